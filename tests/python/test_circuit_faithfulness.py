"""Faithfulness: 0 for nothing, 1 for everything, its two averages, its ablations, its curves."""

import numpy as np
import polars as pl
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import microtome as mt
import tiny_models
from circuit_cases import assert_same_state, failing_at, linear_model, pairs_of, state, tiny
from microtome.capture.models import adapt
from microtome.circuits import (
    MIB_SIZES,
    SIZES,
    Circuit,
    Curve,
    Faithfulness,
    bootstrap,
    faithfulness_curve,
    faithfulness_of,
    mcnemar,
)
from microtome.circuits.forward.decoder import logit_difference
from microtome.errors import ShapeError

ABLATIONS = ["counterfactual", "mean", "mean_positional", "zero", "resample"]


def of(circuit, empty, full, average="ratios"):
    return Faithfulness(*(np.asarray(x, np.float64) for x in (circuit, empty, full)), average=average)


@pytest.mark.parametrize("family", list(tiny_models.FAMILIES))
def test_empty_circuit_scores_zero_and_the_whole_model_one(family):
    built = tiny(family)
    pairs = pairs_of(built, image=family in tiny_models.VLMS)
    shape = mt.attribute(built.model, pairs, "plain").shape
    before = state(built.model)
    nothing, everything = faithfulness_of(built.model, pairs, [Circuit.empty(shape), Circuit.full(shape)])
    assert_same_state(before, state(built.model))
    assert float(nothing) == 0
    assert abs(float(everything) - 1) < 1e-5
    assert nothing.n_dropped == 0


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
@pytest.mark.parametrize("family", ["llava", "qwen3_vl", "gemma3"])
def test_model_is_left_as_found_when_a_run_fails(family, error):
    """In the clean, the counterfactual, the empty and a circuit's run."""
    built = tiny(family)
    pairs = pairs_of(built, 2)
    circuits = [mt.attribute(built.model, pairs, "plain").circuit(s) for s in (0.1, 0.3)]
    before = state(built.model)
    for at in range(5):
        with pytest.raises(error), failing_at(built.model, at, error):
            faithfulness_of(built.model, pairs, circuits)
        assert_same_state(before, state(built.model))


@pytest.mark.parametrize("ablation", ABLATIONS)
def test_every_ablation_keeps_both_ends(ablation):
    built = tiny("llava")
    pairs = pairs_of(built, 3)
    scores = mt.attribute(built.model, pairs)
    ends = [Circuit.empty(scores.shape), Circuit.full(scores.shape), scores.circuit(0.3)]
    nothing, everything, part = faithfulness_of(built.model, pairs, ends, ablation)
    assert float(nothing) == 0
    assert abs(float(everything) - 1) < 1e-5
    assert np.isfinite(float(part))


def test_overwritten_nodes_hold_the_counterfactual_values():
    """The definition, written out: every node outside the circuit is the counterfactual's, later layers see it."""
    built = tiny("llava")
    model = built.model
    pairs = pairs_of(built, 1)
    scores = mt.attribute(model, pairs)
    circuit = scores.circuit(0.2)
    pair = pairs.pairs[0]
    layers = model.get_decoder().layers
    theirs, handles = {}, []
    for i, layer in enumerate(layers):
        for kind, module in (("heads", layer.self_attn.o_proj), ("neurons", layer.mlp.down_proj)):
            handles.append(
                module.register_forward_pre_hook(lambda _, a, k=(kind, i): theirs.__setitem__(k, a[0]))
            )
    with torch.no_grad():
        model(**pair.corrupted)
    for handle in handles:
        handle.remove()
    handles = []
    for i, layer in enumerate(layers):
        for kind, module in (("heads", layer.self_attn.o_proj), ("neurons", layer.mlp.down_proj)):
            mask = torch.from_numpy(circuit.mask(kind)[i])
            mask = mask.repeat_interleave(16, -1) if kind == "heads" else mask
            handles.append(
                module.register_forward_pre_hook(
                    lambda _, a, m=mask, k=(kind, i): (torch.where(m, a[0], theirs[k]),)
                )
            )
    with torch.no_grad():
        logits = model(**pair.clean).logits[:, -1]
    for handle in handles:
        handle.remove()
    expected = float(logits[0, pair.answer] - logits[0, pair.corrupted_answer])
    found = mt.faithfulness(model, pairs, circuit)
    assert abs(found.circuit[0] - expected) < 1e-5


def test_circuit_of_the_nodes_that_matter_is_faithful_on_a_linear_model():
    built = linear_model()
    pairs = pairs_of(built, 2, image=False)
    curve = faithfulness_curve(built.model, pairs, mt.attribute(built.model, pairs), progress=False)
    assert len(curve.points) == len(SIZES) == 27
    assert curve.smallest(0.8) is not None
    assert curve.values[0] == 0


def test_ratios_are_averaged_per_pair_and_tiny_denominators_are_dropped():
    """Trap 5: one pair whose clean and empty runs agree must not decide the mean."""
    found = of([1, 3, 5], [0, 0, 4.9999], [2, 4, 5])
    assert found.n_dropped == 1
    assert found.mean_of_ratios == pytest.approx((0.5 + 0.75) / 2)
    assert found.ratio_of_means == pytest.approx((1 + 3 + 0.0001) / (2 + 4 + 0.0001))
    assert of([1], [1], [1]).n_dropped == 1
    assert np.isnan(float(of([1], [1], [1])))
    assert float(of([9, 9], [0, 0], [3, 3])) == 3, "not clipped"


@given(st.lists(st.tuples(st.floats(-5, 5), st.floats(-5, 5), st.floats(-5, 5)), min_size=1, max_size=20))
def test_ratios_follow_their_definition(rows):
    found = of(*zip(*rows, strict=True))
    expected = [(c - e) / (f - e) for c, e, f in rows if abs(f - e) >= 1e-3]
    assert found.n_dropped == len(rows) - len(expected)
    if expected:
        assert found.mean_of_ratios == pytest.approx(np.mean(expected), rel=1e-9, abs=1e-9)


def test_curve_gives_the_smallest_size_and_the_integrals_of_mib():
    sizes = np.array([0.0, 0.1, 0.5, 1.0])
    curve = Curve(sizes, tuple(of([v], [0], [1], "means") for v in (0.0, 0.6, 0.9, 1.0)))
    assert curve.smallest(0.8) == 0.5
    assert curve.smallest(1.5) is None
    assert curve.cpr() == pytest.approx(0.03 + 0.3 + 0.475)
    assert curve.cmd() == pytest.approx(0.07 + 0.1 + 0.025)
    log = np.diff(np.log([0.1, 0.5, 1.0]))
    assert curve.cpr(log=True) == pytest.approx(0.75 * log[0] + 0.95 * log[1]), "size 0 has no logarithm"
    table = curve.to_polars(50)
    assert table["size"].to_list() == list(sizes)
    assert table["faithfulness"].to_list() == [0.0, 0.6, 0.9, 1.0]


def test_integrals_on_the_grid_of_mib_are_trapezoids_of_its_ten_sizes():
    """CPR and CMD written out in float64: f in [0, 1], above 1, and below 0."""
    assert MIB_SIZES == (0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0)
    f = np.array([-0.2, 0.0, 0.1, 0.4, 0.7, 1.3, 1.1, 0.9, 1.0, 1.0])
    curve = Curve(np.array(MIB_SIZES), tuple(of([v], [0], [1], "means") for v in f))
    cpr = cmd = 0.0
    for i in range(9):
        width = MIB_SIZES[i + 1] - MIB_SIZES[i]
        cpr += width * (f[i] + f[i + 1]) / 2
        cmd += width * (abs(1 - f[i]) + abs(1 - f[i + 1])) / 2
    assert curve.cpr() == pytest.approx(cpr, abs=1e-12)
    assert curve.cmd() == pytest.approx(cmd, abs=1e-12)


def test_replacements_follow_their_definitions():
    """Mean over prompts and positions, over prompts alone, zero, and another prompt's values, from plain hooks."""
    from microtome.circuits.ablation.replacements import Replacements
    from microtome.circuits.forward.decoder import merge
    from microtome.circuits.forward.nodes import node_values

    built = tiny("llava")
    pairs = pairs_of(built, 3)
    adapter = adapt(built.model)
    batch = next(pairs.batches(3))
    seen = []
    down = built.model.get_decoder().layers[1].mlp.down_proj
    handle = down.register_forward_pre_hook(lambda _, a: seen.append(a[0][0]))
    with torch.no_grad():
        for pair in pairs:
            built.model(**pair.clean)
    handle.remove()
    values = torch.stack(seen).double()  # (3, p, m)
    site = "neurons", 1

    def replaced(ablation):
        made = Replacements(adapter, pairs, pairs, ablation, 0, 2)
        return made.of(batch, lambda: node_values(adapter, merge(adapter, batch.corrupted)))[site]

    torch.testing.assert_close(replaced("mean")[0, 0].double(), values.mean((0, 1)), atol=1e-6, rtol=1e-5)
    torch.testing.assert_close(
        replaced("mean_positional").double(), values.mean(0).expand(3, -1, -1), atol=1e-6, rtol=1e-5
    )
    assert not replaced("zero").any()
    for i, row in enumerate(replaced("resample").double()):
        donors = [j for j in range(3) if torch.allclose(row, values[j], atol=1e-6)]
        assert len(donors) == 1
        assert donors != [i]


def test_curve_runs_on_the_grid_of_mib():
    built = tiny("llava")
    pairs = pairs_of(built, 3)
    scores = mt.attribute(built.model, pairs, signed=True)
    curve = faithfulness_curve(
        built.model, pairs, scores, MIB_SIZES, average="means", by="signed", joint=True
    )
    assert curve.values[-1] == pytest.approx(1, abs=1e-5)
    assert isinstance(curve.to_polars(20), pl.DataFrame)


def test_circuits_of_one_call_share_the_other_runs():
    """Two for the check, clean, the replacements' and the empty run once, then each circuit's; zeros need no run at all."""
    built = tiny("llama")
    pairs = pairs_of(built, 2, image=False)
    circuits = [mt.attribute(built.model, pairs).circuit(s) for s in (0.1, 0.2, 0.5)]
    for ablation in ABLATIONS:
        calls = []
        handle = (
            built.model.get_decoder()
            .layers[0]
            .register_forward_pre_hook(lambda *_, calls=calls: calls.append(1))
        )
        faithfulness_of(built.model, pairs, circuits, ablation)
        handle.remove()
        assert len(calls) == 2 + (2 if ablation == "zero" else 3) + len(circuits), ablation


def test_logit_difference_reads_the_last_position_of_prompts_without_padding():
    """Trap 23: padded prompts are refused, so the last position is the last token."""
    logits = torch.tensor([[1.0, 4.0, 2.0]])
    assert float(logit_difference(logits, torch.tensor([1]), torch.tensor([2]))) == 2
    built = tiny("llama")
    batch = built.batch((3, 5), False)
    one = {k: v[:1] for k, v in batch.items()}
    with pytest.raises(ShapeError, match="attention_mask: expected a prompt without padding"):
        from microtome.circuits import prepare

        prepare(built.model, None, [{"clean": one, "corrupted": one, "answer": 20, "corrupted_answer": 21}])


def test_data_positions_are_the_image_tokens_that_the_model_names():
    """Trap 19: families show the same picture in different numbers of tokens; none is assumed."""
    counts = {}
    for family in tiny_models.VLMS:
        pair = pairs_of(tiny(family), 1).pairs[0]
        shown = [i for i, kind in enumerate(pair.kinds) if kind != "text"]
        data = pair.spans["data"].tolist()
        assert data == list(range(shown[0], shown[-1] + 1)), "row breaks inside a picture belong to it"
        counts[family] = len(shown)
    assert len(set(counts.values())) > 1, counts


def test_circuit_of_another_model_is_refused():
    built = tiny("llava")
    with pytest.raises(ShapeError, match="circuit 0: expected shape"):
        mt.faithfulness(
            built.model, pairs_of(built), Circuit.of_masks(np.ones((1, 2, 3)), np.ones((1, 2, 4)))
        )
    scores = mt.attribute(built.model, pairs_of(built), "plain")
    with pytest.raises(ShapeError, match="ablation: expected one of"):
        mt.faithfulness(built.model, pairs_of(built), scores.circuit(0.1), "noise")
    with pytest.raises(ShapeError, match="sizes: expected rising"):
        faithfulness_curve(built.model, pairs_of(built), scores, [0.2, 0.1])


def test_bootstrap_covers_the_mean_and_is_seeded():
    x = np.random.default_rng(0).normal(3, 1, 200)
    found = bootstrap(lambda v: float(v.mean()), [x], 500, seed=1)
    assert found.low < found.value < found.high
    assert abs(found.high - found.low - 2 * 1.96 / 200**0.5) < 0.06
    assert found == bootstrap(lambda v: float(v.mean()), [x], 500, seed=1)
    assert np.isnan(bootstrap(lambda v: float(v.mean()), [x[:0]]).value)


def test_mcnemar_counts_the_discordant_items():
    assert mcnemar([1, 1, 0], [1, 1, 0]) == 1
    assert mcnemar([1] * 8 + [0] * 2, [0] * 8 + [1] * 2) == pytest.approx(2 * (1 + 10 + 45) / 1024)
    with pytest.raises(ShapeError, match="one length"):
        mcnemar([1], [1, 0])
