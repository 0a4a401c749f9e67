"""Prepared clean / counterfactual pairs: tokenised, aligned, checked, in one place (same-task-different-circuits, A1).

A :class:`PairSet` holds what every experiment of this room runs on. Positions are named by *slots*, the
position axis of scores and circuits: with ``align="absolute"`` slot and token position are the same and all
prompts share one length; with
``align="spans"`` every span of a prompt (prefix, data, query, generation) is one slot, so natural prompts of
any length take part.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import torch

from microtome.circuits.forward.decoder import Merged, check_replay, merge
from microtome.errors import ShapeError
from microtome.evaluation.tasks import split_numbers

__all__ = ["GROUPS", "PairBatch", "PairSet", "PreparedPair", "as_pair_set", "check_first", "merge_pair"]

GROUPS = ("prefix", "data", "query", "generation")
"""Position groups in the order of a prompt; ``prefix`` is what precedes the data."""

Align = Literal["absolute", "spans"]
Inputs = dict[str, torch.Tensor]
Positions = npt.NDArray[np.int64]


@dataclass(frozen=True, eq=False)
class PreparedPair:
    """One clean prompt with its counterfactual, as tensors of batch size 1."""

    clean: Inputs
    """Arguments of the model's forward for the clean prompt."""
    corrupted: Inputs
    """The same for the counterfactual."""
    answer: int
    """Token id of the clean prompt's answer r."""
    corrupted_answer: int
    """Token id of the counterfactual's answer r'."""
    spans: Mapping[str, Positions]
    """Positions of each group in the clean prompt."""
    partner: Positions
    """For every clean position the counterfactual position whose activation replaces it."""
    kinds: tuple[str, ...]
    """What each clean position is: text, image or video."""
    facts: Mapping[str, Any] = field(default_factory=dict)
    """Id, task, form, prompt and image of the clean side, where the source has them."""
    number: int | None = None
    """Number in the source, by which forms of the same prompts are matched; None where it is not known."""

    @property
    def length(self) -> int:
        """Tokens of the clean prompt."""
        return len(self.kinds)

    @property
    def is_aligned(self) -> bool:
        """Whether clean position i pairs with counterfactual position i throughout."""
        return self.corrupted["input_ids"].shape[1] == self.length and bool(
            (self.partner == np.arange(self.length)).all()
        )


@dataclass(frozen=True, eq=False)
class PairBatch:
    """Pairs of equal layout stacked: every prompt has the same tensor shapes."""

    clean: Inputs
    corrupted: Inputs
    answers: torch.Tensor  # (b,)
    corrupted_answers: torch.Tensor  # (b,)
    slots: torch.Tensor  # (b, p): slot of each clean position
    partner: torch.Tensor  # (b, p): counterfactual position of each clean position
    indices: tuple[int, ...]
    """Places of the pairs in their set."""

    def __len__(self) -> int:
        return len(self.indices)


@dataclass(frozen=True, eq=False)
class PairSet:
    """Pairs that go through an experiment together.

    Example:
        >>> from microtome import organism
        >>> from microtome.circuits import prepare
        >>> model, processor = organism.load_model(), organism.load_processor()
        >>> pairs = prepare(model, processor, organism.pairs("colour", "visual", 4))
        >>> len(pairs), pairs.groups["generation"] == (pairs.n_slots - 1,)
        (4, True)
    """

    pairs: tuple[PreparedPair, ...]
    align: Align = "absolute"
    dropped: tuple[tuple[int, str], ...] = ()
    """Number in the source and reason of each pair that was left out."""

    def __post_init__(self) -> None:
        if not self.pairs:
            raise ShapeError("pairs: expected at least one pair, found none")
        if self.align not in ("absolute", "spans"):
            raise ShapeError(f"pairs: align: expected absolute or spans, found {self.align!r}")
        if self.align == "absolute":
            self._check_one_layout()

    def _check_one_layout(self) -> None:
        first = self.pairs[0]
        for i, pair in enumerate(self.pairs):
            if pair.length != first.length:
                raise ShapeError(
                    f"pairs: pair {i}: expected {first.length} tokens like pair 0, found {pair.length}. "
                    "Use one template, or align='spans'"
                )
            for group, positions in first.spans.items():
                if not np.array_equal(pair.spans.get(group, ()), positions):
                    raise ShapeError(
                        f"pairs: pair {i}: expected the {group} positions of pair 0, found others. "
                        "Use one template, or align='spans'"
                    )

    def __len__(self) -> int:
        return len(self.pairs)

    def __iter__(self) -> Iterator[PreparedPair]:
        return iter(self.pairs)

    def __getitem__(
        self, index: slice | Sequence[int] | npt.NDArray[np.int64] | npt.NDArray[np.bool_]
    ) -> PairSet:
        if isinstance(index, slice):
            return replace(self, pairs=self.pairs[index])
        return replace(self, pairs=tuple(self.pairs[i] for i in self._places(index)))

    def _places(self, index: Any) -> Positions:
        """Places of the chosen pairs: of a mask of all pairs, or as they are given."""
        chosen, n = np.asarray(index), len(self)
        if chosen.ndim != 1 or (chosen.size and chosen.dtype.kind not in "biu"):
            raise ShapeError(f"pairs: index: expected a slice, a list of places or a mask, found {index!r}")
        if chosen.dtype == bool:
            if len(chosen) != n:
                raise ShapeError(f"pairs: index: expected a mask of {n} pairs, found one of {len(chosen)}")
            return np.flatnonzero(chosen)
        outside = chosen[(chosen < -n) | (chosen >= n)]
        if outside.size:
            raise ShapeError(f"pairs: index: expected places below {n}, found {outside[0]}")
        return chosen.astype(np.int64)

    @property
    def n_slots(self) -> int:
        """Length of the position axis of scores and circuits."""
        return self.pairs[0].length if self.align == "absolute" else len(GROUPS)

    @property
    def groups(self) -> dict[str, tuple[int, ...]]:
        """Slots of each position group."""
        if self.align == "spans":
            return {group: (i,) for i, group in enumerate(GROUPS)}
        return {group: tuple(int(p) for p in positions) for group, positions in self.pairs[0].spans.items()}

    def slots(self, pair: PreparedPair) -> Positions:
        """Slot of every position of ``pair``. Shape ``(p,)``."""
        if self.align == "absolute":
            return np.arange(pair.length)
        slots = np.zeros(pair.length, np.int64)
        for i, group in enumerate(GROUPS):
            slots[pair.spans.get(group, np.empty(0, np.int64))] = i
        return slots

    def batches(
        self,
        batch_size: int,
        device: torch.device | str = "cpu",
        done: Callable[[int], None] = lambda _: None,
    ) -> Iterator[PairBatch]:
        """The pairs in batches of equal tensor shapes, in order within each shape.

        ``done`` is told after each batch how many pairs lie behind.
        """
        if batch_size < 1:
            raise ShapeError(f"batch_size: expected 1 or more, found {batch_size}")
        behind = 0
        layouts: dict[tuple[Any, ...], list[int]] = {}
        for i, pair in enumerate(self.pairs):
            layouts.setdefault(_layout(pair), []).append(i)
        for members in layouts.values():
            for start in range(0, len(members), batch_size):
                chosen = tuple(members[start : start + batch_size])
                yield self._stack(chosen, device)
                behind += len(chosen)
                done(behind)

    def _stack(self, indices: tuple[int, ...], device: torch.device | str) -> PairBatch:
        pairs = [self.pairs[i] for i in indices]

        def stacked(side: str) -> Inputs:
            inputs = [getattr(pair, side) for pair in pairs]
            return {name: torch.cat([x[name] for x in inputs]).to(device) for name in inputs[0]}

        def rows(values: Iterable[npt.NDArray[np.int64] | int]) -> torch.Tensor:
            return torch.from_numpy(np.asarray(list(values), np.int64)).to(device)

        return PairBatch(
            clean=stacked("clean"),
            corrupted=stacked("corrupted"),
            answers=rows(pair.answer for pair in pairs),
            corrupted_answers=rows(pair.corrupted_answer for pair in pairs),
            slots=rows(self.slots(pair) for pair in pairs),
            partner=rows(pair.partner for pair in pairs),
            indices=indices,
        )

    def split(self, fraction: float = 0.75, seed: int = 42) -> tuple[PairSet, PairSet]:
        """A discovery and an evaluation part, drawn without replacement.

        Raises:
            ShapeError: a part would be empty.
        """
        discovery, evaluation = split_numbers(len(self), fraction, seed, "pairs")
        return self[discovery], self[evaluation]

    def swapped(self) -> PairSet:
        """Clean and counterfactual exchanged, for pairs that align."""
        if not all(pair.is_aligned for pair in self.pairs):
            raise ShapeError("swapped: expected pairs of equal length, found unequal ones")
        turned = (
            replace(
                p, clean=p.corrupted, corrupted=p.clean, answer=p.corrupted_answer, corrupted_answer=p.answer
            )
            for p in self.pairs
        )
        return replace(self, pairs=tuple(turned))


def _layout(pair: PreparedPair) -> tuple[Any, ...]:
    shapes = (
        (name, tuple(x.shape)) for side in (pair.clean, pair.corrupted) for name, x in sorted(side.items())
    )
    return (pair.kinds, *shapes)


def as_pair_set(pairs: Any) -> PairSet:
    """``pairs`` when they are prepared already.

    Raises:
        ShapeError: they are not.
    """
    if not isinstance(pairs, PairSet):
        raise ShapeError(
            f"pairs: expected a PairSet, found {type(pairs).__name__}. "
            "Call microtome.circuits.prepare(model, processor, pairs) first"
        )
    return pairs


def check_first(adapter: Any, pairs: PairSet) -> Merged:
    """The first clean prompt, from which the decoder says what the model says.

    Raises:
        Error: it does not.
    """
    with torch.no_grad():
        first = next(pairs[:1].batches(1, adapter.model.device))
        merged = merge(adapter, first.clean)
        check_replay(adapter, first.clean, merged)
    return merged


def merge_pair(adapter: Any, batch: PairBatch) -> tuple[Merged, Merged]:
    """Both sides of a batch of pairs."""
    return merge(adapter, batch.clean), merge(adapter, batch.corrupted)
