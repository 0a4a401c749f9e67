"""Edge ablation: by definition, at its ends, exact on a linear model, and where it is a node ablation."""

import numpy as np
import pytest
import torch

import tiny_models
from circuit_cases import assert_same_state, linear_model, pairs_of, state, tiny
from microtome.circuits import (
    Circuit,
    EdgeGraph,
    attribute_edges,
    edge_faithfulness,
    edge_faithfulness_curve,
    edge_faithfulness_of,
    faithfulness,
)
from microtome.errors import ShapeError
from test_circuit_edges import split_forward


def graph_with(model, chosen):
    """An edge circuit of ``model`` from a mask, or from a share of edges drawn at random."""
    config = model.config.get_text_config()
    layers, heads = config.num_hidden_layers, config.num_attention_heads
    shape = (1 + layers * (heads + 1), layers * (3 * heads + 1) + 1)
    if np.isscalar(chosen):
        chosen = np.random.default_rng(0).random(shape) < chosen
    mask = np.broadcast_to(chosen, shape).copy()
    return EdgeGraph(layers, heads, config.hidden_size, np.zeros(shape, np.float32), mask)


def naive_difference(model, pair, graph):
    """The definition: every destination sums up its own sources."""
    embedding = model.get_input_embeddings()
    e, e_cf = (embedding(s["input_ids"]) for s in (pair.clean, pair.corrupted))
    corrupted = split_forward(model, e_cf)[2]
    logits = split_forward(model, e, graph.selected, corrupted)[0]
    return float((logits[0, pair.answer] - logits[0, pair.corrupted_answer]).detach())


@pytest.mark.parametrize("share", [0.2, 0.5, 0.9])
def test_cut_edges_follow_their_definition(share):
    """A model with grouped queries: four query heads on two key heads."""
    built = tiny("llama")
    pairs = pairs_of(built, 3, image=False)
    graph = graph_with(built.model, share)
    before = state(built.model)
    found = edge_faithfulness(built.model, pairs, graph, batch_size=2)
    assert_same_state(before, state(built.model))
    expected = [naive_difference(built.model, pair, graph) for pair in pairs]
    np.testing.assert_allclose(found.circuit, expected, atol=1e-5)
    assert np.abs(found.circuit - found.full).max() > 1e-3
    assert found.size == graph.selected.sum()


@pytest.mark.parametrize("family", [*tiny_models.VLMS, "gpt2", "gemma"])
def test_all_edges_are_the_clean_run_and_none_is_the_counterfactual(family):
    built = tiny(family)
    pairs = pairs_of(built, 2, image=family in tiny_models.VLMS)
    graphs = [graph_with(built.model, chosen) for chosen in (True, False, 0.5)]
    everything, nothing, half = edge_faithfulness_of(built.model, pairs, graphs)
    np.testing.assert_allclose(everything.circuit, everything.full, atol=1e-4)
    np.testing.assert_allclose(nothing.circuit, nothing.empty, atol=1e-5)
    assert float(everything) == pytest.approx(1, abs=1e-2)
    assert float(nothing) == pytest.approx(0, abs=1e-2)
    assert np.abs(half.circuit - everything.circuit).max() > 1e-4
    for pair, full, empty in zip(pairs, everything.full, everything.empty, strict=True):
        with torch.no_grad():
            logits = [built.model(**side).logits[0, -1] for side in (pair.clean, pair.corrupted)]
        wanted = [float(x[pair.answer] - x[pair.corrupted_answer]) for x in logits]
        assert [full, empty] == pytest.approx(wanted, abs=1e-4)


@pytest.mark.parametrize("family", ["llama", "llava", "qwen3_vl", "gemma3"])
def test_all_edges_of_some_nodes_are_the_ablation_of_the_other_nodes(family):
    built = tiny(family)
    pairs = pairs_of(built, 2, image=family in tiny_models.VLMS)
    graph = graph_with(built.model, False)
    keep = np.random.default_rng(1).random(len(graph.sources)) < 0.5
    keep[0] = True  # a node ablation leaves the embeddings clean
    edges = graph_with(built.model, keep[:, None])
    per_layer = keep[1:].reshape(graph.n_layers, graph.n_heads + 1)
    heads = np.repeat(per_layer[:, None, :-1], pairs.n_slots, 1)
    neurons = np.repeat(per_layer[:, None, -1:], pairs.n_slots, 1)
    width = built.model.config.get_text_config().intermediate_size
    nodes = Circuit.of_masks(heads, np.repeat(neurons, width, 2))
    np.testing.assert_allclose(
        edge_faithfulness(built.model, pairs, edges).circuit,
        faithfulness(built.model, pairs, nodes).circuit,
        atol=1e-4,
    )


def test_edges_into_the_logits_are_exact_on_a_linear_model():
    """Logits are linear in what is written, so the loss of cut edges is minus their score."""
    built = linear_model()
    pairs = pairs_of(built, 1, image=False)
    scores = attribute_edges(built.model, pairs, "eap")
    chosen = np.ones_like(scores.real)
    chosen[[0, 2, 5], -1] = False  # the input, a head, the MLP
    found = edge_faithfulness(built.model, pairs, graph_with(built.model, chosen))
    lost = scores.scores[[0, 2, 5], -1].sum()
    assert abs(lost) > 1e-4
    assert found.circuit[0] - found.full[0] == pytest.approx(lost, abs=1e-5)


@pytest.mark.parametrize("select", ["top", "greedy"])
def test_curve_rises_from_nothing_to_everything(select):
    built = tiny("llava")
    pairs = pairs_of(built, 2)
    scores = attribute_edges(built.model, pairs, steps=2)
    curve = edge_faithfulness_curve(built.model, pairs, scores, (0.0, 0.1, 0.5, 1.0), select=select)
    assert curve.values[0] == pytest.approx(0, abs=1e-3)
    assert curve.values[-1] == pytest.approx(1, abs=1e-3)
    assert curve.points[1].size <= int(0.1 * scores.n_edges)
    assert abs(1 - curve.values[2]) < abs(1 - curve.values[0])


def test_pruning_changes_no_logit():
    """What nothing enters writes its counterfactual value, and what nothing leaves is not read."""
    built = tiny("llama")
    pairs = pairs_of(built, 2, image=False)
    scores = attribute_edges(built.model, pairs, "eap")
    whole, pruned = scores.top(40, prune=False), scores.top(40)
    assert pruned.selected.sum() < whole.selected.sum()
    a, b = edge_faithfulness_of(built.model, pairs, [whole, pruned])
    np.testing.assert_allclose(a.circuit, b.circuit, atol=1e-5)


def test_model_is_left_as_found_when_a_forward_fails():
    built = tiny_models.build("llama")
    pairs = pairs_of(built, 1, image=False)
    graph = graph_with(built.model, 0.5)
    calls = []

    def breaks(*_):
        calls.append(1)
        if len(calls) == 3:  # clean, counterfactual, and the MLP of the circuit
            raise KeyboardInterrupt

    handle = built.model.get_decoder().layers[1].mlp.register_forward_pre_hook(breaks)
    before = state(built.model)
    with pytest.raises(KeyboardInterrupt):
        edge_faithfulness(built.model, pairs, graph)
    assert_same_state(before, state(built.model))
    handle.remove()


def test_bf16_models_keep_their_ends():
    built = tiny_models.build("llama")
    pairs = pairs_of(built, 2, image=False)
    graphs = [graph_with(built.model, chosen) for chosen in (True, False)]
    everything, nothing = edge_faithfulness_of(built.model.bfloat16(), pairs, graphs)
    np.testing.assert_allclose(everything.circuit, everything.full, atol=0.05)
    np.testing.assert_allclose(nothing.circuit, nothing.empty, atol=1e-6)


def test_bad_arguments_are_refused():
    built = tiny("llama")
    pairs = pairs_of(built, 1, image=False)
    graph = graph_with(built.model, 0.5)
    other = EdgeGraph(1, 2, 8, np.zeros((4, 8), np.float32))
    with pytest.raises(ShapeError, match="graph 0: expected 3 layers and 4 heads"):
        edge_faithfulness(built.model, pairs, other)
    with pytest.raises(ShapeError, match="average: expected ratios or means"):
        edge_faithfulness(built.model, pairs, graph, average="median")
    with pytest.raises(ShapeError, match="sizes: expected rising shares"):
        edge_faithfulness_curve(built.model, pairs, graph, (0.5, 0.1))
    with pytest.raises(ShapeError, match="sizes: expected shares from 0 to 1"):
        edge_faithfulness_curve(built.model, pairs, graph, (0.5, 2))
    with pytest.raises(ShapeError, match="select: expected top or greedy"):
        edge_faithfulness_curve(built.model, pairs, graph, (0.5,), select="best")
    with pytest.raises(ShapeError, match="endpoint: expected corrupted or clean"):
        attribute_edges(built.model, pairs, endpoint="both")
