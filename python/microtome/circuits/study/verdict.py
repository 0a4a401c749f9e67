"""The verdict on what two forms share, over tasks."""

from __future__ import annotations

from collections.abc import Mapping

import polars as pl

from microtome.errors import ShapeError

__all__ = ["shared_more_in_generation"]


def shared_more_in_generation(tables: Mapping[str, pl.DataFrame]) -> pl.DataFrame:
    """Mean nIoU per group over tasks, and whether generation shares more than data.

    Raises:
        ShapeError: no task in both forms.
    """
    if "overlap" not in tables:
        raise ShapeError("overlap: expected a task in both forms, found none")
    means = (
        tables["overlap"]
        .filter(pl.col("kind") == "mean")
        .group_by("group")
        .agg(
            pl.col("niou").filter(pl.col("niou").is_not_nan()).mean(),
            pl.col("iou").mean(),
            pl.len().alias("n_tasks"),
            pl.col("niou").is_nan().sum().alias("n_undefined"),
        )
    )
    of = dict(zip(means["group"], means["niou"], strict=True))
    more = of.get("generation") is not None and of.get("data") is not None and of["generation"] > of["data"]
    return means.sort("group").with_columns(pl.lit(more).alias("generation_above_data"))
