"""Scores found block by block: one attribution that also tells how far its circuits can be trusted.

The discovery pairs are cut into blocks, each attributed by itself; the mean over blocks is the attribution of all
pairs. Halves of the blocks give the noise floor of every comparison, leaving one block out an interval, at the
price of one attribution.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl

from microtome.circuits.attribution.nodes import attribute
from microtome.circuits.circuit.overlap import circuit_iou, circuit_niou, overlap_rows
from microtome.circuits.circuit.scores import NodeScores, together
from microtome.circuits.pairs.fingerprints import pairs_fingerprint
from microtome.circuits.pairs.pair_set import PairSet, as_pair_set
from microtome.circuits.statistics import jackknife
from microtome.errors import ShapeError

__all__ = ["Blocks", "attribute_blocks", "overlap_intervals", "split_half"]


@dataclass(frozen=True, eq=False)
class Blocks:
    """Scores of every block of pairs."""

    parts: tuple[NodeScores, ...]
    pairs: str | None = None
    """Fingerprint of all pairs, where it is known."""

    def __len__(self) -> int:
        return len(self.parts)

    def scores(self, chosen: Iterable[int] | None = None) -> NodeScores:
        """Mean over the pairs of the chosen blocks, of all when None.

        Raises:
            ShapeError: no block is chosen.
        """
        parts = self.parts if chosen is None else tuple(self.parts[int(i)] for i in chosen)
        if not parts:
            raise ShapeError("blocks: expected at least one, found none")
        found = together(parts)
        if chosen is None and self.pairs is not None:
            return replace(found, facts={**found.facts, "pairs": self.pairs})
        return found

    def split_half(self, size: float, n_splits: int = 20, seed: int = 0) -> pl.DataFrame:
        """Overlap of circuits of random halves of the blocks: the noise floor of every comparison.

        A half has half the pairs, so the circuits of all pairs agree better than that.

        Returns:
            One row per split and group (``all`` besides): split, group, iou, chance, niou.

        Raises:
            ShapeError: fewer than two blocks.
        """
        if len(self) < 2:
            raise ShapeError(f"split_half: expected at least 2 blocks, found {len(self)}")
        rng = np.random.default_rng(seed)
        tables = []
        for split in range(n_splits):
            order = rng.permutation(len(self))
            halves = (order[: len(self) // 2], order[len(self) // 2 :])
            a, b = (self.scores(half).circuit(size) for half in halves)
            rows = [row for row in overlap_rows(a, b) if row["kind"] == "mean"]
            table = pl.DataFrame(rows).select("group", "iou", "chance", "niou")
            tables.append(table.select(pl.lit(split).alias("split"), pl.all()))
        return pl.concat(tables)


def attribute_blocks(
    model: Any, pairs: PairSet, n_blocks: int = 10, *, out: str | Path | None = None, **attribution: Any
) -> Blocks:
    """:func:`attribute` on ``n_blocks`` blocks of the pairs, as many as there are pairs at the most.

    Args:
        model: a transformers model; left as it was found.
        pairs: prepared pairs.
        n_blocks: blocks of equal size, within one pair.
        out: folder of a resumable run, a folder inside for each block.
        attribution: further arguments of :func:`attribute`.

    Raises:
        ShapeError: ``n_blocks`` is below 1.

    Example:
        >>> from microtome import organism
        >>> from microtome.circuits import prepare
        >>> model, processor = organism.load_model(), organism.load_processor()
        >>> pairs = prepare(model, processor, organism.pairs("colour", "textual", 4))
        >>> blocks = attribute_blocks(model, pairs, 2, method="plain")
        >>> whole = attribute(model, pairs, "plain")
        >>> bool(np.allclose(blocks.scores().heads, whole.heads, atol=1e-6))
        True
    """
    pairs = as_pair_set(pairs)
    if n_blocks < 1:
        raise ShapeError(f"n_blocks: expected 1 or more, found {n_blocks}")
    cuts = np.array_split(np.arange(len(pairs)), min(n_blocks, len(pairs)))
    folders = [None if out is None else Path(out) / f"block-{i:02d}" for i in range(len(cuts))]
    parts = (
        attribute(model, pairs[rows], out=folder, **attribution)
        for rows, folder in zip(cuts, folders, strict=True)
    )
    return Blocks(tuple(parts), pairs_fingerprint(pairs))


def split_half(
    model: Any, pairs: PairSet, size: float, *, n_splits: int = 20, seed: int = 0, **attribution: Any
) -> pl.DataFrame:
    """:meth:`Blocks.split_half` of the pairs, attributed once."""
    return attribute_blocks(model, pairs, **attribution).split_half(size, n_splits, seed)


def overlap_intervals(a: Blocks, b: Blocks, sizes: tuple[float, float]) -> pl.DataFrame:
    """IoU and nIoU of the circuits of two sets of blocks, with 95 % jackknife intervals over blocks.

    Each form's discovery pairs vary by themselves, so blocks are left out of one form at a time and the variances
    add up; see :func:`microtome.circuits.statistics.jackknife`.

    Returns:
        One row per group: group, iou, iou_low, iou_high, niou, niou_low, niou_high.

    Raises:
        ShapeError: fewer than two blocks on a side.
    """
    whole = [blocks.scores().circuit(size) for blocks, size in zip((a, b), sizes, strict=True)]
    without = [
        [blocks.scores([j for j in range(len(blocks)) if j != i]).circuit(size) for i in range(len(blocks))]
        for blocks, size in zip((a, b), sizes, strict=True)
    ]
    groups = [None, *(g for g in whole[0].groups if whole[0].groups[g] and whole[1].groups.get(g))]
    rows = []
    for group in groups:
        row: dict[str, Any] = {"group": group or "all"}
        for name, measure in (("iou", circuit_iou), ("niou", circuit_niou)):
            value = measure(whole[0], whole[1], group=group)
            left_out = (
                [measure(x, whole[1], group=group) for x in without[0]],
                [measure(whole[0], y, group=group) for y in without[1]],
            )
            row[name], row[f"{name}_low"], row[f"{name}_high"] = jackknife(value, *left_out)
        rows.append(row)
    return pl.DataFrame(rows)
