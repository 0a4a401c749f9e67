"""The kill harness: a child appends numbered rows and reports each commit; it is killed, another resumes."""

from __future__ import annotations

import os
import random
import signal
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np

from microtome import ActivationStore, _core

HOOKS = [("blocks.0.hook_resid_post", 33, "tokens"), ("blocks.1.hook_resid_post", 33, "tokens")]
STEPS = 12
ROWS = [700, 1, 400]  # rows of the appends of one step
WIDTH = 33


def rows_from(start: int, n: int) -> tuple[dict[str, np.ndarray], np.ndarray]:
    """Rows that say which they are."""
    number = np.arange(start, start + n)
    rows = {
        "sample": (number // 10).astype(np.uint64),
        "position": (number % 10).astype(np.uint32),
        "token_id": number.astype(np.uint32),
        "kind": (number % 3).astype(np.uint8),
        "special": np.zeros(n, np.uint8),
    }
    return rows, np.repeat(number.astype(np.float32)[:, None], WIDTH, axis=1)  # (n, WIDTH)


def write(path: Path, report: Callable[[int], None], *, early: bool = False) -> None:
    """Append the steps that are missing. ``early`` is a planted bug: it reports before it commits."""
    with _core.StoreWriter(str(path), hooks=HOOKS, dtype="float32", facts='{"model": "numbers"}') as writer:
        report(writer.steps)
        while writer.steps < STEPS:
            start = writer.n_rows["tokens"]
            for n in ROWS:
                rows, x = rows_from(start, n)
                writer.append("tokens", rows, {hook: x for hook, _, _ in HOOKS})
                start += n
            if early:
                report(writer.steps + 1)
                time.sleep(0.02)
            writer.commit(f"samples of step {writer.steps}".encode())
            report(writer.steps)


def run_and_kill(
    path: Path,
    delay: float | None,
    *,
    early: bool = False,
    fail_at: str | None = None,
    write: Callable[..., None] = write,
) -> tuple[int, bool]:
    """Run a child and kill it ``delay`` seconds after it opened the store: (last reported step, finished)."""
    read_end, write_end = os.pipe()
    child = os.fork()
    if child == 0:
        status = 1
        try:
            os.close(read_end)
            if fail_at is not None:
                os.environ["MICROTOME_FAIL_AT"] = fail_at
            write(path, lambda step: os.write(write_end, bytes([step])) and None, early=early)
            status = 0
        finally:
            os._exit(status)
    os.close(write_end)
    reported = os.read(read_end, 1)  # the store is open, or the child is gone
    if delay is not None:
        time.sleep(delay)
        os.kill(child, signal.SIGKILL)
    while chunk := os.read(read_end, 1024):
        reported += chunk
    os.close(read_end)
    _, status = os.waitpid(child, 0)
    return (max(reported) if reported else 0), os.waitstatus_to_exitcode(status) == 0


def broken_promise(path: Path, reported: int) -> str | None:
    """What a reader finds wrong after a kill, if anything."""
    store = ActivationStore(path, verify="always")
    steps = store._reader.steps
    if len(steps) < reported:
        return f"{reported} steps were reported, {len(steps)} are there"
    if problems := store.verify():
        return problems[0]
    expected = np.arange(len(steps) * sum(ROWS))
    for hook in store.hooks:
        if not np.array_equal(store[hook].numpy()[:, 0], expected):
            return f"{hook} does not hold the rows 0..{len(expected)} once"
    if not np.array_equal(store.rows.collect()["token_id"].to_numpy(), expected):
        return "the row table does not hold the rows once"
    return None


def files(path: Path) -> dict[str, bytes]:
    """Every file of a store."""
    return {str(p.relative_to(path)): p.read_bytes() for p in sorted(path.rglob("*")) if p.is_file()}


def kill_until(
    kills: int,
    folder: Path,
    seed: int,
    *,
    early: bool = False,
    write: Callable[..., None] = write,
    broken_promise: Callable[[Path, int], str | None] = broken_promise,
) -> tuple[int, list[str]]:
    """Kill children at random moments, over as many stores as it takes. (Kills, broken promises.)"""
    dice = random.Random(seed)
    begin = time.perf_counter()
    run_and_kill(folder / "whole", None, write=write)
    duration, whole = time.perf_counter() - begin, files(folder / "whole")
    done, broken, store = 0, [], 0
    while done < kills:
        path, finished = folder / str(store), False
        while not finished:
            delay = dice.uniform(0, duration) * dice.choice([0.1, 0.3, 1.0]) if done < kills else None
            reported, finished = run_and_kill(path, delay, early=early, write=write)
            done += not finished
            if problem := broken_promise(path, reported):
                broken.append(problem)
        if files(path) != whole:
            broken.append("the bytes differ from those of a run that was not interrupted")
        store += 1
    return done, broken
