"""``microtome diff | circuit | demo``: whole studies."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from microtome.cli.app import Config, Progress, app, open_store, say


@app.command()
def diff(
    base: Annotated[Path, typer.Argument(help="Store of the base language model.", show_default=False)],
    vlm: Annotated[Path, typer.Argument(help="Store of the VLM, same hooks.", show_default=False)],
    out: Annotated[Path, typer.Option(help="Folder for dictionaries, tables and the report.")] = Path("diff"),
    spatial: Annotated[
        str | None,
        typer.Option(help="Spatial questions, as SQL over row and sample columns.", show_default=False),
    ] = None,
    neutral: Annotated[
        Path | None, typer.Option(help="Store of the VLM under a neutral prompt.", show_default=False)
    ] = None,
    d_sae: Annotated[int, typer.Option(help="Features per dictionary.")] = 1024,
    k: Annotated[int, typer.Option(help="Features per token.")] = 16,
    steps: Annotated[int, typer.Option(help="Training steps per dictionary.")] = 1500,
    batch_size: Annotated[int, typer.Option(help="Rows per training step.")] = 1024,
    p_gap: Annotated[float, typer.Option(help="Share kept by variance gap.")] = 0.2,
    p_cos: Annotated[float, typer.Option(help="Share of those kept by decoder cosine.")] = 0.2,
    seed: Annotated[int, typer.Option(help="Seed of dictionaries and of the shuffle.")] = 0,
    progress: Progress = True,
    config: Config = None,
) -> None:
    """Find the features of the base model's dictionaries that fine-tuning on pictures changed.

    Example: `microtome diff runs/lm runs/vlm --spatial "task = 'spatial'" --out runs/diff`
    """
    import polars as pl

    from microtome.dictionary import TrainConfig
    from microtome.diffing import study
    from microtome.report.diffing import diff_page

    told = study.DiffConfig(
        train=TrainConfig(d_sae=d_sae, k=k, steps=steps, batch_size=batch_size, seed=seed),
        spatial=None if spatial is None else pl.sql_expr(spatial),
        p_gap=p_gap,
        p_cos=p_cos,
    )
    result = study.run(
        open_store(base),
        open_store(vlm),
        out,
        told,
        neutral=None if neutral is None else open_store(neutral),
        progress=progress,
    )
    facts = {"base": str(base), "VLM": str(vlm), "dictionaries": f"{d_sae} features, k = {k}, {steps} steps"}
    page = diff_page(vars(result), facts).write(out / "report.html")
    say(
        f"{result.features.height:,} features, {result.features['adapted'].sum():,} adapted: {out / 'tables'}"
    )
    say(f"open {page.resolve()}")


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
    out: Annotated[Path, typer.Option(help="Folder for scores, circuits, tables and figures.")] = Path(
        "circuits"
    ),
    pairs: Annotated[int, typer.Option(help="Pairs of each task and form, for the organism.")] = 250,
    method: Annotated[str, typer.Option(help="ig, plain, clean_corrupted or ig_activations.")] = "ig",
    steps: Annotated[int, typer.Option(help="Steps of integrated gradients.")] = 5,
    sizes: Annotated[
        str, typer.Option(help="Circuit sizes, e.g. 0.01,0.05,0.2; the paper's 27 when empty.")
    ] = "",
    random: Annotated[int, typer.Option(help="Random controls of overlap and interchange.")] = 20,
    windows: Annotated[str, typer.Option(help="Windows of back-patching; empty leaves it out.")] = "5,3,1",
    exact: Annotated[int, typer.Option(help="Nodes patched exactly to audit the scores.")] = 100,
    memory: Annotated[
        str | None, typer.Option(help="Memory budget of attribution, e.g. 4GiB.", show_default=False)
    ] = None,
    align: Annotated[
        str, typer.Option(help="absolute for one template, spans for natural prompts of any length.")
    ] = "absolute",
    batch_size: Annotated[int, typer.Option(help="Pairs per forward.")] = 16,
    seed: Annotated[int, typer.Option(help="Seed of splits and draws.")] = 42,
    progress: Progress = True,
    config: Config = None,
) -> None:
    """Find the circuits of tasks in two forms, test them, compare them, and draw the figures.

    Example: `microtome circuit organism --tasks colour --tasks counting --out runs/circuits`
    """
    from microtome.circuits.command import study

    windows_of = tuple(int(w) for w in windows.split(",") if w.strip())
    sizes_of = tuple(float(s) for s in sizes.split(",") if s.strip())
    options = {
        "method": method,
        "steps": steps,
        "n_random": random,
        "n_exact": exact,
        "windows": windows_of,
        "memory_budget": memory,
        "batch_size": batch_size,
        "seed": seed,
    } | ({"sizes": sizes_of} if sizes_of else {})
    tables = study(model, tasks, out, pairs, options, align=align, progress=progress)  # type: ignore[arg-type]
    from microtome.report.circuits import write_figures

    for row in tables["sizes"].iter_rows(named=True):
        reached = "" if row["reached"] else "  (threshold not reached)"
        say(
            f"{row['task']:<12} {row['form']:<8} size {row['size']:6.3f}  faithfulness {row['faithfulness']:5.2f}{reached}"
        )
    for path in write_figures(out):
        say(f"figure: {path}")
    say(f"tables: {out}")


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
