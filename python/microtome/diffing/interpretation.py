"""From selected features to what a person judges: texts, pictures, top samples with maps, labels.

Pages go to the survivors first, then to the other spatial features, then to the adapted ones, largest gap first.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import polars as pl

from microtome.diffing.study import DiffResult
from microtome.errors import ShapeError
from microtome.interpret import Evidence, Label, evidence_from, label_features, label_offline
from microtome.interpret.evidence import Decode
from microtome.interpret.labels import Provider
from microtome.store import ActivationStore

__all__ = ["Samples", "gather", "label", "read_samples", "with_labels"]

_METRICS = (
    *("variance_gap", "decoder_cosine", "frequency_vision", "frequency_text"),
    *("frequency_base", "frequency_spatial", "frequency_gap", "odds_ratio", "q_value"),
    *("held_out_gap", "held_out_low", "held_out_high", "neutral_frequency", "neutral_image_mass"),
    *("spatial", "survivor"),
)

LayerEvidence = dict[int, dict[int, list[Evidence]]]
"""Evidence by layer and feature."""


@dataclass(frozen=True)
class Samples:
    """What is known of the samples beside their activations."""

    texts: Mapping[Any, str]
    """Text of each sample, by id; empty when nobody can tell."""
    decode: Decode | None = None
    """Token ids to text."""
    images: Callable[[Any], Any] | None = None
    """The picture of a sample, by id."""


def read_samples(
    store: ActivationStore, data: str | Path | None = None, tokenizer: str | None = None
) -> Samples:
    """Texts and pictures of a store's samples.

    Args:
        store: the captured store.
        data: the data set that was captured, as ``microtome capture --data`` took it: pictures and prompts by id.
        tokenizer: folder or hub id; the model that the store names, where that is a folder here, when None.

    Raises:
        ShapeError: ``data`` names none of the store's samples, or the tokenizer asked for is none.
    """
    decode = _decode(tokenizer or _named_model(store), required=tokenizer is not None)
    if data is None:
        return Samples({} if decode is None else _texts(store, decode), decode)
    from microtome.capture.data import read_items

    items = {item.id: item for item in read_items(data)}
    known = store.samples.select("id").collect()["id"].to_list()
    if not any(id_ in items for id_ in known):
        raise ShapeError(
            f"data: expected samples of {store.path} such as {known[0]!r}, found {next(iter(items))!r} in {data}"
        )
    pictured = {id_: item.image for id_, item in items.items() if item.image is not None}
    texts = {id_: item.prompt for id_, item in items.items()} if decode is None else _texts(store, decode)
    return Samples(texts, decode, pictured.get if pictured else None)


def gather(
    result: DiffResult, vlm: ActivationStore, samples: Samples, *, pages: int = 60, per_dataset: int = 12
) -> LayerEvidence:
    """Top samples, windows and activation maps of the first features in the order of interest."""
    chosen = _ordered(result.features).head(pages).select("layer", "feature")
    top = result.top_samples.filter(pl.col("rank") <= per_dataset).join(
        chosen, on=["layer", "feature"], how="semi"
    )
    hooks = dict(result.features.select("layer", "hook").unique().iter_rows())
    return {
        layer: evidence_from(
            vlm[hooks[layer]],
            result.saes[hooks[layer]],
            top.filter(pl.col("layer") == layer),
            texts=samples.texts or None,
            decode=samples.decode,
            images=samples.images,
        )
        for layer in top["layer"].unique().sort()
    }


def label(
    evidence: LayerEvidence,
    samples: Samples,
    *,
    provider: Provider | None = None,
    cache: str | Path | None = None,
    progress: bool = True,
) -> list[Label]:
    """A label for every feature with evidence: by a language model where there is a provider, else by counting words."""
    background = list(dict.fromkeys(samples.texts.values()))
    labels: list[Label] = []
    for layer, features in evidence.items():
        if provider is None:
            labels += [label_offline(layer, f, items, background) for f, items in features.items()]
        elif cache is None:
            raise ShapeError("cache: expected a file for the language model's labels, found None")
        else:
            labels += label_features(layer, features, provider, cache=cache, progress=progress)
    return labels


def with_labels(features: pl.DataFrame, labels: list[Label]) -> pl.DataFrame:
    """The feature table with these labels in place of those it has."""
    table = pl.DataFrame(
        {
            "layer": pl.Series([item.layer for item in labels], dtype=pl.Int64),
            "feature": pl.Series([item.feature for item in labels], dtype=pl.Int64),
            "label": pl.Series([item.description for item in labels], dtype=pl.String),
            "label_confidence": pl.Series([item.confidence for item in labels], dtype=pl.Float64),
        }
    )
    if "label" not in features.columns:
        return features.join(table, on=["layer", "feature"], how="left", maintain_order="left")
    return features.update(table, on=["layer", "feature"], how="left")


def metrics_of(features: pl.DataFrame, layer: int) -> dict[int, dict[str, object]]:
    """The numbers that a feature's page shows, by feature of a layer."""
    kept = [name for name in _METRICS if name in features.columns]
    part = features.filter((pl.col("layer") == layer) & pl.col("adapted"))
    return {row["feature"]: {name: row[name] for name in kept} for row in part.iter_rows(named=True)}


def _ordered(features: pl.DataFrame) -> pl.DataFrame:
    """Adapted features: survivors, then spatial ones by frequency gap, then the others by variance gap."""
    flags = [name for name in ("survivor", "spatial") if name in features.columns]
    gap = ["frequency_gap"] if "spatial" in flags else []
    keys = [*flags, *gap, "variance_gap"]
    adapted = features.filter("adapted")
    if gap:  # beyond the spatial ones the frequency gap says nothing
        adapted = adapted.with_columns(frequency_gap=pl.when("spatial").then("frequency_gap").otherwise(0.0))
    return adapted.sort(*keys, "layer", "feature", descending=[True] * len(keys) + [False] * 2)


def _named_model(store: ActivationStore) -> str | None:
    model = store.facts.get("model")
    name = model.get("name") if isinstance(model, dict) else None
    return name if name and Path(name).is_dir() else None


def _decode(name: str | None, *, required: bool) -> Decode | None:
    if name is None:
        return None
    from microtome.tensors import extra

    try:
        found = extra("transformers", "models").AutoTokenizer.from_pretrained(name)
    except (OSError, ValueError) as error:
        if required:
            raise ShapeError(
                f"tokenizer: expected a folder or hub id of a tokenizer, found {name!r}"
            ) from error
        return None
    return lambda ids: str(found.decode(ids))


def _texts(store: ActivationStore, decode: Decode) -> dict[Any, str]:
    """Text of every sample from its token ids, image and special tokens left out."""
    plain = (pl.col("kind").cast(pl.String) == "text") & ~pl.col("special").cast(pl.Boolean)
    rows = (
        store.rows.filter(plain).select("sample", "position", "token_id").collect().sort("sample", "position")
    )
    ids = dict(store.samples.select("sample", "id").collect().iter_rows())
    found = {}
    for (sample,), part in rows.group_by("sample", maintain_order=True):
        found[ids[sample]] = decode(part["token_id"].to_list()).strip()
    return found
