"""One HTML file that opens anywhere: figures as inline SVG, pictures as data, no script, no server."""

from __future__ import annotations

import base64
import io
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import polars as pl

from microtome.tensors import extra

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["Card", "Page"]

_LONG = 40
"""Characters from which a cell is prose and gets room."""


@dataclass(frozen=True)
class Card:
    """One sample of a feature: its picture, its words, how strongly the feature fired."""

    caption: str
    value: float
    text: str = ""
    image_png: bytes | None = None
    heat: list[list[float]] | None = None
    """Activation per image patch, row by row, scaled to 0..1; drawn over the picture."""
    note: str = ""
    """A line in small print below."""


@dataclass
class _Section:
    title: str
    text: str
    blocks: list[dict[str, Any]] = field(default_factory=list)


class Page:
    """A report under construction.

    Example:
        >>> import polars as pl
        >>> page = Page("Slices of a model", "what the run was")
        >>> table = pl.DataFrame({"task": ["colour"], "accuracy": [0.98]})
        >>> _ = page.section("Accuracy", "Share of right answers.").table(table)
        >>> "Slices of a model" in page.html()
        True
    """

    def __init__(self, title: str, subtitle: str = "", facts: dict[str, str] | None = None) -> None:
        self.title, self.subtitle, self.facts = title, subtitle, facts or {}
        self.sections: list[_Section] = []

    def section(self, title: str, text: str = "") -> Page:
        """Open a section; what is added next belongs to it."""
        self.sections.append(_Section(title, text))
        return self

    def figure(self, figure: Figure, caption: str = "") -> Page:
        """Add a matplotlib figure, drawn as SVG."""
        self.sections[-1].blocks.append({"kind": "figure", "svg": svg(figure), "caption": caption})
        return self

    def table(
        self, table: pl.DataFrame, caption: str = "", limit: int = 40, links: Sequence[str] | None = None
    ) -> Page:
        """Add the first ``limit`` rows of a table; ``links`` are where the first cells of its rows lead, if any."""
        shown = table.head(limit)
        rows = [[_cell(value) for value in row] for row in shown.iter_rows()]
        note = f"first {limit} of {table.height} rows" if table.height > limit else ""
        numeric = [dtype.is_numeric() for dtype in table.dtypes]
        wide = [any(len(row[i]) > _LONG for row in rows) for i in range(shown.width)]
        kinds = ["n" if n else "long" if w else "" for n, w in zip(numeric, wide, strict=True)]
        block = {"kind": "table", "columns": table.columns, "rows": rows, "kinds": kinds, "links": links}
        self.sections[-1].blocks.append({**block, "caption": " · ".join(filter(None, (caption, note)))})
        return self

    def cards(self, title: str, cards: list[Card], note: str = "") -> Page:
        """Add a strip of samples, most active first."""
        drawn = [{"card": card, "image": _data_uri(card.image_png)} for card in cards]
        self.sections[-1].blocks.append({"kind": "cards", "title": title, "note": note, "cards": drawn})
        return self

    def html(self) -> str:
        """The page as one string."""
        jinja2 = extra("jinja2", "report")
        environment = jinja2.Environment(
            loader=jinja2.PackageLoader("microtome.report", "."),
            autoescape=True,
            trim_blocks=True,
            lstrip_blocks=True,
        )
        template = environment.get_template("page.html.j2")
        return str(template.render(page=self, sections=self.sections))

    def write(self, path: str | Path) -> Path:
        """Write the page and return where it lies."""
        target = Path(path)
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_text(self.html(), encoding="utf-8")
        return target


def svg(figure: Figure) -> str:
    """``figure`` as an SVG element, the same bytes for the same figure."""
    import matplotlib as mpl

    buffer = io.StringIO()
    with mpl.rc_context({"svg.hashsalt": "microtome", "svg.fonttype": "none"}):
        figure.savefig(buffer, format="svg", bbox_inches="tight", metadata={"Date": None})
    text = buffer.getvalue()
    return text[text.index("<svg") :]


def _data_uri(png: bytes | None) -> str:
    return "" if png is None else "data:image/png;base64," + base64.b64encode(png).decode("ascii")


def _cell(value: Any) -> str:
    if value is None:
        return "–"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        return f"{value:.4g}"
    return str(value)
