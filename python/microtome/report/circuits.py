"""Figures of a circuit study, each from one table of it.

:func:`draw` gives every figure that the tables allow: patching effects over layer and position, faithfulness over
size, overlap and interchange per position group, attention over the picture, mean-ablation of heads, alignment over
layers, back-patching over layer pairs.
"""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import polars as pl

from microtome.report.figures import PALETTE, canvas, literal

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = ["draw"]

Tables = Mapping[str, pl.DataFrame]
_GROUPS = ("data", "query", "generation")
_GROUP_COLOURS = {"data": PALETTE["image"], "query": PALETTE["text"], "generation": PALETTE["accent"]}
_TASK_COLOURS = ("#2a6f97", "#b03060", "#e08e2b", "#4f772d", "#7a5195", "#1c2430", "#00a3a3", "#a0785a")
_GREY, _LIGHT = "#5d6b7a", "#dfe4ea"
_FORM_LABELS = {"visual": "picture", "textual": "text (control)"}
_FORM_COLOURS = {"visual": PALETTE["image"], "textual": PALETTE["text"]}


def draw(tables: Tables) -> dict[str, tuple[Figure, pl.DataFrame]]:
    """Every figure that the tables allow, by name, with the rows it shows."""
    figures: dict[str, tuple[Figure, pl.DataFrame]] = {}
    if "curves" in tables:
        figures["faithfulness"] = faithfulness_curves(tables["curves"]), tables["curves"]
    if "overlap" in tables:
        shown = tables["overlap"].filter(pl.col("kind") == "mean", pl.col("group").is_in(_GROUPS))
        figures["overlap"] = overlap_bars(shown, tables.get("noise")), shown
    if "interchange" in tables:
        figures["interchange"] = interchange_bars(tables["interchange"]), tables["interchange"]
    if "controls" in tables:
        figures["controls"] = interchange_raw(tables["controls"]), tables["controls"]
    if "alignment" in tables:
        figures["alignment"] = alignment_lines(tables["alignment"]), tables["alignment"]
    if "repair" in tables:
        figures["repair"] = repair_gains(tables["repair"]), tables["repair"]
    if "ablation" in tables:
        figures["ablation"] = ablation_changes(tables["ablation"]), tables["ablation"]
    for name, one in (
        ("effects", effect_maps),
        ("backpatch", back_patch_maps),
        ("attention", attention_overlays),
    ):
        for task in _tasks(tables[name]) if name in tables else ():
            part = tables[name].filter(pl.col("task") == task)
            chosen = (
                tables["repair"].filter(pl.col("task") == task)
                if name == "backpatch" and "repair" in tables
                else None
            )
            figure = one(part, task) if chosen is None else back_patch_maps(part, task, chosen)
            figures[f"{name}-{task}"] = figure, part.drop("picture", strict=False)
    return figures


def _tasks(table: pl.DataFrame) -> list[str]:
    return table["task"].unique(maintain_order=True).to_list()


def _colour(number: int) -> str:
    return _TASK_COLOURS[number % len(_TASK_COLOURS)]


def faithfulness_curves(table: pl.DataFrame) -> Figure:
    """Faithfulness over circuit size: solid for text, dotted for pictures, a line at 80 %, 95 % bands."""
    figure, axes = canvas(7.4, 3.8)
    tasks = _tasks(table)
    for i, task in enumerate(tasks):
        for form, style in (("textual", "-"), ("visual", ":")):
            part = table.filter((pl.col("task") == task) & (pl.col("form") == form) & (pl.col("size") > 0))
            if part.height:
                axes.plot(part["size"], part["faithfulness"], style, color=_colour(i), lw=1.7)
                axes.fill_between(part["size"], part["low"], part["high"], color=_colour(i), alpha=0.07, lw=0)
    axes.axhline(0.8, color=_GREY, lw=0.8)
    axes.text(axes.get_xlim()[0], 0.81, " 80 %", color=_GREY, fontsize=8, va="bottom")
    axes.set(xscale="log", xlabel="circuit size (share of heads and of neurons)", ylabel="faithfulness")
    values = np.nan_to_num(table["faithfulness"].to_numpy())
    axes.set(ylim=(min(-0.1, values.min() - 0.05), max(1.15, values.max() + 0.05)))
    ticks = [0.001, 0.01, 0.1, 1.0]
    axes.set_xticks(ticks, ["0.1 %", "1 %", "10 %", "100 %"])
    keys = [_mark(task, _colour(i), lw=1.7) for i, task in enumerate(tasks)]
    keys += [_mark(form, ls=style, lw=1.5) for form, style in (("text", "-"), ("picture", ":"))]
    axes.legend(handles=keys, frameon=False, fontsize=8, bbox_to_anchor=(1.0, 1.0), loc="upper left")
    return figure


def _bars(axes: Axes, table: pl.DataFrame, value: str, tasks: Sequence[str], low: str, high: str) -> None:
    """One bar per task and group with its interval; what is not defined is said so."""
    for i, group in enumerate(_GROUPS):
        part = table.filter(pl.col("group") == group)
        for row in part.iter_rows(named=True):
            place = tasks.index(row["task"]) + (i - 1) * 0.27
            if row[value] is None or not np.isfinite(row[value]):
                axes.text(place, 0.02, "n.d.", rotation=90, ha="center", va="bottom", fontsize=7, color=_GREY)
                continue
            axes.bar(place, row[value], 0.25, color=_GROUP_COLOURS[group])
            edges = np.array([row.get(low), row.get(high)], np.float64)
            if np.isfinite(edges).all():
                axes.plot([place, place], edges, color="#1c2430", lw=1)
    axes.axhline(0, color=_GREY, lw=0.8)
    axes.set_xticks(range(len(tasks)), [literal(t) for t in tasks])
    axes.set_xlim(-0.6, len(tasks) - 0.4)


def _legend(figure: Figure, keys: Sequence[Any]) -> None:
    figure.legend(handles=keys, frameon=False, ncols=len(keys), fontsize=8, loc="outside upper center")


def _group_keys() -> list[Any]:
    from matplotlib.patches import Patch

    return [Patch(color=_GROUP_COLOURS[group], label=group) for group in _GROUPS]


def _mark(label: str, colour: str = _GREY, **look: Any) -> Any:
    """A line or marker that stands for something in a legend."""
    from matplotlib.lines import Line2D

    return Line2D([], [], color=colour, label=label, **({"lw": 0} | look))


def overlap_bars(table: pl.DataFrame, noise: pl.DataFrame | None = None) -> Figure:
    """IoU with its chance level, and nIoU with jackknife intervals; the noise floor is what halves of one form share."""
    tasks = _tasks(table)
    figure, panels = canvas(max(8.0, 2.4 * len(tasks)), 3.4, columns=2)
    for axes, value in zip(panels, ("iou", "niou"), strict=True):
        _bars(axes, table, value, tasks, f"{value}_low", f"{value}_high")
        axes.set(ylabel={"iou": "IoU", "niou": "nIoU"}[value], ylim=(-0.12 if value == "niou" else 0, 1.08))
        for row in table.iter_rows(named=True):
            place = tasks.index(row["task"]) + (_GROUPS.index(row["group"]) - 1) * 0.27
            if value == "iou":
                axes.plot([place - 0.12, place + 0.12], [row["chance"]] * 2, color="#1c2430", lw=1.8)
            if noise is not None:
                halves = noise.filter((pl.col("task") == row["task"]) & (pl.col("group") == row["group"]))
                known = halves[value].drop_nans()
                if len(known):
                    axes.plot(place, known.mean(), marker="D", ms=4.5, mfc="white", mec="#1c2430", lw=0)
    marks = [
        _mark("chance", "#1c2430", lw=1.8),
        _mark("halves of one form", "#1c2430", marker="D", mfc="white"),
    ]
    _legend(figure, _group_keys() + marks)
    return figure


def interchange_bars(table: pl.DataFrame) -> Figure:
    """Normalised faithfulness with the other form's sub-circuit: 0 as a random one, 1 as the form's own.

    An interval wider than 2 says that random sub-circuits do as well as the own one: not drawn.
    """
    tasks = _tasks(table)
    unclear = (pl.col("high") - pl.col("low")) > 2
    table = table.with_columns(
        pl.when(unclear).then(None).otherwise(pl.col("normalised")).alias("normalised")
    )
    figure, axes = canvas(max(5.5, 1.5 * len(tasks)), 3.4)
    _bars(axes, table, "normalised", tasks, "low", "high")
    axes.axhline(1, color=_GREY, lw=0.8, ls=":")
    axes.set(ylim=(-0.6, 1.3))
    axes.set_yticks([0, 0.5, 1], ["0\nrandom", "0.5", "1\nown"])
    axes.set_ylabel("normalised faithfulness")
    _legend(figure, _group_keys())
    return figure


def interchange_raw(table: pl.DataFrame) -> Figure:
    """Faithfulness of each form with its own, the other form's and random sub-circuits, group by group."""
    tasks = _tasks(table)
    figure, panels = canvas(max(8.0, 2.4 * len(tasks)), 3.2, columns=2, sharey=True)
    looks = {"own": "o", "other form": "s", "random": "x"}
    for axes, form in zip(panels, ("visual", "textual"), strict=True):
        for row in table.filter(pl.col("form") == form).iter_rows(named=True):
            centre = tasks.index(row["task"]) + (_GROUPS.index(row["group"]) - 1) * 0.28
            place = centre + (list(looks).index(row["circuit"]) - 1) * 0.07
            colour = _GROUP_COLOURS[row["group"]]
            axes.plot([place, place], [row["low"], row["high"]], color=colour, lw=1)
            axes.plot(place, row["faithfulness"], looks[row["circuit"]], color=colour, ms=4.5)
        axes.axhline(0, color=_GREY, lw=0.8)
        axes.set_xticks(range(len(tasks)), [literal(t) for t in tasks], rotation=20)
        axes.set_title({"visual": "pictures", "textual": "words"}[form])
    panels[0].set_ylabel("faithfulness")
    _legend(figure, _group_keys() + [_mark(name, marker=look) for name, look in looks.items()])
    return figure


def alignment_lines(table: pl.DataFrame) -> Figure:
    """Largest cosine of image tokens to words over layers, as it is and mean-centred."""
    figure, axes = canvas(width=9, columns=2, sharey=True)
    for panel, column in zip(axes, ("cosine", "centred"), strict=True):
        for i, task in enumerate(_tasks(table)):
            part = table.filter(pl.col("task") == task)
            panel.plot(part["layer"], part[column], label=literal(task), color=_colour(i), lw=1.6)
            panel.fill_between(
                part["layer"],
                part[f"{column}_low"],
                part[f"{column}_high"],
                color=_colour(i),
                alpha=0.1,
                lw=0,
            )
        panel.set(xlabel="layer (-1: embeddings)", title={"centred": "mean-centred"}.get(column, column))
    axes[0].set_ylabel("image-to-text alignment")
    axes[1].legend(frameon=False, fontsize=8, bbox_to_anchor=(1.0, 1.0), loc="upper left")
    return figure


def effect_maps(table: pl.DataFrame, title: str) -> Figure:
    """Patching effect over layer and position, one panel per form, groups named below.

    Colours follow the effect to the power 0.4: the last position would hide all others on a linear scale.
    """
    from matplotlib.colors import PowerNorm

    forms = _forms(table)
    figure, axes = canvas(width=4.8 * len(forms) + 0.6, columns=len(forms), squeeze=False)
    norm = PowerNorm(0.4, 0, max(table["effect"].to_numpy().max(initial=0.0), 1e-12))
    for panel, form in zip(axes[0], forms, strict=True):
        part = table.filter(pl.col("form") == form)
        values = part.pivot("position", index="layer", values="effect").sort("layer").drop("layer").to_numpy()
        image = panel.imshow(values, aspect="auto", origin="lower", cmap="magma", norm=norm)
        _name_groups(panel, part.filter(pl.col("layer") == 0).sort("position")["group"].to_list())
        panel.set(title=literal(f"{title}, {form}"), ylabel="layer")
        panel.set_yticks(range(len(values)) if len(values) <= 12 else range(0, len(values), 4))
    figure.colorbar(image, ax=axes[0].tolist(), label="patching effect", shrink=0.9, pad=0.01)
    return figure


def _name_groups(panel: Axes, groups: list[str]) -> None:
    """A tick in the middle of every group, a line at its border."""
    starts = [i for i, g in enumerate(groups) if i == 0 or g != groups[i - 1]]
    ends = [*starts[1:], len(groups)]
    names = {"generation": "gen.", "prefix": "bos" if ends and ends[0] == 1 else "prefix"}
    labels = [names.get(groups[a], groups[a]) for a in starts]
    panel.set_xticks([(a + b - 1) / 2 for a, b in zip(starts, ends, strict=True)], labels, fontsize=8)
    for start in starts[1:]:
        panel.axvline(start - 0.5, color="white", lw=0.8)


def _forms(table: pl.DataFrame) -> list[str]:
    return table["form"].unique(maintain_order=True).to_list()


def back_patch_maps(table: pl.DataFrame, title: str, chosen: pl.DataFrame | None = None) -> Figure:
    """Change in P(right answer) over source and destination layer, the best window; pictures beside the text control.

    A circle marks the setting chosen on half of the prompts.
    """
    forms = _forms(table)
    figure, axes = canvas(width=4.2 * len(forms), height=3.6, columns=len(forms), squeeze=False)
    change = table.with_columns((pl.col("p_correct") - pl.col("p_baseline")).alias("change"))
    best = change.group_by("form", "src", "dst").agg(pl.col("change").max())
    limit = float(best["change"].abs().to_numpy().max(initial=1e-9))
    n = int(table["src"].to_numpy().max()) + 1
    for panel, form in zip(axes[0], forms, strict=True):
        part = best.filter(pl.col("form") == form)
        values = np.full((n, n), np.nan)
        values[part["dst"].to_numpy(), part["src"].to_numpy()] = part["change"].to_numpy()
        panel.set_facecolor(_LIGHT)
        image = panel.imshow(values, origin="lower", cmap="RdBu_r", vmin=-limit, vmax=limit)
        panel.set(title=literal(f"{title}, {form}"), xlabel="from layer", ylabel="to layer")
        for row in () if chosen is None else chosen.filter(pl.col("form") == form).iter_rows(named=True):
            panel.plot(row["src"], row["dst"], "o", mfc="none", mec="#1c2430", ms=13, mew=1.4)
            text = f"window {row['window']}"
            panel.annotate(text, (row["src"], row["dst"] + 0.55), ha="center", va="bottom", fontsize=7)
    figure.colorbar(image, ax=axes[0].tolist(), label="change in P(right answer)", shrink=0.9)
    return figure


def _points(
    axes: Axes, tasks: list[str], shift: float, table: pl.DataFrame, stem: str, value: str, **look: Any
) -> None:
    """``value`` with the interval ``stem``_low to ``stem``_high, one per task."""
    places = [tasks.index(task) + shift for task in table["task"]]
    bar = {"color": look["color"], "lw": look.pop("bar", 1.4), "alpha": look.pop("alpha", 1.0)}
    axes.vlines(places, table[f"{stem}_low"], table[f"{stem}_high"], **bar)
    axes.plot(places, table[value], lw=0, **look)


def _by_task(panels: Any, tasks: list[str], labels: Sequence[str]) -> None:
    for axes, label in zip(panels, labels, strict=True):
        axes.axhline(0, color=_GREY, lw=0.8)
        axes.set_xticks(range(len(tasks)), [literal(t) for t in tasks], rotation=20)
        axes.set_ylabel(label)


def repair_gains(table: pl.DataFrame) -> Figure:
    """Gain of back-patching on the prompts that did not choose the setting, pictures beside the text control."""
    tasks = _tasks(table)
    figure, panels = canvas(max(8.0, 2.2 * len(tasks)), 3.2, columns=2)
    for axes, value in zip(panels, ("gain", "p_gain"), strict=True):
        for i, (form, colour) in enumerate(_FORM_COLOURS.items()):
            part = table.filter(pl.col("form") == form)
            _points(axes, tasks, (i - 0.5) * 0.2, part, value, value, color=colour, marker="o", ms=5)
    _by_task(panels, tasks, ("gain in accuracy", "gain in P(right answer)"))
    _legend(figure, [_mark(label, _FORM_COLOURS[form], marker="o") for form, label in _FORM_LABELS.items()])
    return figure


def ablation_changes(table: pl.DataFrame) -> Figure:
    """Change in accuracy and P(correct) with attributed heads at their mean, beside random heads (bars: their 95 % range)."""
    tasks = _tasks(table)
    figure, panels = canvas(max(8.0, 2.2 * len(tasks)), 3.2, columns=2)
    grey = {"color": _GREY, "marker": "_", "ms": 8, "bar": 4, "alpha": 0.35}
    for axes, value in zip(panels, ("accuracy", "p_correct"), strict=True):
        for i, (form, colour) in enumerate(_FORM_COLOURS.items()):
            part, centre = table.filter(pl.col("form") == form), (i - 0.5) * 0.34
            _points(
                axes, tasks, centre - 0.06, part, value, f"{value}_change", color=colour, marker="o", ms=5
            )
            if f"control_{value}_low" in part.columns:
                _points(
                    axes, tasks, centre + 0.06, part, f"control_{value}", f"control_{value}_change", **grey
                )
    _by_task(panels, tasks, ("change in accuracy", "change in P(correct)"))
    keys = [_mark(f"attributed heads, {form}", colour, marker="o") for form, colour in _FORM_COLOURS.items()]
    _legend(figure, [*keys, _mark("random heads", marker="_", ms=8)])
    return figure


def attention_overlays(table: pl.DataFrame, title: str) -> Figure:
    """Attention of the attributed heads from the last position over the picture: a row per head, a column per prompt."""
    prompts = table["prompt"].unique(maintain_order=True).to_list()
    heads = table.select("layer", "head").unique(maintain_order=True).rows()
    size = 1.9 * len(prompts) + 0.6, 1.9 * len(heads) + 0.8
    figure, panels = canvas(*size, columns=len(prompts), rows=len(heads), squeeze=False)
    for row in table.iter_rows(named=True):
        i, j = heads.index((row["layer"], row["head"])), prompts.index(row["prompt"])
        _overlay(panels[i, j], row)
        if i == 0:
            panels[i, j].set_title(literal(_wrapped(row["text"].replace("<image>", "").strip())), fontsize=7)
        if j == 0:
            panels[i, j].set_ylabel(f"L{row['layer']}H{row['head']}", fontsize=9)
        panels[i, j].set_xlabel(f"{row['image_mass']:.0%} on the picture", fontsize=7)
    figure.suptitle(literal(title), fontsize=10)
    return figure


def _overlay(panel: Axes, row: Mapping[str, Any]) -> None:
    weights = np.asarray(row["weights"], np.float64)
    side = round(len(weights) ** 0.5)
    panel.set_xticks([])
    panel.set_yticks([])
    if side * side != len(weights):
        panel.plot(weights, color=PALETTE["image"], lw=1)
        return
    grid = weights.reshape(side, side) / max(weights.max(), 1e-12)
    extent = (0, side, side, 0)
    if row["picture"]:
        import matplotlib.image as images

        panel.imshow(images.imread(io.BytesIO(row["picture"])), extent=extent, interpolation="nearest")
    panel.imshow(
        np.zeros_like(grid), extent=extent, cmap="gray", alpha=0.75 * (1 - grid), interpolation="nearest"
    )


def _wrapped(text: str, width: int = 24) -> str:
    lines = [""]
    for word in text.split():
        if lines[-1] and len(lines[-1]) + len(word) >= width:
            lines.append("")
        lines[-1] = f"{lines[-1]} {word}".strip()
    return "\n".join(lines[:3])
