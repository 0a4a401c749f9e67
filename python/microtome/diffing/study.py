"""Stage-wise model diffing from two stores to one labelled table, in the order of the paper (2602.08713, sections 4 to 7).

1. A dictionary per layer on the base model's rows (or given ones).
2. Each adapted to the VLM's rows under four regimes: all tokens, image tokens, text tokens, and from random weights.
3. Signals per feature from the text-only dictionaries: variance gap, decoder cosine, firing frequencies.
4. The two-stage filter; the shift to spatial questions; the neutral prompt.
5. Top samples and an offline label for every adapted feature.

Each part is a table on disk before the next begins, and dictionaries that are there are not trained again: an interrupted
study continues.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl

from microtome.dictionary import SAE, TrainConfig, train_layers
from microtome.diffing.selection import (
    neutral_survivors,
    select_adapted,
    select_spatial,
    sensitivity,
    summary,
)
from microtome.diffing.signals import firing_shift, signals
from microtome.errors import ShapeError
from microtome.metrics import FeatureStats, analyse, decoder_cosine
from microtome.store import Activations, ActivationStore

__all__ = ["REGIMES", "DiffConfig", "DiffResult", "run"]

REGIMES: dict[str, pl.Expr | None] = {
    "text": pl.col("kind") == "text",
    "image": pl.col("kind") == "image",
    "full": None,
    "random": None,
}
"""Which tokens enter the loss; ``random`` sees all of them but starts from random weights."""

_KEY = ["layer", "feature"]


@dataclass(frozen=True, kw_only=True)
class DiffConfig:
    """What a study is told; the defaults are the paper's where it gives a number."""

    train: TrainConfig = field(default_factory=lambda: TrainConfig(k=50))
    """How base dictionaries are trained; adaptation uses the same with a regime of its own."""
    adapt_steps: int | None = None
    """Steps of the adaptation; as many as the base dictionaries' when None."""
    regimes: tuple[str, ...] = ("text", "image", "full", "random")
    """Regimes to train; the first is the one that signals are taken from."""
    spatial: pl.Expr | None = None
    """Which VLM rows are spatial questions, over row and sample columns; None leaves that part out."""
    base_is_complement: bool = True
    """Compare spatial with the other questions; False: with all of them (nested, as in the paper)."""
    vision: pl.Expr | None = None
    """Which VLM rows stand for vision in the variance gap; all by default."""
    p_gap: float = 0.2
    p_cos: float = 0.2
    spatial_top: float = 0.2
    top_samples: int = 20

    def __post_init__(self) -> None:
        if unknown := sorted(set(self.regimes) - set(REGIMES)):
            raise ShapeError(f"regimes: expected some of {', '.join(REGIMES)}, found {unknown[0]!r}")
        if not self.regimes:
            raise ShapeError("regimes: expected at least one, found none")


@dataclass(frozen=True)
class DiffResult:
    """The tables of a study; each is a parquet file of the same name under ``tables/``."""

    features: pl.DataFrame
    """One row per layer and feature: signals, selections, label."""
    curves: pl.DataFrame
    """FVU, L0 and dead share against tokens seen, per layer and regime."""
    cosines: pl.DataFrame
    """Quantiles of the decoder cosine per layer and regime."""
    layers: pl.DataFrame
    """Counts and mean cosines per layer."""
    sensitivity: pl.DataFrame
    """The adapted set under other thresholds."""
    top_samples: pl.DataFrame
    """Top samples of the adapted features."""


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
        ShapeError: the stores differ in hooks or widths; the message names both sides.
    """
    config = config or DiffConfig()
    hooks = _common_hooks(base, vlm)
    folder = Path(out)
    saes, curves = _dictionaries(base, vlm, hooks, folder / "dictionaries", config, dictionaries, progress)
    tables = [_layer(base, vlm, hook, i, saes, config, progress) for i, hook in enumerate(hooks)]
    features = select_adapted(pl.concat([t for t, _ in tables]), p_gap=config.p_gap, p_cos=config.p_cos)
    if config.spatial is not None:
        features = select_spatial(features, top=config.spatial_top)
        if neutral is not None:
            features = neutral_survivors(
                features, _neutral(neutral, hooks, saes[config.regimes[0]], progress)
            )
    top = _top_of(features, pl.concat([t for _, t in tables]), vlm)
    if texts is not None:
        features = _labelled(features, top, texts)
    result = DiffResult(
        features=features,
        curves=curves,
        cosines=_cosine_quantiles(saes, hooks),
        layers=summary(features),
        sensitivity=sensitivity(features),
        top_samples=top,
    )
    _write(result, folder / "tables")
    return result


def _common_hooks(base: ActivationStore, vlm: ActivationStore) -> list[str]:
    hooks = [hook for hook in vlm.hooks if hook in base.hooks]
    if not hooks:
        raise ShapeError(f"base, vlm: expected hooks in common, found {base.hooks} and {vlm.hooks}")
    for hook in hooks:
        if base[hook].width != vlm[hook].width:
            raise ShapeError(
                f"base, vlm: expected one width at {hook}, found {base[hook].width} and {vlm[hook].width}"
            )
    return hooks


def _dictionaries(
    base: ActivationStore,
    vlm: ActivationStore,
    hooks: list[str],
    folder: Path,
    config: DiffConfig,
    given: Mapping[str, SAE] | None,
    progress: bool,
) -> tuple[dict[str, dict[str, SAE]], pl.DataFrame]:
    """Dictionaries by stage ("base" and each regime) and hook, and their curves."""
    curves = []
    if given is None:
        trained = train_layers(
            base, config.train.replace(regime="base"), hooks=hooks, out=folder / "base", progress=progress
        )
        given, curves = trained.saes, [trained.curves]
    if missing := [hook for hook in hooks if hook not in given]:
        raise ShapeError(f"dictionaries: expected one for {missing[0]}, found {', '.join(given)}")
    stages = {"base": {hook: given[hook] for hook in hooks}}
    for regime in config.regimes:
        told = config.train.replace(
            regime=regime, loss_where=REGIMES[regime], steps=config.adapt_steps or config.train.steps
        )
        if (
            regime == "random"
        ):  # other first weights than the base dictionary's, or their cosine would say nothing
            told = told.replace(seed=told.seed + 1)
        start = None if regime == "random" else stages["base"]
        adapted = train_layers(vlm, told, hooks=hooks, base=start, out=folder / regime, progress=progress)
        stages[regime] = adapted.saes
        curves.append(adapted.curves)
    return stages, pl.concat(curves)


def _layer(
    base: ActivationStore,
    vlm: ActivationStore,
    hook: str,
    layer: int,
    saes: Mapping[str, Mapping[str, SAE]],
    config: DiffConfig,
    progress: bool,
) -> tuple[pl.DataFrame, pl.DataFrame]:
    """The signals of one layer, and the top samples of its features."""
    sae = saes[config.regimes[0]][hook]
    seen = vlm[hook] if config.vision is None else vlm[hook].where(config.vision)
    vision = analyse(seen, sae, top=config.top_samples, progress=progress)
    text = analyse(base[hook], sae, top=0, progress=progress)
    table = signals(layer, saes["base"][hook].W_dec, sae.W_dec, _all(vision.stats), _all(text.stats))
    if config.spatial is not None:
        shifted = firing_shift(layer, *_split(vlm[hook], sae, config, progress))
        table = table.join(shifted, on=_KEY, maintain_order="left")
    top = vision.top if vision.top is not None else pl.DataFrame()
    return table.with_columns(hook=pl.lit(hook)), top.with_columns(layer=pl.lit(layer, pl.Int64))


def _split(
    acts: Activations, sae: SAE, config: DiffConfig, progress: bool
) -> tuple[FeatureStats, FeatureStats]:
    """Statistics on spatial questions and on what they are compared with."""
    assert config.spatial is not None  # noqa: S101 - told by the caller
    spatial = _all(analyse(acts.where(config.spatial), sae, top=0, progress=progress).stats)
    others = _all(analyse(acts.where(~config.spatial), sae, top=0, progress=progress).stats)
    return spatial, others if config.base_is_complement else others.merge(spatial)


def _neutral(
    store: ActivationStore, hooks: list[str], saes: Mapping[str, SAE], progress: bool
) -> pl.DataFrame:
    """Per feature: share of samples on which it fires under the neutral prompt, and its mass on image tokens."""
    from microtome.metrics import sample_fires

    tables = []
    for layer, hook in enumerate(hooks):
        acts, sae = store[hook], saes[hook]
        by_kind = analyse(acts, sae, by=pl.col("kind").cast(pl.String), top=0, progress=progress).stats
        if not isinstance(by_kind, dict):
            raise ShapeError(f"neutral: expected rows of several kinds at {hook}, found one group")
        mass = {kind: stats.sum for kind, stats in by_kind.items()}
        total = np.sum(list(mass.values()), axis=0)
        image = mass.get("image", np.zeros_like(total))
        samples = sample_fires(sae.encode(acts), acts.rows)
        share = np.divide(image, total, out=np.zeros_like(total), where=total > 0)
        columns = {"sample_frequency": samples.firing_frequency(), "image_mass": share}
        index = {
            "layer": np.full(sae.d_sae, layer, np.int64),
            "feature": np.arange(sae.d_sae, dtype=np.int64),
        }
        tables.append(pl.DataFrame(index | columns))
    return pl.concat(tables)


def _cosine_quantiles(saes: Mapping[str, Mapping[str, SAE]], hooks: list[str]) -> pl.DataFrame:
    """Mean and quantiles of the decoder cosine with the base dictionary, per layer and regime."""
    rows = []
    for regime in (name for name in saes if name != "base"):
        for layer, hook in enumerate(hooks):
            cosine = np.asarray(decoder_cosine(saes["base"][hook].W_dec, saes[regime][hook].W_dec))
            low, middle, high = np.nanquantile(cosine, [0.1, 0.5, 0.9])
            rows.append(
                {"regime": regime, "layer": layer, "hook": hook, "cosine": float(np.nanmean(cosine))}
                | {"q10": float(low), "median": float(middle), "q90": float(high)}
            )
    return pl.DataFrame(rows)


def _top_of(features: pl.DataFrame, top: pl.DataFrame, vlm: ActivationStore) -> pl.DataFrame:
    """Top samples of the adapted features, with the ids of their samples."""
    wanted = features.filter("adapted").select(_KEY)
    names = vlm.samples.select("sample", "id").collect()
    kept = top.with_columns(pl.col("feature").cast(pl.Int64)).join(wanted, on=_KEY, how="semi")
    return kept.join(names, on="sample", how="left").sort(*_KEY, "rank")


def _labelled(features: pl.DataFrame, top: pl.DataFrame, texts: Mapping[Any, str]) -> pl.DataFrame:
    """Offline labels of the adapted features: what their top samples' words have in common."""
    from microtome.interpret import collect, label_offline

    background = list(dict.fromkeys(texts.values()))
    rows = []
    for (layer,), part in top.group_by("layer", maintain_order=True):
        for feature, evidence in collect({"vlm": part}, {"vlm": texts}).items():
            label = label_offline(int(layer), feature, evidence, background)
            rows.append(dataclasses.asdict(label))
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


def _all(stats: FeatureStats | dict[Any, FeatureStats]) -> FeatureStats:
    """Statistics of an analysis that was not grouped."""
    if isinstance(stats, dict):
        raise ShapeError("statistics: expected those of all rows, found groups")
    return stats


def _write(result: DiffResult, folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for name, table in vars(result).items():
        table.write_parquet(folder / f"{name}.parquet")
