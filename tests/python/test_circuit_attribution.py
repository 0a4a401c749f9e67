"""Attribution: exact where theory says so, complete, the same by every way of running it, and on every family."""

import gc
from dataclasses import replace

import numpy as np
import pytest
import torch

import microtome as mt
import tiny_models
from circuit_cases import assert_same_state, linear_model, pairs_of, state, tiny
from microtome.capture.models import adapt
from microtome.circuits import estimate, prepare
from microtome.circuits.forward.decoder import last_logits, logit_difference, merge
from microtome.circuits.pairs.fingerprints import pairs_fingerprint
from microtome.errors import ShapeError, StoreError

METHODS = ["plain", "ig", "clean_corrupted", "ig_activations"]


def naive_scores(model, pairs, points, head_reduce="abs_sum"):
    """The definition: one backward for each pair and point, nothing batched, all kept."""
    adapter = adapt(model)
    heads, neurons = 0, 0
    for batch in pairs.batches(1):

        def run(embeds, keep, batch=batch):
            seen = {}
            handles = []
            for layer in adapter.layers:
                for name, module in (("z", layer.o_proj.module), ("m", layer.down_proj.module)):

                    def hook(_, args, site=(name, layer.index), seen=seen):
                        seen[site] = args[0]
                        args[0].requires_grad_(True) if not args[0].requires_grad else args[0].retain_grad()
                        return

                    handles.append(module.register_forward_pre_hook(hook))
            merged = merge(adapter, batch.clean)
            logits = last_logits(adapter, merged.at(embeds, merged.deepstack))
            for handle in handles:
                handle.remove()
            if keep:
                logit_difference(logits, batch.answers, batch.corrupted_answers).sum().backward()
            return seen

        e, e_cf = merge(adapter, batch.clean).embeds, merge(adapter, batch.corrupted).embeds
        clean, corrupted = run(e, False), run(e_cf, False)
        grads = {}
        for a in points:
            seen = run((e_cf + a * (e - e_cf)).requires_grad_(True), True)
            for key, x in seen.items():
                grads[key] = grads.get(key, 0) + x.grad / len(points)
        layers = range(adapter.n_layers)
        h = torch.stack([((corrupted["z", i] - clean["z", i]) * grads["z", i])[0] for i in layers]).detach()
        h = h.unflatten(-1, (adapter.n_heads, -1))
        h = h.abs().sum(-1) if head_reduce == "sum_abs" else h.sum(-1).abs()
        m = (
            torch.stack([((corrupted["m", i] - clean["m", i]) * grads["m", i])[0] for i in layers])
            .detach()
            .abs()
        )
        heads, neurons = heads + h / len(pairs), neurons + m / len(pairs)
    return heads.numpy(), neurons.numpy()


@pytest.mark.parametrize("head_reduce", ["abs_sum", "sum_abs"])
@pytest.mark.parametrize(
    ("method", "points"), [("plain", [1.0]), ("ig", [1 / 3, 2 / 3, 1]), ("clean_corrupted", [0, 1])]
)
def test_scores_follow_their_definition(method, points, head_reduce):
    built = tiny("llava")
    pairs = pairs_of(built, 3)
    scores = mt.attribute(built.model, pairs, method, 3, head_reduce=head_reduce, batch_size=2)
    heads, neurons = naive_scores(built.model, pairs, points, head_reduce)
    np.testing.assert_allclose(scores.heads, heads, atol=1e-6, rtol=1e-4)
    np.testing.assert_allclose(scores.neurons, neurons, atol=1e-6, rtol=1e-4)
    assert scores.heads.dtype == scores.neurons.dtype == np.float32
    assert scores.n_pairs == 3


@pytest.mark.parametrize("method", METHODS)
def test_every_method_is_exact_on_a_linear_model(method):
    built = linear_model()
    pairs = pairs_of(built, 2, image=False)
    scores = mt.attribute(built.model, pairs, method, 4)
    exact = mt.attribute(built.model, pairs, "exact")
    np.testing.assert_allclose(scores.neurons, exact.neurons, atol=2e-6)
    with torch.no_grad():
        built.model.get_decoder().layers[0].mlp.down_proj.weight.zero_()  # heads act directly alone
    scores, exact = mt.attribute(built.model, pairs, method, 4), mt.attribute(built.model, pairs, "exact")
    assert exact.heads.max() > 1e-4
    np.testing.assert_allclose(scores.heads, exact.heads, atol=2e-6)


def test_plain_equals_integrated_gradients_with_one_step():
    built = tiny("llava")
    pairs = pairs_of(built)
    one, plain = mt.attribute(built.model, pairs, "ig", 1), mt.attribute(built.model, pairs, "plain")
    assert np.array_equal(one.neurons, plain.neurons)


def test_tokens_before_the_first_difference_score_zero():
    built = tiny("llama")
    pairs = pairs_of(built, image=False)
    scores = mt.attribute(built.model, pairs)
    first = pairs.n_slots - 3
    assert not scores.heads[:, :first].any()
    assert not scores.neurons[:, :first].any()
    assert scores.neurons[:, first:].any()


def test_merged_path_moves_the_image_and_the_text_only_path_does_not():
    """Trap 1: with equal texts the text-only path has identical gradients at every step, so it is plain attribution."""
    built = tiny("llava")
    clean, corrupted = (built.batch((6,), True, seed=s) for s in (0, 1))
    corrupted["input_ids"] = clean["input_ids"]
    pairs = prepare(
        built.model, None, [{"clean": clean, "corrupted": corrupted, "answer": 20, "corrupted_answer": 21}]
    )
    plain = mt.attribute(built.model, pairs, "plain")
    text_only = mt.attribute(built.model, pairs, "ig", ig_path="text_only")
    merged = mt.attribute(built.model, pairs, "ig")
    np.testing.assert_allclose(text_only.neurons, plain.neurons, rtol=1e-4, atol=1e-8)
    assert np.abs(merged.neurons - plain.neurons).max() > 1e-3 * plain.neurons.max()


def test_path_of_a_deepstack_model_ends_at_the_counterfactual():
    """Trap 10: DeepStack features move with the embeddings, so the path's start says what the counterfactual says."""
    from microtome.circuits.attribution.path import interpolated
    from microtome.circuits.pairs.pair_set import merge_pair

    built = tiny("qwen3_vl")
    adapter = adapt(built.model)
    batch = next(pairs_of(built, 1).batches(1))
    clean, corrupted = merge_pair(adapter, batch)
    assert clean.deepstack
    path = interpolated(
        adapter, clean, corrupted, batch.partner, (0.0, 1.0), "merged", batch.clean["input_ids"]
    )
    with torch.no_grad():
        start, end = last_logits(adapter, path)
        torch.testing.assert_close(start, built.model(**batch.corrupted).logits[0, -1], atol=1e-5, rtol=1e-4)
        torch.testing.assert_close(end, built.model(**batch.clean).logits[0, -1], atol=1e-5, rtol=1e-4)


def test_head_scores_differ_by_where_the_absolute_value_is_taken():
    """Trap 6: the sum of absolute values bounds the absolute value of the sum."""
    built = tiny("llava")
    pairs = pairs_of(built)
    formula, reference = (mt.attribute(built.model, pairs, head_reduce=r) for r in ("abs_sum", "sum_abs"))
    assert (formula.heads <= reference.heads * (1 + 1e-5) + 1e-9).all()
    assert (formula.heads < reference.heads).any()
    assert np.array_equal(formula.neurons, reference.neurons)


def test_signed_scores_average_before_the_absolute_value():
    built = tiny("llava")
    pairs = pairs_of(built, 3)
    singles = [mt.attribute(built.model, pairs[i : i + 1], signed=True) for i in range(3)]
    signed, absolute = mt.attribute(built.model, pairs, signed=True), mt.attribute(built.model, pairs)
    np.testing.assert_allclose(signed.neurons, np.mean([s.neurons for s in singles], 0), atol=1e-6)
    np.testing.assert_allclose(absolute.neurons, np.mean([np.abs(s.neurons) for s in singles], 0), atol=1e-6)


@pytest.mark.parametrize("family", list(tiny_models.VLMS))
def test_every_family_is_attributed(family):
    built = tiny(family)
    pairs = pairs_of(built)
    before = state(built.model)
    scores = mt.attribute(built.model, pairs, steps=2)
    assert_same_state(before, state(built.model))
    data = list(pairs.groups["data"])
    assert data
    assert scores.neurons[:, data].any()
    assert np.isfinite(scores.neurons).all()
    exact = mt.attribute(built.model, pairs, "exact", nodes=scores.circuit(0.05, 0.005))
    measured = ~np.isnan(exact.neurons)
    assert measured.sum() == int(0.005 * scores.neurons.size)
    assert np.corrcoef(exact.neurons[measured], scores.neurons[measured])[0, 1] > 0.5


@pytest.mark.parametrize("family", ["llama", "qwen2", "gemma", "gpt2"])
def test_language_models_are_attributed(family):
    built = tiny(family)
    assert mt.attribute(built.model, pairs_of(built, image=False), steps=2).heads.any()


def needed(model, pairs):
    return estimate(model, pairs, steps=3, batch_size=2).bytes_memory


def least(model, pairs):
    """The least budget, as the refusal of a smaller one names it."""
    with pytest.raises(ShapeError, match="at least") as refused:
        mt.attribute(model, pairs, steps=3, memory_budget=1)
    return int(str(refused.value).split("at least ")[1].split()[0])


@pytest.mark.parametrize("share", [0.6, 0.3, 0.05, 0.0])
@pytest.mark.parametrize("family", ["llava", "qwen3_vl", "gemma3"])
def test_scores_do_not_depend_on_the_memory_budget(family, share):
    built = tiny(family)
    pairs = pairs_of(built, 2)
    smallest = least(built.model, pairs)
    budget = smallest + int(share * (needed(built.model, pairs) - smallest))
    whole = mt.attribute(built.model, pairs, steps=3, batch_size=2)
    tiled = mt.attribute(built.model, pairs, steps=3, batch_size=2, memory_budget=budget)
    np.testing.assert_allclose(tiled.heads, whole.heads, atol=1e-7, rtol=1e-3)
    np.testing.assert_allclose(tiled.neurons, whole.neurons, atol=1e-7, rtol=1e-3)
    assert estimate(built.model, pairs, steps=3, batch_size=2, memory_budget=budget).bytes_memory <= budget


@pytest.mark.parametrize("share", [1.0, 0.5])
def test_a_run_leaves_no_tensor_to_the_garbage_collector(share):
    """A hook that held its own tensor would keep every layer's values until the next collection."""
    built = tiny("llava")
    pairs = pairs_of(built)
    budget = int(share * needed(built.model, pairs))
    mt.attribute(built.model, pairs, steps=3)
    gc.collect()
    gc.disable()
    try:
        before = sum(isinstance(x, torch.Tensor) for x in gc.get_objects())
        mt.attribute(built.model, pairs, steps=3, memory_budget=budget)
        after = sum(isinstance(x, torch.Tensor) for x in gc.get_objects())
    finally:
        gc.enable()
    assert after == before


def test_budget_below_one_layer_at_one_position_is_refused():
    built = tiny("llava")
    with pytest.raises(ShapeError, match="memory_budget: expected at least"):
        mt.attribute(built.model, pairs_of(built), memory_budget="1KiB")


def test_interrupted_run_goes_on_and_gives_the_same_scores(tmp_path, monkeypatch):
    from microtome.circuits.attribution import nodes, streaming

    monkeypatch.setattr(streaming, "CHECKPOINT_SECONDS", 0.0)
    built = tiny("llava")
    pairs = pairs_of(built, 4)
    arguments = {"steps": 2, "batch_size": 1, "memory_budget": int(1.05 * least(built.model, pairs))}
    whole = mt.attribute(built.model, pairs, **arguments)
    calls, real = [], nodes.add_batch

    def fails_late(*args):
        calls.append(1)
        if len(calls) in (3, 6):
            raise KeyboardInterrupt
        return real(*args)

    monkeypatch.setattr(nodes, "add_batch", fails_late)
    before = state(built.model)
    for _ in range(2):
        with pytest.raises(KeyboardInterrupt):
            mt.attribute(built.model, pairs, out=tmp_path / "run", **arguments)
        assert_same_state(before, state(built.model))
    resumed = mt.attribute(built.model, pairs, out=tmp_path / "run", **arguments)
    assert np.array_equal(resumed.neurons, whole.neurons)
    assert np.array_equal(resumed.heads, whole.heads)
    loaded = mt.NodeScores.load(tmp_path / "run")
    assert np.array_equal(loaded.heads, whole.heads)
    assert loaded.groups == whole.groups
    n_calls = len(calls)
    mt.attribute(built.model, pairs, out=tmp_path / "run", **arguments)
    assert len(calls) == n_calls, "a finished run is not run again"
    with pytest.raises(StoreError, match="found another one"):
        mt.attribute(built.model, pairs[:3], out=tmp_path / "run", **arguments)


def test_interrupted_run_goes_on_with_other_batches_and_budgets(tmp_path, monkeypatch):
    from microtome.circuits.attribution import nodes, streaming

    monkeypatch.setattr(streaming, "CHECKPOINT_SECONDS", 0.0)
    built = tiny("llava")
    pairs = pairs_of(built, 4)
    budget = int(1.05 * least(built.model, pairs))
    whole = mt.attribute(built.model, pairs, steps=2)
    seen, real, stop = [], nodes.add_batch, 0

    def interrupted(adapter, batch, *others):
        seen.append(len(batch))
        if len(seen) == stop:
            raise KeyboardInterrupt
        return real(adapter, batch, *others)

    def go_on(**how):
        seen.clear()
        return mt.attribute(built.model, pairs, steps=2, out=tmp_path, **how)

    monkeypatch.setattr(nodes, "add_batch", interrupted)
    for stop, how in (
        (7, {"batch_size": 1, "memory_budget": budget}),
        (3, {"batch_size": 1}),
        (2, {"batch_size": 2}),
    ):
        with pytest.raises(KeyboardInterrupt):
            go_on(**how)
        assert len(seen) == stop, "sums of other batches or of another cut are of no use"
    stop = 0
    found = go_on(batch_size=2)
    assert seen == [2], "sums of equal batches are"
    np.testing.assert_array_equal(found.heads, whole.heads)
    np.testing.assert_array_equal(found.neurons, whole.neurons)
    for how in ({"batch_size": 1}, {"batch_size": 4, "memory_budget": budget}):
        again = go_on(**how)
        assert not seen, "a finished run is read, however it was cut"
        np.testing.assert_array_equal(again.neurons, whole.neurons)


def test_a_run_is_of_its_spans_partners_and_tensors_alone(tmp_path):
    """Other spans, partners, shapes or dtypes are other pairs, however alike their numbers are."""
    built = tiny("llama")
    pairs = pairs_of(built, 2, image=False)
    raw = [{"clean": p.clean, "corrupted": p.corrupted, "answer": p.answer, "corrupted_answer": p.corrupted_answer}
           for p in pairs]  # fmt: skip
    by_span = [
        prepare(
            built.model, None, [{**r, "spans": {"data": list(range(1, 3 + i))}} for r in raw], align="spans"
        )
        for i in (0, 1)
    ]
    mt.attribute(built.model, by_span[0], "plain", out=tmp_path)
    with pytest.raises(StoreError, match="found another one"):
        mt.attribute(built.model, by_span[1], "plain", out=tmp_path)
    first = pairs.pairs[0]
    mask = first.clean["attention_mask"]
    others = [
        replace(first, partner=first.partner[::-1]),
        replace(first, clean=first.clean | {"attention_mask": mask.bool()}),
        replace(first, clean=first.clean | {"attention_mask": mask.reshape(-1)}),
    ]
    told = {pairs_fingerprint(replace(pairs, pairs=(one,))) for one in (first, *others)}
    assert len(told) == 4


def test_exact_scores_are_kept_and_say_what_made_them(tmp_path):
    built = tiny("llama")
    pairs = pairs_of(built, 2, image=False)
    approximate = mt.attribute(built.model, pairs, "plain")
    nodes = [approximate.circuit(size) for size in (0.02, 0.01)]
    found = mt.attribute(built.model, pairs, "exact", nodes=nodes[0], out=tmp_path)
    same = ("weights", "pairs", "dtype", "version", "model", "align")
    assert {k: found.facts[k] for k in same} == {k: approximate.facts[k] for k in same}
    calls = []
    handle = built.model.get_decoder().layers[0].register_forward_pre_hook(lambda *_: calls.append(1))
    again = mt.attribute(built.model, pairs, "exact", nodes=nodes[0], out=tmp_path)
    handle.remove()
    assert len(calls) == 2, "those of the check"
    np.testing.assert_array_equal(again.neurons, found.neurons)
    for method, chosen in (("exact", nodes[1]), ("plain", None)):
        with pytest.raises(StoreError, match="found another one"):
            mt.attribute(built.model, pairs, method, nodes=chosen, out=tmp_path)


def test_bf16_models_are_scored_in_float32():
    built = tiny_models.build("llava")
    model = built.model.eval()
    full = mt.attribute(model, pairs_of(built, 3))
    half = mt.attribute(model.bfloat16(), pairs_of_dtype(built, 3, torch.bfloat16))
    assert half.neurons.dtype == np.float32
    assert half.facts["dtype"] == "bfloat16"
    assert np.corrcoef(full.neurons.ravel(), half.neurons.ravel())[0, 1] > 0.95


def pairs_of_dtype(built, n, dtype):
    pairs = pairs_of(built, n)
    for pair in pairs:
        for side in (pair.clean, pair.corrupted):
            side["pixel_values"] = side["pixel_values"].to(dtype)
    return pairs


def test_pairs_whose_logits_are_not_finite_are_counted_and_left_out():
    built = tiny_models.build("llama")
    model = built.model.eval()
    pairs = pairs_of(built, 3, image=False)
    token = 63
    pairs.pairs[0].clean["input_ids"][0, 1] = token
    for pair in pairs.pairs[1:]:
        for side in (pair.clean, pair.corrupted):
            side["input_ids"][side["input_ids"] == token] = 62
    alone = mt.attribute(model, pairs[1:])
    with torch.no_grad():
        model.get_input_embeddings().weight[token] = float("nan")
    found = mt.attribute(model, pairs)
    assert (found.n_pairs, found.n_skipped) == (2, 1)
    np.testing.assert_allclose(found.neurons, alone.neurons, atol=1e-7)


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
@pytest.mark.parametrize("run", [
    lambda m, p: mt.attribute(m, p), lambda m, p: mt.attribute(m, p, "exact"),
    lambda m, p: mt.attribute(m, p, memory_budget="400KiB", batch_size=1),
])  # fmt: skip
def test_model_is_left_as_found_when_a_forward_fails(run, error):
    built = tiny_models.build("llava")
    model = built.model.train()
    pairs = pairs_of(built)
    model(**pairs.pairs[0].clean)  # the class puts permanent hooks of its own on at the first forward
    calls = []

    def breaks(*_):
        calls.append(1)
        if len(calls) == 4:
            raise error("broken")

    handle = model.get_decoder().layers[2].register_forward_pre_hook(breaks)
    before = state(model)
    with pytest.raises(error):
        run(model, pairs)
    assert_same_state(before, state(model))
    handle.remove()


@pytest.mark.parametrize(("arguments", "message"), [
    ({"method": "eap"}, "method: expected one of"), ({"steps": 0}, "steps: expected 1 or more"),
    ({"batch_size": 0}, "batch_size: expected 1 or more"), ({"ig_path": "image"}, "ig_path: expected one of"),
    ({"head_reduce": "sum_abs", "signed": True}, "head_reduce: expected 'abs_sum' with signed=True"),
    ({"method": "exact", "batch_size": 0}, "batch_size: expected 1 or more"),
    ({"method": "exact", "memory_budget": "1GiB"}, "memory_budget: expected none with method='exact', found '1GiB'"),
    ({"method": "exact", "memory_budget": "lots"}, "memory_budget: expected bytes"),
    ({"head_reduce": "mean"}, "head_reduce: expected one of"), ({"memory_budget": "lots"}, "memory_budget: expected bytes"),
])  # fmt: skip
def test_bad_arguments_are_refused(arguments, message):
    built = tiny("llava")
    with pytest.raises(ShapeError, match=message):
        mt.attribute(built.model, pairs_of(built), **arguments)


def test_unprepared_pairs_are_refused():
    with pytest.raises(ShapeError, match="expected a PairSet"):
        mt.attribute(tiny("llava").model, [("a", "b")])


def test_estimate_counts_the_forwards_that_run():
    built = tiny("llava")
    pairs = pairs_of(built, 2)
    cost = estimate(built.model, pairs, steps=5)
    assert (cost.forwards, cost.backwards) == (2 * 7, 2 * 5)
    assert cost.seconds > 0
    assert cost.bytes_scores == 4 * mt.attribute(built.model, pairs).shape.size("heads") * (4 + 128) // 4


@pytest.mark.parametrize("budget", ["1GiB", "4GiB"])
def test_plan_of_a_28_layer_model_at_a_thousand_image_tokens_keeps_within_the_budget(budget):
    """Sizes of Qwen2-VL-7B in bfloat16; the plan covers every layer and position exactly once."""
    from types import SimpleNamespace

    from microtome.arguments import parse_bytes
    from microtome.circuits.attribution.plan import plan_run
    from microtome.circuits.attribution.settings import Settings

    sizes = {"n_layers": 28, "d_model": 3584, "n_heads": 28, "d_head": 128, "d_mlp": 18944}
    model = SimpleNamespace(parameters=lambda: iter([torch.zeros(1, dtype=torch.bfloat16)]))
    adapter = SimpleNamespace(**sizes, model=model, attn_implementation="sdpa")
    positions = 1100

    class Pairs(list):
        n_slots, align = positions, "absolute"

    settings = Settings("ig", 5, "merged", "abs_sum", False)
    plan = plan_run(
        adapter,
        Pairs([SimpleNamespace(length=positions, clean={}, corrupted={})]),
        settings,
        8,
        parse_bytes(budget),
    )
    assert plan.bytes_needed <= parse_bytes(budget)
    covered = np.zeros((28, positions), int)
    for tile in plan.tiles:
        covered[tile.layers.start : tile.layers.stop, tile.positions] += 1
    assert (covered == 1).all()
    assert len(plan.tiles) <= (28 if budget == "1GiB" else 2), plan
