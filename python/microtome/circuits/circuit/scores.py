"""Node scores: what attribution gives, and the circuits selected from it."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import polars as pl

from microtome.arguments import require_one_of
from microtome.circuits.circuit.nodes import KINDS, Circuit, CircuitShape, NodeKind
from microtome.errors import ShapeError
from microtome.metrics import Bitset, top_n

__all__ = ["MIB_SIZES", "SIZES", "NodeScores", "together"]

SIZES: tuple[float, ...] = tuple(
    sorted({0.001, 0.005, *(round(i / 100, 2) for i in range(21)), 0.3, 0.5, 0.7, 0.9})
)
"""The 27 circuit sizes of same-task-different-circuits."""

MIB_SIZES: tuple[float, ...] = (0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0)
"""The ten sizes of the Mechanistic Interpretability Benchmark."""

Scores = npt.NDArray[np.float32]


@dataclass(frozen=True, eq=False)
class NodeScores:
    """Mean scores of all nodes over a set of pairs."""

    heads: Scores
    """Shape ``(L, P, H)``. Mean of absolute scores, of signed ones when ``signed``; NaN where not measured."""
    neurons: Scores
    """Shape ``(L, P, m)``."""
    n_pairs: int
    """Pairs in the mean."""
    n_skipped: int = 0
    """Pairs left out because their logit difference was not finite."""
    signed: bool = False
    groups: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    facts: Mapping[str, Any] = field(default_factory=dict)
    """What made the scores: method, steps, path, model, dtype, version."""

    @property
    def shape(self) -> CircuitShape:
        """Sizes of the node space."""
        layers, slots, heads = self.heads.shape
        return CircuitShape(layers, slots, heads, self.neurons.shape[2])

    def circuit(
        self,
        size: float,
        neurons: float | None = None,
        *,
        joint: bool = False,
        by: Literal["absolute", "signed"] = "absolute",
    ) -> Circuit:
        """The top ``int(size · H · L · P)`` heads and ``int(size · m · L · P)`` neurons (A6).

        Args:
            size: share of the heads, 0 to 1; of the neurons too unless ``neurons`` is given.
            neurons: share of the neurons.
            joint: rank heads and neurons together, as MIB does, and take ``int(size · all)`` of them.
            by: rank signed scores by magnitude or by value.

        Ties go to the lower layer, then position, then index; NaN comes last.

        Raises:
            ShapeError: a share is outside 0 to 1, ``by`` is neither of the two, or signed ranking is asked of absolute scores.
        """
        for name, share in (("size", size), ("neurons", size if neurons is None else neurons)):
            if not 0 <= share <= 1:
                raise ShapeError(f"{name}: expected a share from 0 to 1, found {share}")
        require_one_of("by", by, ("absolute", "signed"))
        if by == "signed" and not self.signed:
            raise ShapeError(
                "by: expected 'absolute' for absolute scores, found 'signed'. Attribute with signed=True"
            )
        rank = np.abs if self.signed and by == "absolute" else np.asarray
        values = {"heads": rank(self.heads), "neurons": rank(self.neurons)}
        facts = dict(self.facts) | {
            "n_pairs": self.n_pairs,
            "size": size,
            "neurons": neurons,
            "joint": joint,
            "by": by,
        }
        if joint:
            return self._joint(size, values, facts)
        shares = {"heads": size, "neurons": size if neurons is None else neurons}
        of_heads, of_neurons = (_top(values[kind], int(shares[kind] * values[kind].size)) for kind in KINDS)
        return Circuit(self.shape, of_heads, of_neurons, dict(self.groups), facts)

    def _joint(self, size: float, values: Mapping[str, Scores], facts: Mapping[str, Any]) -> Circuit:
        flat = np.concatenate([values["heads"].reshape(-1), values["neurons"].reshape(-1)])
        chosen = _top(flat, int(size * flat.size)).to_mask()
        heads, neurons = np.split(chosen, [self.heads.size])
        return Circuit.of_masks(
            heads.reshape(self.heads.shape), neurons.reshape(self.neurons.shape), self.groups, facts
        )

    def effect_map(self) -> npt.NDArray[np.float64]:
        """Patching effect over layer and position: the sum of all scores there (A12). Shape ``(L, P)``."""
        heads, neurons = (np.nan_to_num(x.astype(np.float64)).sum(2) for x in (self.heads, self.neurons))
        return np.asarray(heads + neurons)

    def merge(self, other: NodeScores) -> NodeScores:
        """The mean over both sets of pairs.

        Raises:
            ShapeError: the scores do not compare.
        """
        if self.shape != other.shape or self.signed != other.signed:
            raise ShapeError(
                f"merge: expected scores of shape {tuple(self.shape)}, found {tuple(other.shape)}"
            )
        return together((self, other))

    def to_polars(self, n: int = 1000) -> pl.DataFrame:
        """The ``n`` nodes of each kind with the largest magnitude: kind, layer, position, index, score."""
        frames = []
        for name, scores in (("head", self.heads), ("neuron", self.neurons)):
            chosen = _top(np.abs(scores), min(n, scores.size)).to_mask().reshape(scores.shape)
            at = np.argwhere(chosen).astype(np.int32)
            columns = {"layer": at[:, 0], "position": at[:, 1], "index": at[:, 2], "score": scores[chosen]}
            frames.append(pl.DataFrame(columns).select(pl.lit(name).alias("kind"), pl.all()))
        return pl.concat(frames).sort(
            pl.col("score").abs(), descending=True, nulls_last=True, maintain_order=True
        )

    def save(self, path: str | Path) -> None:
        """Write a folder: ``heads.npy``, ``neurons.npy``, ``scores.json``."""
        folder = Path(path)
        folder.mkdir(parents=True, exist_ok=True)
        for name in ("heads", "neurons"):
            scores = getattr(self, name)
            if not (
                isinstance(scores, np.memmap)
                and str(scores.filename) == str((folder / f"{name}.npy").resolve())
            ):
                np.save(folder / f"{name}.npy", scores)
        facts = {
            "n_pairs": self.n_pairs,
            "n_skipped": self.n_skipped,
            "signed": self.signed,
            "groups": {g: list(p) for g, p in self.groups.items()},
            "facts": dict(self.facts),
        }
        (folder / "scores.json").write_text(json.dumps(facts, indent=1))

    @classmethod
    def load(cls, path: str | Path) -> NodeScores:
        """Read what :meth:`save` wrote; the arrays stay on disk until they are touched."""
        folder = Path(path)
        known = json.loads((folder / "scores.json").read_text())
        groups = {g: tuple(p) for g, p in known.pop("groups").items()}
        heads, neurons = (np.load(folder / f"{name}.npy", mmap_mode="r") for name in ("heads", "neurons"))
        return cls(heads, neurons, groups=groups, **known)


def together(parts: Sequence[NodeScores]) -> NodeScores:
    """The mean over the pairs of all parts, which compare; parts without pairs count nothing."""
    first = parts[0]
    blocks = [part.facts.get("pairs") for part in parts]
    facts = {name: fact for name, fact in first.facts.items() if name != "identity" or len(parts) == 1}
    if len(parts) > 1:
        facts["pairs"] = hashlib.blake2b(repr(blocks).encode(), digest_size=8).hexdigest()
    heads, neurons = (_mean(parts, kind) for kind in KINDS)
    n, skipped = sum(part.n_pairs for part in parts), sum(part.n_skipped for part in parts)
    return NodeScores(heads, neurons, n, skipped, first.signed, first.groups, facts | {"blocks": blocks})


def _mean(parts: Sequence[NodeScores], kind: NodeKind) -> Scores:
    """Mean over pairs, layer by layer: beside the result no more than a layer is held in float64."""
    used = [part for part in parts if part.n_pairs]
    n = sum(part.n_pairs for part in used)
    out = np.full(getattr(parts[0], kind).shape, np.nan, np.float32)
    for layer in range(len(out) if used else 0):
        out[layer] = sum((part.n_pairs / n) * getattr(part, kind)[layer].astype(np.float64) for part in used)
    return out


def _top(scores: Scores, n: int) -> Bitset:
    """The ``n`` nodes that score highest, numbered in C order."""
    return Bitset.from_indices(top_n(np.ascontiguousarray(scores, np.float32), n), scores.size)
