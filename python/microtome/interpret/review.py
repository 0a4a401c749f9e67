"""Human verdicts on labels: a sheet to fill in, and how far the reviewers agree."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

import polars as pl

from microtome.errors import ShapeError
from microtome.interpret.labels import Label

__all__ = ["VERDICTS", "agreement", "read_verdicts", "write_review_sheet"]

VERDICTS = ("right", "partly", "wrong")


def write_review_sheet(labels: Sequence[Label], path: str | Path) -> Path:
    """A CSV with one line per label and empty columns ``verdict`` (right, partly, wrong) and ``comment``."""
    rows = [{k: v for k, v in asdict(label).items() if not isinstance(v, list | dict)} for label in labels]
    target = Path(path)
    pl.DataFrame(rows).with_columns(verdict=pl.lit(""), comment=pl.lit("")).write_csv(target)
    return target


def read_verdicts(path: str | Path) -> pl.DataFrame:
    """A filled-in sheet: layer, feature, verdict, comment; lines without a verdict are left out.

    Raises:
        ShapeError: a verdict that is none of right, partly, wrong; names the line.
    """
    table = pl.read_csv(path, schema_overrides={"verdict": pl.String, "comment": pl.String})
    table = table.with_row_index("line", offset=2).with_columns(
        pl.col("verdict").fill_null("").str.strip_chars().str.to_lowercase()
    )
    wrong = table.filter((pl.col("verdict") != "") & ~pl.col("verdict").is_in(VERDICTS))
    if wrong.height:
        raise ShapeError(
            f"verdict: expected {', '.join(VERDICTS)}, found {wrong['verdict'][0]!r} in line {wrong['line'][0]} of {path}"
        )
    return table.filter(pl.col("verdict") != "").select("layer", "feature", "verdict", "comment")


def agreement(a: pl.DataFrame, b: pl.DataFrame) -> dict[str, float]:
    """How far two reviewers agree: share of equal verdicts and Cohen's kappa over the labels that both judged.

    ``kappa = (p_o - p_e) / (1 - p_e)``; NaN when both always gave the same one verdict, since chance then explains all.

    Raises:
        ShapeError: no label was judged by both.
    """
    both = a.join(b, on=["layer", "feature"], suffix="_b")
    if not both.height:
        raise ShapeError("verdicts: expected labels that both reviewers judged, found none")
    observed = float((both["verdict"] == both["verdict_b"]).mean())  # type: ignore[arg-type]
    shares = [
        float((both["verdict"] == v).mean()) * float((both["verdict_b"] == v).mean())  # type: ignore[arg-type]
        for v in VERDICTS
    ]
    expected = sum(shares)
    kappa = (observed - expected) / (1 - expected) if expected < 1 else float("nan")
    return {"n": float(both.height), "agreement": observed, "kappa": kappa}
