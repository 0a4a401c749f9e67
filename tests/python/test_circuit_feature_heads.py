"""Attribution of a feature to queries, keys and z: against central differences, head by head."""

import numpy as np
import pytest
import torch

import tiny_models
from circuit_cases import pairs_of
from microtome.capture.models import adapt
from microtome.circuits import feature_attribution, mean_embedding
from microtome.circuits.attribution.features import _corrupted
from microtome.circuits.forward.attention import watched_attention
from microtome.circuits.forward.decoder import decode, merge
from microtome.circuits.forward.nodes import on_residuals

LAYER = 1
EPSILON = 1e-2  # norms and softmax run in float32 even in a float64 model: a smaller step drowns in rounding
DIRECTION = np.random.default_rng(0).standard_normal(64).astype(np.float32)


def in_double(pairs):
    """Pairs whose pictures are float64, for a model in float64."""
    for pair in pairs:
        for side in (pair.clean, pair.corrupted):
            side["pixel_values"] = side["pixel_values"].double()
    return pairs


def targets_of(adapter, watch, merged, text, move=None):
    """Σ over text positions of h · v, with the queries, keys or z of one head moved; and what attention saw."""
    kept, resid = {}, []

    def see(site, layer, x):
        kept[site, layer] = x
        if move is not None and (site, layer) == move[0]:
            x = x.clone()
            x[:, move[1]] += move[2]
        return x

    watch(see)
    with torch.no_grad(), on_residuals(adapter, lambda _, x: resid.append(x), [LAYER]):
        decode(adapter, merged)
    watch(None)
    return float((resid[0][0, text] @ torch.from_numpy(DIRECTION).double()).sum()), kept


@pytest.mark.parametrize("method", ["A", "B"])
@pytest.mark.parametrize("family", ["llava", "qwen3_vl"])  # four query heads on two key heads; DeepStack
def test_scores_are_central_differences_along_what_the_other_run_holds(family, method):
    """A: the clean run moved towards the corrupted one; B: the corrupted run moved towards the clean one."""
    built = tiny_models.build(family)
    model = built.model.eval().double()
    pairs = in_double(pairs_of(built, 1))
    mean = mean_embedding(model, in_double(pairs_of(built, 4)))
    found = feature_attribution(model, pairs, LAYER, DIRECTION, mean, method, sites=("q", "k", "z"))
    adapter = adapt(model)
    batch = next(pairs.batches(1))
    clean = merge(adapter, batch.clean)
    runs = [clean, _corrupted(adapter, batch, clean, mean)]
    own, other = runs if method == "A" else runs[::-1]
    text = adapter.row_kinds(batch.clean["input_ids"])[0] == 0
    with watched_attention(model) as watch:
        here, there = (targets_of(adapter, watch, run, text)[1] for run in (own, other))
        for site in ("q", "k", "z"):
            for layer in range(LAYER + 1):
                for head in range(4):
                    step = EPSILON * (there[site, layer] - here[site, layer])[:, head]
                    up, down = (
                        targets_of(adapter, watch, own, text, ((site, layer), head, sign * step))[0]
                        for sign in (1, -1)
                    )
                    assert found.scores[site][layer, head] == pytest.approx(
                        (up - down) / (2 * EPSILON), rel=2e-3, abs=2e-5
                    )
    assert np.abs(found.scores["q"][: LAYER + 1]).min() > 0
