"""Row tables and groups that cannot be: one error of microtome, in one line, by name; never one of polars."""

from __future__ import annotations

import numpy as np
import polars as pl
import pytest

from microtome.errors import DtypeError, ShapeError
from microtome.metrics import SparseCodes, cka_interval, feature_stats, frequency_gap, top_samples

N = 6
CODES = SparseCodes(np.zeros((N, 1), np.uint32), np.ones((N, 1), np.float32), d_sae=2)
ROWS = {"z": list("abcdef"), "sample": [0, 0, 1, 1, 2, 2], "position": [0, 1] * 3}
OBJECTS = pl.Series([object()] * N, dtype=pl.Object)
X = np.random.default_rng(0).standard_normal((20, 5), dtype=np.float32)

BY = "by: expected integer, string or boolean labels, found Object"
TABLES = {
    "complex": (lambda: feature_stats(CODES, np.arange(N) * 1j), DtypeError, BY),
    "objects": (lambda: feature_stats(CODES, OBJECTS), DtypeError, BY),
    "mixed": (lambda: feature_stats(CODES, [1, "a", 2, "b", None, 3]), DtypeError, "by: expected"),
    "arithmetic": (lambda: feature_stats(CODES, pl.col("z") + 1, rows=ROWS), DtypeError, "rows: expected"),
    "cast": (lambda: feature_stats(CODES, pl.col("z").cast(int), rows=ROWS), DtypeError, "rows: expected"),
    "lengths": (
        lambda: feature_stats(CODES, "z", rows={"z": ROWS["z"], "q": [1, 2]}),
        ShapeError,
        "rows: expected columns of one length",
    ),
    "all": (lambda: feature_stats(CODES, pl.all(), rows=ROWS), ShapeError, "found several columns"),
    "missing": (lambda: feature_stats(CODES, "w", rows=ROWS), ShapeError, 'unable to find column "w"'),
    "lazily missing": (
        lambda: feature_stats(CODES, "z", rows=pl.LazyFrame(ROWS).with_columns(pl.col("w"))),
        ShapeError,
        'unable to find column "w"',
    ),
    "object sample": (
        lambda: top_samples(CODES, {"sample": OBJECTS, "position": range(N)}),
        DtypeError,
        "sample: expected",
    ),
    "object cluster": (
        lambda: frequency_gap(CODES, {"sample": OBJECTS}, CODES, {"sample": OBJECTS}),
        DtypeError,
        "cluster: expected",
    ),
}


@pytest.mark.parametrize("case", TABLES)
def test_a_bad_row_table_is_refused_in_one_line(case):
    call, kind, message = TABLES[case]
    with pytest.raises(kind) as caught:
        call()
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("groups", "kind", "message"),
    [
        (
            pl.Series([None] * 3 + list(range(17))),
            ShapeError,
            "groups: expected a group in every row, found 3 null",
        ),
        ([None] * 10 + list(range(10)), ShapeError, "found 10 null"),
        (
            np.arange(20) + 0.5,
            DtypeError,
            "groups: expected integer, string or boolean labels, found Float64",
        ),
        (np.arange(20) * 1j, DtypeError, "groups: expected integer"),
        (np.arange(20)[:, None], ShapeError, r"groups: expected one entry per row, found shape (20, 1)"),
        (3, ShapeError, "groups: expected one entry per row, found shape ()"),
    ],
    ids=["null", "None", "float", "complex", "matrix", "scalar"],
)
def test_bad_groups_of_an_interval_are_refused_by_name(groups, kind, message):
    with pytest.raises(kind) as caught:
        cka_interval(X, X[:, :2], groups=groups)
    assert message in str(caught.value)


def test_groups_may_be_named_or_numbered():
    numbers = np.arange(20) // 2
    by_number = cka_interval(X, X[:, :2], groups=numbers)
    assert by_number == cka_interval(X, X[:, :2], groups=[f"image {i}" for i in numbers])
    assert by_number == cka_interval(X, X[:, :2], groups=pl.Series(numbers + 7))
