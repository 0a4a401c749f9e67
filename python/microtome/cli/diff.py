"""``microtome diff``."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from microtome.cli.app import Config, Progress, app, expression, open_store, say

if TYPE_CHECKING:
    from microtome.dictionary import SAE


@app.command()
def diff(
    base: Annotated[Path, typer.Argument(help="Store of the base language model.", show_default=False)],
    vlm: Annotated[Path, typer.Argument(help="Store of the VLM, same hooks.", show_default=False)],
    out: Annotated[Path, typer.Option(help="Folder for dictionaries, tables, figures and pages.")] = Path(
        "diff"
    ),
    spatial: Annotated[
        str | None,
        typer.Option(help="Spatial questions, as SQL over row and sample columns.", show_default=False),
    ] = None,
    neutral: Annotated[
        Path | None, typer.Option(help="Store of the VLM under a neutral prompt.", show_default=False)
    ] = None,
    data: Annotated[
        Path | None,
        typer.Option(
            help="The data set that the VLM was captured on: texts and pictures.", show_default=False
        ),
    ] = None,
    tokenizer: Annotated[
        str | None, typer.Option(help="Folder or hub id.", show_default="the model that the store names")
    ] = None,
    dictionaries: Annotated[
        Path | None,
        typer.Option(help="Base dictionaries, a folder of each hook's name.", show_default="trained here"),
    ] = None,
    d_sae: Annotated[int, typer.Option(help="Features per dictionary.")] = 1024,
    k: Annotated[int, typer.Option(help="Features per token.")] = 16,
    steps: Annotated[int, typer.Option(help="Training steps per dictionary.")] = 1500,
    batch_size: Annotated[int, typer.Option(help="Rows per training step.")] = 1024,
    vision: Annotated[
        str | None, typer.Option(help="VLM rows that stand for vision, as SQL.", show_default="all")
    ] = None,
    text_dictionary: Annotated[
        str, typer.Option(help="What encodes the base model's side of the variance gap: adapted or base.")
    ] = "adapted",
    gap_tokens: Annotated[
        str, typer.Option(help="VLM tokens of the variance gap: all, text or image.")
    ] = "all",
    gap_average: Annotated[str, typer.Option(help="Average of the variance gap: token or sample.")] = "token",
    p_gap: Annotated[float, typer.Option(help="Share kept by variance gap.")] = 0.2,
    p_cos: Annotated[float, typer.Option(help="Share of those kept by decoder cosine.")] = 0.2,
    unit: Annotated[str, typer.Option(help="What firing is counted by: token or sample.")] = "token",
    nested: Annotated[
        bool, typer.Option(help="Compare spatial questions with all, not with the others.")
    ] = False,
    spatial_top: Annotated[float, typer.Option(help="Share of features whose frequency gap is large.")] = 0.2,
    min_gap: Annotated[
        float | None, typer.Option(help="Least frequency gap, instead of a share.", show_default=False)
    ] = None,
    min_odds_ratio: Annotated[float, typer.Option(help="Odds ratios above this.")] = 1.0,
    max_q: Annotated[
        float | None, typer.Option(help="Benjamini-Hochberg q-values up to this.", show_default=False)
    ] = None,
    min_neutral_frequency: Annotated[
        float, typer.Option(help="Share of samples a survivor fires on under the neutral prompt.")
    ] = 0.01,
    min_image_mass: Annotated[
        float, typer.Option(help="Its mass on image tokens is above this share.")
    ] = 0.5,
    cluster: Annotated[str, typer.Option(help="Sample column that names the image.")] = "sample",
    holdout: Annotated[float, typer.Option(help="Share of images that selection does not see.")] = 0.5,
    neighbours: Annotated[int, typer.Option(help="Nearest features a matched control is drawn from.")] = 20,
    draws: Annotated[int, typer.Option(help="Control sets and bootstrap replicates.")] = 1000,
    pages: Annotated[int, typer.Option(help="Features with a page; 0 for none.")] = 60,
    label_model: Annotated[
        str | None, typer.Option(help="Language model that labels them.", show_default="by counting words")
    ] = None,
    label_url: Annotated[
        str | None, typer.Option(help="Its OpenAI-compatible address.", show_default="OpenAI's")
    ] = None,
    label_budget: Annotated[float, typer.Option(help="Largest estimated price that is begun.")] = 1.0,
    seed: Annotated[int, typer.Option(help="Seed of dictionaries, splits and draws.")] = 0,
    progress: Progress = True,
    config: Config = None,
) -> None:
    """Find the features of the base model's dictionaries that fine-tuning on pictures changed.

    Example: `microtome diff runs/lm runs/vlm --spatial "task = 'spatial'" --data questions.jsonl --out runs/diff`
    """
    from microtome.dictionary import TrainConfig
    from microtome.diffing import study
    from microtome.diffing.interpretation import read_samples
    from microtome.report.study import report_study

    told = study.DiffConfig(
        train=TrainConfig(d_sae=d_sae, k=k, steps=steps, batch_size=batch_size, seed=seed),
        spatial=expression("spatial", spatial),
        vision=expression("vision", vision),
        text_dictionary=text_dictionary,  # type: ignore[arg-type]
        gap_tokens=gap_tokens,  # type: ignore[arg-type]
        gap_average=gap_average,  # type: ignore[arg-type]
        p_gap=p_gap,
        p_cos=p_cos,
        unit=unit,  # type: ignore[arg-type]
        base_is_complement=not nested,
        spatial_top=spatial_top,
        min_gap=min_gap,
        min_odds_ratio=min_odds_ratio,
        max_q=max_q,
        min_neutral_frequency=min_neutral_frequency,
        min_image_mass=min_image_mass,
        cluster=cluster,
        holdout=holdout,
        neighbours=neighbours,
        draws=draws,
    )
    seen = open_store(vlm)
    samples = read_samples(seen, data, tokenizer)
    result = study.run(
        open_store(base),
        seen,
        out,
        told,
        dictionaries=None if dictionaries is None else _dictionaries(dictionaries, seen.hooks),
        neutral=None if neutral is None else open_store(neutral),
        texts=samples.texts or None,
        progress=progress,
    )
    labeller = None if label_model is None else (label_model, label_url, label_budget)
    facts = {"base": str(base), "VLM": str(vlm), "dictionaries": f"{d_sae} features, k = {k}, {steps} steps"}
    for line in report_study(result, seen, samples, out, facts, pages, labeller, progress):
        say(line)


def _dictionaries(folder: Path, hooks: list[str]) -> dict[str, SAE]:
    """Dictionaries of a folder, in any known format, by the hooks that name their folders."""
    from urllib.parse import quote

    from microtome.dictionary import SAE

    places = {hook: folder / quote(hook, safe=".-_") for hook in hooks}
    found = {hook: SAE.load_from_disk(place) for hook, place in places.items() if place.exists()}
    if not found:
        raise typer.BadParameter(
            f"--dictionaries {folder}: expected folders named {', '.join(hooks)}, found none"
        )
    return found
