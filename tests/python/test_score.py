"""Accuracy and its interval."""

import polars as pl
import pytest

from microtome.evaluation import accuracy


def test_accuracy_is_counted_for_each_group_with_wilson_interval():
    scores = pl.DataFrame(
        {"task": ["a"] * 10 + ["b"] * 4, "form": "textual", "correct": [True] * 9 + [False] + [True] * 4}
    )
    table = accuracy(scores, ["task"])
    assert table["n"].to_list() == [10, 4]
    assert table["accuracy"].to_list() == [0.9, 1.0]
    assert table["low"][0] == pytest.approx(0.59585, abs=1e-4)  # Wilson 1927, n = 10, 9 right
    assert table["high"][0] == pytest.approx(0.98213, abs=1e-4)
    assert table["high"][1] == pytest.approx(1.0)
