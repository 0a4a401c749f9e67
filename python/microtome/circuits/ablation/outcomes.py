"""Answers before and after an intervention, on identical items: accuracy, P(correct), paired tests (spatial-features, B17)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch

from microtome.circuits.forward.restore import left_as_found
from microtome.circuits.pairs.pair_set import PairSet, as_pair_set
from microtome.circuits.pairs.reading import require_token
from microtome.circuits.statistics import Interval, bootstrap, mcnemar
from microtome.errors import ShapeError
from microtome.progress import bar

__all__ = ["NO", "YES", "Effect", "Outcome", "effect_of", "outcome", "token_group"]

YES = ("Yes", " Yes", "yes", " yes", "YES", " YES")
"""Spellings of yes; those that are one token form its group."""
NO = ("No", " No", "no", " no", "NO", " NO")
"""Spellings of no."""

Vector = npt.NDArray[np.float64]


def token_group(processor: Any, spellings: Sequence[str]) -> tuple[int, ...]:
    """Token ids of the spellings that are one token.

    Raises:
        ShapeError: none is.
    """
    tokenizer = getattr(processor, "tokenizer", processor)
    found: dict[int, None] = {}
    for text in spellings:
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
        if len(ids) == 1 and ids[0] != tokenizer.unk_token_id:
            found[int(ids[0])] = None
    if not found:
        raise ShapeError(
            f"token group: expected a spelling that is one token, found none of {list(spellings)}"
        )
    return tuple(found)


@dataclass(frozen=True, eq=False)
class Outcome:
    """Answers of one run over the items."""

    correct: npt.NDArray[np.bool_]
    """Whether the answer's group is the most likely of all groups, ``(n,)``."""
    p_correct: Vector
    """Probability of the answer's group among all groups, ``(n,)``."""
    p_vocabulary: Vector
    """Probability of the answer's group over the whole vocabulary, ``(n,)``."""


def outcome(
    model: Any,
    items: PairSet,
    groups: Sequence[Sequence[int]] | None = None,
    *,
    batch_size: int = 16,
    progress: bool = True,
) -> Outcome:
    """Ask the clean prompt of every item.

    Args:
        model: a transformers model, perhaps inside an intervention.
        items: prepared items; their ``answer`` is right.
        groups: token ids of each possible answer, such as the spellings of yes and of no; the items' answers
            one by one when None.
        batch_size: prompts per forward.
        progress: show a bar.

    Raises:
        ShapeError: an answer is in no group, or in several; or a token is not one of the model's.
    """
    items = as_pair_set(items)
    if groups is None:
        groups = [(i,) for i in sorted({i for item in items for i in (item.answer, item.corrupted_answer)})]
    place = {token: number for number, group in enumerate(groups) for token in group}
    if len(place) != sum(len(group) for group in groups):
        raise ShapeError("groups: expected every token in one group, found a token in several")
    for token in place:
        require_token(model, "groups", token)
    missing = {item.answer for item in items} - set(place)
    if missing:
        raise ShapeError(f"groups: expected every answer in a group, found {sorted(missing)} in none")
    found = np.zeros((3, len(items)))
    with left_as_found(model), torch.no_grad(), bar("answering", len(items), progress, "items") as done:
        for batch in items.batches(batch_size, model.device, done):
            logits = model(**batch.clean, use_cache=False).logits[:, -1].double()
            everywhere = logits.softmax(-1)
            mass = torch.stack([everywhere[:, list(group)].sum(-1) for group in groups], -1)  # (b, groups)
            right = torch.tensor([place[int(a)] for a in batch.answers], device=mass.device)
            p = mass.gather(1, right[:, None])[:, 0]
            share = p / mass.sum(-1)
            rows = torch.stack([(mass.argmax(-1) == right).double(), share, p])
            found[:, list(batch.indices)] = rows.cpu().numpy()
    return Outcome(found[0].astype(bool), found[1], found[2])


class Effect(NamedTuple):
    """What an intervention changes, item by item."""

    accuracy: float
    accuracy_change: Interval
    p_correct: float
    p_correct_change: Interval
    p_mcnemar: float


def effect_of(before: Outcome, after: Outcome, *, n_resamples: int = 1000, seed: int = 0) -> Effect:
    """Paired comparison of two runs over the same items: bootstrap intervals, McNemar's exact test.

    Raises:
        ShapeError: different numbers of items.
    """
    if before.correct.shape != after.correct.shape:
        raise ShapeError(
            f"effect: expected the same items, found {len(before.correct)} before and {len(after.correct)} after"
        )

    def change(a: Vector, b: Vector) -> float:
        return float(a.mean() - b.mean())

    pairs = [
        (after.correct.astype(np.float64), before.correct.astype(np.float64)),
        (after.p_correct, before.p_correct),
    ]
    accuracy, p = (bootstrap(change, pair, n_resamples, seed) for pair in pairs)
    return Effect(
        float(after.correct.mean()),
        accuracy,
        float(after.p_correct.mean()),
        p,
        mcnemar(before.correct, after.correct),
    )
