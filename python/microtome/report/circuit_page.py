"""The report of a circuit study: figures as PNG with their rows as CSV, and one HTML page."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any
from urllib.parse import quote

import polars as pl

from microtome.errors import ShapeError
from microtome.report.circuits import draw
from microtome.report.page import Page

__all__ = ["circuit_page", "write_report"]

Tables = Mapping[str, pl.DataFrame]
_NAMES = (
    "accuracy", "curves", "sizes", "overlap", "noise", "shared", "interchange", "controls", "effects", "attention",
    "ablation", "alignment", "backpatch", "repair", "iterated", "agreement", "cost",
)  # fmt: skip
_SECTIONS: tuple[tuple[str, str, tuple[str, ...]], ...] = (
    ("What the model answers", "Only pairs whose two prompts are answered correctly enter the circuits.", ("accuracy",)),
    (
        "Faithfulness",
        ("Share of the logit difference that a circuit alone keeps, everything outside it set to its counterfactual "
        "value; 95 % bootstrap over held-out pairs. The chosen circuit is the smallest above the threshold."),
        ("faithfulness", "sizes"),
    ),
    (
        "What two forms share",
        ("IoU of heads and of neurons, averaged; data positions are dropped before they are compared. nIoU is 0 at "
        "chance and 1 for equal circuits. Lines: 95 % jackknife over blocks of discovery pairs. Diamonds: circuits of two "
        "halves of the same form, with half the pairs each."),
        ("overlap", "shared"),
    ),
    (
        "Interchange",
        ("A group's sub-circuit replaced by that of the other form, between random sub-circuits (0) and the form's own (1). "
        "n.d.: a random sub-circuit does as well as the own one (or the interval is wider than 2): nothing to normalise by."),
        ("interchange", "controls"),
    ),
    ("Where the effect is", "Sum of node scores over layer and position.", ("effects",)),
    (
        "Heads",
        ("The heads with the largest scores at their mean over the discovery prompts, beside as many random heads; "
        "and where they look from the last position."),
        ("ablation", "attention"),
    ),
    ("Alignment", "Mean over image tokens of the largest cosine to a token of the description.", ("alignment",)),
    (
        "Back-patching",
        ("Late values of the data put into an earlier layer. Maps: all prompts, best window. Gains: setting chosen on one "
        "half of the prompts, judged on the other; 95 % bootstrap."),
        ("repair", "backpatch", "iterated"),
    ),
    ("How far to trust the scores", "Rank correlation with exact patching of the nodes that score highest.", ("agreement",)),
    ("Cost", "Estimated before the run.", ("cost",)),
)  # fmt: skip
_CLUMSY = {"effects", "attention", "backpatch", "controls", "curves", "alignment"}
"""Tables too long for a page; their figures stand for them."""


_ABLATION = pl.col(
    "task", "form", "heads", "n", "accuracy_before", "accuracy", "accuracy_change", "accuracy_low", "accuracy_high",
    "p_mcnemar", "^control_accuracy_.*$", "^accuracy_excess.*$",
)  # fmt: skip


def circuit_page(tables: Tables, facts: Mapping[str, str] | None = None) -> Page:
    """The report of a study from its tables.

    Args:
        tables: as :func:`microtome.circuits.study.run` gives them.
        facts: what was studied, for the head of the page.
    """
    figures = draw(tables)
    page = Page("Circuits across modalities", "The same tasks in pictures and in words", dict(facts or {}))
    for title, text, names in _SECTIONS:
        blocks = [name for name in names if name in tables or name in figures]
        if not blocks:
            continue
        page.section(title, text)
        for name in blocks:
            for key, (figure, _) in figures.items():
                if key == name or key.startswith(f"{name}-"):
                    page.figure(figure)
            if name in tables and name not in _CLUMSY:
                page.table(_readable(name, tables[name]), limit=60)
    return page


def _readable(name: str, table: pl.DataFrame) -> pl.DataFrame:
    """Intervals in one cell, parts that only a reader of the parquet file wants left out."""
    if name == "overlap":
        table = table.filter(pl.col("kind") == "mean").drop("kind", "drawn_low", "drawn_high", "niou_drawn")
    if name == "interchange":
        table = table.select("task", "group", "normalised", "low", "high")
    if name == "ablation":
        table = table.select(_ABLATION)
    if name == "iterated":
        table = table.pivot("iteration", index=["task", "form"], values="accuracy")
    for low in [c for c in table.columns if c.endswith("_low") or c == "low"]:
        stem, high = low.removesuffix("low").removesuffix("_"), low.removesuffix("low") + "high"
        edges = [pl.col(c).round(2).fill_nan(None).cast(pl.String) for c in (low, high)]
        text = pl.concat_str(
            *edges, separator="\u00a0to\u00a0"
        )  # null where an edge is: not wrapped, not "NaN"
        table = table.with_columns(text.alias(low)).drop(high).rename({low: f"{stem or ''} 95 %".strip()})
    return table


def write_report(folder: str | Path, facts: Mapping[str, str] | None = None) -> tuple[Path, list[Path]]:
    """Draw the study in ``folder``: ``figures/*.png`` with ``figures/*.csv``, and ``report.html``.

    Args:
        folder: the tables of a study.
        facts: what was studied; what ``run.json`` and ``study.json`` say when None.

    Returns:
        The page, and the figures.

    Raises:
        ShapeError: the folder holds no table of a study.
    """
    source = Path(folder)
    tables = {name: pl.read_parquet(path) for name in _NAMES if (path := source / f"{name}.parquet").exists()}
    if not tables:
        raise ShapeError(f"figures: {source}: expected the tables of a circuit study, found none")
    out = source / "figures"
    out.mkdir(exist_ok=True)
    paths = []
    for name, (figure, rows) in draw(tables).items():
        paths.append(out / f"{quote(name, safe=' ')}.png")
        figure.savefig(paths[-1], dpi=150, facecolor="white")
        _flat(rows).write_csv(paths[-1].with_suffix(".csv"))
    page = circuit_page(tables, _facts(source) if facts is None else facts)
    return page.write(source / "report.html"), paths


def _flat(table: pl.DataFrame) -> pl.DataFrame:
    """Lists as text: CSV has none."""
    lists = [name for name, dtype in table.schema.items() if isinstance(dtype, pl.List)]
    return table.with_columns(pl.col(name).cast(pl.List(pl.String)).list.join(" ") for name in lists)


def _facts(folder: Path) -> dict[str, str]:
    facts: dict[str, str] = {}
    for name, wanted in (("run.json", ("model", "tasks")), ("study.json", ("weights", "version"))):
        path = folder / name
        known: dict[str, Any] = json.loads(path.read_text()) if path.exists() else {}
        facts |= {key: _said(known[key]) for key in wanted if key in known}
        if name == "study.json":
            options = {k.removeprefix("option "): v for k, v in known.items() if k.startswith("option ")}
            shown = ("method", "steps", "threshold", "n_random", "n_blocks", "n_heads", "fraction", "seed")
            facts["options"] = ", ".join(f"{k} {options[k]}" for k in shown if k in options)
    return {key: value for key, value in facts.items() if value}


def _said(value: Any) -> str:
    return (
        ", ".join(map(str, value))
        if isinstance(value, Sequence) and not isinstance(value, str)
        else str(value)
    )
