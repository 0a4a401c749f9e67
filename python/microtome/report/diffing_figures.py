"""The figures of stage-wise model diffing (2602.08713), each drawn from one table of a study."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import polars as pl

from microtome.report.figures import PALETTE, canvas

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = [
    "adapted_per_layer",
    "controls",
    "cosine_by_layer",
    "frequency_shift",
    "fvu_by_layer",
    "fvu_curves",
    "joint_scatter",
    "reconstruction_bars",
    "survivors",
    "thresholds",
]

_GREY = "#5d6b7a"
_SPATIAL = "#5b2a86"
REGIMES = {
    "text": PALETTE["text"],
    "image": PALETTE["image"],
    "full": PALETTE["accent"],
    "random": "#8a949e",
}
_KINDS = {"all": _GREY, "text": PALETTE["text"], "image": PALETTE["image"]}


def fvu_curves(curves: pl.DataFrame) -> Figure:
    """Mean FVU over layers against tokens seen, one line per regime (Figure 1)."""
    figure, axes = canvas()
    mean = curves.group_by("regime", "tokens").agg(pl.col("fvu").mean()).sort("tokens")
    _regime_lines(axes, mean)
    axes.set(xlabel="tokens seen", ylabel="FVU, mean over layers", yscale="log", xlim=(0, None))
    _plain_log(axes)
    axes.legend(frameon=False, loc="center left", bbox_to_anchor=(1, 0.5))
    return figure


def fvu_by_layer(curves: pl.DataFrame) -> Figure:
    """FVU against tokens seen, one panel per layer (Figure 7)."""
    hooks = curves.filter(pl.col("regime") != "base")["hook"].unique(maintain_order=True).to_list()
    columns = min(4, len(hooks))
    rows = -(-len(hooks) // columns)
    figure, axes = canvas(2.4 * columns + 0.8, 1.9 * rows + 0.6, columns, rows=rows, sharex=True, sharey=True)
    panels = np.atleast_1d(axes).ravel()
    for i, (panel, hook) in enumerate(zip(panels, hooks, strict=False)):
        _regime_lines(panel, curves.filter(pl.col("hook") == hook).sort("tokens"))
        panel.set(yscale="log", title=f"layer {i}", xlim=(0, None))
        _plain_log(panel)
    for panel in panels[len(hooks) :]:
        panel.set_visible(False)
    figure.supxlabel("tokens seen", fontsize=9.5)
    figure.supylabel("FVU", fontsize=9.5)
    figure.legend(*panels[0].get_legend_handles_labels(), frameon=False, loc="outside upper center", ncols=4)
    return figure


def reconstruction_bars(table: pl.DataFrame) -> Figure:
    """FVU of every final dictionary on the same held-out VLM rows, by kind of token; dots are layers."""
    figure, axes = canvas(7.4)
    stages = table["stage"].unique(maintain_order=True).to_list()
    kinds = [k for k in _KINDS if k in table["tokens"].unique().to_list()]
    width = 0.8 / max(1, len(kinds))
    for j, kind in enumerate(kinds):
        for i, stage in enumerate(stages):
            values = table.filter((pl.col("stage") == stage) & (pl.col("tokens") == kind))["fvu"].to_numpy()
            at = i + (j - (len(kinds) - 1) / 2) * width
            axes.bar(
                at,
                np.nanmean(values),
                width * 0.9,
                color=_KINDS[kind],
                alpha=0.55,
                label=f"{kind} tokens" if i == 0 else None,
            )
            axes.scatter(np.full(len(values), at), values, s=9, color=_KINDS[kind], lw=0, zorder=3)
    names = {"base": "base, not adapted"}
    axes.set_xticks(range(len(stages)), [names.get(s, s) for s in stages])
    axes.set(ylabel="FVU", yscale="log")
    _plain_log(axes)
    axes.legend(frameon=False, loc="center left", bbox_to_anchor=(1, 0.5))
    return figure


def cosine_by_layer(cosines: pl.DataFrame) -> Figure:
    """Decoder cosine with the base dictionary against layer, one line per regime (Figure 6)."""
    figure, axes = canvas()
    for regime, colour in REGIMES.items():
        part = cosines.filter(pl.col("regime") == regime).sort("layer")
        if part.height:
            layer = part["layer"].to_numpy()
            axes.plot(layer, part["cosine"].to_numpy(), color=colour, label=regime, marker="o", ms=3.5)
            axes.fill_between(
                layer, part["q10"].to_numpy(), part["q90"].to_numpy(), color=colour, alpha=0.12, lw=0
            )
    axes.set(xlabel="layer", ylabel="decoder cosine (band: 10 to 90 %)", ylim=(None, 1.03))
    _whole_layers(axes)
    axes.legend(frameon=False, loc="center left", bbox_to_anchor=(1, 0.5))
    return figure


def joint_scatter(features: pl.DataFrame) -> Figure:
    """Variance gap against decoder cosine, the adapted set highlighted (Figures 2 and 9)."""
    figure, axes = canvas(7.4, 4.0)
    living = features.filter(~pl.col("dead"))
    groups = [
        ("living", living, PALETTE["pool"], 5),
        ("adapted", living.filter("adapted"), PALETTE["image"], 9),
    ]
    if "spatial" in living.columns:
        groups.append(("spatial", living.filter("spatial"), _SPATIAL, 16))
    for name, part, colour, size in groups:
        x, y = part["variance_gap"].to_numpy(), part["decoder_cosine"].to_numpy()
        axes.scatter(
            x,
            y,
            s=size,
            color=colour,
            lw=0,
            alpha=0.75,
            label=f"{name} ({len(x):,})",
            rasterized=len(x) > 5000,
        )
    _symlog(axes, living["variance_gap"].to_numpy())
    axes.axvline(0, color=_GREY, lw=0.6, ls=":")
    axes.set(xlabel="variance gap (symmetric log)", ylabel="decoder cosine")
    axes.legend(frameon=False, markerscale=1.6, loc="center left", bbox_to_anchor=(1, 0.5))
    return figure


def adapted_per_layer(layers: pl.DataFrame) -> Figure:
    """Adapted features per layer, and their mean cosine beside that of the pool (Figure 8)."""
    figure, (left, right) = canvas(8.6, 3.2, columns=2)
    layer = layers["layer"].to_numpy()
    left.bar(layer, layers["adapted"].to_numpy(), color=PALETTE["image"], alpha=0.8, label="adapted")
    if "spatial" in layers.columns:
        left.bar(layer, layers["spatial"].to_numpy(), color=_SPATIAL, width=0.45, label="of them spatial")
    left.legend(frameon=False, loc="lower center", bbox_to_anchor=(0.5, 1.0), ncols=2)
    left.set(xlabel="layer", ylabel="features")
    for name, colour in (("cosine_pool", PALETTE["pool"]), ("cosine_adapted", PALETTE["image"])):
        label = {"cosine_pool": "living features", "cosine_adapted": "adapted"}[name]
        right.plot(layer, layers[name].to_numpy(), marker="o", ms=3.5, color=colour, label=label)
    right.set(xlabel="layer", ylabel="mean decoder cosine")
    right.legend(frameon=False, loc="lower center", bbox_to_anchor=(0.5, 1.0), ncols=2)
    for axes in (left, right):
        _whole_layers(axes)
    return figure


def frequency_shift(features: pl.DataFrame) -> Figure:
    """How often features fire on spatial and on other questions (Figure 3a)."""
    figure, axes = canvas(6.4)
    living = features.filter(~pl.col("dead"))
    columns = {
        "frequency_base": ("other questions", _GREY),
        "frequency_spatial": ("spatial questions", _SPATIAL),
    }
    least = _least(living, list(columns))
    for column, (label, colour) in columns.items():
        values = np.maximum(living[column].to_numpy(), least)
        axes.hist(values, bins=np.geomspace(least, 1, 30), histtype="step", lw=1.6, color=colour, label=label)
    axes.set(
        xscale="log", yscale="log", xlabel="firing frequency (leftmost bin: silent)", ylabel="living features"
    )
    axes.legend(frameon=False, loc="upper left", bbox_to_anchor=(0.02, 1.18), ncols=2)
    return figure


def survivors(features: pl.DataFrame) -> Figure:
    """Adapted features on both kinds of question, spatial ones and survivors highlighted (Figure 3b)."""
    figure, axes = canvas(6.6, 4.0)
    living = features.filter(~pl.col("dead") & pl.col("adapted"))
    columns = ("frequency_base", "frequency_spatial")
    least = _least(living, list(columns))
    groups = [("adapted", PALETTE["pool"], 10), ("spatial", _SPATIAL, 14), ("survivor", PALETTE["image"], 22)]
    labels = {"adapted": "adapted", "spatial": "spatial", "survivor": "survives the neutral prompt"}
    for name, colour, size in groups:
        if name not in living.columns:
            continue
        part = living.filter(name)
        x, y = (np.maximum(part[c].to_numpy(), least) for c in columns)
        axes.scatter(x, y, s=size, lw=0, color=colour, alpha=0.85, label=f"{labels[name]} ({part.height})")
    axes.plot([least, 1], [least, 1], color=_GREY, lw=0.8, ls=":")
    axes.set(
        xscale="log", yscale="log", xlabel="frequency, other questions", ylabel="frequency, spatial questions"
    )
    axes.legend(frameon=False, loc="center left", bbox_to_anchor=(1, 0.5))
    return figure


def controls(table: pl.DataFrame) -> Figure:
    """Chosen features minus matched random ones on held-out images, with intervals; zero: no difference."""
    sets = table["set"].unique(maintain_order=True).to_list()
    figure, panels = canvas(8.6, 1.4 + 0.55 * len(sets), columns=2, sharey=True)
    names = {"frequency": "frequency on spatial questions", "gap": "frequency, spatial minus other questions"}
    for axes, (statistic, title) in zip(panels, names.items(), strict=True):
        for j, kind in enumerate(_KINDS):
            part = table.filter((pl.col("statistic") == statistic) & (pl.col("tokens") == kind))
            y = np.array([sets.index(s) for s in part["set"]]) + (j - 1) * 0.22
            x = part["difference"].to_numpy()
            reach = np.abs(np.stack([part["low"].to_numpy(), part["high"].to_numpy()]) - x)
            axes.errorbar(
                x, y, xerr=reach, fmt="o", ms=4.5, lw=1.6, color=_KINDS[kind], label=f"{kind} tokens"
            )
        axes.axvline(0, color=_GREY, lw=0.8, ls=":")
        axes.set_yticks(range(len(sets)), sets)
        axes.set(title=title, xlabel="chosen minus matched random", ylim=(len(sets) - 0.5, -0.5))
    figure.legend(*panels[0].get_legend_handles_labels(), frameon=False, loc="outside lower center", ncols=3)
    return figure


def thresholds(table: pl.DataFrame) -> Figure:
    """IoU of the adapted set under other thresholds with the reported one; numbers: features adapted."""
    from microtome.report.figures import heat_map

    gaps, cosines = (table[c].unique().sort().to_list() for c in ("p_gap", "p_cos"))
    grid = table.sort("p_cos", "p_gap")["iou_with_reference"].to_numpy().reshape(len(cosines), len(gaps))
    ticks = ([f"{g:g}" for g in gaps], [f"{c:g}" for c in cosines])
    return heat_map(grid, "share kept by variance gap", "share kept by cosine", ticks, label="IoU")


def _regime_lines(axes: Any, table: pl.DataFrame) -> None:
    for regime, colour in REGIMES.items():
        part = table.filter(pl.col("regime") == regime)
        if part.height:
            axes.plot(part["tokens"].to_numpy(), part["fvu"].to_numpy(), color=colour, label=regime, lw=1.8)


def _plain_log(axes: Any) -> None:
    """Plain numbers at 1, 2 and 5 on a logarithmic axis that spans little."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    axes.yaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda v, _: f"{v:g}"))
    axes.yaxis.set_minor_formatter(NullFormatter())


def _symlog(axes: Any, values: Any) -> None:
    """A symmetric log axis, linear below the lower quartile of sizes, with labels that do not touch."""
    sizes = np.abs(values[values != 0])
    scale = float(np.quantile(sizes, 0.25)) if len(sizes) else 1.0
    axes.set_xscale("symlog", linthresh=scale)
    low, high = int(np.ceil(np.log10(scale))) + 1, int(np.floor(np.log10(sizes.max()))) if len(sizes) else 0
    decades = [10.0**d for d in range(high, low - 1, -max(1, (high - low + 1) // 3))]
    least, most = (float(f(values)) if len(values) else 0.0 for f in (np.min, np.max))
    axes.set_xticks(sorted([0.0, *(d for d in decades if d <= most), *(-d for d in decades if -d >= least)]))


def _whole_layers(axes: Any) -> None:
    from matplotlib.ticker import MaxNLocator

    axes.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))


def _least(table: pl.DataFrame, columns: list[str]) -> float:
    """Where silent features are drawn on a logarithmic axis: half the least frequency there is."""
    values = np.concatenate([table[c].filter(table[c] > 0).to_numpy() for c in columns])
    return float(values.min()) / 2 if len(values) else 1e-6
