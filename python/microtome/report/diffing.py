"""The figures of stage-wise model diffing (2602.08713), each from one table of a study."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import polars as pl

from microtome.report.figures import PALETTE, canvas
from microtome.report.page import Page

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["adapted_per_layer", "cosine_by_layer", "diff_page", "fvu_curves", "joint_scatter", "survivors"]

_REGIMES = {
    "text": PALETTE["text"],
    "image": PALETTE["image"],
    "full": PALETTE["accent"],
    "random": PALETTE["pool"],
}


def fvu_curves(curves: pl.DataFrame) -> Figure:
    """Mean FVU over layers against tokens seen, one line per regime (the paper's Figure 1)."""
    figure, axes = canvas()
    for regime, colour in _REGIMES.items():
        part = (
            curves.filter(pl.col("regime") == regime)
            .group_by("tokens")
            .agg(pl.col("fvu").mean())
            .sort("tokens")
        )
        if part.height:
            axes.plot(part["tokens"].to_numpy(), part["fvu"].to_numpy(), color=colour, label=regime, lw=1.8)
    axes.set(xlabel="tokens seen", ylabel="FVU, mean over layers", yscale="log")
    axes.legend(frameon=False)
    return figure


def fvu_table(curves: pl.DataFrame) -> pl.DataFrame:
    """Final FVU over layers: mean, median, least, largest, per regime."""
    final = curves.sort("tokens").group_by("regime", "hook").agg(pl.col("fvu").last())
    value = pl.col("fvu")
    table = final.group_by("regime").agg(
        mean=value.mean(), median=value.median(), min=value.min(), max=value.max(), layers=pl.len()
    )
    return table.sort("mean")


def cosine_by_layer(cosines: pl.DataFrame) -> Figure:
    """Decoder cosine with the base dictionary against layer, one line per regime (Figure 6)."""
    figure, axes = canvas()
    for regime, colour in _REGIMES.items():
        part = cosines.filter(pl.col("regime") == regime).sort("layer")
        if part.height:
            layer = part["layer"].to_numpy()
            axes.plot(layer, part["cosine"].to_numpy(), color=colour, label=regime, marker="o", ms=3.5)
            axes.fill_between(
                layer, part["q10"].to_numpy(), part["q90"].to_numpy(), color=colour, alpha=0.12, lw=0
            )
    axes.set(xlabel="layer", ylabel="decoder cosine (band: 10 to 90 %)")
    axes.legend(frameon=False)
    return figure


def joint_scatter(features: pl.DataFrame) -> Figure:
    """Variance gap against decoder cosine, the adapted set highlighted (Figures 2 and 9)."""
    figure, axes = canvas(6.4, 4.0)
    living = features.filter(~pl.col("dead"))
    groups = [("pool", living, PALETTE["pool"]), ("adapted", living.filter("adapted"), PALETTE["image"])]
    if "spatial" in living.columns:
        groups.append(("spatial", living.filter("spatial"), "#5b2a86"))
    for name, part, colour in groups:
        x, y = part["variance_gap"].to_numpy(), part["decoder_cosine"].to_numpy()
        axes.scatter(
            x, y, s=5 if name == "pool" else 10, color=colour, lw=0, alpha=0.7, label=f"{name} ({len(x):,})"
        )
    gaps = np.abs(living["variance_gap"].to_numpy())
    scale = float(np.quantile(gaps[gaps > 0], 0.2)) if (gaps > 0).any() else 1.0
    axes.set_xscale("symlog", linthresh=scale)
    axes.set(xlabel="variance gap", ylabel="decoder cosine")
    axes.legend(frameon=False, markerscale=2)
    return figure


def adapted_per_layer(layers: pl.DataFrame) -> Figure:
    """Adapted features per layer, and their mean cosine beside that of the pool (Figure 8)."""
    figure, (left, right) = canvas(8.6, 3.2, columns=2)
    layer = layers["layer"].to_numpy()
    left.bar(layer, layers["adapted"].to_numpy(), color=PALETTE["image"])
    left.set(xlabel="layer", ylabel="adapted features")
    for name, colour in (("cosine_pool", PALETTE["pool"]), ("cosine_adapted", PALETTE["image"])):
        right.plot(
            layer,
            layers[name].to_numpy(),
            marker="o",
            ms=3.5,
            color=colour,
            label=name.removeprefix("cosine_"),
        )
    right.set(xlabel="layer", ylabel="mean decoder cosine")
    right.legend(frameon=False)
    return figure


def survivors(features: pl.DataFrame) -> Figure:
    """Firing frequency on general and on spatial questions, the retained features highlighted (Figure 3)."""
    figure, (left, right) = canvas(9.0, 3.6, columns=2)
    living = features.filter(~pl.col("dead"))
    columns = ("frequency_base", "frequency_spatial")
    positive = np.concatenate([living[c].filter(living[c] > 0).to_numpy() for c in columns])
    least = float(positive.min()) / 2 if len(positive) else 1e-6
    for column, colour in zip(columns, (PALETTE["pool"], PALETTE["image"]), strict=True):
        values = np.maximum(living[column].to_numpy(), least)
        label = column.removeprefix("frequency_")
        left.hist(values, bins=np.geomspace(least, 1, 40), histtype="step", lw=1.6, color=colour, label=label)
    left.set(xscale="log", yscale="log", xlabel="firing frequency", ylabel="features")
    left.legend(frameon=False)
    kept = "survivor" if "survivor" in living.columns else "spatial"
    for name, part, colour in (
        ("adapted", living.filter("adapted"), PALETTE["pool"]),
        (kept, living.filter(kept), PALETTE["image"]),
    ):
        x, y = (np.maximum(part[c].to_numpy(), least) for c in columns)
        right.scatter(x, y, s=12, lw=0, color=colour, alpha=0.8, label=f"{name} ({part.height})")
    right.plot([least, 1], [least, 1], color="#5d6b7a", lw=0.8, ls=":")
    right.set(
        xscale="log", yscale="log", xlabel="frequency, other questions", ylabel="frequency, spatial questions"
    )
    right.legend(frameon=False)
    return figure


def diff_page(tables: dict[str, pl.DataFrame], facts: dict[str, str]) -> Page:
    """The report of a study from its tables ``features, curves, cosines, layers, sensitivity``."""
    features, curves, layers = tables["features"], tables["curves"], tables["layers"]
    page = Page(
        "What fine-tuning on pictures changed", "Stage-wise model diffing, base language model to VLM", facts
    )
    page.section(
        "Reconstruction",
        "Held-out FVU of dictionaries adapted to the VLM, by the tokens that entered the loss.",
    )
    page.figure(fvu_curves(curves)).table(fvu_table(curves), "final FVU over layers")
    page.section(
        "Rotation", "Cosine of every decoder direction with the base dictionary's: 1 means unchanged."
    )
    page.figure(cosine_by_layer(tables["cosines"]))
    page.section(
        "Adapted features", "Large variance gap first, then low decoder cosine, over all layers pooled."
    )
    page.figure(joint_scatter(features)).figure(adapted_per_layer(layers)).table(layers)
    if "spatial" in features.columns:
        page.section(
            "Spatial features", "Adapted features that fire more on spatial questions than on others."
        )
        page.figure(survivors(features)).table(_spatial_table(features), "by frequency gap")
    page.section("Thresholds", "The adapted set under other thresholds, against the one reported here.")
    return page.table(tables["sensitivity"])


def _spatial_table(features: pl.DataFrame) -> pl.DataFrame:
    wanted = [
        "layer",
        "feature",
        "frequency_spatial",
        "frequency_base",
        "odds_ratio",
        "variance_gap",
        "decoder_cosine",
    ]
    optional = [c for c in ("survivor", "label") if c in features.columns]
    return (
        features.filter("spatial").sort("frequency_gap", descending=True).select(*wanted, *optional).head(20)
    )
