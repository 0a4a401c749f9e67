"""The report of a diffing study: the figures of the paper, each with its data beside it, and one page."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import polars as pl

from microtome.report import diffing_figures as draw
from microtome.report.page import Page

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["diff_page", "figures_of", "fvu_table", "write_figures"]

Tables = Mapping[str, pl.DataFrame]

_FEATURES = ["layer", "feature", "variance_gap", "decoder_cosine", "dead", "adapted"]
_SHIFT = ["frequency_base", "frequency_spatial", "frequency_gap", "odds_ratio", "spatial"]


def figures_of(tables: Tables) -> dict[str, tuple[pl.DataFrame, Callable[[pl.DataFrame], Figure]]]:
    """Each figure that the tables allow: the table it is drawn from, and the function that draws it."""
    features = tables["features"]
    shift = [c for c in (*_SHIFT, "survivor") if c in features.columns]
    found: dict[str, tuple[pl.DataFrame, Callable[[pl.DataFrame], Figure]]] = {
        "fvu": (tables["curves"], draw.fvu_curves),
        "fvu_by_layer": (tables["curves"], draw.fvu_by_layer),
        "reconstruction": (tables["reconstruction"], draw.reconstruction_bars),
        "cosine_by_layer": (tables["cosines"], draw.cosine_by_layer),
        "joint": (features.select(*_FEATURES, *(c for c in ("spatial",) if c in shift)), draw.joint_scatter),
        "adapted_per_layer": (tables["layers"], draw.adapted_per_layer),
        "thresholds": (tables["sensitivity"], draw.thresholds),
    }
    if "spatial" in shift:
        found["frequency_shift"] = (features.select(*_FEATURES, *shift), draw.frequency_shift)
        found["survivors"] = (features.select(*_FEATURES, *shift), draw.survivors)
    if tables["controls"].height:
        found["controls"] = (tables["controls"], draw.controls)
    return found


def write_figures(tables: Tables, folder: str | Path) -> list[Path]:
    """Every figure as ``NAME.svg`` and ``NAME.png``, and the table it shows as ``NAME.csv``; returns the PNGs."""
    out = Path(folder)
    out.mkdir(parents=True, exist_ok=True)
    paths = []
    for name, (table, drawer) in figures_of(tables).items():
        figure = drawer(table)
        table.write_csv(out / f"{name}.csv")
        figure.savefig(out / f"{name}.svg", metadata={"Date": None})
        paths.append(out / f"{name}.png")
        figure.savefig(paths[-1], dpi=150, facecolor="white")
    return paths


def fvu_table(curves: pl.DataFrame) -> pl.DataFrame:
    """Final FVU over layers: mean, median, least, largest, per regime (the table of Figure 1)."""
    final = curves.sort("tokens").group_by("regime", "hook").agg(pl.col("fvu", "l0", "dead_share").last())
    value = pl.col("fvu")
    table = final.group_by("regime").agg(
        mean=value.mean(),
        median=value.median(),
        min=value.min(),
        max=value.max(),
        L0=pl.col("l0").mean(),
        dead=pl.col("dead_share").mean(),
        layers=pl.len(),
    )
    return table.sort("mean")


def diff_page(tables: Tables, facts: dict[str, str], pages: str = "") -> Page:
    """The report of a study from its tables; ``pages`` leads to the index of feature pages, where there is one."""
    features, layers = tables["features"], tables["layers"]
    figures = {name: (lambda t=table, d=drawer: d(t)) for name, (table, drawer) in figures_of(tables).items()}
    page = Page(
        "What fine-tuning on pictures changed", "Stage-wise model diffing, base language model to VLM", facts
    )
    page.section(
        "Reconstruction",
        "Held-out FVU of dictionaries adapted to the VLM, each on the tokens that enter its loss; random starts from random "
        "weights and sees all tokens.",
    )
    page.figure(figures["fvu"]()).table(fvu_table(tables["curves"]), "final values, over layers")
    page.figure(figures["fvu_by_layer"](), "Layer by layer.")
    page.figure(
        figures["reconstruction"](),
        "All dictionaries on held-out VLM rows of the same kinds. Bars: mean over layers; dots: layers.",
    )
    page.section(
        "Rotation", "Cosine of every decoder direction with the base dictionary's: 1 means unchanged."
    )
    page.figure(figures["cosine_by_layer"]())
    page.section(
        "Adapted features",
        "Large variance gap first, then low decoder cosine, over all layers pooled; dead features left out.",
    )
    page.figure(figures["joint"]()).figure(figures["adapted_per_layer"]()).table(layers)
    if "spatial" in features.columns:
        _spatial_sections(page, tables, figures, pages)
    page.section("Thresholds", "The adapted set under other thresholds, against the one of 20 % and 20 %.")
    return page.figure(figures["thresholds"]()).table(tables["sensitivity"])


def _spatial_sections(
    page: Page, tables: Tables, figures: Mapping[str, Callable[[], Figure]], pages: str
) -> None:
    features = tables["features"]
    page.section("Spatial features", "Adapted features that fire more on spatial questions than on others.")
    page.figure(figures["frequency_shift"]()).figure(figures["survivors"]())
    links = None
    shown = _spatial_table(features)
    if pages:
        links = [f"{pages}/{name}.html" for name in shown["name"]]
    page.table(shown, "by frequency gap", limit=25, links=links)
    if "controls" in figures:
        page.section("Against random features", _verdict(tables["controls"]))
        columns = [
            "set",
            "tokens",
            "statistic",
            "n_features",
            "chosen",
            "controls",
            "difference",
            "low",
            "high",
        ]
        page.figure(figures["controls"]()).table(
            tables["controls"].select(*columns, "p_value", "images_spatial", "images_other")
        )


def _verdict(controls: pl.DataFrame) -> str:
    """What the comparison says, in words, as it is."""
    row = controls.filter(
        (pl.col("set") == "spatial") & (pl.col("tokens") == "all") & (pl.col("statistic") == "frequency")
    ).row(0, named=True)
    holds = (
        "excludes zero"
        if row["low"] > 0
        else "does not exclude zero"
        if row["high"] >= 0
        else "lies below zero"
    )
    return (
        f"On images that they were not chosen by, the {row['n_features']} spatial features fire on {row['chosen']:.2%} of "
        f"the tokens of spatial questions; random features of the same layers, matched by overall frequency, on "
        f"{row['controls']:.2%}. Difference {row['difference']:+.2%}, {row['level']:.0%} interval {row['low']:+.2%} to "
        f"{row['high']:+.2%}: it {holds} (cluster bootstrap over {row['images_spatial']:,} images with and "
        f"{row['images_other']:,} without spatial questions, {row['draws']:,} control sets)."
    )


def _spatial_table(features: pl.DataFrame) -> pl.DataFrame:
    """The spatial features as the report lists them: short headings, intervals in one cell."""
    ordered = features.filter("spatial").sort("frequency_gap", descending=True)
    columns = [
        pl.format("L{}F{}", "layer", "feature").alias("name"),
        pl.col("frequency_spatial").alias("spatial"),
        pl.col("frequency_base").alias("other"),
        pl.col("odds_ratio").alias("odds ratio"),
        pl.col("decoder_cosine").alias("cosine"),
    ]
    if "held_out_gap" in features.columns:
        values = (pl.col(f"held_out_{end}").round(4) for end in ("gap", "low", "high"))
        columns.append(pl.format("{} ({} to {})", *values).alias("gap, held out"))
    columns += [pl.col(c) for c in ("survivor", "label") if c in features.columns]
    return ordered.select(columns)
