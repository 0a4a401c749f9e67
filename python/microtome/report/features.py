"""A static page per feature, for reading and for review."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import polars as pl

from microtome.interpret.evidence import Evidence
from microtome.interpret.labels import Label
from microtome.report.page import Card, Page

__all__ = ["feature_page", "write_pages"]


def feature_page(
    label: Label, evidence: Sequence[Evidence], metrics: Mapping[str, object] | None = None
) -> Page:
    """The page of one feature: its label, its numbers, its top samples by data set."""
    facts = {"confidence": f"{label.confidence:.2f}", "labelled by": label.labeller}
    page = Page(f"Layer {label.layer}, feature {label.feature}", label.description, facts)
    page.section("Numbers", "; ".join(label.common_patterns))
    if metrics:
        page.table(pl.DataFrame({"signal": list(metrics), "value": [str(v) for v in metrics.values()]}))
    if label.cue_counts:
        cues = {"cue": list(label.cue_counts), "samples": list(label.cue_counts.values())}
        page.table(pl.DataFrame(cues), "cues in the top samples")
    page.section(
        "Top samples", "Brackets mark the token on which the activation peaks; frames the image patch."
    )
    for dataset in dict.fromkeys(item.dataset for item in evidence):
        page.cards(dataset, [_card(item) for item in evidence if item.dataset == dataset])
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
            Path(folder) / f"L{label.layer}F{label.feature}.html"
        )
        for label in labels
    ]


def _card(item: Evidence) -> Card:
    return Card(
        item.window or item.text,
        item.activation,
        text=item.window or item.text,
        image_png=item.image_png,
        heat=item.heat,
    )
