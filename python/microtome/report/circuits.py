"""Figures of a circuit study, from its tables alone.

:func:`write_figures` reads the parquet files that ``microtome circuit`` writes and draws what is there:
patching effects over layer and position, faithfulness over size, overlap and interchange per group, alignment
over layers, back-patching over layer pairs.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import polars as pl

from microtome.errors import ShapeError
from microtome.report.figures import PALETTE, canvas

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["draw", "write_figures"]

Tables = Mapping[str, pl.DataFrame]
_GROUPS = ("data", "query", "generation")
_GROUP_COLOURS = {"data": PALETTE["image"], "query": PALETTE["text"], "generation": PALETTE["accent"]}
_GREY = "#5d6b7a"


def draw(tables: Tables) -> dict[str, Figure]:
    """Every figure that the tables allow, by name."""
    figures: dict[str, Figure] = {}
    if "curves" in tables:
        figures["faithfulness"] = faithfulness_curves(tables["curves"])
    for name, title in (("overlap", "nIoU"), ("interchange", "normalised faithfulness")):
        if name in tables:
            figures[name] = group_bars(tables[name], title)
    if "alignment" in tables:
        figures["alignment"] = alignment_lines(tables["alignment"])
    if "effects" in tables:
        for task in tables["effects"]["task"].unique(maintain_order=True):
            figures[f"effects-{task}"] = effect_maps(tables["effects"].filter(pl.col("task") == task), task)
    if "backpatch" in tables:
        for task in tables["backpatch"]["task"].unique(maintain_order=True):
            figures[f"backpatch-{task}"] = back_patch_maps(
                tables["backpatch"].filter(pl.col("task") == task), task
            )
    return figures


def write_figures(folder: str | Path) -> list[Path]:
    """Draw the study in ``folder`` into its ``figures`` as PNG.

    Raises:
        ShapeError: the folder holds no table of a study.
    """
    source = Path(folder)
    names = ("curves", "overlap", "interchange", "alignment", "effects", "backpatch")
    tables = {name: pl.read_parquet(path) for name in names if (path := source / f"{name}.parquet").exists()}
    if not tables:
        raise ShapeError(f"figures: {source}: expected the tables of a circuit study, found none")
    out = source / "figures"
    out.mkdir(exist_ok=True)
    paths = []
    for name, figure in draw(tables).items():
        paths.append(out / f"{name}.png")
        figure.savefig(paths[-1], dpi=150, facecolor="white")
    return paths


def faithfulness_curves(table: pl.DataFrame) -> Figure:
    """Faithfulness over circuit size: solid for text, dotted for pictures, a line at 80 %."""
    figure, axes = canvas()
    colours = ["#2a6f97", "#b03060", "#e08e2b", "#4f772d", "#7a5195", "#5d6b7a", "#00a3a3"]
    for i, task in enumerate(table["task"].unique(maintain_order=True)):
        for form, style in (("textual", "-"), ("visual", ":")):
            part = table.filter((pl.col("task") == task) & (pl.col("form") == form) & (pl.col("size") > 0))
            if part.height:
                colour = colours[i % len(colours)]
                axes.plot(part["size"], part["faithfulness"], style, color=colour, label=f"{task}, {form}")
                axes.fill_between(part["size"], part["low"], part["high"], color=colour, alpha=0.08, lw=0)
    axes.axhline(0.8, color=_GREY, lw=0.8)
    axes.set(
        xscale="log", xlabel="circuit size (share of all nodes)", ylabel="faithfulness", ylim=(-0.1, 1.2)
    )
    axes.legend(frameon=False, fontsize=7, bbox_to_anchor=(1.0, 1.0), loc="upper left")
    return figure


def group_bars(table: pl.DataFrame, ylabel: str) -> Figure:
    """One bar per task and position group, with intervals where the table has them."""
    value = "niou" if "niou" in table.columns else "normalised"
    if "kind" in table.columns:
        table = table.filter(pl.col("kind") == "mean")
    tasks = table["task"].unique(maintain_order=True).to_list()
    figure, axes = canvas(width=max(5.0, 1.4 * len(tasks) + 1.5))
    for i, group in enumerate(_GROUPS):
        part = table.filter(pl.col("group") == group)
        places = [tasks.index(task) + (i - 1) * 0.27 for task in part["task"]]
        heights = part[value].fill_nan(None).fill_null(0).to_numpy()
        axes.bar(places, heights, 0.25, color=_GROUP_COLOURS[group], label=group)
        if value == "normalised":
            error = np.stack([heights - part["low"].to_numpy(), part["high"].to_numpy() - heights])
            axes.errorbar(places, heights, np.maximum(error, 0), fmt="none", ecolor=_GREY, lw=1)
    axes.axhline(1, color=_GREY, lw=0.8, ls=":")
    axes.axhline(0, color=_GREY, lw=0.8)
    axes.set_xticks(range(len(tasks)), tasks)
    lowest = float(np.nan_to_num(table[value].to_numpy()).min(initial=0.0))
    axes.set(ylabel=ylabel, ylim=(min(-0.25, max(lowest, -1.0) - 0.05), 1.3))
    axes.legend(frameon=False, ncols=3, loc="lower center", bbox_to_anchor=(0.5, 1.0))
    return figure


def alignment_lines(table: pl.DataFrame) -> Figure:
    """Largest cosine of image tokens to words over layers, as it is and mean-centred."""
    figure, axes = canvas(width=9, columns=2, sharey=True)
    for panel, column in zip(axes, ("cosine", "centred"), strict=True):
        for task in table["task"].unique(maintain_order=True):
            part = table.filter(pl.col("task") == task)
            panel.plot(part["layer"], part[column], label=task)
            panel.fill_between(part["layer"], part[f"{column}_low"], part[f"{column}_high"], alpha=0.12, lw=0)
        panel.set(xlabel="layer (-1: embeddings)", title=column)
    axes[0].set_ylabel("image-to-text alignment")
    axes[1].legend(frameon=False, fontsize=7)
    return figure


def effect_maps(table: pl.DataFrame, title: str) -> Figure:
    """Patching effect over layer and position, one panel per form, group borders marked.

    Colours follow the effect to the power 0.4: the last position would hide all others on a linear scale.
    """
    from matplotlib.colors import PowerNorm

    forms = table["form"].unique(maintain_order=True).to_list()
    figure, axes = canvas(width=4.6 * len(forms), columns=len(forms), squeeze=False)
    for panel, form in zip(axes[0], forms, strict=True):
        part = table.filter(pl.col("form") == form)
        values = part.pivot("position", index="layer", values="effect").sort("layer").drop("layer").to_numpy()
        panel.imshow(values, aspect="auto", origin="lower", cmap="magma", norm=PowerNorm(0.4))
        groups = part.filter(pl.col("layer") == 0).sort("position")["group"].to_list()
        starts = [i for i, g in enumerate(groups) if i == 0 or g != groups[i - 1]]
        panel.set_xticks(starts, [groups[i] for i in starts], rotation=45, ha="right")
        for start in starts[1:]:
            panel.axvline(start - 0.5, color="white", lw=0.6)
        panel.set(title=f"{title}, {form}", ylabel="layer")
    return figure


def back_patch_maps(table: pl.DataFrame, title: str) -> Figure:
    """Change in accuracy over source and destination layer, the best window; pictures beside the text control."""
    forms = table["form"].unique(maintain_order=True).to_list()
    figure, axes = canvas(width=4.2 * len(forms), height=3.6, columns=len(forms), squeeze=False)
    change = table.with_columns((pl.col("accuracy") - pl.col("baseline")).alias("change"))
    limit = float(change["change"].abs().to_numpy().max(initial=1e-9))
    for panel, form in zip(axes[0], forms, strict=True):
        best = change.filter(pl.col("form") == form).group_by("src", "dst").agg(pl.col("change").max())
        n = int(best["src"].to_numpy().max()) + 1
        values = np.full((n, n), np.nan)
        values[best["dst"].to_numpy(), best["src"].to_numpy()] = best["change"].to_numpy()
        image = panel.imshow(values, origin="lower", cmap="RdBu_r", vmin=-limit, vmax=limit)
        panel.set(title=f"{title}, {form}", xlabel="from layer", ylabel="to layer")
    figure.colorbar(image, ax=axes[0].tolist(), label="change in accuracy", shrink=0.9)
    return figure
