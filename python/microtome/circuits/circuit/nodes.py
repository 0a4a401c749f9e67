"""Circuits: sets of (layer, head or neuron, position), kept as bitsets.

>>> import numpy as np
>>> heads, neurons = np.zeros((2, 3, 4), bool), np.zeros((2, 3, 8), bool)
>>> heads[1, 2, 0] = neurons[0, 2, 5] = True
>>> circuit = Circuit.of_masks(heads, neurons, {"generation": (2,)})
>>> len(circuit), ("head", 1, 2, 0) in circuit
(2, True)
"""

from __future__ import annotations

import json
import operator
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import numpy.typing as npt
import polars as pl

from microtome.arguments import require_one_of
from microtome.errors import ShapeError
from microtome.metrics import Bitset

__all__ = ["Circuit", "CircuitShape", "NodeKind"]

NodeKind = Literal["heads", "neurons"]
KINDS: tuple[NodeKind, ...] = ("heads", "neurons")
NAMES: dict[NodeKind, str] = {"heads": "head", "neurons": "neuron"}
Mask = npt.NDArray[np.bool_]
_METADATA = "microtome.circuit"


class CircuitShape(NamedTuple):
    """Sizes of the node space."""

    n_layers: int
    n_slots: int
    """Length of the position axis; see :class:`microtome.circuits.PairSet`."""
    n_heads: int
    d_mlp: int

    def of(self, kind: NodeKind) -> tuple[int, int, int]:
        """Shape of the scores of one kind: (L, P, H) or (L, P, m)."""
        require_one_of("kind", kind, KINDS)
        return self.n_layers, self.n_slots, self.n_heads if kind == "heads" else self.d_mlp

    def size(self, kind: NodeKind) -> int:
        """Number of nodes of one kind."""
        layers, slots, width = self.of(kind)
        return layers * slots * width


@dataclass(frozen=True, eq=False)
class Circuit:
    """A set of nodes of a model, by position."""

    shape: CircuitShape
    head_bits: Bitset = field(repr=False)
    """Bit (layer · P + position) · H + head."""
    neuron_bits: Bitset = field(repr=False)
    """Bit (layer · P + position) · m + neuron."""
    groups: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    """Positions of each group: prefix, data, query, generation."""
    facts: Mapping[str, Any] = field(default_factory=dict, repr=False)
    """What made the circuit: those of its scores (method, steps, weights, pairs, dtype, version) and its size."""

    @classmethod
    def of_masks(
        cls,
        heads: npt.ArrayLike,
        neurons: npt.ArrayLike,
        groups: Mapping[str, tuple[int, ...]] | None = None,
        facts: Mapping[str, Any] | None = None,
    ) -> Circuit:
        """From boolean masks ``(L, P, H)`` and ``(L, P, m)``.

        Raises:
            ShapeError: the masks disagree on layers or positions.
        """
        h, m = np.asarray(heads, bool), np.asarray(neurons, bool)
        if h.ndim != 3 or m.ndim != 3 or h.shape[:2] != m.shape[:2]:
            raise ShapeError(
                f"heads, neurons: expected masks (L, P, H) and (L, P, m), found {h.shape} and {m.shape}"
            )
        shape = CircuitShape(h.shape[0], h.shape[1], h.shape[2], m.shape[2])
        return cls(shape, Bitset.from_mask(h), Bitset.from_mask(m), dict(groups or {}), dict(facts or {}))

    @classmethod
    def empty(cls, shape: CircuitShape, groups: Mapping[str, tuple[int, ...]] | None = None) -> Circuit:
        """No node at all."""
        return cls.of_masks(np.zeros(shape.of("heads"), bool), np.zeros(shape.of("neurons"), bool), groups)

    @classmethod
    def full(cls, shape: CircuitShape, groups: Mapping[str, tuple[int, ...]] | None = None) -> Circuit:
        """Every node."""
        return cls.of_masks(np.ones(shape.of("heads"), bool), np.ones(shape.of("neurons"), bool), groups)

    @classmethod
    def random(
        cls,
        shape: CircuitShape,
        n_heads: int,
        n_neurons: int,
        seed: int = 0,
        groups: Mapping[str, tuple[int, ...]] | None = None,
    ) -> Circuit:
        """As many heads and neurons as asked for, drawn uniformly without replacement."""
        rng = np.random.default_rng(seed)
        sizes = ((shape.size("heads"), n_heads), (shape.size("neurons"), n_neurons))
        heads, neurons = (
            Bitset.from_indices(rng.choice(n, k, replace=False, shuffle=False), n) for n, k in sizes
        )
        return cls(shape, heads, neurons, dict(groups or {}))

    def bits(self, kind: NodeKind) -> Bitset:
        """The bitset of one kind."""
        require_one_of("kind", kind, KINDS)
        return self.head_bits if kind == "heads" else self.neuron_bits

    def mask(self, kind: NodeKind) -> Mask:
        """Membership as booleans ``(L, P, H)`` or ``(L, P, m)``."""
        return self.bits(kind).to_mask().reshape(self.shape.of(kind))

    def layer_mask(self, kind: NodeKind, layer: int) -> Mask:
        """Membership in one layer, ``(P, H)`` or ``(P, m)``, without unpacking the rest."""
        _, slots, width = self.shape.of(kind)
        start = layer * slots * width
        first = start // 64
        words = self.bits(kind).words[first : -(-(start + slots * width) // 64)]
        bits = np.unpackbits(words.astype("<u8").view(np.uint8), bitorder="little").view(np.bool_)
        return bits[start - 64 * first :][: slots * width].reshape(slots, width)

    def size(self, kind: NodeKind) -> int:
        """Number of heads or neurons in the circuit."""
        return len(self.bits(kind))

    @property
    def fraction(self) -> float:
        """Share of all nodes."""
        return len(self) / (self.shape.size("heads") + self.shape.size("neurons"))

    def __len__(self) -> int:
        return self.size("heads") + self.size("neurons")

    def __contains__(self, node: tuple[str, int, int, int]) -> bool:
        name, *place = node
        require_one_of("kind", name, NAMES.values())
        kind: NodeKind = "heads" if name == "head" else "neurons"
        if not all(0 <= at < n for at, n in zip(place, self.shape.of(kind), strict=True)):
            return False
        layer, position, index = place
        return bool(self.layer_mask(kind, layer)[position, index])

    def __iter__(self) -> Iterator[tuple[str, int, int, int]]:
        for kind, name in NAMES.items():
            for layer, position, index in np.argwhere(self.mask(kind)):
                yield name, int(layer), int(position), int(index)

    def __eq__(self, other: object) -> bool:
        return (
            isinstance(other, Circuit)
            and self.shape == other.shape
            and self.head_bits == other.head_bits
            and self.neuron_bits == other.neuron_bits
        )

    __hash__ = None  # type: ignore[assignment]

    def __and__(self, other: Circuit) -> Circuit:
        return self._with(other, operator.and_)

    def __or__(self, other: Circuit) -> Circuit:
        return self._with(other, operator.or_)

    def __sub__(self, other: Circuit) -> Circuit:
        return self._with(other, operator.sub)

    def complement(self) -> Circuit:
        """The nodes outside."""
        return Circuit.full(self.shape, self.groups) - self

    def _with(self, other: Circuit, operation: Any) -> Circuit:
        self.require_same_shape(other)
        heads, neurons = (operation(self.bits(kind), other.bits(kind)) for kind in KINDS)
        return Circuit(self.shape, heads, neurons, self.groups, self.facts)

    def require_same_model(self, other: Circuit) -> None:
        """Refuse to compare circuits of different weights, as far as both know theirs.

        Raises:
            ShapeError: the weights' fingerprints differ.
        """
        ours, theirs = self.facts.get("weights"), other.facts.get("weights")
        if ours is not None and theirs is not None and ours != theirs:
            raise ShapeError(
                f"circuits: expected circuits of the same weights, found {ours} and {theirs}. "
                "across_models=True compares them all the same"
            )

    def require_same_shape(self, other: Circuit) -> None:
        """Refuse to mix circuits of different node spaces.

        Raises:
            ShapeError: the shapes differ.
        """
        if self.shape != other.shape:
            raise ShapeError(
                f"circuits: expected one node space, found {tuple(self.shape)} and {tuple(other.shape)}. "
                "Map positions with microtome.circuits.PositionMap first"
            )

    def positions(self, group: str) -> tuple[int, ...]:
        """Positions of a group.

        Raises:
            ShapeError: the circuit knows no such group.
        """
        if group not in self.groups:
            raise ShapeError(f"group: expected one of {', '.join(self.groups) or '(none)'}, found {group!r}")
        return self.groups[group]

    def group(self, name: str) -> Circuit:
        """The nodes at the positions of one group."""
        keep = np.zeros(self.shape.n_slots, bool)
        keep[list(self.positions(name))] = True
        return self.at_positions(keep)

    def at_positions(self, keep: Mask) -> Circuit:
        """The nodes at the positions where ``keep`` ``(P,)`` is true."""
        heads, neurons = (self.mask(kind) & keep[None, :, None] for kind in KINDS)
        return Circuit.of_masks(heads, neurons, self.groups, self.facts)

    def shuffled(self, seed: int) -> Circuit:
        """A random circuit with as many heads and neurons in every group, at any layer, position and index there."""
        rng = np.random.default_rng(seed)
        groups = list(self.groups.values()) or [tuple(range(self.shape.n_slots))]
        inside = {p for where in groups for p in where}
        groups.append(tuple(p for p in range(self.shape.n_slots) if p not in inside))
        masks = []
        for kind in KINDS:
            mask = self.mask(kind)
            for where in groups:
                part = mask[:, list(where)]
                drawn = np.zeros(part.size, bool)
                drawn[rng.choice(part.size, int(part.sum()), replace=False)] = True
                mask[:, list(where)] = drawn.reshape(part.shape)
            masks.append(mask)
        return Circuit.of_masks(masks[0], masks[1], self.groups)

    def without_positions(self, group: str | None = None) -> Circuit:
        """Position labels dropped: a node is in when it is at any position (of ``group``). Position axis of length 1."""
        where = list(self.positions(group)) if group else list(range(self.shape.n_slots))
        heads, neurons = (self.mask(kind)[:, where].any(1, keepdims=True) for kind in KINDS)
        return Circuit.of_masks(heads, neurons, {}, self.facts)

    def to_polars(self) -> pl.DataFrame:
        """One row per node: kind, layer, position, index."""
        frames = []
        for kind, name in NAMES.items():
            at = np.argwhere(self.mask(kind)).astype(np.int32)
            columns = {"layer": at[:, 0], "position": at[:, 1], "index": at[:, 2]}
            frames.append(pl.DataFrame(columns).select(pl.lit(name).alias("kind"), pl.all()))
        return pl.concat(frames)

    def save(self, path: str | Path) -> None:
        """Write one parquet file: a row per node; sizes, groups and what made the circuit in its metadata."""
        groups = {g: list(p) for g, p in self.groups.items()}
        facts = {"shape": list(self.shape), "groups": groups, "facts": dict(self.facts)}
        self.to_polars().write_parquet(path, metadata={_METADATA: json.dumps(facts)})

    @classmethod
    def load(cls, path: str | Path) -> Circuit:
        """Read what :meth:`save` wrote.

        Raises:
            ShapeError: another parquet file, or nodes outside the sizes it names.
        """
        facts = pl.read_parquet_metadata(path).get(_METADATA)
        if facts is None:
            raise ShapeError(
                f"circuit: {path}: expected a parquet file written by Circuit.save, found another one"
            )
        known = json.loads(facts)
        shape = CircuitShape(*known["shape"])
        groups = {g: tuple(p) for g, p in known["groups"].items()}
        masks = {}
        table = pl.read_parquet(path)
        for kind, name in NAMES.items():
            mask = np.zeros(shape.of(kind), bool)
            at = table.filter(pl.col("kind") == name).select("layer", "position", "index").to_numpy()
            if len(at) and ((at < 0).any() or (at >= mask.shape).any()):
                raise ShapeError(f"circuit: {path}: expected nodes inside {mask.shape}, found others")
            mask[tuple(at.T)] = True
            masks[kind] = Bitset.from_mask(mask)
        return cls(shape, masks["heads"], masks["neurons"], groups, known.get("facts", {}))
