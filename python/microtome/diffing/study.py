"""Stage-wise model diffing from two stores to one labelled table, in the order of the paper (2602.08713, sections 4 to 7).

1. A dictionary per layer on the base model's rows (or given ones).
2. Each adapted to the VLM's rows under four regimes: all tokens, image tokens, text tokens, and from random weights.
3. Signals per feature from the text-only dictionaries: variance gap, decoder cosine, firing frequencies.
4. The two-stage filter; the shift to spatial questions; the neutral prompt.
5. The spatial features against matched random ones, on images that they were not chosen by.
6. Top samples and an offline label for every adapted feature.

Dictionaries that are there are not trained again: an interrupted study continues. Memory does not grow with the rows.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl

from microtome.dictionary import SAE
from microtome.diffing.checks import check_neutral, common_hooks, fitting_stores
from microtome.diffing.config import REGIMES, DiffConfig
from microtome.diffing.controls import against_controls
from microtome.diffing.counting import check_expression
from microtome.diffing.passes import (
    check_seen,
    compared_kinds,
    held_out,
    layer_signals,
    neutral_activity,
    seen_rows,
)
from microtome.diffing.selection import (
    neutral_survivors,
    select_adapted,
    select_spatial,
    sensitivity,
    summary,
)
from microtome.diffing.stages import (
    Stages,
    check_dictionaries,
    cosine_quantiles,
    reconstruction,
    train_stages,
)
from microtome.errors import ShapeError
from microtome.metrics import OddsRatio
from microtome.metrics.undefined import warn_undefined
from microtome.record import Record, write_table
from microtome.store import ActivationStore

__all__ = ["REGIMES", "DiffConfig", "DiffResult", "run"]

_KEY = ["layer", "feature"]


@dataclass(frozen=True)
class DiffResult:
    """What a study found. Each table is a parquet file of the same name under ``tables/``."""

    features: pl.DataFrame
    """One row per layer and feature: signals, selections, label."""
    curves: pl.DataFrame
    """FVU, L0 and dead share against tokens seen, per layer and regime."""
    reconstruction: pl.DataFrame
    """FVU of every final dictionary on held-out VLM rows, by kind of token."""
    cosines: pl.DataFrame
    """Quantiles of the decoder cosine per layer and regime."""
    layers: pl.DataFrame
    """Counts and mean cosines per layer."""
    sensitivity: pl.DataFrame
    """The adapted (and spatial) set under other thresholds."""
    controls: pl.DataFrame
    """Spatial features and survivors against matched random features, over all tokens and each kind that questions of
    both sorts have; empty without spatial questions."""
    top_samples: pl.DataFrame
    """Top samples of the adapted features by data set."""
    saes: Mapping[str, SAE]
    """The adapted dictionaries that signals were taken from, by hook."""

    def tables(self) -> dict[str, pl.DataFrame]:
        """The tables by name."""
        return {name: value for name, value in vars(self).items() if isinstance(value, pl.DataFrame)}


def run(
    base: ActivationStore,
    vlm: ActivationStore,
    out: str | Path,
    config: DiffConfig | None = None,
    *,
    dictionaries: Mapping[str, SAE] | None = None,
    neutral: ActivationStore | None = None,
    texts: Mapping[Any, str] | None = None,
    progress: bool = True,
) -> DiffResult:
    """Find the features of a language model's dictionary that multimodal fine-tuning changed.

    Args:
        base: rows of the base language model on the questions, images replaced by words.
        vlm: rows of the VLM on the questions with their images; the same hooks.
        out: folder for dictionaries and tables.
        config: thresholds, regimes, training.
        dictionaries: base dictionaries by hook; trained on ``base`` when None.
        neutral: rows of the VLM under a neutral prompt; without it no feature is tested for survival.
        texts: {sample id: text} of the VLM's samples, for offline labels.
        progress: whether to draw bars.

    Raises:
        ShapeError: stores of other models, hooks or widths, dictionaries of other widths, expressions over columns that
            are not there, no rows for vision or the variance gap, questions of one kind alone to choose by or held out;
            before any work, with both sides named.
    """
    config = config or DiffConfig()
    hooks = common_hooks(base, vlm)
    held = _check(base, vlm, hooks, config, dictionaries, neutral)
    folder = Path(out)
    stages, curves = train_stages(base, vlm, hooks, folder / "dictionaries", config, dictionaries, progress)
    saes = stages[config.regimes[0]]
    features = _features(base, vlm, hooks, stages, folder, config, held, progress)
    if config.spatial is not None and neutral is not None:
        activity = [neutral_activity(neutral, h, i, saes[h], progress) for i, h in enumerate(hooks)]
        features = neutral_survivors(
            features,
            pl.concat(activity),
            min_frequency=config.min_neutral_frequency,
            min_image_mass=config.min_image_mass,
        )
    features, controls = _controls(features, vlm, hooks, saes, config, held)
    top = _top_of(features, folder / "top", vlm, config)
    if texts is not None:
        features = _labelled(features, top, texts)
    result = DiffResult(
        features=features,
        curves=curves,
        reconstruction=reconstruction(vlm, stages, config, progress),
        cosines=cosine_quantiles(stages, hooks),
        layers=summary(features),
        sensitivity=sensitivity(features),
        controls=controls,
        top_samples=top,
        saes=saes,
    )
    _write(result, folder / "tables", _record(base, vlm, neutral, config))
    return result


def _check(
    base: ActivationStore,
    vlm: ActivationStore,
    hooks: list[str],
    config: DiffConfig,
    dictionaries: Mapping[str, SAE] | None,
    neutral: ActivationStore | None,
) -> pl.Expr | None:
    """Refuse whatever can be refused before any work; which rows are held out, where spatial questions are asked for."""
    fitting_stores(base, vlm)
    if dictionaries is not None:
        check_dictionaries(dictionaries, vlm, hooks)
    if neutral is not None:
        check_neutral(neutral, vlm, hooks)
    check_expression(vlm, pl.col(config.cluster), "cluster", None)
    for name in ("vision", "spatial"):
        expression = getattr(config, name)
        if expression is not None:
            check_expression(vlm, expression, name)
    widest = max(config.train.features(vlm[hook].width) for hook in hooks)
    if dictionaries is None and config.train.k > widest:
        raise ShapeError(f"k: expected at most d_sae = {widest}, found {config.train.k}")
    held = held_out(vlm, config) if config.spatial is not None else None
    check_seen(seen_rows(vlm, hooks[0], config), config, held)
    return held


def _features(
    base: ActivationStore,
    vlm: ActivationStore,
    hooks: list[str],
    stages: Stages,
    folder: Path,
    config: DiffConfig,
    held: pl.Expr | None,
    progress: bool,
) -> pl.DataFrame:
    """Signals of all layers, and what the filters make of them; top samples go to a file per layer."""
    tables = []
    (folder / "top").mkdir(parents=True, exist_ok=True)
    for layer, hook in enumerate(hooks):
        table, top = layer_signals(base, vlm, hook, layer, stages, config, held, progress)
        top.write_parquet(folder / "top" / f"{layer:03d}.parquet")
        tables.append(table)
    features = select_adapted(pl.concat(tables), p_gap=config.p_gap, p_cos=config.p_cos)
    if config.spatial is None:
        return features
    return select_spatial(
        _pooled_q(features),
        top=None if config.min_gap is not None else config.spatial_top,
        min_gap=config.min_gap,
        min_odds_ratio=config.min_odds_ratio,
        max_q=config.max_q,
    )


def _pooled_q(features: pl.DataFrame) -> pl.DataFrame:
    """q-values over the living features of all layers, as the filter pools them; null for dead ones."""
    living = features.filter(~pl.col("dead"))
    odds, error, p = (living[c].to_numpy() for c in ("odds_ratio", "log_standard_error", "p_value"))
    q = OddsRatio(odds, np.log(odds), error, p).q_value()
    pooled = living.select(_KEY).with_columns(q_value=pl.Series(q))
    return features.drop("q_value").join(pooled, on=_KEY, how="left", maintain_order="left")


def _controls(
    features: pl.DataFrame,
    vlm: ActivationStore,
    hooks: list[str],
    saes: Mapping[str, SAE],
    config: DiffConfig,
    held: pl.Expr | None,
) -> tuple[pl.DataFrame, pl.DataFrame]:
    """Chosen sets against matched random features on held-out images, over all tokens and over each kind."""
    tables, each = [], None
    if held is None or config.spatial is None:
        return features, pl.DataFrame()
    kinds = compared_kinds(seen_rows(vlm, hooks[0], config), config, held)
    if absent := [kind for kind in ("text", "image") if kind not in kinds]:
        reason = "held-out questions with and without a relation do not both have such tokens"
        warn_undefined("the comparison with random features", reason, absent, stacklevel=4)
    for chosen in (name for name in ("spatial", "survivor") if name in features.columns):
        if not features.filter(chosen & (pl.col(config.match) > 0)).height:
            continue
        for kind in kinds:
            where = held if kind == "all" else held & (pl.col("kind") == kind)
            table, gaps = against_controls(
                features,
                lambda layer: (seen_rows(vlm, hooks[layer], config), saes[hooks[layer]]),
                config.spatial.fill_null(value=False),
                chosen=chosen,
                where=where,
                match=config.match,
                neighbours=config.neighbours,
                n_draws=config.draws,
                unit=config.unit,
                cluster=config.cluster,
                level=config.level,
                seed=config.train.seed,
            )
            tables.append(table.select("set", pl.lit(kind).alias("tokens"), pl.exclude("set")))
            each = gaps if each is None else each
    if each is not None:
        features = features.join(each, on=_KEY, how="left", maintain_order="left")
    return features, pl.concat(tables) if tables else pl.DataFrame()


def _top_of(features: pl.DataFrame, folder: Path, vlm: ActivationStore, config: DiffConfig) -> pl.DataFrame:
    """Top samples of the adapted features, one per image, with the ids of their samples."""
    wanted = features.filter("adapted").select(_KEY).lazy()
    images = pl.col("sample") if config.cluster == "sample" else pl.col(config.cluster)
    names = vlm.samples.select("sample", "id", image=images)
    files = sorted(folder.glob("*.parquet"))
    top = pl.concat([pl.scan_parquet(file) for file in files]).join(wanted, on=_KEY, how="semi")
    place = ("layer", "dataset", "feature")
    first = (
        top.join(names, on="sample", how="left")
        .sort(*place, "rank")
        .unique([*place, "image"], keep="first", maintain_order=True)
        .with_columns(rank=pl.int_range(1, pl.len() + 1).over(place))
    )
    return first.filter(pl.col("rank") <= config.top_samples).sort(*_KEY, "dataset", "rank").collect()


def _labelled(features: pl.DataFrame, top: pl.DataFrame, texts: Mapping[Any, str]) -> pl.DataFrame:
    """Offline labels of the adapted features: what their top samples' words have in common."""
    from microtome.interpret import collect, label_offline

    background = list(dict.fromkeys(texts.values()))
    rows = []
    for (layer,), part in top.group_by("layer", maintain_order=True):
        datasets = part["dataset"].unique(maintain_order=True).to_list()
        parts = {name: part.filter(pl.col("dataset") == name) for name in datasets}
        for feature, evidence in collect(parts, dict.fromkeys(parts, texts)).items():
            rows.append(dataclasses.asdict(label_offline(int(layer), feature, evidence, background)))
    schema = {"layer": pl.Int64, "feature": pl.Int64, "label": pl.String, "label_confidence": pl.Float64}
    labels = pl.DataFrame(
        [
            {"layer": r["layer"], "feature": r["feature"], "label": r["description"]}
            | {"label_confidence": r["confidence"]}
            for r in rows
        ],
        schema=schema,
    )
    return features.join(labels, on=_KEY, how="left", maintain_order="left")


def _record(
    base: ActivationStore, vlm: ActivationStore, neutral: ActivationStore | None, config: DiffConfig
) -> Record:
    """What the tables of a study were made from."""
    stores = [store for store in (base, vlm, neutral) if store is not None]
    inputs = {str(store.path): store.fingerprint for store in stores}
    told = {field.name: str(getattr(config, field.name)) for field in dataclasses.fields(config)}
    return Record("diff", inputs, told, rows=sum(store.n_rows for store in stores))


def _write(result: DiffResult, folder: Path, record: Record) -> None:
    for name, table in result.tables().items():
        write_table(table, folder / f"{name}.parquet", record)
