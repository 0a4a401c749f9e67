"""Progress on long work: a rich bar on a terminal, silence elsewhere."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager

__all__ = ["bar"]


@contextmanager
def bar(
    label: str, total: int | None, enabled: bool = True, unit: str = "rows"
) -> Iterator[Callable[[int], None]]:
    """A bar for ``total`` steps; yields a function that takes the number of steps done so far.

    Nothing is drawn when ``enabled`` is false, when standard error is not a terminal or when rich is missing.

    Example:
        >>> with bar("encoding", 3) as done:
        ...     for i in range(3):
        ...         done(i + 1)
    """
    if not (enabled and sys.stderr.isatty()):
        yield lambda _: None
        return
    try:
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
    except ImportError:
        yield lambda _: None
        return
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn(unit),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=Console(stderr=True), transient=True) as progress:
        task = progress.add_task(label, total=total)
        yield lambda done: progress.update(task, completed=done)
