"""``microtome capture | info | verify``."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import polars as pl
import typer

from microtome.cli.app import Config, Progress, StorePath, app, open_store, say

if TYPE_CHECKING:
    from microtome.store import ActivationStore


@app.command()
def capture(
    model: Annotated[str, typer.Option(help="Folder or hub id of any model that transformers loads.")],
    data: Annotated[
        Path, typer.Option(help="JSONL, parquet, folder of images, or folder of a saved data set.")
    ],
    out: Annotated[Path, typer.Option(help="Folder of the store; an existing one is continued.")],
    hooks: Annotated[
        list[str], typer.Option(help="Hook names or module paths, with wildcards; may be repeated.")
    ] = [  # noqa: B006
        "blocks.*.hook_resid_post"
    ],
    prompt: Annotated[
        str | None, typer.Option(help="Prompt for data without one.", show_default=False)
    ] = None,
    dtype: Annotated[
        str, typer.Option(help="Element type on disk: bfloat16, float16 or float32.")
    ] = "bfloat16",
    pool: Annotated[str | None, typer.Option(help="'mean': one row per sample.", show_default=False)] = None,
    batch_size: Annotated[int, typer.Option(help="Samples per forward pass.")] = 8,
    step_rows: Annotated[int, typer.Option(help="Rows per committed step.")] = 65_536,
    limit: Annotated[
        int | None, typer.Option(help="Take the first samples only.", show_default=False)
    ] = None,
    device: Annotated[str, typer.Option(help="Where the model runs: cpu, cuda, cuda:1.")] = "cpu",
    chat: Annotated[bool, typer.Option(help="Wrap prompts in the model's chat template.")] = False,
    stop_early: Annotated[bool, typer.Option(help="Leave the model after the last wanted layer.")] = True,
    progress: Progress = True,
    config: Config = None,
) -> None:
    """Run a model over data and store its activations.

    Example: `microtome capture --model ./llava --data questions.jsonl --hooks "blocks.*.hook_resid_post" --out runs/llava`
    """
    from microtome.capture.data import capture_dataset, load_model, read_items

    loaded, processor = load_model(model, device=device)
    capture_dataset(
        loaded,
        processor,
        read_items(data, prompt=prompt, limit=limit),
        out,
        hooks=hooks,
        dtype=dtype,
        pool=pool,
        batch_size=batch_size,
        step_rows=step_rows,
        chat=chat,
        stop_early=stop_early,
        progress=progress,
    )
    _show(open_store(out))


@app.command()
def info(store: StorePath, config: Config = None) -> None:
    """Say what a store holds.

    Example: `microtome info runs/llava`
    """
    _show(open_store(store))


@app.command()
def verify(store: StorePath, progress: Progress = True, config: Config = None) -> None:
    """Check every byte of a store; exit code 1 when something is damaged.

    Example: `microtome verify runs/llava`
    """
    from microtome.progress import bar

    opened = open_store(store)
    with bar("verifying", opened.n_files, progress, "files") as done:
        problems = opened.verify(done)
    for problem in problems:
        say(str(problem))
    say(f"{store}: {'sound' if not problems else f'{len(problems)} problems'}")
    if problems:
        raise typer.Exit(1)


def _show(store: ActivationStore) -> None:
    model = store.facts.get("model", {})
    say(f"{store.path}: {store.n_rows:,} rows, {len(store.hooks)} hooks, {store[store.hooks[0]].dtype}")
    say(
        f"  model: {model.get('class', 'unknown')} {model.get('name') or ''} {model.get('revision') or ''}".rstrip()
    )
    say(f"  samples: {int(store.samples.select(pl.len()).collect().item()):,}")
    for hook in store.hooks:
        n, d = store[hook].shape
        say(f"  {hook:<44} {n:>12,} x {d}")
