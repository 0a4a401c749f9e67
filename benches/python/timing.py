"""How every bench of this folder takes its ratios: both sides in turn, A B A B, in one process.

A ratio is their time over our time of one round, so above 1 means that microtome is faster; the median of the rounds is
reported with the least and the largest. Wall time and processor time are taken together. On one thread the ratio is
that of processor time, which other processes disturb less; on several it is that of wall time, which is what threads are
for. Sizes, seed, threads and rounds come from ``MICROTOME_BENCH_SCALE``, ``_SEED``, ``_REPEATS`` and
``MICROTOME_NUM_THREADS``; ``MICROTOME_BENCH_CLOCK`` (``wall`` or ``cpu``) overrides the clock.
"""

from __future__ import annotations

import os
import resource
import statistics
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

from microtome import _core

THREADS = int(os.environ.get("MICROTOME_NUM_THREADS", "1"))
REPEATS = int(os.environ.get("MICROTOME_BENCH_REPEATS", "5"))
SCALE = float(os.environ.get("MICROTOME_BENCH_SCALE", "1"))
SEED = int(os.environ.get("MICROTOME_BENCH_SEED", "0"))
CLOCK = os.environ.get("MICROTOME_BENCH_CLOCK", "")


class Seconds(NamedTuple):
    """What one call took."""

    wall: float
    cpu: float

    def __truediv__(self, other: float) -> Seconds:
        return Seconds(self.wall / other, self.cpu / other)

    def by(self, threads: int, clock: str = "") -> float:
        """By the clock asked for, or by the one that counts for this number of threads."""
        return self.cpu if (clock or CLOCK or ("cpu" if threads == 1 else "wall")) == "cpu" else self.wall


def refuse_debug() -> None:
    """End the process when the core was built for debugging: its times mean nothing."""
    if _core.BUILD_PROFILE != "release":
        raise SystemExit("benches: expected a release build, found a debug build. Run make bench")


def peak_mib() -> float:
    """Largest resident size of this process so far, MiB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def seconds(call: Callable[[], Any], inner: int = 1) -> Seconds:
    """Time of one of ``inner`` calls."""
    wall, cpu = time.perf_counter(), time.process_time()
    for _ in range(inner):
        call()
    return Seconds(time.perf_counter() - wall, time.process_time() - cpu) / inner


def let_threads_rest() -> None:
    """Wait until threads that a call has left spinning for more work, as those of OpenMP and OpenBLAS do, give it up."""
    time.sleep(0.4)


def alternate(
    calls: dict[str, Callable[[], Any]],
    repeats: int = REPEATS,
    inner: dict[str, int] | None = None,
    before: Callable[[], Any] | None = None,
) -> dict[str, list[Seconds]]:
    """Times of each call, a round of all after the other; the first round warms up and does not count.

    Args:
        calls: what is timed, by name.
        repeats: rounds that count.
        inner: calls per round, for those that are too short for the clock.
        before: called before each timing, and not timed.
    """
    refuse_debug()
    found: dict[str, list[Seconds]] = {name: [] for name in calls}
    for i in range(repeats + 1):
        for name, call in calls.items():
            if before:
                before()
            spent = seconds(call, (inner or {}).get(name, 1))
            if i:
                found[name].append(spent)
    return found


def line(
    name: str,
    shape: str,
    peer: str,
    ours: list[Seconds],
    theirs: list[Seconds],
    *,
    threads: int = THREADS,
    bar: float | None = None,
    cost: bool = False,
    clock: str = "",
) -> dict[str, Any]:
    """One line of the table, from the rounds of both sides.

    Args:
        bar: ratio to reach.
        cost: the ratio is what ours costs on top of theirs: ours over theirs, and the bar a limit.
        clock: ``wall`` or ``cpu`` for the ratio, whatever the threads.
    """
    sides = (theirs, ours) if cost else (ours, theirs)
    rounds = list(zip(*sides, strict=True))
    ratios = [b.by(threads, clock) / a.by(threads, clock) for a, b in rounds]
    ratio = statistics.median(ratios)
    return {
        "name": name,
        "shape": shape,
        "peer": peer,
        "ratio": ratio,
        "min": min(ratios),
        "max": max(ratios),
        "wall": statistics.median(b.wall / a.wall for a, b in rounds),
        "cpu": statistics.median(b.cpu / a.cpu for a, b in rounds),
        "bar": bar,
        "reached": None if bar is None else bool(ratio <= bar if cost else ratio >= bar),
    }


def compare(
    name: str,
    shape: str,
    peer: str,
    ours: Callable[[], Any],
    theirs: Callable[[], Any],
    *,
    bar: float | None = None,
    atol: float | None = None,
    inner: int = 1,
    share: float = 1.0,
    repeats: int = REPEATS,
    threads: int = THREADS,
) -> dict[str, Any]:
    """One line of the table: ours against theirs, in turn.

    Args:
        bar: ratio to reach.
        atol: both results are held to each other within this before anything is timed; None for sides whose results
            are compared elsewhere.
        inner: calls of ours per round.
        share: the part of the work behind its result that one call of theirs does.
    """
    if atol is not None:
        mine, other = np.asarray(ours()), np.asarray(theirs())
        assert np.allclose(mine, other, atol=atol, rtol=0), f"{name}: {np.abs(mine - other).max()}"
    found = alternate({"ours": ours, "theirs": theirs}, repeats, {"ours": inner})
    whole = [spent / share for spent in found["theirs"]]
    return line(name, shape, peer, found["ours"], whole, bar=bar, threads=threads)


def reached(row: dict[str, Any]) -> str:
    """``yes``, ``no``, or nothing where there is no bar."""
    return "" if row.get("reached") is None else "yes" if row["reached"] else "no"


def show(table: list[dict[str, Any]]) -> None:
    """Print lines for a reader at a terminal."""
    for row in table:
        bar = f"  bar {row['bar']:g}: {reached(row)}" if row["bar"] is not None else ""
        text = (
            f"{row['name']:24} {row['shape']:44} {row['peer']:28} {row['ratio']:10.2f} "
            f"({row['min']:.2f} to {row['max']:.2f}; wall {row['wall']:.2f}, cpu {row['cpu']:.2f}){bar}"
        )
        print(f"{text}  {row.get('remarks', '')}".rstrip(), flush=True)
