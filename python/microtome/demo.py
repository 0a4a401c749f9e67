"""The main job on the shipped model: capture, store, encode, count, compare, show.

1. Ask the base LM and the VLM a few thousand questions, in words and in pictures, and capture every layer's residual stream.
2. Train a small TopK SAE on the VLM's middle layer, on the way.
3. Encode; count how often each feature fires on image and on text tokens; take the variance gap of VLM images over LM text.
4. Compare the layers of LM and VLM on the same words by CKA.
5. Write tables (parquet) and one self-contained page, ``report.html``.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import polars as pl

import microtome as mt
from microtome import organism
from microtome.capture import capture
from microtome.dictionary import SAE, TrainConfig, train_sae
from microtome.evaluation import score
from microtome.store import ActivationStore

__all__ = ["run"]

_HOOKS = ["blocks.*.hook_resid_post"]
_SEED = 0


@dataclass(frozen=True)
class _Paths:
    """Where the demo puts what it makes."""

    out: Path

    def store(self, which: str) -> Path:
        return self.out / "stores" / which

    @property
    def sae(self) -> Path:
        return self.out / "sae"

    def table(self, name: str) -> Path:
        return self.out / "tables" / f"{name}.parquet"


def run(out: str | Path = "demo", *, questions: int = 2800, progress: bool = True) -> Path:
    """Run the whole demo and return the path of the report.

    Args:
        out: folder for stores, tables, the SAE and ``report.html``; a run that was interrupted continues there.
        questions: number of questions, half of them in pictures, half in words.
        progress: whether to draw bars.
    """
    started = time.monotonic()
    paths = _Paths(Path(out))
    paths.table("x").parent.mkdir(parents=True, exist_ok=True)
    items = organism.dataset(questions, seed=_SEED)
    scores = _ask(paths, items, progress)
    vlm, lm = ActivationStore(paths.store("vlm")), ActivationStore(paths.store("base_lm"))
    hook = vlm.hooks[len(vlm.hooks) // 2]
    sae = _dictionary(paths, vlm, hook, progress)
    features = _features(vlm, lm, hook, sae)
    cka = _layer_map(vlm, lm)
    samples = _samples(vlm, hook, sae, features)
    for name, table in {"scores": scores, "features": features, "cka": cka, "top_samples": samples}.items():
        table.write_parquet(paths.table(name))
    page = _page(vlm, lm, hook, sae, items, scores, features, cka, samples, time.monotonic() - started)
    return page.write(paths.out / "report.html")


def _ask(paths: _Paths, items: list[organism.Item], progress: bool) -> pl.DataFrame:
    """Answers of both models; their residual streams go to a store each."""
    words = [item for item in items if item.form == "textual"]
    tables = []
    for which, asked in (("base_lm", words), ("vlm", items)):
        model, known = organism.load_model(which), paths.table(f"scores_{which}")
        with capture(model, paths.store(which), hooks=_HOOKS, dtype="bfloat16", progress=False) as recorder:
            fresh = score(
                model,
                organism.load_processor(),
                asked,
                recorder=recorder,
                label=f"{which} answers",
                progress=progress,
            )
        if known.exists():  # answers of an interrupted run
            fresh = pl.concat([pl.read_parquet(known), fresh]).unique("id", keep="first", maintain_order=True)
        fresh.write_parquet(known)
        tables.append(fresh.with_columns(model=pl.lit(which)))
    return pl.concat(tables)


def _dictionary(paths: _Paths, vlm: ActivationStore, hook: str, progress: bool) -> SAE:
    """The SAE of ``hook``, trained once."""
    if paths.sae.exists():
        return SAE.load_from_disk(paths.sae)
    config = TrainConfig(d_sae=1024, k=16, seed=_SEED, steps=1500, batch_size=1024)
    sae = train_sae(vlm[hook], config, progress=progress).sae
    sae.save_to_disk(paths.sae)
    return sae


def _features(vlm: ActivationStore, lm: ActivationStore, hook: str, sae: SAE) -> pl.DataFrame:
    """One row per feature: firing frequency by token kind, variance gap, odds ratio of image over text tokens."""
    acts = vlm[hook]
    codes = sae.encode(acts)
    kind = acts.rows.select("kind").collect()["kind"].cast(pl.String).to_numpy()
    by_kind = mt.feature_stats(codes, by=kind)
    visual = acts.where(pl.col("form") == "visual")
    vision = mt.feature_stats(sae.encode(visual))  # image and question, in the VLM
    text = mt.feature_stats(sae.encode(lm[hook]))  # the same scenes in words, in the base LM
    odds = mt.odds_ratio(by_kind["image"], by_kind["text"])
    return pl.DataFrame(
        {
            "feature": np.arange(codes.d_sae, dtype=np.uint32),
            "frequency_image": by_kind["image"].firing_frequency(),
            "frequency_text": by_kind["text"].firing_frequency(),
            "variance_gap": mt.variance_gap(vision, text),
            "odds_ratio": odds.odds_ratio,
            "log_standard_error": odds.log_standard_error,
            "dead": by_kind["image"].merge(by_kind["text"]).dead(),
        }
    )


def _layer_map(vlm: ActivationStore, lm: ActivationStore) -> pl.DataFrame:
    """Debiased linear CKA of every LM layer with every VLM layer, on the rows of the same questions in words."""
    words = [vlm[hook].where(pl.col("form") == "textual") for hook in vlm.hooks]
    values = mt.cka_matrix([lm[hook] for hook in lm.hooks], words)
    rows = [(i, j, float(values[i, j])) for i in range(len(lm.hooks)) for j in range(len(vlm.hooks))]
    return pl.DataFrame(rows, schema=["lm_layer", "vlm_layer", "cka"], orient="row")


def _samples(vlm: ActivationStore, hook: str, sae: SAE, features: pl.DataFrame) -> pl.DataFrame:
    """Top samples of the features that fire on images, strongest gap first, and of the strongest on words."""
    often = features.filter(~pl.col("dead") & (pl.col("frequency_image") + pl.col("frequency_text") > 0.002))
    vision = often.sort("variance_gap", descending=True)["feature"].head(4)
    words = often.sort("variance_gap")["feature"].head(2)
    chosen = [*vision.to_list(), *words.to_list()]
    acts = vlm[hook]
    top = mt.top_samples(sae.encode(acts), acts.rows, n=6, features=chosen)
    order = pl.DataFrame(
        {"feature": chosen, "place": range(len(chosen))}, schema_overrides={"feature": top["feature"].dtype}
    )
    names = vlm.samples.select("sample", "id").collect()
    return top.join(names, on="sample").join(order, on="feature").sort("place", "rank").drop("place")
