"""A static page per feature, for reading and for review, and an index of them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import polars as pl

from microtome.interpret.evidence import Evidence
from microtome.interpret.labels import Label
from microtome.report.page import Card, Page

__all__ = ["feature_page", "page_name", "write_index", "write_pages"]


def page_name(layer: int, feature: int) -> str:
    """File name of a feature's page."""
    return f"L{layer}F{feature}.html"


def feature_page(
    label: Label, evidence: Sequence[Evidence], metrics: Mapping[str, object] | None = None
) -> Page:
    """The page of one feature: its label, its numbers, its top samples by data set."""
    facts = {"confidence": f"{label.confidence:.2f}", "labelled by": label.labeller}
    page = Page(f"Layer {label.layer}, feature {label.feature}", label.description, facts)
    page.section(
        "Top samples",
        "Brackets mark the token on which the activation peaks. The picture shows the same feature on the image tokens, "
        "whether it peaks there or not: the fuller a patch is coloured, the nearer to the feature's largest activation.",
    )
    for dataset in dict.fromkeys(item.dataset for item in evidence):
        page.cards(f"{dataset} questions", [_card(item) for item in evidence if item.dataset == dataset])
    page.section("Numbers", "; ".join(label.common_patterns))
    if metrics:
        page.table(pl.DataFrame({"signal": list(metrics), "value": [_value(v) for v in metrics.values()]}))
    if label.cue_counts:
        cues = {"cue": list(label.cue_counts), "samples": list(label.cue_counts.values())}
        page.table(pl.DataFrame(cues), "cues in the top samples")
    return page


def write_pages(
    labels: Iterable[Label],
    evidence: Mapping[int, Sequence[Evidence]],
    folder: str | Path,
    metrics: Mapping[int, Mapping[str, object]] | None = None,
) -> list[Path]:
    """Write ``L{layer}F{feature}.html`` for every label and return the paths."""
    return [
        feature_page(label, evidence[label.feature], (metrics or {}).get(label.feature)).write(
            Path(folder) / page_name(label.layer, label.feature)
        )
        for label in labels
    ]


def write_index(table: pl.DataFrame, folder: str | Path, title: str = "Features") -> Path:
    """A table of features, each row leading to its page.

    Args:
        table: columns ``layer`` and ``feature`` first to be named by, then what is shown.
        folder: where the pages lie; the index is its ``index.html``.
        title: heading.
    """
    names = pl.format("L{}F{}", "layer", "feature").alias("name")
    links = [page_name(*key) for key in table.select("layer", "feature").iter_rows()]
    page = Page(title, f"{table.height} features, each with its top samples").section("Features")
    shown = table.select(names, pl.exclude("layer", "feature"))
    return page.table(shown, limit=max(1, shown.height), links=links).write(Path(folder) / "index.html")


def _card(item: Evidence) -> Card:
    on_picture = max((max(row) for row in item.heat), default=0.0) if item.heat else None
    if item.on_image:
        caption, note = item.text, "peaks on the picture"
    else:
        caption = item.window or item.text
        note = "" if on_picture is None else "silent on the picture" if on_picture == 0 else ""
    return Card(caption, item.activation, text=caption, image_png=item.image_png, heat=item.heat, note=note)


def _value(value: object) -> str:
    return f"{value:.4g}" if isinstance(value, float) else "–" if value is None else str(value)
