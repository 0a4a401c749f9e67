"""Rows on their way to the optimiser: split by sample, shuffled by a seed, read ahead by a thread.

The order is a function of ``(seed, step)``: a run that resumes at a step asks for that step, and nothing else
has to be stored.
"""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from microtome.errors import DtypeError, NonFiniteError, ShapeError

if TYPE_CHECKING:
    import polars as pl

__all__ = ["BatchReader", "RowSource", "Shuffle"]

_Indices = npt.NDArray[np.int64]


class RowSource:
    """Rows by number, from :class:`microtome.Activations`, a tensor or an array, with the sample of each.

    Args:
        acts: rows ``(n, d)``.
        where: rows to keep, a polars expression; needs the tables of a store.

    Raises:
        DtypeError: neither of these.
        ShapeError: not a matrix, no rows left, or an expression over an array.
    """

    def __init__(self, acts: Any, where: pl.Expr | None = None) -> None:
        if not hasattr(acts, "shape"):
            raise DtypeError(
                f"acts: expected activations of a store, a tensor or an array, found {type(acts).__name__}"
            )
        stored = hasattr(acts, "blocks")
        if where is not None:
            if not stored:
                raise ShapeError(
                    "loss_where: expected activations of a store, whose rows have columns, found an array. "
                    "Select its rows before"
                )
            acts = acts.where(where)
        if len(acts.shape) != 2:
            raise ShapeError(f"acts: expected rows (n, d), found shape {tuple(acts.shape)}")
        if acts.shape[0] == 0:
            raise ShapeError(
                f"acts: expected rows to train on, found none{'' if where is None else f' where {where}'}"
            )
        self.acts = acts
        self.n, self.d = int(acts.shape[0]), int(acts.shape[1])
        self.samples: _Indices | None = None
        if stored and hasattr(acts, "rows"):
            column = acts.rows.select("sample").collect().to_series()
            self.samples = column.to_numpy().astype(np.int64)

    def read(self, indices: _Indices) -> Tensor:
        """Rows by number as float32, ``(len(indices), d)``.

        Raises:
            NonFiniteError: NaN or infinity among them.
        """
        rows = self.acts[torch.from_numpy(indices) if isinstance(self.acts, Tensor) else indices]
        rows = torch.as_tensor(rows).float()
        if not bool(torch.isfinite(rows).all()):
            bad = int((~torch.isfinite(rows)).any(1).nonzero()[0])
            raise NonFiniteError(
                f"acts: expected finite rows, found NaN or infinity in row {int(indices[bad])}"
            )
        return rows

    def split(self, fraction: float, seed: int) -> tuple[_Indices, _Indices]:
        """Row numbers for training and held out; all rows of a sample are on one side.

        Raises:
            ShapeError: one side would be empty.
        """
        numbers = np.arange(self.n, dtype=np.int64)
        if fraction == 0:
            return numbers, numbers
        groups = numbers if self.samples is None else self.samples
        held_out = _uniform(groups, seed) < fraction
        if held_out.all() or not held_out.any():
            raise ShapeError(
                f"eval_fraction: expected samples on both sides of {fraction}, found "
                f"{len(np.unique(groups))} samples "
                "on one side. Use another fraction, or 0 to measure on training rows"
            )
        return numbers[~held_out], numbers[held_out]


def _uniform(numbers: _Indices, seed: int) -> npt.NDArray[np.float64]:
    """A number in [0, 1) for every sample, by SplitMix64: the same on every machine and in every version."""
    with np.errstate(over="ignore"):
        z = numbers.astype(np.uint64) + np.uint64((seed + 1) * 0x9E3779B97F4A7C15 & (2**64 - 1))
        z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        bits = (z ^ (z >> np.uint64(31))) >> np.uint64(11)
    return bits.astype(np.float64) * 2.0**-53


class Shuffle:
    """A seeded order of all rows, pass after pass, that is read block by block.

    Blocks of neighbouring rows are permuted over the whole data; a pool of blocks at a time, its rows are
    permuted. Memory: one number per block and one pool. With a pool as large as the data it is a full
    permutation.
    """

    def __init__(self, rows: _Indices, seed: int, block_rows: int, pool_rows: int) -> None:
        self.rows, self.seed = rows, seed
        self.block_rows = max(1, min(block_rows, len(rows)))
        self.blocks_per_pool = max(1, pool_rows // self.block_rows)
        self._epoch: tuple[int, _Indices, _Indices] | None = None
        self._pool: tuple[tuple[int, int], _Indices] | None = None

    def batch(self, step: int, size: int) -> _Indices:
        """Row numbers of a step, ascending; steps follow each other without a gap over the ends of passes."""
        n = len(self.rows)
        parts, start, stop = [], step * size, (step + 1) * size
        while start < stop:
            epoch, place = divmod(start, n)
            order, ends = self._blocks(epoch)
            pool = int(np.searchsorted(ends, place, side="right"))
            begin = int(ends[pool - 1]) if pool else 0
            taken = min(stop - start, int(ends[pool]) - place)
            parts.append(self._rows_of(epoch, pool, order)[place - begin : place - begin + taken])
            start += taken
        return np.sort(self.rows[np.concatenate(parts)])

    def _blocks(self, epoch: int) -> tuple[_Indices, _Indices]:
        """The order of blocks in a pass, and where each pool ends."""
        if self._epoch is None or self._epoch[0] != epoch:
            n_blocks = -(-len(self.rows) // self.block_rows)
            order = np.random.default_rng([self.seed, epoch]).permutation(n_blocks)
            sizes = np.full(n_blocks, self.block_rows)
            sizes[order == n_blocks - 1] = len(self.rows) - (n_blocks - 1) * self.block_rows
            ends = np.cumsum(np.add.reduceat(sizes, np.arange(0, n_blocks, self.blocks_per_pool)))
            self._epoch = (epoch, order, ends)
        return self._epoch[1], self._epoch[2]

    def _rows_of(self, epoch: int, pool: int, order: _Indices) -> _Indices:
        """The rows of a pool, permuted."""
        if self._pool is None or self._pool[0] != (epoch, pool):
            blocks = order[pool * self.blocks_per_pool : (pool + 1) * self.blocks_per_pool]
            rows = (blocks[:, None] * self.block_rows + np.arange(self.block_rows)).ravel()
            rows = rows[rows < len(self.rows)]
            rng = np.random.default_rng([self.seed, epoch, pool])
            self._pool = ((epoch, pool), rng.permutation(rows))
        return self._pool[1]


class BatchReader:
    """Batches of steps ``first`` to ``last``, read ahead by a thread.

    Use it as a context manager: the thread ends on every way out. An error while reading is raised where the
    batch is asked for.
    """

    _AHEAD = 4

    def __init__(
        self, source: RowSource, order: Shuffle, size: int, first: int, last: int, device: str
    ) -> None:
        self._source, self._order, self._size = source, order, size
        self._steps, self._device = range(first, last), torch.device(device)
        self._ready: queue.Queue[Tensor | BaseException] = queue.Queue(self._AHEAD)
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._read, name="microtome-batches", daemon=True)
        self.seconds_waited = 0.0
        """Time the optimiser stood still for want of rows."""

    def __enter__(self) -> BatchReader:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()

    def __iter__(self) -> Iterator[tuple[int, Tensor]]:
        for step in self._steps:
            began = time.perf_counter()
            batch = self._ready.get()
            self.seconds_waited += time.perf_counter() - began
            if isinstance(batch, BaseException):
                raise batch
            yield step, batch.to(self._device, non_blocking=True)

    def _read(self) -> None:
        try:
            for step in self._steps:
                batch = self._source.read(self._order.batch(step, self._size))
                if not self._offer(batch.pin_memory() if self._device.type == "cuda" else batch):
                    return
        except BaseException as error:  # handed over: raised in the thread that asks
            self._offer(error)

    def _offer(self, item: Tensor | BaseException) -> bool:
        while not self._stop.is_set():
            try:
                self._ready.put(item, timeout=0.1)
            except queue.Full:
                continue
            return True
        return False
