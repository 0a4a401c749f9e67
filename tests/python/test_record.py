"""A table says what made it, and tables of different data are not mixed unseen (promise P26)."""

import polars as pl
import pytest

from microtome import set_num_threads
from microtome.errors import StoreError
from microtome.record import Record, read_record, require_same_inputs, write_table

TABLE = pl.DataFrame({"feature": [0, 1], "fires": [3, 5]})


def made(fingerprint="aa", **parameters):
    return Record("stats", {"runs/llava": fingerprint}, parameters, rows=10)


def test_record_travels_with_the_table_and_the_table_stays_plain_parquet(tmp_path):
    path = write_table(TABLE, tmp_path / "new" / "stats.parquet", made(by="kind", threshold=0.2))
    assert pl.read_parquet(path).equals(TABLE)
    found = read_record(path)
    assert found == made(by="kind", threshold=0.2)
    assert found.version
    assert found.threads >= 1


def test_other_parameters_inputs_or_rows_are_another_record():
    assert made(by="kind") != made(by="task")
    assert made("aa") != made("bb")
    assert Record("stats", {}, rows=1) != Record("stats", {}, rows=2)


def test_threads_are_noted_and_not_compared():
    one = made()
    set_num_threads(1)
    try:
        assert made().threads == 1
        assert made() == one
    finally:
        set_num_threads(0)


def test_a_table_without_record_has_none(tmp_path):
    TABLE.write_parquet(tmp_path / "plain.parquet")
    assert read_record(tmp_path / "plain.parquet") is None


def test_tables_of_different_data_are_refused_with_both_named(tmp_path):
    a = write_table(TABLE, tmp_path / "a.parquet", made("aa"))
    b = write_table(TABLE, tmp_path / "b.parquet", made("aa", by="kind"))
    require_same_inputs([a, b])
    c = write_table(TABLE, tmp_path / "c.parquet", made("bb"))
    with pytest.raises(StoreError, match=r"runs/llava, found aa in .*a\.parquet and bb in .*c\.parquet"):
        require_same_inputs([a, b, c])
