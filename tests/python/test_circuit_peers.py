"""Side by side with EAP-IG: its code as circuitkit ships it, on a HookedTransformer with the weights of a transformers model.

EAP-IG itself is in no package registry. circuitkit carries its graph, attribution and evaluation, and counts the
points of a path from 1 to m, where EAP-IG counts from 0 to m - 1. Needs circuitkit and transformer-lens.
"""

from importlib.util import find_spec
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from circuit_cases import pairs_of, tiny
from microtome.circuits import EdgeGraph, attribute_edges, edge_faithfulness

pytestmark = [
    pytest.mark.slow,
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.skipif(
        not (find_spec("circuitkit") and find_spec("transformer_lens")),
        reason="EAP-IG side by side: needs circuitkit and transformer-lens",
    ),
]
N_PAIRS = 3
METHODS = [("EAP", "eap"), ("EAP-IG-inputs", "eap_ig"), ("clean-corrupted", "clean_corrupted")]


@pytest.fixture(scope="module")
def peer():
    """Modules of the peer; circuitkit must be imported before transformer_lens."""
    import circuitkit  # noqa: F401
    from circuitkit.backends.eap import attribute, evaluate, graph
    from transformer_lens import HookedTransformer, HookedTransformerConfig
    from transformer_lens.pretrained.weight_conversions import convert_gpt2_weights, convert_llama_weights

    return SimpleNamespace(
        attribute=attribute.attribute, evaluate_graph=evaluate.evaluate_graph, Graph=graph.Graph,
        Model=HookedTransformer, Config=HookedTransformerConfig,
        convert={"llama": convert_llama_weights, "gpt2": convert_gpt2_weights},
    )  # fmt: skip


def hooked(peer, family, model):
    """The same weights in a HookedTransformer that splits heads and inputs."""
    config = model.config
    n_heads = config.num_attention_heads
    common = {
        "n_layers": config.num_hidden_layers, "d_model": config.hidden_size, "n_heads": n_heads,
        "d_head": config.hidden_size // n_heads, "d_vocab": config.vocab_size, "n_ctx": 64, "device": "cpu",
        "use_attn_result": True, "use_split_qkv_input": True, "use_hook_mlp_in": True,
    }  # fmt: skip
    own = {
        "llama": lambda: {
            "d_mlp": config.intermediate_size, "act_fn": "silu", "gated_mlp": True, "normalization_type": "RMS",
            "eps": config.rms_norm_eps, "positional_embedding_type": "rotary", "rotary_dim": common["d_head"],
            "rotary_adjacent_pairs": False, "rotary_base": rope_base(config), "final_rms": True,
            "n_key_value_heads": config.num_key_value_heads, "ungroup_grouped_query_attention": True,
        },
        "gpt2": lambda: {
            "d_mlp": config.n_inner or 4 * config.hidden_size, "act_fn": "gelu_new", "normalization_type": "LN",
            "eps": config.layer_norm_epsilon,
        },
    }  # fmt: skip
    built = peer.Model(peer.Config(**common, **own[family]()))
    weights = peer.convert[family](model, built.cfg)
    built.load_state_dict({k: v.detach().clone() for k, v in weights.items()}, strict=False)
    built.tokenizer = SimpleNamespace(padding_side="right", pad_token_id=-1, bos_token_id=-1)
    built.to_tokens = lambda texts, **_: torch.tensor([[int(x) for x in text.split()] for text in texts])
    built.to_str_tokens = lambda tokens: [str(int(t)) for t in tokens]
    return built.eval()


def rope_base(config):
    parameters = getattr(config, "rope_parameters", None) or {}
    return parameters.get("rope_theta", getattr(config, "rope_theta", 10000.0))


def written(pair, side):
    return " ".join(str(int(x)) for x in getattr(pair, side)["input_ids"][0])


@pytest.fixture(params=["llama", "gpt2"])
def case(request, peer):
    """Our model and pairs, theirs, and their batches of one pair."""
    built = tiny(request.param)
    pairs = pairs_of(built, N_PAIRS, image=False)
    batches = [
        ([written(p, "clean")], [written(p, "corrupted")], torch.tensor([[p.answer, p.corrupted_answer]]))
        for p in pairs
    ]
    theirs = hooked(peer, request.param, built.model)
    with torch.no_grad():
        logits = theirs(theirs.to_tokens(batches[0][0]))
        own = built.model(**pairs.pairs[0].clean).logits
    torch.testing.assert_close(logits.log_softmax(-1), own.log_softmax(-1), atol=1e-4, rtol=1e-4)
    return SimpleNamespace(model=built.model, pairs=pairs, theirs=theirs, batches=batches)


def difference(logits, _clean_logits, lengths, labels):
    """Their metric: our logit difference."""
    last = logits[torch.arange(len(logits)), lengths - 1]
    return (last.gather(1, labels)[:, 0] - last.gather(1, labels)[:, 1]).mean()


@pytest.mark.parametrize(("theirs", "ours"), METHODS)
def test_scores_equal_those_of_eap_ig(peer, case, theirs, ours):
    graph = peer.Graph.from_model(case.theirs)
    peer.attribute(case.theirs, graph, case.batches, difference, theirs, ig_steps=4, quiet=True)
    found = attribute_edges(case.model, case.pairs, ours, 4, endpoint="clean")
    expected = in_our_order(graph, found)
    assert np.abs(expected).max() > 1e-3
    np.testing.assert_allclose(found.scores, expected, atol=2e-6, rtol=2e-4)


def in_our_order(graph, ours):
    """Their scores by name, as our matrix."""
    scores = np.zeros_like(ours.scores)
    assert len(graph.edges) == ours.n_edges
    for name, edge in graph.edges.items():
        source, _, destination = name.partition("->")
        scores[ours.sources.index(source), ours.destinations.index(destination)] = float(edge.score)
    return scores


@pytest.mark.parametrize("n", [20, 60, 150])
def test_top_circuits_and_their_faithfulness_equal_those_of_eap_ig(peer, case, n, tmp_path):
    """Selected, pruned, written by us, read and run by them: the same logit differences."""
    graph = attribute_edges(case.model, case.pairs, "eap_ig", 4)
    ours = graph.top(n)
    graph.to_json(tmp_path / "scores.json")
    theirs = peer.Graph.from_json(str(tmp_path / "scores.json"))
    theirs.apply_topn(n, True, level="edge", prune=True)
    theirs.to_json(str(tmp_path / "circuit.json"))
    back = EdgeGraph.from_json(tmp_path / "circuit.json")
    assert np.array_equal(back.selected, ours.selected)
    assert 0 < ours.selected.sum() <= n
    theirs_values = peer.evaluate_graph(case.theirs, theirs, case.batches, difference, quiet=True)
    found = edge_faithfulness(case.model, case.pairs, ours)
    np.testing.assert_allclose(found.circuit, theirs_values.numpy(), atol=2e-5)


def test_greedy_circuits_equal_those_of_eap_ig(peer, case, tmp_path):
    graph = attribute_edges(case.model, case.pairs, "eap")
    graph.to_json(tmp_path / "scores.json")
    theirs = peer.Graph.from_json(str(tmp_path / "scores.json"))
    theirs.apply_greedy(50, absolute=True, prune=True)
    theirs.to_json(str(tmp_path / "circuit.json"))
    assert np.array_equal(EdgeGraph.from_json(tmp_path / "circuit.json").selected, graph.greedy(50).selected)
