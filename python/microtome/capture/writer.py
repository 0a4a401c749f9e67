"""The writer thread: what a forward leaves behind goes to the store while the model runs on.

The queue is bounded in bytes. A full queue makes the model wait; an error of the thread is raised in the
user's thread at its next call.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

__all__ = ["Block", "Cut", "Matrix", "WriterThread"]


@dataclass
class Matrix:
    """One hook's rows: the pieces of the forwards, and the order that sorts them by sample, if any."""

    pieces: list[torch.Tensor]
    order: npt.NDArray[np.int64] | None

    @property
    def nbytes(self) -> int:
        """Bytes that the rows hold while they wait."""
        return sum(piece.nbytes for piece in self.pieces)

    def array(self) -> Any:
        """The rows as the store takes them: an array, or bf16 words with their tag."""
        whole = self.pieces[0] if len(self.pieces) == 1 else torch.cat(self.pieces)
        if self.order is not None:
            whole = whole[torch.from_numpy(self.order)]
        return whole.view(torch.uint16).numpy() if whole.dtype == torch.bfloat16 else whole.numpy()


@dataclass
class Cut:
    """How far a block goes into the open step, and the sample table if the step ends there."""

    stops: dict[str, int]
    """Row of each space after the last one."""
    samples_parquet: bytes | None = None
    ids: list[Any] = field(default_factory=list)


@dataclass
class Block:
    """What one forward (or one generation) adds to the store."""

    rows: dict[str, dict[str, npt.NDArray[Any]]]
    """Row table by space."""
    matrices: dict[str, dict[str, Matrix]]
    """Values by space and hook."""
    cuts: list[Cut]
    events: list[Any] = field(default_factory=list)
    """CUDA events after which the pinned copies are complete."""

    @property
    def nbytes(self) -> int:
        """Bytes that the block holds while it waits."""
        return sum(matrix.nbytes for hooks in self.matrices.values() for matrix in hooks.values())

    def write(self, store: Any, committed: Callable[[list[Any]], None]) -> None:
        """Append the rows cut by cut, and commit where a step ends."""
        for event in self.events:
            event.synchronize()
        bf16 = {
            space: {name: (m.pieces[0].dtype == torch.bfloat16, m.array()) for name, m in hooks.items()}
            for space, hooks in self.matrices.items()
        }
        starts = dict.fromkeys(self.rows, 0)
        for cut in self.cuts:
            for space, rows in self.rows.items():
                start, stop = starts[space], cut.stops[space]
                starts[space] = stop
                if stop > start:
                    part = {name: values[start:stop] for name, values in rows.items()}
                    store.append(space, part, _slices(bf16[space], start, stop))
            if cut.samples_parquet is not None:
                store.commit(cut.samples_parquet)
                committed(cut.ids)


def _slices(arrays: Mapping[str, tuple[bool, Any]], start: int, stop: int) -> dict[str, Any]:
    parts = {name: (tagged, array[start:stop]) for name, (tagged, array) in arrays.items()}
    return {name: ("bfloat16", part) if tagged else part for name, (tagged, part) in parts.items()}


class WriterThread:
    """Writes blocks to a store in order, on one thread of its own."""

    def __init__(self, store: Any, limit: int, committed: Callable[[list[Any]], None]) -> None:
        """Start on ``store``; let at most ``limit`` bytes wait, or one block that is larger."""
        self._store, self._limit, self._committed = store, limit, committed
        self._changed = threading.Condition()
        self._queue: deque[tuple[Block, int]] = deque()
        self._waiting = 0  # bytes not yet written, the block in hand included
        self._closing = False
        self._error: BaseException | None = None
        self._thread = threading.Thread(target=self._work, name="microtome-writer", daemon=True)
        self._thread.start()

    def put(self, block: Block) -> None:
        """Queue a block; waits while the queue is full. Raises what the thread failed with."""
        size = block.nbytes
        with self._changed:
            while self._waiting and self._waiting + size > self._limit and self._error is None:
                self._changed.wait()
            self._raise()
            self._waiting += size
            self._queue.append((block, size))
            self._changed.notify_all()

    def check(self) -> None:
        """Raise what the thread failed with, if it did."""
        with self._changed:
            self._raise()

    def close(self, *, keep: bool) -> None:
        """End the thread: after the queue is written, or (``keep=False``) after the block in hand."""
        with self._changed:
            self._closing = True
            if not keep:
                self._queue.clear()
            self._changed.notify_all()
        self._thread.join()
        if keep:
            self.check()

    def _raise(self) -> None:
        if self._error is not None:
            raise self._error

    def _work(self) -> None:
        while True:
            with self._changed:
                while not self._queue and not self._closing:
                    self._changed.wait()
                if not self._queue:
                    return
                block, size = self._queue.popleft()
            try:
                block.write(self._store, self._committed)
            except BaseException as error:  # carried over to the user's thread
                with self._changed:
                    self._error = error
                    self._queue.clear()
                    self._changed.notify_all()
                return
            with self._changed:
                self._waiting -= size
                self._changed.notify_all()
