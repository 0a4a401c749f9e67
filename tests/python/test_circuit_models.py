"""Models that the replay or the edges do not fit are refused by name, wherever results would be wrong."""

import numpy as np
import pytest
import torch
import transformers

import microtome as mt
import tiny_models
from circuit_cases import pairs_of, tiny
from microtome.circuits import (
    Circuit,
    CircuitShape,
    Setting,
    attribute_edges,
    back_patch,
    back_patch_iterated,
    completeness,
    edge_faithfulness,
    faithfulness,
    patching_map,
)
from microtome.errors import Error, ShapeError
from test_circuit_attribution import naive_scores


def made(name, cls, config, **changes):
    torch.manual_seed(0)
    return tiny_models.Tiny(name, cls(tiny_models.text_config(config, **changes)).eval())


def granite(**changes):
    return made("granite", transformers.GraniteForCausalLM, transformers.GraniteConfig, **changes)


def cohere():
    return made("cohere", transformers.CohereForCausalLM, transformers.CohereConfig, logit_scale=0.0625)


def neox():
    torch.manual_seed(0)
    config = transformers.GPTNeoXConfig(
        vocab_size=64,
        hidden_size=64,
        num_hidden_layers=3,
        num_attention_heads=4,
        intermediate_size=128,
        bos_token_id=1,
        eos_token_id=2,
        use_parallel_residual=True,
    )
    return tiny_models.Tiny("neox", transformers.GPTNeoXForCausalLM(config).eval())


def phi():
    return made("phi", transformers.PhiForCausalLM, transformers.PhiConfig)


def whole(pairs):
    return Circuit.full(CircuitShape(3, pairs.n_slots, 4, 128))


ENTRIES = {
    "attribute": lambda m, p: mt.attribute(m, p, "plain"),
    "edges": lambda m, p: attribute_edges(m, p, "eap"),
    "edge faithfulness": lambda m, p: edge_faithfulness(m, p, attribute_edges(tiny("llama").model, p, "eap")),
    "faithfulness": lambda m, p: faithfulness(m, p, whole(p)),
    "patching map": lambda m, p: patching_map(m, p),
    "completeness": lambda m, p: completeness(m, p, 2),
    "back-patching": lambda m, p: back_patch(m, p, [Setting(2, 0, 1)], group="query"),
    "iterated": lambda m, p: back_patch_iterated(m, p, Setting(2, 0, 1), 1, group="query"),
}


@pytest.mark.parametrize("entry", ENTRIES)
@pytest.mark.parametrize("model", [lambda: granite(logits_scaling=8.0), cohere], ids=["granite", "cohere"])
def test_models_that_change_what_lies_between_decoder_and_head_are_refused(model, entry):
    built = model()
    pairs = pairs_of(built, 1, image=False)
    with pytest.raises(Error, match=f"replaying the decoder: {type(built.model).__name__}"):
        ENTRIES[entry](built.model, pairs)


@pytest.mark.parametrize("entry", ["edges", "edge faithfulness"])
@pytest.mark.parametrize("model", [neox, phi, lambda: granite(residual_multiplier=0.3)])
def test_edges_of_layers_that_do_not_add_attention_and_then_mlp_are_refused(model, entry):
    built = model()
    pairs = pairs_of(built, 1, image=False)
    with pytest.raises(ShapeError, match=f"edges: {type(built.model).__name__}: expected each layer to add"):
        ENTRIES[entry](built.model, pairs)


@pytest.mark.parametrize("budget", [None, 300_000])
@pytest.mark.parametrize("model", [neox, phi])
def test_attention_and_mlp_side_by_side_are_attributed(model, budget):
    built = model()
    pairs = pairs_of(built, 2, image=False)
    scores = mt.attribute(built.model, pairs, "ig", 3, memory_budget=budget)
    heads, neurons = naive_scores(built.model, pairs, [1 / 3, 2 / 3, 1])
    assert heads[0].any()
    assert neurons[0].any()
    np.testing.assert_allclose(scores.heads, heads, atol=1e-6, rtol=1e-4)
    np.testing.assert_allclose(scores.neurons, neurons, atol=1e-6, rtol=1e-4)


@pytest.mark.parametrize("entry", ["attribute", "faithfulness"])
def test_models_without_one_mlp_in_each_layer_are_refused_by_name(entry):
    built = made("mixtral", transformers.MixtralForCausalLM, transformers.MixtralConfig, num_local_experts=2)
    pairs = pairs_of(built, 1, image=False)
    calls = {
        "attribute": ENTRIES["attribute"],
        "faithfulness": lambda m, p: faithfulness(m, p, Circuit.full(CircuitShape(3, p.n_slots, 4, 0))),
    }
    with pytest.raises(ShapeError, match=r"nodes: MixtralForCausalLM: .* found no blocks.0.mlp.hook_post"):
        calls[entry](built.model, pairs)
