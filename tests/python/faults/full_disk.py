"""A writer on a disk of its own, 8 MiB large, that runs full; run as a program inside a mount namespace."""

from __future__ import annotations

import errno
import sys
from pathlib import Path

from faults import kill
from microtome import ActivationStore, _core
from microtome.errors import StoreError

DISK = 8 << 20
STEP_ROWS = 3000  # one step takes about 0.9 MB


def append_step(writer: _core.StoreWriter) -> None:
    rows, x = kill.rows_from(writer.n_rows["tokens"], STEP_ROWS)
    writer.append("tokens", rows, {hook: x for hook, _, _ in kill.HOOKS})
    writer.commit(f"samples of step {writer.steps}".encode())


def open_writer(path: Path) -> _core.StoreWriter:
    return _core.StoreWriter(str(path), hooks=kill.HOOKS, dtype="float32", facts='{"model": "numbers"}')


def run_full(disk: Path, free: int) -> str:
    """Write on ``disk`` until it is full, with ``free`` bytes free at first; then make room and go on. What went wrong."""
    filler = disk / "filler"
    filler.write_bytes(bytes(DISK - (64 << 10) - free))
    committed, failure = 0, None
    with open_writer(disk / "run") as writer:
        try:
            for _ in range(20):
                append_step(writer)
                committed = writer.steps
        except OSError as error:
            failure = error
        if failure is None:
            return "the disk never ran full"
        if failure.errno != errno.ENOSPC or not failure.filename:
            return f"expected ENOSPC with a file name, found {failure!r}"
        try:
            append_step(writer)
        except StoreError:
            pass
        else:
            return "the writer went on after a failed commit"
    if problem := whole(disk, committed):
        return problem
    filler.unlink()
    with open_writer(disk / "run") as writer:
        if writer.steps != committed:
            return f"resumed at step {writer.steps}, {committed} were committed"
        append_step(writer)
    return whole(disk, committed + 1)


def whole(disk: Path, steps: int) -> str:
    """What a reader finds wrong."""
    if steps == 0:
        return ""
    store = ActivationStore(disk / "run", verify="always")
    if store.n_rows != steps * STEP_ROWS:
        return f"expected {steps} steps, found {store.n_rows / STEP_ROWS}"
    if problems := store.verify():
        return problems[0]
    first = store[kill.HOOKS[0][0]].numpy()[:, 0]
    if not (first == range(store.n_rows)).all():
        return "the rows are not those that were written"
    return f"left behind: {left}" if (left := list((disk / "run").rglob("*.tmp-*"))) else ""


if __name__ == "__main__":
    sys.exit(run_full(Path(sys.argv[1]), int(sys.argv[2])) or 0)
