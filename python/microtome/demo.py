"""The main job on the shipped model: capture, store, encode, count, compare, show.

1. Ask the base LM and the VLM a few thousand questions, in words and in pictures, and capture every layer's residual stream.
2. Train a small TopK SAE on the VLM's middle layer, on the way.
3. Encode; count how often each feature fires on image and on text tokens; take the variance gap of VLM images over LM text.
4. Compare the layers of LM and VLM on the same words by CKA.
5. Write tables (parquet) and one self-contained page, ``report.html``.
"""

from __future__ import annotations

import io
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl

import microtome as mt
from microtome import organism
from microtome.capture import capture
from microtome.dictionary import SAE, TrainConfig, train_sae
from microtome.errors import StoreError
from microtome.evaluation import accuracy, score
from microtome.organism.scenes import CELLS, GRID
from microtome.report import Card, Page, figures
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
    if (
        not words[0]
        .sample_ids.select("id")
        .collect()
        .equals(lm[lm.hooks[0]].sample_ids.select("id").collect())
    ):
        raise StoreError(
            f"layer map: expected the same rows in {lm.path} and {vlm.path}. Remove both and run again"
        )
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


def _page(
    vlm: ActivationStore,
    lm: ActivationStore,
    hook: str,
    sae: SAE,
    items: list[organism.Item],
    scores: pl.DataFrame,
    features: pl.DataFrame,
    cka: pl.DataFrame,
    samples: pl.DataFrame,
    seconds: float,
) -> Page:
    facts = {
        "questions": f"{len(items):,}, half in pictures and half in words",
        "rows captured": f"{vlm.n_rows + lm.n_rows:,} tokens at {len(vlm.hooks)} layers, bfloat16",
        "dictionary": f"{sae.d_sae} features, k = {sae.k}, on {hook}",
        "time": f"{seconds:.0f} s",
        "microtome": mt.__version__,
    }
    page = Page(
        "A vision-language model in slices",
        "The shipped model organism, from its activations to numbers",
        facts,
    )
    _accuracy_section(page, scores)
    _feature_sections(page, features)
    _layer_section(page, cka, len(vlm.hooks))
    return _sample_section(page, items, samples)


def _accuracy_section(page: Page, scores: pl.DataFrame) -> None:
    run = pl.concat_str("model", "form", separator=", ").replace(_RUN_NAMES)
    table = accuracy(scores.with_columns(run=run), by=("task", "run"))
    page.section("Accuracy", "Share of questions about unseen scenes that were answered right. Dotted: 90 %.")
    page.figure(figures.grouped_bars(table, "task", "accuracy", "run", floor=0.9))
    page.table(table.pivot("run", index="task", values="accuracy"))


_RUN_NAMES = {
    "base_lm, textual": "base LM, words",
    "vlm, textual": "VLM, words",
    "vlm, visual": "VLM, pictures",
}


def _feature_sections(page: Page, features: pl.DataFrame) -> None:
    dead = int(features["dead"].sum())
    page.section(
        "Firing frequency by token kind",
        f"Share of image tokens and of text tokens on which a feature fires. {dead} of {features.height} features never do.",
    ).figure(figures.firing_by_kind(features))
    page.section(
        "Variance gap",
        "Mean squared activation on the VLM's picture questions minus that on the base LM's questions in words: "
        "large where a feature serves vision.",
    ).figure(figures.variance_gap(features["variance_gap"].to_numpy()))
    columns = ["feature", "variance_gap", "frequency_image", "frequency_text", "odds_ratio"]
    page.table(features.sort("variance_gap", descending=True).select(columns), "largest gaps", limit=8)


def _layer_section(page: Page, cka: pl.DataFrame, layers: int) -> None:
    values = cka.sort("lm_layer", "vlm_layer")["cka"].to_numpy().reshape(-1, layers)
    page.section(
        "Layers of the language model against layers of the VLM",
        "Debiased linear CKA of the residual streams on the same questions in words: what fine-tuning on pictures "
        "left as it was (bright diagonal), and where it changed the text side.",
    ).figure(figures.heat_map(values, "VLM layer", "base LM layer", limits=None, label="CKA"))


def _sample_section(page: Page, items: list[organism.Item], samples: pl.DataFrame) -> Page:
    page.section(
        "Top samples",
        "The questions on which a feature is most active; frames show the image patch or word where it peaks. "
        "First the features with the largest variance gap, then those with the smallest.",
    )
    by_id = {item.id: item for item in items}
    for (feature,), rows in samples.group_by("feature", maintain_order=True):
        page.cards(f"Feature {feature}", [_card(by_id[row["id"]], row) for row in rows.iter_rows(named=True)])
    return page


def _card(item: organism.Item, row: dict[str, Any]) -> Card:
    question = item.prompt.removeprefix("<image>").strip()
    if item.image is None:
        return Card(f"→ {item.answer}", row["activation"], text=_marked(item.prompt, row["position"] - 1))
    words, at = question.split(), row["position"] - 1 - CELLS
    caption = (
        f"{question} → {item.answer}"
        if at < 0
        else f"{_marked(question, min(at, len(words) - 1))} → {item.answer}"
    )
    return Card(caption, row["activation"], image_png=_png(item.image), heat=_patch(row["position"] - 1))


def _marked(text: str, at: int) -> str:
    """``text`` with its word number ``at`` in brackets."""
    return " ".join(f"[{word}]" if i == at else word for i, word in enumerate(text.split()))


def _patch(index: int) -> list[list[float]] | None:
    """The grid of image patches with patch ``index`` lit, or None for a token behind the image."""
    side = GRID
    if not 0 <= index < CELLS:
        return None
    return [[float(row * side + column == index) for column in range(side)] for row in range(side)]


def _png(image: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return buffer.getvalue()
