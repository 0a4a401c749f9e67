"""Figures of the main job, each from one table. They are returned, not shown."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import polars as pl

from microtome.tensors import extra

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = ["PALETTE", "canvas", "firing_by_kind", "grouped_bars", "heat_map", "lines", "variance_gap"]

PALETTE = {"image": "#b03060", "text": "#2a6f97", "pool": "#b8c0c8", "accent": "#e08e2b", "third": "#4f772d"}
_CYCLE = [PALETTE[name] for name in ("text", "image", "accent", "third", "pool")]


def canvas(
    width: float = 7.0, height: float = 3.4, columns: int = 1, *, rows: int = 1, **options: Any
) -> tuple[Figure, Any]:
    """An empty figure in the house style: (figure, axes)."""
    extra("matplotlib", "report")
    import matplotlib as mpl
    from cycler import cycler
    from matplotlib.figure import Figure

    style: dict[str, Any] = {
        "font.size": 9.5,
        "font.family": ["DejaVu Sans"],
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.prop_cycle": cycler(color=_CYCLE),
        "axes.titlesize": 10,
    }
    with mpl.rc_context(style):
        figure = Figure(figsize=(width, height), layout="constrained", facecolor="none")
        axes = figure.subplots(rows, columns, subplot_kw={"facecolor": "none"}, **options)
    return figure, axes


def literal(text: object) -> str:
    """``text`` as matplotlib draws it letter by letter: a pair of dollar signs would be a formula."""
    return str(text).replace("$", r"\$")


def grouped_bars(table: pl.DataFrame, x: str, y: str, group: str, floor: float | None = None) -> Figure:
    """Bars of ``y`` for each value of ``x``, side by side for each ``group``; a dotted line at ``floor``."""
    names, groups = table[x].unique(maintain_order=True), table[group].unique(maintain_order=True)
    figure, axes = canvas(width=max(6.0, 1.1 * len(names)))
    width = 0.8 / len(groups)
    for i, g in enumerate(groups):
        heights = [_value(table.filter((pl.col(x) == n) & (pl.col(group) == g)), y) for n in names]
        places = np.arange(len(names)) + (i - (len(groups) - 1) / 2) * width
        axes.bar(places, heights, width * 0.92, label=literal(g))
    if floor is not None:
        axes.axhline(floor, color="#5d6b7a", lw=0.8, ls=":")
    axes.set_xticks(np.arange(len(names)), [literal(n) for n in names])
    axes.set_ylabel(y)
    axes.legend(ncols=len(groups), loc="lower center", bbox_to_anchor=(0.5, 1.0), frameon=False)
    return figure


def _value(rows: pl.DataFrame, column: str) -> float:
    return float(rows[column][0]) if rows.height else float("nan")


def heat_map(
    values: npt.NDArray[np.float64],
    xlabel: str,
    ylabel: str,
    ticks: tuple[Sequence[str], Sequence[str]] | None = None,
    limits: tuple[float, float] | None = (0.0, 1.0),
    label: str = "",
) -> Figure:
    """A matrix as colours, numbers written in when it is small; NaN is grey."""
    figure, axes = canvas(width=1.8 + 0.55 * values.shape[1], height=1.2 + 0.48 * values.shape[0])
    low, high = limits or (float(np.nanmin(values)), float(np.nanmax(values)))
    from matplotlib import colormaps

    colours = colormaps["viridis"].with_extremes(bad="#d0d4d8")
    image = axes.imshow(values, cmap=colours, vmin=low, vmax=high, origin="lower", aspect="auto")
    if values.size <= 400:
        _write_numbers(axes, values, (low + high) / 2)
    x_names, y_names = ticks or (range(values.shape[1]), range(values.shape[0]))
    axes.set_xticks(range(values.shape[1]), [literal(t) for t in x_names])
    axes.set_yticks(range(values.shape[0]), [literal(t) for t in y_names])
    axes.set_xlabel(xlabel)
    axes.set_ylabel(ylabel)
    figure.colorbar(image, ax=axes, label=label, shrink=0.9)
    return figure


def _write_numbers(axes: Axes, values: npt.NDArray[np.float64], middle: float) -> None:
    for (row, column), value in np.ndenumerate(values):
        if np.isfinite(value):
            ink = "white" if value < middle else "#1c2430"
            axes.text(column, row, f"{value:.2f}", ha="center", va="center", fontsize=7.5, color=ink)


def firing_by_kind(table: pl.DataFrame) -> Figure:
    """Firing frequency of each feature on image tokens against text tokens, and both distributions.

    Args:
        table: columns ``feature``, ``frequency_image``, ``frequency_text``.
    """
    figure, (left, right) = canvas(width=9.0, height=3.6, columns=2)
    image, text = table["frequency_image"].to_numpy(), table["frequency_text"].to_numpy()
    least = min((v[v > 0].min() for v in (image, text) if (v > 0).any()), default=1e-6) / 2
    left.scatter(
        np.maximum(text, least), np.maximum(image, least), s=6, alpha=0.5, color=PALETTE["image"], lw=0
    )
    left.plot([least, 1], [least, 1], color="#5d6b7a", lw=0.8, ls=":")
    left.set(
        xscale="log",
        yscale="log",
        xlabel="firing frequency, text tokens",
        ylabel="firing frequency, image tokens",
    )
    bins = np.geomspace(least, 1.0, 40)
    for name, values in (("image", image), ("text", text)):
        right.hist(
            np.maximum(values, least), bins=bins, histtype="step", lw=1.6, label=name, color=PALETTE[name]
        )
    right.set(xscale="log", xlabel="firing frequency (leftmost bin: dead)", ylabel="features")
    right.legend(frameon=False)
    return figure


def variance_gap(gap: npt.NDArray[np.float64]) -> Figure:
    """Features sorted by variance gap, on a symmetric log scale: vision-preferring right, text-preferring left."""
    figure, axes = canvas()
    order = np.sort(gap)
    scale = float(np.quantile(np.abs(order[order != 0]), 0.1)) if (order != 0).any() else 1.0
    places = np.arange(len(order))
    axes.fill_between(
        places,
        order,
        0,
        where=order > 0,
        color=PALETTE["image"],
        alpha=0.8,
        label="prefers vision",
        step="mid",
    )
    axes.fill_between(
        places, order, 0, where=order < 0, color=PALETTE["text"], alpha=0.8, label="prefers text", step="mid"
    )
    axes.set_yscale("symlog", linthresh=scale)
    axes.set(xlabel="features, sorted", ylabel="variance gap")
    axes.legend(loc="upper left", frameon=False)
    return figure


def lines(
    table: pl.DataFrame, x: str, y: str, group: str, log_x: bool = False, log_y: bool = False
) -> Figure:
    """``y`` against ``x``, one line for each ``group``."""
    figure, axes = canvas()
    for name in table[group].unique(maintain_order=True):
        part = table.filter(pl.col(group) == name).sort(x)
        axes.plot(part[x].to_numpy(), part[y].to_numpy(), marker="o", ms=3, label=literal(name))
    axes.set(xlabel=x, ylabel=y, xscale="log" if log_x else "linear", yscale="log" if log_y else "linear")
    axes.legend(frameon=False)
    return figure
