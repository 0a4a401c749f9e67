"""The two-stage filter over all features of all layers, and what is left after a shift to spatial questions.

All selections work on one feature table (polars; one row per layer and feature) and add a boolean column. Counts are exact,
``ceil(p * n)``, and ties go to the lower layer, then the lower feature: the same table always gives the same set.

Source: 2602.08713, sections 5.2 and 6.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import polars as pl

from microtome.errors import ShapeError

__all__ = ["neutral_survivors", "select_adapted", "select_spatial", "sensitivity", "summary"]

_KEY = ["layer", "feature"]


def select_adapted(table: pl.DataFrame, *, p_gap: float = 0.2, p_cos: float = 0.2) -> pl.DataFrame:
    """Mark the features with a large variance gap and, among them, the least aligned decoder direction.

    Stage one keeps the top ``p_gap`` share by ``variance_gap`` over all layers pooled; stage two keeps the bottom ``p_cos``
    share of those by ``decoder_cosine``. Dead features (they fire on neither side, so their gap is exactly 0) and features
    without a finite cosine take part in neither stage: with them, a dictionary that is mostly dead would make the first cut
    arbitrary.

    Args:
        table: columns ``layer``, ``feature``, ``variance_gap``, ``decoder_cosine`` and, if known, ``dead``.
        p_gap: share kept by the first stage, in (0, 1].
        p_cos: share of those kept by the second stage, in (0, 1].

    Returns:
        The table with the columns ``large_gap`` and ``adapted``.

    Raises:
        ShapeError: a share outside (0, 1], or a missing column.

    Example:
        >>> import polars as pl
        >>> cosines = [0.9] * 8 + [0.8, 0.1]
        >>> columns = {"layer": [0] * 10, "feature": range(10), "variance_gap": range(10)}
        >>> table = pl.DataFrame({**columns, "decoder_cosine": cosines})
        >>> select_adapted(table, p_gap=0.2, p_cos=0.5).filter("adapted")["feature"].to_list()
        [9]
    """
    _need(table, [*_KEY, "variance_gap", "decoder_cosine"])
    _share("p_gap", p_gap)
    _share("p_cos", p_cos)
    dead = pl.col("dead") if "dead" in table.columns else pl.lit(value=False)
    valid = ~dead & pl.col("decoder_cosine").is_finite() & pl.col("variance_gap").is_finite()
    pool = table.filter(valid).sort("variance_gap", *_KEY, descending=[True, False, False])
    large = pool.head(math.ceil(p_gap * pool.height))
    rotated = large.sort("decoder_cosine", *_KEY).head(math.ceil(p_cos * large.height))
    return _mark(_mark(table, large, "large_gap"), rotated, "adapted")


def select_spatial(
    table: pl.DataFrame,
    *,
    top: float | None = 0.2,
    min_gap: float | None = None,
    min_odds_ratio: float = 1.0,
    max_q: float | None = None,
    within: str | None = "adapted",
) -> pl.DataFrame:
    """Mark the features that fire more on spatial questions.

    A candidate has ``frequency_gap`` among the ``top`` share of living features (or at least ``min_gap``; the paper says
    only "large") and an odds ratio above ``min_odds_ratio``; with ``max_q``, a Benjamini-Hochberg q-value of at most that.
    Candidates are spatial when they also lie in the set named by the column ``within``.

    Args:
        table: columns ``layer``, ``feature``, ``frequency_gap``, ``odds_ratio`` and those named by the options.
        top: share of living features by frequency gap; None when ``min_gap`` is given.
        min_gap: least frequency gap.
        min_odds_ratio: least odds ratio, exclusive.
        max_q: largest q-value; needs the column ``q_value``.
        within: boolean column that spatial features must lie in; None for all.

    Returns:
        The table with the columns ``spatial_candidate`` and ``spatial``.
    """
    _need(
        table,
        [
            *_KEY,
            "frequency_gap",
            "odds_ratio",
            *(["q_value"] if max_q is not None else []),
            *([within] if within else []),
        ],
    )
    if (top is None) == (min_gap is None):
        raise ShapeError(f"top, min_gap: expected exactly one of them, found top={top}, min_gap={min_gap}")
    living = table.filter(~pl.col("dead")) if "dead" in table.columns else table
    ranked = living.sort("frequency_gap", *_KEY, descending=[True, False, False], nulls_last=True)
    if min_gap is not None:
        large = ranked.filter(pl.col("frequency_gap") >= min_gap)
    else:
        _share("top", top)
        large = ranked.head(math.ceil(float(top or 0) * ranked.height)).filter(pl.col("frequency_gap") > 0)
    chosen = large.filter(pl.col("odds_ratio") > min_odds_ratio)
    if max_q is not None:
        chosen = chosen.filter(pl.col("q_value") <= max_q)
    marked = _mark(table, chosen, "spatial_candidate")
    inside = pl.col(within) if within else pl.lit(value=True)
    return marked.with_columns(spatial=pl.col("spatial_candidate") & inside)


def neutral_survivors(
    table: pl.DataFrame, neutral: pl.DataFrame, *, min_frequency: float = 0.01, min_image_mass: float = 0.5
) -> pl.DataFrame:
    """Mark the spatial features that stay active, mostly on image tokens, under a neutral prompt.

    The paper asks that they "remain active and image-token-dominant" without numbers; the defaults are firing on 1 % of the
    samples and more than half of the activation mass on image tokens.

    Args:
        table: feature table with the column ``spatial``.
        neutral: columns ``layer``, ``feature``, ``sample_frequency`` (share of samples on which the feature fires) and
            ``image_mass`` (share of its summed activation that lies on image tokens), from a run of the neutral prompt.
        min_frequency: least share of samples, inclusive.
        min_image_mass: least share of mass, exclusive.

    Returns:
        The table with ``neutral_frequency``, ``neutral_image_mass`` and ``survivor``.
    """
    _need(table, [*_KEY, "spatial"])
    _need(neutral, [*_KEY, "sample_frequency", "image_mass"])
    facts = neutral.select(
        *_KEY, neutral_frequency=pl.col("sample_frequency"), neutral_image_mass=pl.col("image_mass")
    )
    joined = table.join(facts, on=_KEY, how="left", maintain_order="left")
    alive = pl.col("neutral_frequency").fill_null(0.0) >= min_frequency
    seen = pl.col("neutral_image_mass").fill_nan(0.0).fill_null(0.0) > min_image_mass
    return joined.with_columns(survivor=pl.col("spatial") & alive & seen)


def sensitivity(
    table: pl.DataFrame,
    p_gaps: Sequence[float] = (0.1, 0.15, 0.2, 0.25, 0.3),
    p_coss: Sequence[float] = (0.1, 0.15, 0.2, 0.25, 0.3),
    reference: tuple[float, float] = (0.2, 0.2),
) -> pl.DataFrame:
    """The adapted set for every pair of thresholds, against the one for ``reference``.

    Returns:
        One row per pair: p_gap, p_cos, n_adapted, the IoU with the reference set, and n_spatial where the table has
        the column ``spatial_candidate``.
    """
    base = _adapted_keys(table, *reference)
    candidates = None
    if "spatial_candidate" in table.columns:
        candidates = set(table.filter("spatial_candidate").select(_KEY).iter_rows())
    rows = []
    for p_gap in p_gaps:
        for p_cos in p_coss:
            keys = _adapted_keys(table, p_gap, p_cos)
            union = len(base | keys)
            iou = len(base & keys) / union if union else float("nan")
            row = {"p_gap": p_gap, "p_cos": p_cos, "n_adapted": len(keys), "iou_with_reference": iou}
            rows.append(row if candidates is None else row | {"n_spatial": len(keys & candidates)})
    return pl.DataFrame(rows)


def summary(table: pl.DataFrame) -> pl.DataFrame:
    """Per layer: features, dead, adapted, spatial, survivors, and the mean cosine of the adapted set and of the pool."""
    flags = [
        name for name in ("dead", "large_gap", "adapted", "spatial", "survivor") if name in table.columns
    ]
    finite = pl.col("decoder_cosine").filter(pl.col("decoder_cosine").is_finite())
    columns = [
        pl.len().alias("features"),
        *(pl.col(f).sum().alias(f) for f in flags),
        finite.mean().alias("cosine_pool"),
    ]
    if "adapted" in flags:
        columns.append(pl.col("decoder_cosine").filter(pl.col("adapted")).mean().alias("cosine_adapted"))
    return table.group_by("layer").agg(columns).sort("layer")


def _adapted_keys(table: pl.DataFrame, p_gap: float, p_cos: float) -> set[tuple[int, int]]:
    marked = select_adapted(table, p_gap=p_gap, p_cos=p_cos)
    return set(marked.filter("adapted").select(_KEY).iter_rows())


def _mark(table: pl.DataFrame, chosen: pl.DataFrame, name: str) -> pl.DataFrame:
    """``table`` with a boolean column ``name``, true for the keys of ``chosen``; the order of rows is kept."""
    keys = chosen.select(_KEY).with_columns(pl.lit(value=True).alias(name))
    base = table.drop(name, strict=False)
    return base.join(keys, on=_KEY, how="left", maintain_order="left").with_columns(
        pl.col(name).fill_null(value=False)
    )


def _share(name: str, value: float | None) -> None:
    if value is None or not (0 < value <= 1) or not np.isfinite(value):
        raise ShapeError(f"{name}: expected a share in (0, 1], found {value}")


def _need(table: pl.DataFrame, columns: Sequence[str]) -> None:
    missing = [column for column in columns if column not in table.columns]
    if missing:
        raise ShapeError(
            f"table: expected the columns {', '.join(columns)}, found none called {', '.join(missing)}"
        )
