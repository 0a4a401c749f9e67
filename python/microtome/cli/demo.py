"""``microtome demo``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from microtome.cli.app import Config, Progress, app, say


@app.command()
def demo(
    out: Annotated[Path, typer.Option(help="Folder for stores, tables and the report.")] = Path("demo"),
    questions: Annotated[int, typer.Option(help="Questions put to the models.")] = 2800,
    progress: Progress = True,
    config: Config = None,
) -> None:
    """Run the main job on the shipped model: capture, encode, count, compare, show.

    Example: `microtome demo --out demo`
    """
    from microtome.demo import run

    say(f"open {run(out, questions=questions, progress=progress).resolve()}")
