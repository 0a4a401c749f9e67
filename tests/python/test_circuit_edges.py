"""Edges: against a forward in which every destination reads its own copy, selection by hand, EAP-IG's JSON."""

import json

import numpy as np
import pytest
import torch

import tiny_models
from circuit_cases import assert_same_state, pairs_of, state, tiny
from microtome.capture.models import adapt
from microtome.circuits import EdgeGraph, attribute_edges
from microtome.circuits.attribution.edges import _input_gradients, _sources
from microtome.circuits.forward.attention import watched_attention
from microtome.circuits.forward.decoder import logit_difference
from microtome.circuits.forward.wiring import deepstack_deltas
from microtome.circuits.pairs.pair_set import merge_pair
from microtome.errors import NonFiniteError, ShapeError


def split_forward(model, embeds, edges=None, corrupted=()):
    """A Llama in which every q, k, v, MLP and the logits read their own copy of the residual stream.

    With ``edges`` a copy is the sum of what its sources write, in the ``corrupted`` run where there is no edge.
    """
    config, decoder = model.config, model.get_decoder()
    heads, repeats = config.num_attention_heads, config.num_attention_heads // config.num_key_value_heads
    p = embeds.shape[1]
    cos, sin = decoder.rotary_emb(embeds, torch.arange(p)[None])

    def rotate(x):
        half = x.shape[-1] // 2
        return x * cos + torch.cat([-x[..., half:], x[..., :half]], -1) * sin

    def copy(x):
        if edges is not None:
            column = edges[:, len(reads)]
            x = sum(w if column[s] else corrupted[s] for s, w in enumerate(writes))
        x = x.clone()
        if not x.requires_grad:
            x.requires_grad_()
        x.retain_grad()
        reads.append(x)
        return x

    reads, writes = [], [embeds]
    x = embeds
    for layer in decoder.layers:
        a, attention = layer.input_layernorm, layer.self_attn
        parts = {}
        for letter in "qkv":
            projection = getattr(attention, f"{letter}_proj").weight.reshape(-1, 16, 64)
            projection = projection if letter == "q" else projection.repeat_interleave(repeats, 0)
            parts[letter] = torch.stack(
                [a(copy(x)) @ projection[h].T for h in range(heads)], 1
            )  # (1, H, p, 16)
        q, k, v = rotate(parts["q"]), rotate(parts["k"]), parts["v"]
        mask = torch.ones(p, p).tril() == 0
        pattern = (q @ k.transpose(-1, -2) / 4).masked_fill(mask, -torch.inf).softmax(-1)
        z = pattern @ v
        o = attention.o_proj.weight.reshape(64, heads, 16)
        written = [z[:, h] @ o[:, h].T for h in range(heads)]
        writes += written
        x = x + sum(written)
        out = layer.mlp(layer.post_attention_layernorm(copy(x)))
        writes.append(out)
        x = x + out
    return model.lm_head(decoder.norm(copy(x)))[:, -1], reads, writes


def naive_edges(model, pairs, points):
    total = 0
    embedding = model.get_input_embeddings()
    for pair in pairs:
        e, e_cf = (embedding(s["input_ids"]).detach() for s in (pair.clean, pair.corrupted))
        ends = [torch.stack(split_forward(model, x.clone().requires_grad_())[2]) for x in (e, e_cf)]
        delta = (ends[1] - ends[0]).detach()
        grad = 0
        for point in points:
            logits, reads, _ = split_forward(model, (e_cf + point * (e - e_cf)).requires_grad_())
            (logits[0, pair.answer] - logits[0, pair.corrupted_answer]).backward()
            grad = grad + torch.stack([r.grad for r in reads]) / len(points)
        total = total + torch.einsum("sbpd,tbpd->st", delta, grad) / len(pairs)
    return total.numpy()


@pytest.mark.parametrize(
    ("method", "points"), [("eap", [1.0]), ("eap_ig", [0, 1 / 3, 2 / 3]), ("clean_corrupted", [0, 1])]
)
def test_edges_follow_their_definition(method, points):
    built = tiny("llama")
    pairs = pairs_of(built, 2, image=False)
    before = state(built.model)
    graph = attribute_edges(built.model, pairs, method, 3)
    assert_same_state(before, state(built.model))
    expected = naive_edges(built.model, pairs, points)
    for p in built.model.parameters():
        p.grad = None
    assert np.abs(expected).max() > 1e-3
    np.testing.assert_allclose(graph.scores, np.where(graph.real, expected, 0), atol=1e-6, rtol=1e-3)


@pytest.mark.parametrize("family", [*tiny_models.VLMS, "gpt2", "gemma"])
def test_sources_add_up_to_the_residual_stream_of_every_family(family):
    built = tiny(family)
    pairs = pairs_of(built, 1, image=family in tiny_models.VLMS)
    adapter = adapt(built.model)
    batch = next(pairs.batches(1))
    resid = []
    handle = adapter.final_norm.register_forward_pre_hook(lambda _, a: resid.append(a[0]))
    with torch.no_grad():
        for side in (batch.clean, batch.corrupted):
            built.model(**side)
    handle.remove()
    clean, corrupted = merge_pair(adapter, batch)
    with watched_attention(built.model) as watch:
        delta = _sources(adapter, corrupted, watch) - _sources(adapter, clean, watch)
        added = sum(deepstack_deltas(clean, corrupted)) if clean.deepstack else 0
        torch.testing.assert_close(
            (delta.sum(0) + added), (resid[1] - resid[0]).detach(), atol=1e-4, rtol=1e-3
        )
        grads = _input_gradients(adapter, batch, clean, watch)
    assert [g.shape[0] for g in grads] == [13, 13, 13, 1]
    assert attribute_edges(built.model, pairs, "eap").scores[:, -1].any()


def test_input_gradients_through_heads_add_up_to_the_gradient_of_the_layer():
    built = tiny("llava")
    adapter = adapt(built.model)
    batch = next(pairs_of(built, 1).batches(1))
    clean, _ = merge_pair(adapter, batch)
    with watched_attention(built.model) as watch:
        grads = _input_gradients(adapter, batch, clean, watch)
    leaf = clean.embeds.clone().requires_grad_()
    from microtome.circuits.forward.decoder import last_logits

    value = logit_difference(last_logits(adapter, clean.at(leaf, ())), batch.answers, batch.corrupted_answers)
    (whole,) = torch.autograd.grad(value.sum(), leaf)
    torch.testing.assert_close(sum(g.sum(0) for g in grads), whole, atol=1e-5, rtol=1e-3)


def graph_of(edges, layers=2, heads=1):
    graph = EdgeGraph(
        layers, heads, 4, np.zeros((1 + layers * (heads + 1), layers * (3 * heads + 1) + 1), np.float32)
    )
    for (source, destination), score in edges.items():
        graph.scores[graph.sources.index(source), graph.destinations.index(destination)] = score
    return graph


def test_real_edges_are_those_that_eap_ig_counts():
    assert EdgeGraph(12, 12, 768, np.zeros((157, 445), np.float32)).n_edges == 32491, "GPT-2 small"


def test_top_edges_are_pruned_to_what_connects_input_and_logits():
    graph = graph_of(
        {("input", "a0.h0<v>"): 5, ("a0.h0", "logits"): -4, ("m1", "logits"): 3, ("input", "m0"): 2}
    )
    top = graph.top(4)
    edges = {(s, d) for s, d, _, inside in top.to_polars().iter_rows() if inside}
    assert edges == {("input", "a0.h0<v>"), ("a0.h0", "logits")}, "nothing enters m1, nothing leaves m0"
    assert graph.top(4, prune=False).selected.sum() == 4
    assert graph.top(2, by="signed", prune=False).iou(graph.top(2, prune=False)) == 1 / 3


def test_greedy_takes_edges_from_the_logits_up():
    graph = graph_of(
        {("input", "a0.h0<v>"): 5, ("a0.h0", "logits"): 1, ("m1", "logits"): 3, ("a0.h0", "m1"): 2}
    )
    edges = [(s, d) for s, d, _, inside in graph.greedy(3, prune=False).to_polars().iter_rows() if inside]
    assert set(edges) == {("m1", "logits"), ("a0.h0", "m1"), ("input", "a0.h0<v>")}
    with pytest.raises(ShapeError, match="n: expected 0 to"):
        graph.greedy(1000)


def test_json_of_eap_ig_goes_out_and_in(tmp_path):
    built = tiny("llama")
    graph = attribute_edges(built.model, pairs_of(built, 1, image=False), "eap").top(200)
    graph.to_json(tmp_path / "graph.json")
    content = json.loads((tmp_path / "graph.json").read_text())
    assert content["cfg"] == {"n_layers": 3, "n_heads": 4, "parallel_attn_mlp": False, "d_model": 64}
    assert set(content["edges"]["a0.h1->a2.h3<q>"]) == {"score", "in_graph"}
    assert content["nodes"]["logits"] == {"in_graph": True}
    back = EdgeGraph.from_json(tmp_path / "graph.json")
    np.testing.assert_array_equal(back.scores, np.where(graph.real, graph.scores, 0))
    assert np.array_equal(back.selected, graph.selected)
    content["edges"]["a9.h0->logits"] = {"score": 0, "in_graph": False}
    (tmp_path / "bad.json").write_text(json.dumps(content))
    with pytest.raises(ShapeError, match=r"found 'a9\.h0->logits'"):
        EdgeGraph.from_json(tmp_path / "bad.json")
    (tmp_path / "bad.json").write_text("{}")
    with pytest.raises(ShapeError, match="expected keys cfg, nodes and edges"):
        EdgeGraph.from_json(tmp_path / "bad.json")


def test_pairs_whose_logits_are_not_finite_are_counted_and_left_out():
    built = tiny_models.build("llama")
    model = built.model.eval()
    pairs = pairs_of(built, 3, image=False)
    token = 63
    for pair in pairs.pairs:
        for side in (pair.clean, pair.corrupted):
            side["input_ids"][side["input_ids"] == token] = 62
    pairs.pairs[1].clean["input_ids"][0, 1] = token
    alone = attribute_edges(model, pairs[[0, 2]], steps=2)
    with torch.no_grad():
        model.get_input_embeddings().weight[token] = float("nan")
    found = attribute_edges(model, pairs, steps=2)
    assert (found.facts["n_pairs"], found.facts["n_skipped"]) == (2, 1)
    np.testing.assert_allclose(found.scores, alone.scores, atol=1e-7)
    pairs.pairs[0].corrupted["input_ids"][0, 1] = token
    with pytest.raises(NonFiniteError, match="edge attribution: scores"):
        attribute_edges(model, pairs, steps=2)
