"""Functional interchange of sub-circuits between two forms of a task (A11).

The sub-circuit of one position group is taken out of form A's circuit, and form B's, carried over by the
position map, put in its place. If the two forms compute the same thing there, A's faithfulness stays. It is
read between two controls:

    normalised = (F_swapped - F_random) / (F_original - F_random)

with F averaged over both directions first. Random sub-circuits have as many heads and neurons as what they
replace the swapped one with, anywhere inside the group; many draws, with an interval.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import polars as pl

from microtome.circuits.ablation.replacements import Ablation
from microtome.circuits.circuit.nodes import KINDS, Circuit
from microtome.circuits.circuit.positions import PositionMap
from microtome.circuits.faithfulness.nodes import faithfulness_of
from microtome.circuits.pairs.pair_set import PairSet
from microtome.errors import ShapeError

__all__ = [
    "Interchange",
    "interchange",
    "interchange_controls",
    "interchange_table",
    "random_subcircuit",
    "swapped_circuit",
]

Matrix = npt.NDArray[np.float64]

LEAST_CONTRAST = 1e-3
"""Own and random sub-circuits whose faithfulness differs by less leave nothing to normalise by."""


def swapped_circuit(circuit: Circuit, other: Circuit, groups: Sequence[str]) -> Circuit:
    """``circuit`` with the nodes of ``groups`` replaced by those of ``other``, at the corresponding positions.

    Raises:
        ShapeError: a group is unknown to one of the two.
    """
    there = PositionMap.between(other.groups, circuit.groups, other.shape.n_slots, circuit.shape.n_slots)
    for group in groups:
        circuit = (circuit - circuit.group(group)) | there.apply(other.group(group)).group(group)
    return circuit


def random_subcircuit(circuit: Circuit, group: str, n_heads: int, n_neurons: int, seed: int) -> Circuit:
    """``circuit`` with the nodes of a group replaced by random ones of that group: any layer, any head or neuron."""
    where = np.asarray(circuit.positions(group), np.int64)
    rng = np.random.default_rng(seed)
    masks = []
    for kind, n in zip(KINDS, (n_heads, n_neurons), strict=True):
        mask = circuit.mask(kind)
        drawn = np.zeros((mask.shape[0], len(where), mask.shape[2]), bool)
        drawn.reshape(-1)[rng.choice(drawn.size, n, replace=False)] = True
        mask[:, where] = drawn
        masks.append(mask)
    return Circuit.of_masks(masks[0], masks[1], circuit.groups)


@dataclass(frozen=True, eq=False)
class Interchange:
    """What happens to each form when a group's sub-circuit comes from the other."""

    group: str
    original: tuple[Matrix, Matrix]
    """Per-pair faithfulness of each form's own circuit, ``(n,)``."""
    swapped: tuple[Matrix, Matrix]
    """With the other form's sub-circuit, ``(n,)``."""
    random: tuple[Matrix, Matrix]
    """With random sub-circuits, ``(draws, n)``."""

    @property
    def normalised(self) -> float:
        """0 as good as random, 1 as good as the form's own; averaged over both directions, not clamped.

        NaN where own and random differ by less than ``LEAST_CONTRAST``.
        """
        return _normalised(self.original, self.swapped, self.random)

    def interval(self, n_resamples: int = 1000, seed: int = 0, level: float = 0.95) -> tuple[float, float]:
        """Bootstrap interval of :attr:`normalised`: pairs and random draws resampled."""
        rng = np.random.default_rng(seed)
        found = np.empty(n_resamples)
        for i in range(n_resamples):
            rows = [rng.integers(len(x), size=len(x)) for x in self.original]
            draws = [rng.integers(len(x), size=len(x)) for x in self.random]
            original = tuple(x[r] for x, r in zip(self.original, rows, strict=True))
            swapped = tuple(x[r] for x, r in zip(self.swapped, rows, strict=True))
            random = tuple(x[d][:, r] for x, d, r in zip(self.random, draws, rows, strict=True))
            found[i] = _normalised(original, swapped, random)
        finite = found[np.isfinite(found)]
        if not len(finite):
            return float("nan"), float("nan")
        low, high = np.quantile(finite, [(1 - level) / 2, (1 + level) / 2])
        return float(low), float(high)


def _normalised(original: Any, swapped: Any, random: Any) -> float:
    own, other, drawn = (
        float(np.mean([np.nanmean(x) for x in sides])) for sides in (original, swapped, random)
    )
    return (other - drawn) / (own - drawn) if abs(own - drawn) >= LEAST_CONTRAST else float("nan")


def interchange(
    model: Any,
    pairs: tuple[PairSet, PairSet],
    circuits: tuple[Circuit, Circuit],
    groups: Sequence[str] = ("data", "query", "generation"),
    *,
    n_random: int = 20,
    seed: int = 0,
    ablation: Ablation = "counterfactual",
    batch_size: int = 16,
    progress: bool = True,
    across_models: bool = False,
) -> dict[str, Interchange]:
    """Exchange the sub-circuits of every group between two forms, both ways.

    Args:
        model: a transformers model; left as it was found.
        pairs: evaluation pairs of each form.
        circuits: circuits of each form.
        groups: position groups to exchange, one at a time.
        n_random: random sub-circuits per group and direction.
        seed: of the draws.
        ablation: as in :func:`microtome.circuits.faithfulness`.
        batch_size: pairs per forward.
        progress: show a bar.
        across_models: take circuits whose facts name different weights.

    Raises:
        ShapeError: circuits and pairs do not fit, circuits of different weights, or no random draw is asked for.

    Example:
        >>> from microtome import organism
        >>> from microtome.circuits import attribute, prepare
        >>> model, processor = organism.load_model(), organism.load_processor()
        >>> sets = tuple(prepare(model, processor, organism.pairs("shape", form, 4)) for form in ("visual", "textual"))
        >>> circuits = tuple(attribute(model, pairs, "plain").circuit(0.05) for pairs in sets)
        >>> found = interchange(model, sets, circuits, ["generation"], n_random=2)
        >>> found["generation"].random[0].shape       # draws, pairs
        (2, 4)
    """
    if n_random < 1:
        raise ShapeError(f"n_random: expected 1 or more, found {n_random}")
    if not across_models:
        circuits[0].require_same_model(circuits[1])
    sides = []
    for own, other, evaluation in (
        (circuits[0], circuits[1], pairs[0]),
        (circuits[1], circuits[0], pairs[1]),
    ):
        wanted = [own]
        for number, group in enumerate(groups):
            swapped = swapped_circuit(own, other, [group])
            part = swapped.group(group)
            wanted.append(swapped)
            sizes = part.size("heads"), part.size("neurons")
            wanted += [
                random_subcircuit(own, group, *sizes, seed=seed + 1000 * number + draw)
                for draw in range(n_random)
            ]
        found = faithfulness_of(model, evaluation, wanted, ablation, batch_size=batch_size, progress=progress)
        sides.append(np.stack([one.ratios for one in found]))  # (1 + groups (1 + draws), n)
    out = {}
    for number, group in enumerate(groups):
        first = 1 + number * (1 + n_random)
        rows = [(side[0], side[first], side[first + 1 : first + 1 + n_random]) for side in sides]
        original, swapped_f, random = (tuple(values) for values in zip(*rows, strict=True))
        out[group] = Interchange(group, original, swapped_f, random)
    return out


def interchange_table(found: dict[str, Interchange], forms: tuple[str, str], seed: int = 0) -> pl.DataFrame:
    """One row per group: the raw faithfulness of each form, and the normalised value with its interval."""
    rows = []
    for group, one in found.items():
        low, high = one.interval(seed=seed)
        row: dict[str, Any] = {"group": group, "normalised": one.normalised, "low": low, "high": high}
        for i, form in enumerate(forms):
            row |= {
                f"{form}_original": float(np.nanmean(one.original[i])),
                f"{form}_swapped": float(np.nanmean(one.swapped[i])),
                f"{form}_random": float(np.nanmean(one.random[i])),
            }
        rows.append(row)
    return pl.DataFrame(rows)


def interchange_controls(
    found: dict[str, Interchange], forms: tuple[str, str], seed: int = 0
) -> pl.DataFrame:
    """Faithfulness behind the normalised values: one row per group, form and circuit.

    Returns:
        Columns group, form, circuit (``own``, ``other form``, ``random``), faithfulness, low, high: 95 % bootstrap
        over pairs, and over draws for the random sub-circuits.
    """
    rows = []
    for group, one in found.items():
        for i, form in enumerate(forms):
            sides = {
                "own": one.original[i][None],
                "other form": one.swapped[i][None],
                "random": one.random[i],
            }
            for circuit, values in sides.items():
                row = {
                    "group": group,
                    "form": form,
                    "circuit": circuit,
                    "faithfulness": float(np.nanmean(values)),
                }
                low, high = _grid_interval(values, seed)
                rows.append(row | {"low": low, "high": high})
    return pl.DataFrame(rows)


def _grid_interval(values: Matrix, seed: int, n_resamples: int = 1000) -> tuple[float, float]:
    """Percentile interval of the mean of ``values`` (draws, n), both axes resampled."""
    rng = np.random.default_rng(seed)
    known = values[:, ~np.isnan(values).any(0)]
    if not known.size:
        return float("nan"), float("nan")
    means = [
        known[rng.integers(len(known), size=len(known))][
            :, rng.integers(known.shape[1], size=known.shape[1])
        ].mean()
        for _ in range(n_resamples)
    ]
    low, high = np.quantile(means, [0.025, 0.975])
    return float(low), float(high)
