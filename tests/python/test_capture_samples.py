"""The sample table of a capture: ids and columns are kept as they were given, or refused (P11)."""

import enum
import threading
from datetime import date, datetime
from pathlib import Path

import numpy as np
import pytest
import torch

import microtome as mt
import tiny_models
from microtome.capture.samples import SampleTable
from microtome.errors import CorruptShardError, DtypeError, Error, StoreError
from test_capture import Stored

HOOKS = ["blocks.0.hook_resid_post"]


class Colour(enum.Enum):
    RED = 1


@pytest.fixture(scope="module")
def llama():
    return tiny_models.build("llama")


def fed(llama, path, batches, **options):
    """Capture one token of each sample of ``batches``, pairs of ids and columns."""
    with mt.capture(llama.model, path, HOOKS, **{"step_rows": 1} | options) as recorder, torch.no_grad():
        for ids, columns in batches:
            recorder.samples(ids=ids, **columns)
            llama.model(input_ids=torch.ones(len(ids), 1, dtype=torch.long))


def sampled(llama, path, batches, **options):
    fed(llama, path, batches, **options)
    return Stored(path)


# --- a step that cannot be built ----------------------------------------------------------------------------


def test_after_a_step_that_failed_a_recorder_takes_nothing_more(llama, tmp_path):
    refused = []
    with pytest.raises(Error, match="found one that failed"):
        with mt.capture(llama.model, tmp_path / "s", HOOKS, step_rows=2) as recorder, torch.no_grad():
            for i, value in enumerate([1, 2, 3, "three", 5, 6, 7]):
                try:
                    recorder.samples(ids=[i], value=[value])
                    llama.model(input_ids=torch.ones(1, 1, dtype=torch.long))
                except Error as error:
                    refused.append(error)
            with pytest.raises(Error, match="found one that failed"):
                llama.model(input_ids=torch.ones(1, 1, dtype=torch.long))
    assert isinstance(refused[0], DtypeError)
    expected = f"capture: expected a recorder without errors, found one that failed: {refused[0]}. Open"
    assert len(refused) == 3
    assert all(str(error).startswith(expected) for error in refused[1:])
    assert set(recorder.done) == {0, 1}
    assert mt.ActivationStore(tmp_path / "s").verify() == []
    store = sampled(llama, tmp_path / "s", [([i], {"value": [i]}) for i in range(7)], step_rows=2)
    assert store.samples["id"].to_list() == list(range(7))
    assert store.rows()["sample"].to_list() == list(range(7))


def test_a_last_step_that_failed_leaves_no_thread_and_no_lock(llama, tmp_path):
    with pytest.raises(DtypeError, match="samples: value: expected"):
        sampled(llama, tmp_path / "s", [([0], {"value": [1]}), ([1], {"value": ["one"]})], step_rows=9)
    assert not [t for t in threading.enumerate() if t.name == "microtome-writer"]
    assert sampled(llama, tmp_path / "s", [([0], {"value": [1]})]).samples["id"].to_list() == [0]


# --- a recorder used again ----------------------------------------------------------------------------------


def one_token(llama, recorder, ids):
    recorder.samples(ids=ids)
    llama.model(input_ids=torch.ones(len(ids), 1, dtype=torch.long))


def test_a_recorder_opened_again_goes_on_after_what_is_committed(llama, tmp_path):
    recorder = mt.capture(llama.model, tmp_path / "s", HOOKS, step_rows=2)
    with pytest.raises(KeyboardInterrupt), recorder, torch.no_grad():
        one_token(llama, recorder, ["a", "b"])
        one_token(llama, recorder, ["c"])
        recorder.samples(ids=["d"])
        raise KeyboardInterrupt
    for ids in (["c", "d"], ["c", "e"]):
        with recorder, torch.no_grad():
            assert set(recorder.done) == ({"a", "b"} if ids[1] == "d" else {"a", "b", "c", "d"})
            one_token(llama, recorder, ids)
    store = Stored(tmp_path / "s")
    assert store.samples["id"].to_list() == ["a", "b", "c", "d", "e"]
    assert store.rows()["sample"].to_list() == [0, 1, 2, 3, 4]


def test_an_open_recorder_cannot_be_opened_again(llama, tmp_path):
    with mt.capture(llama.model, tmp_path / "s", HOOKS) as recorder, torch.no_grad():
        with pytest.raises(Error, match="found an open one"), recorder:
            pass
        one_token(llama, recorder, ["a"])
    assert Stored(tmp_path / "s").samples["id"].to_list() == ["a"]


def test_a_capture_that_waits_for_widths_does_not_number_samples_that_another_numbered(llama, tmp_path):
    other, hook = tiny_models.build("llama"), ["model.layers.1.mlp.act_fn"]
    with pytest.raises(StoreError, match=r"expected a store without steps.*found 1 by another capture"):
        with mt.capture(llama.model, tmp_path / "s", hook) as late, torch.no_grad():
            with mt.capture(other.model, tmp_path / "s", hook) as first:
                one_token(other, first, ["a", "b"])
            one_token(llama, late, ["c", "d"])
    store = Stored(tmp_path / "s")
    assert store.samples["id"].to_list() == ["a", "b"]
    assert store.rows()["sample"].to_list() == [0, 1]


# --- what a resumed run reads back --------------------------------------------------------------------------


def test_a_damaged_sample_table_is_refused_before_it_is_parsed(llama, tmp_path):
    batches = [(["alpha", "beta"], {"note": ["hello", "world"]})]
    file = sampled(llama, tmp_path / "s", batches).steps[0] / "samples.parquet"
    file.chmod(0o644)
    sound = file.read_bytes()
    for i in range(0, len(sound), 37):
        file.write_bytes(sound[:i] + bytes([sound[i] ^ 1]) + sound[i + 1 :])
        with pytest.raises(CorruptShardError, match=r"samples\.parquet"):
            SampleTable(tmp_path / "s", 1)
    with pytest.raises(CorruptShardError, match=r"samples\.parquet"):
        sampled(llama, tmp_path / "s", batches)
    file.write_bytes(sound)
    assert sampled(llama, tmp_path / "s", batches).samples["id"].to_list() == ["alpha", "beta"]


# --- columns ------------------------------------------------------------------------------------------------


def stepwise(llama, path, *values):
    """One column, its values one sample and one step each; gives what is read back."""
    fed(llama, path, [([i], {"x": [value]}) for i, value in enumerate(values)])
    return mt.ActivationStore(path).samples.collect()["x"].to_list()


@pytest.mark.parametrize(
    ("values", "stored"),
    [
        ([1, None, 2.5], [1.0, None, 2.5]),
        ([None, "a", None], None),
        ([[], ["a"], [], None], None),
        ([[[]], [["a"]], [[]]], None),
        ([{"x": None, "y": 1}, {"x": "a", "y": None}, {"y": 2, "x": "b"}], None),
        ([{"x": 1}, {}, None], [{"x": 1}, {"x": None}, None]),
        ([[0.5], [1], [float("inf")]], None),
        ([datetime(2020, 1, 1, 12), date(2020, 1, 2)], [datetime(2020, 1, 1, 12), datetime(2020, 1, 2)]),
        ([np.float32(0.1), np.int64(3)], [float(np.float32(0.1)), 3.0]),
        ([np.arange(2), np.arange(2)], [[0, 1], [0, 1]]),
        ([True, None, False], None),
        ([Colour.RED], [1]),
        ([range(3)], [[0, 1, 2]]),
        ([(1, 2), (3,)], [[1, 2], [3]]),
        ([2**63, 1], None),
    ],
)
def test_a_column_gives_back_what_it_was_given(llama, tmp_path, values, stored):
    assert stepwise(llama, tmp_path / "s", *values) == (values if stored is None else stored)


def test_nan_is_a_value_like_others(llama, tmp_path):
    nan = float("nan")
    assert str(stepwise(llama, tmp_path / "s", 1, nan, 2.0)) == "[1.0, nan, 2.0]"
    assert str(stepwise(llama, tmp_path / "t", [1.0], [nan, 2])) == "[[1.0], [nan, 2.0]]"


@pytest.mark.parametrize(
    ("first", "second"),
    [
        ({"x": 1}, {"y": 1}),
        ({"x": None}, {"x": 1, "y": 2}),
        ([1], [1.5]),
        ([[]], [1]),
        ([], "a"),
        (["a"], [1]),
        (date(2020, 1, 1), datetime(2020, 1, 1, 12)),
        (True, 1),
    ],
)
def test_values_that_a_column_would_change_are_refused(llama, tmp_path, first, second):
    with pytest.raises(DtypeError, match=r"samples: x: expected .*, found others"):
        stepwise(llama, tmp_path / "s", first, second)
    with pytest.raises(DtypeError, match=r"samples: x: expected .*, found others"):
        sampled(llama, tmp_path / "t", [([0, 1], {"x": [first, second]})], step_rows=9)


def test_arrays_of_another_length_than_those_of_the_first_step_are_refused(llama, tmp_path):
    with pytest.raises(DtypeError, match=r"samples: x: expected Array.*, found others"):
        stepwise(llama, tmp_path / "s", np.arange(2), np.arange(3))


@pytest.mark.parametrize("value", [{1}, Path("a"), object(), {}, [{}]])
def test_values_that_no_table_holds_are_refused_naming_their_column(llama, tmp_path, value):
    kind = type(value).__name__
    with pytest.raises(DtypeError, match=f"samples: x: expected numbers, text.*, found {kind}"):
        sampled(llama, tmp_path / "s", [([0], {"sound": [1], "x": [value], "zero": [None]})])


# --- ids ----------------------------------------------------------------------------------------------------


class Name(str):
    __slots__ = ()

    def __str__(self):
        return "another text"


@pytest.mark.parametrize(
    ("first", "then"),
    [
        (np.array(["a", "b"]), ["b", "c"]),
        (["a", "b"], np.array(["b", "c"])),
        (np.arange(2), [1, 2]),
        ([0, 1], np.arange(1, 3).astype(np.uint8)),
        ([Name("a"), Name("b")], ["b", "c"]),
    ],
)
def test_a_run_with_ids_of_numpy_or_of_a_subclass_is_resumed(llama, tmp_path, first, then):
    fed(llama, tmp_path / "s", [(first, {})])
    ids = sampled(llama, tmp_path / "s", [(then, {})]).samples["id"].to_list()
    assert ids in (["a", "b", "c"], [0, 1, 2])


def test_ids_of_samples_that_were_refused_may_come_again(llama, tmp_path):
    with mt.capture(llama.model, tmp_path / "s", HOOKS) as recorder, torch.no_grad():
        with pytest.raises(KeyError):
            recorder.samples(ids=["a"], x={"another": 1})
        one_token(llama, recorder, ["a"])
    assert Stored(tmp_path / "s").samples.columns == ["sample", "id"]
