"""What a person writes as a pair is taken as it stands or refused by name."""

import numpy as np
import pytest

from circuit_cases import pairs_of, tiny
from microtome.circuits import prepare
from microtome.errors import ShapeError


def raw(**changes):
    built = tiny("llama")
    sides = {"clean": built.batch((6,), seed=0), "corrupted": built.batch((6,), seed=1)}
    return built.model, {**sides, "answer": 20, "corrupted_answer": 40, **changes}


@pytest.mark.parametrize(("changes", "message"), [
    ({"spans": {"data": [1, 4]}}, r"spans: data: expected positions without a gap, each once, found \[1, 4\]"),
    ({"spans": {"data": [1, 1]}}, "spans: data: expected positions without a gap"),
    ({"spans": {"data": [1.7]}}, r"spans: data: expected a list of whole numbers, found \[1.7\]"),
    ({"spans": {"data": 3}}, "spans: data: expected a list of whole numbers, found 3"),
    ({"spans": {"data": [-3, -2]}}, "spans: data: expected positions before the last of 7 tokens, found -3"),
    ({"spans": {"data": [1], "query": [5]}}, "spans: query: expected positions 2 to 5, .* found positions 5 to 5"),
    ({"spans": {"data": [1], "generation": [2]}}, "spans: generation: expected positions 6 to 6"),
    ({"spans": {"data": [1], "generation": []}}, "spans: generation: expected positions 6 to 6, .* found no position"),
    ({"spans": {"dta": [1]}}, "spans: expected one of prefix, data, query, generation, found 'dta'"),
    ({"spans": [1, 2]}, "spans: expected positions by group, found list"),
    ({"answer": -1}, "answer: expected a token id from 0 to 63, found -1"),
    ({"corrupted_answer": 999}, "corrupted_answer: expected a token id from 0 to 63, found 999"),
    ({"answer": 3.7}, "answer: expected text or a token id, found 3.7"),
    ({"answer": "yes"}, "processor: expected a tokenizer for the answer 'yes', found none"),
])  # fmt: skip
def test_input_that_would_be_rewritten_is_refused(changes, message):
    model, pair = raw(**changes)
    with pytest.raises(ShapeError, match=f"pairs: pair 0: {message}"):
        prepare(model, None, [pair])


@pytest.mark.parametrize(("option", "value"), [("on_invalid", "rasie"), ("align", "span")])
def test_misspelt_options_are_refused(option, value):
    model, pair = raw()
    with pytest.raises(ShapeError, match=f"{option}: expected one of .*, found '{value}'"):
        prepare(model, None, [pair], **{option: value})


@pytest.mark.parametrize(
    ("given", "groups"),
    [
        ({"data": [2, 1]}, ((0,), (1, 2), (3, 4, 5), (6,))),
        ({"data": range(1, 3), "query": [3, 4], "generation": [5, 6]}, ((0,), (1, 2), (3, 4), (5, 6))),
        ({"generation": [5, 6]}, ((), (), (0, 1, 2, 3, 4), (5, 6))),
    ],
)
def test_spans_are_those_that_are_given(given, groups):
    model, pair = raw(spans=given)
    found = prepare(model, None, [pair]).groups
    assert tuple(found[group] for group in ("prefix", "data", "query", "generation")) == groups


def test_a_generation_is_as_long_in_a_counterfactual_of_another_length():
    model, pair = raw(spans={"data": [1, 2], "query": [3, 4], "generation": [5, 6]})
    pair["corrupted"] = tiny("llama").batch((8,), seed=1)
    (one,) = prepare(model, None, [pair], align="spans")
    np.testing.assert_array_equal(one.partner, [0, 1, 2, 3, 6, 7, 8])


@pytest.mark.parametrize(
    ("index", "numbers"),
    [
        (np.array([False, True, False, True]), [1, 3]),
        ([False, True, True, False], [1, 2]),
        (np.array([2, 0], np.uint8), [2, 0]),
        ([-1], [3]),
        (slice(1, 3), [1, 2]),
    ],
)
def test_pairs_are_chosen_by_mask_or_by_place(index, numbers):
    pairs = pairs_of(tiny("llama"), 4, image=False)
    assert [pair.number for pair in pairs[index]] == numbers


@pytest.mark.parametrize(("index", "message"), [
    (np.array([True, False]), "expected a mask of 4 pairs, found one of 2"),
    ([0, 4], "expected places below 4, found 4"), ([-5], "expected places below 4, found -5"),
    ([0.5], "expected a slice, a list of places or a mask"), (0, "expected a slice, a list of places or a mask, found 0"),
    ([False] * 4, "expected at least one pair, found none"),
])  # fmt: skip
def test_other_choices_are_refused(index, message):
    pairs = pairs_of(tiny("llama"), 4, image=False)
    with pytest.raises(ShapeError, match=message):
        pairs[index]
