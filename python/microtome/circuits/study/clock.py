"""What a study is doing and how long it will still take, one line per step."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import polars as pl

__all__ = ["Clock", "duration"]


def duration(seconds: float) -> str:
    """Seconds as a person says them.

    Example:
        >>> duration(8.4), duration(95), duration(7300)
        ('8 s', '2 min', '2 h 2 min')
    """
    if seconds < 90:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 90 else f"{minutes // 60} h {minutes % 60} min"


class Clock:
    """Announces steps with what is left of the estimate, scaled by how long the finished ones really took."""

    def __init__(self, costs: pl.DataFrame, say: Callable[[str], None]) -> None:
        self._costs, self._say = costs, say
        self._left = float(costs["seconds"].sum())
        self._expected, self._taken = 0.0, 0.0
        self._number = 0

    def announce(self) -> None:
        """What the study will take, by step."""
        parts = self._costs.group_by("step", maintain_order=True).agg(
            pl.col("seconds").sum(), pl.col("forwards").sum()
        )
        for step, seconds, forwards in parts.iter_rows():
            self._say(f"{step:<14} {forwards:>11,} forwards  about {duration(seconds)}")
        total = int(self._costs["forwards"].sum())
        self._say(f"{'in all':<14} {total:>11,} forwards  about {duration(self._left)}")

    @contextmanager
    def step(self, name: str, task: str, form: str | None = None, done: bool = False) -> Iterator[None]:
        """Around one step."""
        mine = (pl.col("step") == name) & (pl.col("task") == task)
        rows = self._costs.filter(mine if form is None else mine & (pl.col("form") == form))
        expected = float(rows["seconds"].sum())
        self._number += 1
        pace = self._taken / self._expected if self._expected > 1 else 1.0
        what = f"[{self._number}] {task}{f', {form}' if form else ''}: {name}"
        self._say(f"{what:<44} " + ("done before" if done else f"{duration(self._left * pace)} to go"))
        start = time.monotonic()
        yield
        self._left -= expected
        if not done and expected:
            self._expected += expected
            self._taken += time.monotonic() - start
