"""Everything that a person reads of a diffing study, written in one go: pages, labels, review sheet, figures, report."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import polars as pl

from microtome.errors import ShapeError
from microtome.record import Record, read_record, write_table
from microtome.report.diffing import diff_page, write_figures
from microtome.report.features import write_index, write_pages

if TYPE_CHECKING:
    from microtome.diffing.interpretation import LayerEvidence, Samples
    from microtome.diffing.study import DiffResult
    from microtome.interpret import Label
    from microtome.store import ActivationStore

__all__ = ["report_study"]


def report_study(
    result: DiffResult,
    vlm: ActivationStore,
    samples: Samples,
    out: Path,
    facts: dict[str, str],
    pages: int,
    labeller: tuple[str, str | None, float] | None,
    progress: bool,
) -> Iterator[str]:
    """Write pages, labels, review sheet, figures and the report of a study; yields what a user should be told.

    Raises:
        ShapeError: labelling by a language model would cost more than was allowed.
    """
    from microtome.diffing.interpretation import gather, label, metrics_of, with_labels
    from microtome.interpret import ChatProvider, write_review_sheet

    evidence = gather(result, vlm, samples, pages=pages) if pages else {}
    if evidence:
        provider = None
        if labeller is not None:
            model, url, budget = labeller
            yield from _priced(model, budget, evidence)
            provider = ChatProvider(model, base_url=url)
        labels = label(evidence, samples, provider=provider, cache=out / "labels.jsonl", progress=progress)
        result = dataclasses.replace(result, features=with_labels(result.features, labels))
        _replace(result.features, out / "tables" / "features.parquet")
        for layer, items in evidence.items():
            mine = [item for item in labels if item.layer == layer]
            write_pages(mine, items, out / "features", metrics_of(result.features, layer))
        shown = ("layer", "feature", "spatial", "survivor", "variance_gap", "decoder_cosine", "label")
        listed = result.features.join(_keys(labels), on=["layer", "feature"], how="semi")
        write_index(listed.select(c for c in shown if c in listed.columns), out / "features")
        sheet = write_review_sheet(labels, out / "review.csv")
        yield (f"{len(labels)} pages: {out / 'features' / 'index.html'}; verdicts go into {sheet}")
    tables = result.tables()
    write_figures(tables, out / "figures")
    page = diff_page(tables, facts, "features" if evidence else "").write(out / "report.html")
    yield (
        f"{result.features.height:,} features, {result.features['adapted'].sum():,} adapted: {out / 'tables'}"
    )
    yield (f"figures: {out / 'figures'}")
    yield (f"open {page.resolve()}")


def _keys(labels: list[Label]) -> pl.DataFrame:
    keys = [(item.layer, item.feature) for item in labels]
    return pl.DataFrame(keys, schema={"layer": pl.Int64, "feature": pl.Int64}, orient="row")


def _priced(model: str, budget: float, evidence: LayerEvidence) -> Iterator[str]:
    """Say what labelling will cost, and refuse what costs more than was allowed."""
    from microtome.interpret import estimate

    items = {(layer, f): found for layer, features in evidence.items() for f, found in features.items()}
    cost = estimate(items)
    yield (
        f"labelling by {model}: {cost['requests']:.0f} requests, about {cost['tokens_in']:,.0f} tokens in, "
        f"{cost['tokens_out']:,.0f} out, {cost['price']:.2f} USD at gpt-4o-mini's price"
    )
    if cost["price"] > budget:
        raise ShapeError(
            f"--label-budget: expected at least {cost['price']:.4f} for {len(items)} features, found {budget}"
        )


def _replace(table: pl.DataFrame, path: Path) -> None:
    """Write a table in the place of another; the record of what made it stays."""
    write_table(table, path, read_record(path) or Record("diff", {}))
