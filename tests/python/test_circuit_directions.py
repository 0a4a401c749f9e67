"""Directions are taken as they are held: parameters, bf16, lists; what is not finite is refused."""

import numpy as np
import pytest
import torch

from circuit_cases import pairs_of, tiny
from microtome.circuits import ablate_features, feature_attribution, mean_embedding
from microtome.errors import NonFiniteError, ShapeError

ONES = torch.ones(64)
HELD = {
    "parameter": torch.nn.Parameter(ONES.clone()),
    "bf16": ONES.bfloat16(),
    "float16 array": np.ones(64, np.float16),
    "list": [1.0] * 64,
}


def ablated(model, direction):
    batch = tiny("llava").batch()
    with torch.no_grad(), ablate_features(model, {1: direction}):
        return model(**batch).logits


@pytest.mark.parametrize("held", HELD)
def test_directions_are_taken_as_they_are_held(held):
    built = tiny("llava")
    model, pairs = built.model, pairs_of(built)
    assert torch.equal(ablated(model, HELD[held]), ablated(model, np.ones(64)))
    mean = mean_embedding(model, pairs)
    found, expected = (feature_attribution(model, pairs, 1, x, mean) for x in (HELD[held], np.ones(64)))
    np.testing.assert_array_equal(found.heads, expected.heads)


def test_rows_of_a_parameter_are_directions():
    model = tiny("llava").model
    rows = torch.nn.Parameter(torch.randn(2, 64, generator=torch.Generator().manual_seed(0)))
    expected = ablated(model, rows.detach().numpy())
    for held in (rows, [rows[0], rows[1]], list(rows.detach().numpy())):
        assert torch.equal(ablated(model, held), expected)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_directions_that_are_not_finite_are_refused(bad):
    built = tiny("llava")
    pairs = pairs_of(built)
    direction = ONES.clone()
    direction[3] = bad
    with pytest.raises(NonFiniteError, match="directions: layer 1: expected finite numbers, found 1 of 64"):
        ablated(built.model, direction)
    mean = mean_embedding(built.model, pairs)
    with pytest.raises(NonFiniteError, match="direction: expected finite numbers, found 1 of 64"):
        feature_attribution(built.model, pairs, 1, direction, mean)


def test_directions_of_more_axes_are_refused():
    with pytest.raises(ShapeError, match="directions: layer 1: expected width 64, found shape"):
        ablated(tiny("llava").model, np.ones((2, 2, 64)))
