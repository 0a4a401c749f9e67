"""What a study reads of one layer: signals on both sides, the shift to spatial questions, the neutral prompt."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import polars as pl

from microtome.dictionary import SAE
from microtome.diffing.config import DiffConfig
from microtome.diffing.counting import fires_by_label, labels_of, mean_square_by_sample
from microtome.diffing.signals import firing_shift, signals
from microtome.errors import ShapeError
from microtome.metrics import Analysis, FeatureStats, analyse
from microtome.store import Activations, ActivationStore

__all__ = ["check_seen", "compared_kinds", "held_out", "layer_signals", "neutral_activity", "seen_rows"]

_KEY = ["layer", "feature"]
_SETS = ("other", "spatial")
_HELD_OUT = ", held out"


def seen_rows(vlm: ActivationStore, hook: str, config: DiffConfig) -> Activations:
    """The VLM rows of a hook that stand for vision."""
    return vlm[hook] if config.vision is None else vlm[hook].where(config.vision)


def check_seen(seen: Activations, config: DiffConfig, held: pl.Expr | None) -> None:
    """Refuse rows that leave a part of the study without any.

    Raises:
        ShapeError: no rows for vision or for the variance gap; spatial questions alone, or others alone, among those that
            features are chosen by or among those held out.
    """
    rows = _sides(seen, config, held)
    if not rows.height:
        raise ShapeError(f"vision: expected rows of the VLM, found none by {config.vision}")
    if config.gap_tokens not in ("all", *rows["kind"]):
        kinds = ", ".join(rows["kind"].drop_nulls().unique().sort())
        raise ShapeError(
            f"gap_tokens: expected a kind among {kinds} of the rows for vision, found {config.gap_tokens}"
        )
    if held is None:
        return
    for part, where in (
        ("", pl.lit(value=True)),
        (" to choose by", ~pl.col("held")),
        (" held out", pl.col("held")),
    ):
        found = rows.filter(where)["spatial"].to_list()
        for name, value in (("spatial", True), ("other", False)):
            if value not in found:
                raise ShapeError(
                    f"spatial: expected questions of both kinds, found no {name} ones{part} by {config.spatial}"
                )


def compared_kinds(seen: Activations, config: DiffConfig, held: pl.Expr) -> list[str]:
    """Kinds of token that held-out spatial and other questions both have, ``all`` first."""
    rows = _sides(seen, config, held).filter("held")
    return ["all", *(k for k in ("text", "image") if rows.filter(kind=k)["spatial"].n_unique() == 2)]


def _sides(seen: Activations, config: DiffConfig, held: pl.Expr | None) -> pl.DataFrame:
    """Which combinations of question, side of the holdout and kind of token there are."""
    spatial = (
        pl.lit(value=None, dtype=pl.Boolean)
        if config.spatial is None
        else config.spatial.fill_null(value=False)
    )
    return labels_of(
        seen,
        spatial.alias("spatial"),
        (pl.lit(value=False) if held is None else held).alias("held"),
        pl.col("kind").cast(pl.String),
    ).unique()


def held_out(vlm: ActivationStore, config: DiffConfig) -> pl.Expr:
    """Which rows belong to images that spatial features are not chosen by; decided by the seed and the images' names.

    Raises:
        ShapeError: too few images for both sides.
    """
    images = vlm.samples.select("sample", pl.col(config.cluster).alias("image")).collect()
    names = images["image"].unique().sort()
    n = round(config.holdout * len(names))
    if not 0 < n < len(names):
        raise ShapeError(
            f"holdout: expected images on both sides of {config.holdout}, found {len(names)} images"
        )
    chosen = np.random.default_rng(config.train.seed).permutation(len(names))[:n]
    samples = images.filter(pl.col("image").is_in(names.gather(chosen).to_list()))["sample"]
    return pl.col("sample").is_in(samples.to_list())


def layer_signals(
    base: ActivationStore,
    vlm: ActivationStore,
    hook: str,
    layer: int,
    stages: Mapping[str, Mapping[str, SAE]],
    config: DiffConfig,
    held: pl.Expr | None,
    progress: bool,
) -> tuple[pl.DataFrame, pl.DataFrame]:
    """Signals of every feature of a layer, and their top samples by data set, from one pass over each side."""
    sae = stages[config.regimes[0]][hook]
    seen = seen_rows(vlm, hook, config)
    labels = None if held is None else _labels(seen, config, held)
    vision = analyse(seen, sae, by=labels, top=config.top_samples, progress=progress)
    text_sae = sae if config.text_dictionary == "adapted" else stages["base"][hook]
    text = analyse(base[hook], text_sae, top=0, progress=progress)
    stats, text_stats = _merged(vision.stats), _merged(text.stats)
    table = signals(layer, stages["base"][hook].W_dec, sae.W_dec, stats, text_stats)
    gap = _gap(seen, base[hook], sae, text_sae, stats, text_stats, config, progress)
    table = table.with_columns(variance_gap=pl.Series(gap), hook=pl.lit(hook))
    if labels is not None:
        shifted = firing_shift(layer, *_shift(vision, seen, sae, labels, config))
        table = table.join(shifted, on=_KEY, maintain_order="left")
    return table, _top(vision, layer)


def neutral_activity(store: ActivationStore, hook: str, layer: int, sae: SAE, progress: bool) -> pl.DataFrame:
    """Per feature: share of samples on which it fires under the neutral prompt, and its mass on image tokens."""
    acts = store[hook]
    by_kind = analyse(acts, sae, by=pl.col("kind").cast(pl.String), top=0, progress=progress).stats
    mass = {kind: stats.sum for kind, stats in by_kind.items()} if isinstance(by_kind, dict) else {}
    total = np.sum(list(mass.values()), axis=0)
    image = mass.get("image", np.zeros(sae.d_sae))
    share = np.divide(image, total, out=np.zeros(sae.d_sae), where=total > 0)
    samples = fires_by_label(acts, sae, pl.Series(np.zeros(len(acts), np.int8)))[0]
    index = {"layer": np.full(sae.d_sae, layer, np.int64), "feature": np.arange(sae.d_sae, dtype=np.int64)}
    return pl.DataFrame(index | {"sample_frequency": samples.firing_frequency(), "image_mass": share})


def _labels(seen: Activations, config: DiffConfig, held: pl.Expr) -> pl.Series:
    """The data set of each row: spatial or other questions, and whether its image is held out."""
    assert config.spatial is not None  # noqa: S101 - told by the caller
    spatial = config.spatial.fill_null(value=False)
    name = pl.when(spatial).then(pl.lit("spatial")).otherwise(pl.lit("other"))
    suffix = pl.when(held).then(pl.lit(_HELD_OUT)).otherwise(pl.lit(""))
    labels = labels_of(seen, pl.concat_str(name, suffix).alias("label")).to_series()
    if missing := [name for name in _SETS if name not in labels.unique().to_list()]:
        raise ShapeError(
            f"spatial: expected questions of both kinds, found no {missing[0]} ones by {config.spatial}"
        )
    return labels


def _shift(
    vision: Analysis, seen: Activations, sae: SAE, labels: pl.Series, config: DiffConfig
) -> tuple[Any, Any]:
    """Counts on spatial questions and on what they are compared with, from the images that selection may see."""
    if config.unit == "sample":
        counts: Mapping[Any, Any] = fires_by_label(seen, sae, labels)
    else:
        counts = vision.stats if isinstance(vision.stats, dict) else {}
    other, spatial = (counts[name] for name in _SETS)
    return spatial, other if config.base_is_complement else other.merge(spatial)


def _gap(
    seen: Activations,
    words: Activations,
    sae: SAE,
    text_sae: SAE,
    vision: FeatureStats,
    text: FeatureStats,
    config: DiffConfig,
    progress: bool,
) -> Any:
    """The variance gap by the tokens and the average that the configuration asks for, (d_sae,)."""
    if config.gap_tokens != "all":
        seen = seen.where(pl.col("kind") == config.gap_tokens)
    if config.gap_average == "sample":
        return mean_square_by_sample(seen, sae) - mean_square_by_sample(words, text_sae)
    if config.gap_tokens != "all":
        vision = _merged(analyse(seen, sae, top=0, progress=progress).stats)
    return vision.mean_square() - text.mean_square()


def _top(vision: Analysis, layer: int) -> pl.DataFrame:
    """Top samples by data set, those of held-out images among them; ranks run from 1 in each data set."""
    top = vision.top if vision.top is not None else pl.DataFrame()
    if "group" not in top.columns:
        top = top.with_columns(group=pl.lit("vision"))
    dataset = pl.col("group").str.strip_suffix(_HELD_OUT).alias("dataset")
    kept = top.select(dataset, pl.col("feature").cast(pl.Int64), "sample", "position", "activation")
    order = kept.sort(
        "dataset",
        "feature",
        "activation",
        "sample",
        descending=[False, False, True, False],
        maintain_order=True,
    )
    ranked = order.with_columns(rank=pl.int_range(1, pl.len() + 1).over("dataset", "feature"))
    most = int(top["rank"].max() or 0) if top.height else 0  # type: ignore[arg-type]
    return ranked.filter(pl.col("rank") <= most).with_columns(layer=pl.lit(layer, pl.Int64))


def _merged(stats: FeatureStats | dict[Any, FeatureStats]) -> FeatureStats:
    """Statistics of all groups together."""
    if not isinstance(stats, dict):
        return stats
    first, *others = stats.values()
    for part in others:
        first = first.merge(part)
    return first
