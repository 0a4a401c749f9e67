"""``microtome circuit``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from microtome.cli.app import Config, Progress, app, say


@app.command()
def circuit(
    model: Annotated[str, typer.Argument(help="organism, or a folder or hub id that transformers loads.")],
    tasks: Annotated[
        list[str] | None,
        typer.Option(
            help="Task of the organism, or a JSON-lines file of pairs; give it several times.",
            show_default=False,
        ),
    ] = None,
    out: Annotated[
        Path, typer.Option(help="Folder for scores, circuits, tables, figures and report.")
    ] = Path("circuits"),
    pairs: Annotated[int, typer.Option(help="Pairs of each task and form, for the organism.")] = 250,
    method: Annotated[str, typer.Option(help="ig, plain, clean_corrupted or ig_activations.")] = "ig",
    steps: Annotated[int, typer.Option(help="Steps of integrated gradients.")] = 5,
    sizes: Annotated[
        str, typer.Option(help="Circuit sizes, e.g. 0.01,0.05,0.2; the paper's 27 when empty.")
    ] = "",
    random: Annotated[int, typer.Option(help="Random controls of overlap, interchange and heads.")] = 20,
    windows: Annotated[str, typer.Option(help="Windows of back-patching; empty leaves it out.")] = "5,3,1",
    allow_prefix: Annotated[
        bool, typer.Option("--allow-prefix", help="Back-patch prompts whose words before the data differ.")
    ] = False,
    exact: Annotated[int, typer.Option(help="Nodes patched exactly to audit the scores.")] = 100,
    heads: Annotated[int, typer.Option(help="Attributed heads that are mean-ablated.")] = 3,
    memory: Annotated[
        str | None, typer.Option(help="Memory budget of attribution, e.g. 4GiB.", show_default=False)
    ] = None,
    align: Annotated[
        str, typer.Option(help="absolute for one template, spans for natural prompts of any length.")
    ] = "absolute",
    batch_size: Annotated[int, typer.Option(help="Pairs per forward.")] = 16,
    seed: Annotated[int, typer.Option(help="Seed of splits and draws.")] = 42,
    estimate: Annotated[bool, typer.Option("--estimate", help="Say what it will take, and end.")] = False,
    progress: Progress = True,
    config: Config = None,
) -> None:
    """Find the circuits of tasks in two forms, test them, compare them, and draw the figures.

    Example: `microtome circuit organism --tasks colour --tasks counting --out runs/circuits`
    """
    from microtome.circuits.study.command import numbers, study

    options = {
        "method": method,
        "steps": steps,
        "n_random": random,
        "n_controls": random,
        "n_exact": exact,
        "n_heads": heads,
        "windows": numbers("windows", windows, int),
        "allow_prefix": allow_prefix,
        "memory_budget": memory,
        "batch_size": batch_size,
        "seed": seed,
    } | ({"sizes": numbers("sizes", sizes, float)} if sizes.strip() else {})
    aside = (lambda text: typer.echo(text, err=True)) if progress or estimate else None
    tables = study(
        model, tasks, out, pairs, options, align=align, progress=progress, say=aside, estimate_only=estimate
    )
    if estimate:
        return
    from microtome.report.circuit_page import write_report

    for row in tables["sizes"].iter_rows(named=True):
        reached = "" if row["reached"] else "  (threshold not reached)"
        say(
            f"{row['task']:<12} {row['form']:<8} size {row['size']:6.3f}  faithfulness {row['faithfulness']:5.2f}"
            f" [{row['low']:.2f}, {row['high']:.2f}]{reached}"
        )
    page, figures = write_report(out)
    say(f"tables: {out}/*.parquet, figures: {out / 'figures'} ({len(figures)})")
    say(f"open {page.resolve()}")
