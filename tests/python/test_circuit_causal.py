"""Ablation of features and heads, paired outcomes, attention maps, attribution of a feature to heads."""

import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

import tiny_models
from circuit_cases import assert_same_state, failing_at, pairs_of, state, tiny
from microtome.capture.models import adapt
from microtome.circuits import (
    NodeScores,
    ablate_features,
    ablate_heads,
    ablation_table,
    attention_implementation,
    attention_maps,
    attributed_heads,
    causal_test,
    effect_of,
    feature_attribution,
    head_means,
    matched_features,
    mean_embedding,
    outcome,
    random_heads,
    token_group,
)
from microtome.circuits.ablation.outcomes import NO, YES, Outcome
from microtome.errors import ShapeError

rng = np.random.default_rng(0)
V = rng.standard_normal((2, 64)).astype(np.float32)


def residual(model, layer, inputs):
    kept = []
    handle = model.get_decoder().layers[layer].register_forward_hook(lambda *a: kept.append(a[2]))
    with torch.no_grad():
        model(**inputs)
    handle.remove()
    return kept[0]


@pytest.mark.parametrize("family", list(tiny_models.VLMS))
def test_feature_is_gone_at_text_positions_and_untouched_at_image_tokens(family):
    built = tiny(family)
    inputs = pairs_of(built, 1).pairs[0].clean
    before = state(built.model)
    plain = residual(built.model, 1, inputs)
    with ablate_features(built.model, {1: V[0]}):
        kept = []
        handle = (
            built.model.get_decoder()
            .layers[2]
            .register_forward_pre_hook(lambda m, a, k: kept.append(a[0]), with_kwargs=True)
        )
        with torch.no_grad():
            built.model(**inputs)
        handle.remove()
    assert_same_state(before, state(built.model))
    image = adapt(built.model).row_kinds(inputs["input_ids"])[0] != 0
    v = torch.from_numpy(V[0] / np.linalg.norm(V[0]))
    found = kept[0][0]
    assert (found[~image] @ v).abs().max() < 1e-4 < (plain[0][~image] @ v).abs().max()
    rest = plain[0] - (plain[0] @ v)[:, None] * v
    torch.testing.assert_close(found[~image], rest[~image], atol=1e-4, rtol=1e-4)
    if family != "qwen3_vl":  # there DeepStack features are added after layer 1, at image tokens
        torch.testing.assert_close(found[image], plain[0][image])


def test_projection_is_idempotent_and_does_not_depend_on_order():
    built = tiny("llava")
    inputs = pairs_of(built, 1).pairs[0].clean

    def logits(*directions):
        with torch.no_grad(), ablate_features(built.model, {1: np.stack(directions)}):
            return built.model(**inputs).logits

    both = logits(V[0], V[1])
    torch.testing.assert_close(both, logits(V[1], V[0]), atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(both, logits(V[0], V[1], V[0] + V[1]), atol=1e-4, rtol=1e-4)
    with torch.no_grad(), ablate_features(built.model, {1: V}), ablate_features(built.model, {1: V}):
        torch.testing.assert_close(both, built.model(**inputs).logits, atol=1e-4, rtol=1e-4)


def test_ablation_holds_while_text_is_generated():
    built = tiny("llava")
    inputs = pairs_of(built, 1).pairs[0].clean
    kept = []
    with ablate_features(built.model, {1: V[0]}):
        handle = (
            built.model.get_decoder()
            .layers[2]
            .register_forward_pre_hook(lambda m, a, k: kept.append(a[0]), with_kwargs=True)
        )
        built.model.generate(**inputs, max_new_tokens=3, do_sample=False)
        handle.remove()
    assert [x.shape[1] for x in kept][1:] == [1, 1]
    assert all((x[0, -1] @ torch.from_numpy(V[0])).abs() < 1e-3 for x in kept)


@pytest.mark.parametrize(("directions", "message"), [
    ({9: V[0]}, "expected layers 0 to 2"), ({1: V[0][:5]}, "expected width 64"), ({1: V[0] * 0}, "positive length"),
])  # fmt: skip
def test_directions_that_do_not_fit_are_refused(directions, message):
    with pytest.raises(ShapeError, match=message), ablate_features(tiny("llava").model, directions):
        pass


@pytest.mark.parametrize("positional", [False, True])
def test_heads_are_replaced_by_their_mean_over_the_calibration_set(positional):
    built = tiny("llava")
    pairs = pairs_of(built, 3)
    means = head_means(built.model, pairs, positional=positional)
    z = []
    o_proj = built.model.get_decoder().layers[1].self_attn.o_proj
    for pair in pairs:
        handle = o_proj.register_forward_pre_hook(lambda _, a: z.append(a[0][0].unflatten(-1, (4, 16))))
        with torch.no_grad():
            built.model(**pair.clean)
        handle.remove()
    expected = torch.stack(z).mean(0) if positional else torch.stack(z).mean((0, 1))
    torch.testing.assert_close(means[1], expected, atol=1e-6, rtol=1e-5)
    before = state(built.model)
    seen = []
    with ablate_heads(built.model, [(1, 2)], means):
        handle = o_proj.register_forward_pre_hook(lambda _, a: seen.append(a[0][0].unflatten(-1, (4, 16))))
        with torch.no_grad():
            built.model(**pairs.pairs[0].clean)
        handle.remove()
    assert_same_state(before, state(built.model))
    torch.testing.assert_close(
        seen[0][:, 2], expected[..., 2, :].expand(len(seen[0]), -1), atol=1e-6, rtol=1e-5
    )
    torch.testing.assert_close(seen[0][:, 1], z[0][:, 1])


def test_heads_that_do_not_exist_are_refused():
    built = tiny("llava")
    means = head_means(built.model, pairs_of(built, 2))
    for heads in ([(0, 4)], [(3, 0)]):
        with (
            pytest.raises(ShapeError, match="heads: expected layers below 3"),
            ablate_heads(built.model, heads, means),
        ):
            pass
    with (
        pytest.raises(ShapeError, match="expected a mean of layer 0"),
        ablate_heads(built.model, [(0, 0)], {}),
    ):
        pass


def test_model_is_left_as_found_when_an_intervention_fails():
    built = tiny("llava")
    before = state(built.model)
    with pytest.raises(KeyboardInterrupt), ablate_features(built.model, {1: V}):
        raise KeyboardInterrupt
    assert_same_state(before, state(built.model))


def test_control_heads_come_from_the_same_layers():
    heads = [(0, 1), (2, 3)]
    for control in random_heads(tiny("llava").model, heads, 20):
        assert [layer for layer, _ in control] == [0, 2]
        assert not set(control) & set(heads)


def test_control_features_fire_about_as_often():
    frequency = np.concatenate([np.full(100, 0.001), np.full(100, 0.1), np.zeros(10)])
    for control in matched_features(frequency, [150, 3], 10, pool=20):
        assert 100 <= control[0] < 200
        assert control[1] < 100
        assert not {150, 3} & set(control)


def test_probability_of_an_answer_adds_up_over_its_spellings():
    """Trap 18: yes and no are groups of tokens, and P(correct) is the share within the two groups."""
    built = tiny("llama")
    items = pairs_of(built, 3, image=False)
    items = replace(items, pairs=tuple(replace(p, answer=20) for p in items))
    found = outcome(built.model, items, [(20, 21), (30, 31, 32)])
    for i, item in enumerate(items):
        with torch.no_grad():
            p = built.model(**item.clean).logits[0, -1].double().softmax(-1)
        yes, no = float(p[[20, 21]].sum()), float(p[[30, 31, 32]].sum())
        assert found.p_correct[i] == pytest.approx(yes / (yes + no))
        assert found.p_vocabulary[i] == pytest.approx(yes)
        assert found.correct[i] == (yes > no)
    with pytest.raises(ShapeError, match="in several"):
        outcome(built.model, items, [(20, 21), (21,)])
    with pytest.raises(ShapeError, match="in none"):
        outcome(built.model, items, [(21,), (22,)])


class Words:
    """A tokenizer of whole words."""

    unk_token_id = 0

    def __call__(self, text, add_special_tokens=True):
        known = {"yes": [5], " yes": [6], "Yes": [7], "YES": [8, 9]}
        return {"input_ids": known.get(text, [0])}


def test_spellings_of_several_tokens_are_left_out():
    assert token_group(Words(), YES) == (7, 5, 6)
    with pytest.raises(ShapeError, match="expected a spelling that is one token"):
        token_group(Words(), NO)


def test_effects_are_paired_item_by_item():
    before = Outcome(np.ones(20, bool), np.full(20, 0.9), np.full(20, 0.5))
    after = Outcome(np.arange(20) >= 8, np.full(20, 0.6), np.full(20, 0.5))
    effect = effect_of(before, after)
    assert effect.accuracy_change.value == pytest.approx(-0.4)
    assert effect.accuracy_change.low < -0.4 < effect.accuracy_change.high
    assert effect.p_correct_change.value == pytest.approx(-0.3)
    assert effect.p_mcnemar == pytest.approx(2 / 2**8)
    with pytest.raises(ShapeError, match="same items"):
        effect_of(before, Outcome(np.ones(3, bool), np.ones(3), np.ones(3)))


def test_table_of_interventions_begins_with_none():
    built = tiny("llava")
    items = pairs_of(built, 3)
    before = state(built.model)
    table = ablation_table(built.model, items, {
        "feature": lambda: ablate_features(built.model, {1: V[0]}),
        "nothing": lambda: ablate_heads(built.model, [], {}),
    })  # fmt: skip
    assert_same_state(before, state(built.model))
    assert table["intervention"].to_list() == ["none", "feature", "nothing"]
    assert table["p_correct_change"][0] == table["p_correct_change"][2] == 0
    assert table["p_correct_change"][1] != 0


def test_causal_test_compares_a_change_with_that_of_its_controls():
    """Written out: changes against the plain run, their spread over controls, the excess over the mean control."""
    built = tiny("llava")
    items = pairs_of(built, 6)

    def without(vector):
        return lambda: ablate_features(built.model, {1: vector})

    directions = np.random.default_rng(1).standard_normal((4, 64)).astype(np.float32)
    before = state(built.model)
    table = causal_test(
        built.model, items, {"f": without(directions[0])}, {"f": [without(v) for v in directions[1:]]}
    )
    assert_same_state(before, state(built.model))
    row = table.row(0, named=True)
    plain = outcome(built.model, items)
    runs = []
    for vector in directions:
        with ablate_features(built.model, {1: vector}):
            runs.append(outcome(built.model, items))
    changes = [float(run.p_correct.mean() - plain.p_correct.mean()) for run in runs]
    assert (row["test"], row["n"], row["n_controls"]) == ("f", 6, 3)
    assert row["p_correct_change"] == pytest.approx(changes[0])
    assert row["control_p_correct_change"] == pytest.approx(np.mean(changes[1:]))
    assert row["control_p_correct_low"] == pytest.approx(np.quantile(changes[1:], 0.025))
    assert row["p_correct_excess"] == pytest.approx(changes[0] - np.mean(changes[1:]))
    assert row["p_correct_excess_low"] <= row["p_correct_excess"] <= row["p_correct_excess_high"]
    side = np.sign(changes[0])
    reached = sum(side * c >= abs(changes[0]) for c in changes[1:])
    assert row["p_controls_p_correct"] == pytest.approx((1 + reached) / 4)
    assert row["p_mcnemar"] == effect_of(plain, runs[0]).p_mcnemar
    alone = causal_test(built.model, items, {"f": without(directions[0])}, {})
    assert alone["n_controls"].to_list() == [0]
    assert "control_accuracy_change" not in alone.columns
    with pytest.raises(ShapeError, match="controls: expected names of tests"):
        causal_test(built.model, items, {}, {})
    with pytest.raises(ShapeError, match=r"controls: expected names of tests \(f\), found \['g'\]"):
        causal_test(built.model, items, {"f": without(directions[0])}, {"g": []})


def test_ablating_nothing_changes_nothing_and_no_control_does_less():
    built = tiny("llava")
    items = pairs_of(built, 4)
    nothing = lambda: ablate_heads(built.model, [], {})  # noqa: E731
    row = causal_test(built.model, items, {"none": nothing}, {"none": [nothing] * 3}).row(0, named=True)
    assert row["accuracy_change"] == row["p_correct_change"] == 0
    assert row["p_correct_excess"] == pytest.approx(0, abs=1e-12)
    assert row["p_mcnemar"] == row["p_controls_p_correct"] == 1


def test_attributed_heads_are_those_with_the_largest_sums():
    heads = np.zeros((3, 2, 4), np.float32)
    heads[2, :, 1], heads[0, 0, 3], heads[1, 1, 0] = 2, -3, np.nan
    scores = NodeScores(heads, np.zeros((3, 2, 8), np.float32), 1, signed=True)
    assert attributed_heads(scores, 2) == [(2, 1), (0, 3)]
    assert attributed_heads(scores, 3)[2] == (0, 0), "ties go to the lower layer and head"
    for n in (0, 13):
        with pytest.raises(ShapeError, match="n: expected 1 to 12 heads"):
            attributed_heads(scores, n)


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_model_is_left_as_found_when_a_run_inside_an_intervention_fails(error):
    built = tiny("qwen3_vl")
    items = pairs_of(built, 2)
    means = head_means(built.model, items)
    before = state(built.model)
    runs = (
        lambda: outcome(built.model, items),
        lambda: head_means(built.model, items),
        lambda: attention_maps(built.model, items.pairs[0], [(0, 1)]),
        lambda: causal_test(
            built.model, items, {"f": lambda: ablate_features(built.model, {1: V})},
            {"f": [lambda: ablate_heads(built.model, [(0, 0)], means)]},
        ),
    )  # fmt: skip
    for run in runs:
        with pytest.raises(error), failing_at(built.model, 0, error):
            run()
        assert_same_state(before, state(built.model))
    for at in (1, 2):
        with pytest.raises(error), failing_at(built.model, at, error):
            runs[-1]()
        assert_same_state(before, state(built.model))


def guide_example():
    """The worked example of docs/circuits.md."""
    page = (Path(__file__).parents[2] / "docs" / "circuits.md").read_text()
    [example] = [x for x in re.findall(r"```python\n(.*?)```", page, flags=re.DOTALL) if "causal_test(" in x]
    return example


@pytest.mark.slow
def test_guide_example_of_the_causal_test_finds_what_the_guide_says(tmp_path, monkeypatch):
    """Paper 004, section 9, on the organism: the guide's example, run as it stands, of one dictionary.

    Projecting out the eight features that spatial questions recruit costs accuracy on spatial questions and none on
    another yes/no task, but not more than many a control set does. Dictionaries of two of three other seeds show no cost.
    """
    monkeypatch.chdir(tmp_path)
    tables = []
    exec(compile(guide_example(), "circuits.md", "exec"), {"print": tables.append})
    matched, mismatched = (table.row(0, named=True) for table in tables)
    assert matched["accuracy_high"] < 0
    assert matched["p_mcnemar"] < 0.01
    assert matched["n_controls"] == 20
    assert matched["p_controls_accuracy"] > 0.05, (
        "the guide says that the set does not stand out among its controls"
    )
    assert abs(mismatched["accuracy_change"]) < 0.02


@pytest.mark.parametrize("family", list(tiny_models.VLMS))
def test_attention_maps_switch_to_eager_and_back(family):
    built = tiny(family)
    pair = pairs_of(built, 1).pairs[0]
    before = state(built.model)
    maps = attention_maps(built.model, pair, [(0, 1), (2, 3)])
    assert_same_state(before, state(built.model))
    for one in maps:
        assert one.weights.sum() == pytest.approx(1, abs=1e-4)
        assert 0 < one.image_mass < 1
        assert 0 <= one.entropy <= np.log(len(one.image)) + 1e-6
    grid = maps[0].grid(2)
    assert grid.sum() == pytest.approx(maps[0].image_mass, rel=1e-5)
    assert maps[0].mass_in((0, 0, 1, 1), 2) == pytest.approx(1)
    assert maps[0].mass_in((0, 0, 1, 0.5), 2) == pytest.approx(grid[0].sum() / grid.sum())


def test_attention_implementation_is_restored_after_an_error():
    model = tiny("llava").model
    before = model.config.text_config._attn_implementation
    with pytest.raises(RuntimeError), attention_implementation(model, "eager"):
        assert model.config.text_config._attn_implementation == "eager"
        raise RuntimeError
    assert (
        model.config.text_config._attn_implementation
        == model.config.vision_config._attn_implementation
        == before
    )


@pytest.mark.parametrize("method", ["A", "B"])
@pytest.mark.parametrize("family", list(tiny_models.VLMS))
def test_every_family_attributes_a_feature_to_heads(family, method):
    built = tiny(family)
    pairs = pairs_of(built, 2)
    before = state(built.model)
    found = feature_attribution(built.model, pairs, 1, V[0], mean_embedding(built.model, pairs), method)
    assert_same_state(before, state(built.model))
    assert found.heads.shape == (3, 4)
    assert found.heads[:2].any()
    assert not found.heads[2].any(), "heads above the feature cannot drive it"
    assert found.to_polars().columns == ["layer", "head", "q", "k", "score"]


def test_z_scores_add_up_to_the_change_of_a_linear_target():
    """Without an MLP the target is linear in z, so the heads' scores are its change exactly, and A = -B."""
    built = tiny_models.build("llava")
    model = built.model
    del model.get_decoder().layers[1:]
    model.config.text_config.num_hidden_layers = 1
    with torch.no_grad():
        model.get_decoder().layers[0].mlp.down_proj.weight.zero_()
    pairs = pairs_of(built, 1)
    mean = mean_embedding(model, pairs_of(built, 4))
    a, b = (feature_attribution(model, pairs, 0, V[0], mean, m, sites=("z",)) for m in "AB")
    np.testing.assert_allclose(a.heads, -b.heads, atol=1e-5)
    adapter = adapt(model)
    from microtome.circuits.attribution.features import _corrupted
    from microtome.circuits.forward.decoder import decode, merge
    from microtome.circuits.forward.nodes import on_residuals

    batch = next(pairs.batches(1))
    clean = merge(adapter, batch.clean)
    resid = []
    with torch.no_grad(), on_residuals(adapter, lambda _, x: resid.append(x)):
        for merged in (clean, _corrupted(adapter, batch, clean, mean)):
            decode(adapter, merged)
    text = adapter.row_kinds(batch.clean["input_ids"])[0] == 0
    change = ((resid[1] - resid[0])[0, text] @ torch.from_numpy(V[0])).sum()
    assert a.heads.sum() == pytest.approx(float(change), rel=1e-3)


def test_keys_are_attributed_per_query_head():
    """Trap 15: the scores of the query heads that share a key add up to the score of that key."""
    built = tiny("llava")
    model, pairs = built.model, pairs_of(built, 1)
    mean = mean_embedding(model, pairs_of(built, 4))
    found = feature_attribution(model, pairs, 1, V[0], mean, sites=("q", "k"))
    adapter = adapt(model)
    from microtome.circuits.attribution.features import _corrupted
    from microtome.circuits.forward.decoder import decode, merge

    batch = next(pairs.batches(1))
    clean = merge(adapter, batch.clean)
    seen, resid, grads = [], [], []
    for merged in (clean, _corrupted(adapter, batch, clean, mean)):
        kept = {}
        handles = [
            layer.k_proj.module.register_forward_hook(
                lambda m, a, o, i=layer.index, kept=kept: kept.__setitem__(i, o)
            )
            for layer in adapter.layers
        ]
        handles.append(adapter.layers[1].module.register_forward_hook(lambda m, a, o: resid.append(o)))
        decode(adapter, merged.at(merged.embeds.requires_grad_(), ()))
        for handle in handles:
            handle.remove()
        seen.append(kept)
    text = adapter.row_kinds(batch.clean["input_ids"])[0] == 0
    target = (resid[0][0, text] @ torch.from_numpy(V[0])).sum()
    grads = torch.autograd.grad(target, [seen[0][0], seen[0][1]])
    for layer in (0, 1):
        per_key = ((seen[1][layer] - seen[0][layer]) * grads[layer]).unflatten(-1, (2, 16)).sum((0, 1, 3))
        np.testing.assert_allclose(
            found.scores["k"][layer].reshape(2, 2).sum(1), per_key.detach().numpy(), rtol=1e-3, atol=1e-5
        )


def test_mean_embedding_is_the_mean_of_visual_tokens():
    built = tiny("qwen3_vl")
    pairs = pairs_of(built, 2)
    adapter = adapt(built.model)
    from microtome.circuits.forward.decoder import merge

    rows = [merge(adapter, p.clean) for p in pairs]
    image = adapter.row_kinds(pairs.pairs[0].clean["input_ids"])[0] != 0
    one, each = (mean_embedding(built.model, pairs, positional=p) for p in (False, True))
    expected = torch.stack([r.embeds[0, image] for r in rows])
    torch.testing.assert_close(one.embedding, expected.mean((0, 1)))
    torch.testing.assert_close(each.embedding, expected.mean(0))
    assert len(one.deepstack) == len(rows[0].deepstack) > 0


@pytest.mark.parametrize("targets", ["text", "argmax", "last"])
def test_targets_and_bad_options(targets):
    built = tiny("llava")
    pairs = pairs_of(built, 2)
    mean = mean_embedding(built.model, pairs)
    assert feature_attribution(built.model, pairs, 2, V[0], mean, targets=targets).heads.any()
    for bad in ({"method": "C"}, {"targets": "first"}, {"sites": ("v",)}):
        with pytest.raises(ShapeError, match="expected"):
            feature_attribution(built.model, pairs, 2, V[0], mean, **bad)
    with pytest.raises(ShapeError, match="expected prompts with pictures"):
        mean_embedding(built.model, pairs_of(built, 1, image=False))
