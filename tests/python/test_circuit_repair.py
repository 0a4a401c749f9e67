"""Back-patching and alignment: what is put where, chosen and judged on different prompts, on every family."""

import numpy as np
import pytest
import torch

import tiny_models
from circuit_cases import assert_same_state, failing_at, pairs_of, state, tiny
from microtome.capture.models import adapt
from microtome.circuits import alignment, back_patch, back_patch_iterated, gap_closed
from microtome.circuits.backpatch.choice import BackPatch, Setting, all_settings
from microtome.errors import ShapeError


def test_settings_are_all_layer_pairs_and_windows_are_clipped():
    assert len(all_settings(4, (3, 1))) == 2 * 6
    assert Setting(3, 0, 3).layers(4) == {0: 3}, "layer 1 would need source 4, layer -1 does not exist"
    assert Setting(2, 1, 3).layers(4) == {0: 1, 1: 2, 2: 3}


@pytest.mark.parametrize("family", list(tiny_models.VLMS))
def test_every_family_is_back_patched(family):
    built = tiny(family)
    pairs = pairs_of(built)
    before = state(built.model)
    found = back_patch(built.model, pairs, windows=(1,))
    assert_same_state(before, state(built.model))
    assert found.correct.shape == (3, 2)
    columns = ["src", "dst", "window", "accuracy", "baseline", "p_correct", "p_baseline"]
    assert found.to_polars().columns == columns
    assert found.p_correct is not None
    assert ((found.p_correct > 0) & (found.p_correct < 1)).all()


def test_patched_run_holds_the_late_values_at_the_data_alone():
    """The definition, with plain hooks: resid_post[dst] at data positions is the clean run's resid_post[src]."""
    built = tiny("llava")
    model, pairs = built.model, pairs_of(built, 1)
    pair = pairs.pairs[0]
    data = torch.from_numpy(pair.spans["data"])
    layers = model.get_decoder().layers
    kept = []
    handle = layers[2].register_forward_hook(lambda *a: kept.append(a[2]))
    with torch.no_grad():
        model(**pair.clean)
    handle.remove()

    def put(_module, _args, output):
        output = output.clone()
        output[:, data] = kept[0][:, data]
        return output

    handle = layers[0].register_forward_hook(put)
    with torch.no_grad():
        logits = model(**pair.clean).logits[0, -1]
    handle.remove()
    labels = torch.tensor(range(16, 64))
    best = int(labels[logits[labels].argmax()])
    from dataclasses import replace

    for answer, right in ((best, True), (best + 1 if best < 63 else 16, False)):
        asked = replace(pairs, pairs=(replace(pair, answer=answer),))
        found = back_patch(model, asked, [Setting(2, 0, 1)], labels=range(16, 64))
        assert bool(found.correct[0, 0]) is right


def test_deepstack_features_are_patched_once():
    """Trap 10: what is put there is what the next layer is given, so features added behind the layer are not added twice."""
    built = tiny("qwen3_vl")
    model, pairs = built.model, pairs_of(built, 1)
    pair = pairs.pairs[0]
    data = torch.from_numpy(pair.spans["data"])
    layers = model.get_decoder().layers
    assert adapt(model).deepstack_layers[:2] == (0, 1)
    kept, changed = {}, {}

    def see(into, index):
        return lambda _m, args, kwargs: into.__setitem__(index, (args or tuple(kwargs.values()))[0].clone())

    handles = [layers[i].register_forward_pre_hook(see(kept, i), with_kwargs=True) for i in (1, 2)]
    with torch.no_grad():
        model(**pair.clean)
    for handle in handles:
        handle.remove()

    def put(_module, args, kwargs):
        x = args[0].clone()
        x[:, data] = kept[2][:, data]
        return (x, *args[1:]), kwargs

    handle = layers[1].register_forward_pre_hook(put, with_kwargs=True)
    with torch.no_grad():
        logits = model(**pair.clean).logits[0, -1, 16:64].double()
    handle.remove()
    found = back_patch(model, pairs, [Setting(1, 0, 1)], labels=range(16, 64))
    assert found.p_correct[0, 0] == pytest.approx(float(logits.softmax(-1)[pair.answer - 16]), rel=1e-5)
    norm = layers[1].input_layernorm
    handle = norm.register_forward_pre_hook(see(changed, 1), with_kwargs=True)
    back_patch(model, pairs, [Setting(1, 0, 1)], labels=range(16, 64))
    handle.remove()
    assert torch.equal(changed[1][:, data], kept[2][:, data])


def test_probability_of_the_answer_is_that_among_the_labels():
    built = tiny("llava")
    pairs = pairs_of(built, 2)
    found = back_patch(built.model, pairs, [Setting(1, 0, 1)])
    labels = sorted({i for p in pairs for i in (p.answer, p.corrupted_answer)})
    for i, pair in enumerate(pairs):
        with torch.no_grad():
            logits = built.model(**pair.clean).logits[0, -1].double()
        expected = logits[labels].softmax(-1)[labels.index(pair.answer)]
        assert found.p_baseline[i] == pytest.approx(float(expected), rel=1e-5)


def test_equally_accurate_settings_are_told_apart_by_probability():
    settings = tuple(all_settings(4, (1,)))
    likely = np.full((6, 20), 0.5)
    likely[4] = 0.7
    found = BackPatch(settings, np.ones((6, 20), bool), np.ones(20, bool), likely, np.full(20, 0.5))
    choice = found.choose()
    assert choice.setting == settings[4]
    assert choice.gain.value == 0
    assert choice.p_gain.value == pytest.approx(0.2)


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
@pytest.mark.parametrize("family", ["llava", "qwen3_vl", "gemma3"])
def test_model_is_left_as_found_when_a_patched_run_fails(family, error):
    """Each forward of the run fails once: the unpatched one, a patched one, the last one."""
    built = tiny(family)
    pairs = pairs_of(built)
    before = state(built.model)
    runs = (
        lambda: back_patch(built.model, pairs, windows=(1,), batch_size=2),
        lambda: back_patch_iterated(built.model, pairs, Setting(2, 0, 1), 3, batch_size=2),
        lambda: alignment(built.model, pairs, pairs),
    )
    for run in runs:
        for at in (0, 1, 3):
            with pytest.raises(error), failing_at(built.model, at, error):
                run()
            assert_same_state(before, state(built.model))


def test_setting_is_chosen_on_other_prompts_than_it_is_judged_on():
    """Trap 4: among many useless settings the best on the judged prompts looks good by chance alone."""
    rng = np.random.default_rng(0)
    found = BackPatch(tuple(all_settings(9, (1,))), rng.random((36, 60)) < 0.5, np.zeros(60, bool))
    honest = np.mean([found.choose(seed=s, n_resamples=10).accuracy for s in range(20)])
    optimistic = found.choose(fraction=1, n_resamples=10).accuracy
    assert abs(honest - 0.5) < 0.05 < optimistic - honest
    planted = found.correct.copy()
    planted[7] = True
    choice = BackPatch(found.settings, planted, found.baseline).choose()
    assert choice.setting == found.settings[7]
    assert choice.accuracy == 1
    assert choice.gain.low == 1
    assert choice.p < 1e-8


def test_iteration_begins_with_the_unpatched_and_the_patched_model():
    built = tiny("llava")
    pairs = pairs_of(built, 3)
    setting = Setting(2, 0, 1)
    once = back_patch(built.model, pairs, [setting])
    many = back_patch_iterated(built.model, pairs, setting, 3)
    assert many.shape == (4, 3)
    assert np.array_equal(many[0], once.baseline)
    assert np.array_equal(many[1], once.correct[0])


def test_values_imposed_again_are_those_of_the_clean_run():
    """``repeat_processing=False``, with plain hooks: layer 0 gives layer 1's values, layers 1 and 2 their own clean ones."""
    built = tiny("llava")
    model, pairs = built.model, pairs_of(built, 1)
    pair, layers = pairs.pairs[0], built.model.get_decoder().layers
    data = torch.from_numpy(pair.spans["data"])
    kept = {}
    handles = [
        layer.register_forward_hook(lambda _m, _a, out, i=i: kept.__setitem__(i, out.clone()))
        for i, layer in enumerate(layers)
    ]
    with torch.no_grad():
        model(**pair.clean)
    for handle in handles:
        handle.remove()

    def put(source):
        def hook(_module, _args, output):
            output = output.clone()
            output[:, data] = kept[source][:, data]
            return output

        return hook

    handles = [layers[i].register_forward_hook(put(source)) for i, source in ((0, 1), (1, 1), (2, 2))]
    with torch.no_grad():
        expected = model(**pair.clean).logits[0, -1, 16:64].double().softmax(-1)[pair.answer - 16]
    for handle in handles:
        handle.remove()
    again = back_patch(model, pairs, [Setting(1, 0, 1)], labels=range(16, 64), repeat_processing=False)
    assert again.p_correct[0, 0] == pytest.approx(float(expected), rel=1e-5)
    assert again.p_correct[0, 0] != again.p_baseline[0]


def test_question_before_the_data_is_refused():
    built = tiny("llava")
    pairs = pairs_of(built, 2)
    pairs.pairs[1].clean["input_ids"][0, 0] = 30
    with pytest.raises(ShapeError, match="same words before the data"):
        back_patch(built.model, pairs)
    with pytest.raises(ShapeError, match="same words before the data"):
        back_patch_iterated(built.model, pairs, Setting(1, 0, 1), 2)
    back_patch(built.model, pairs, [Setting(1, 0, 1)], allow_prefix=True)


@pytest.mark.parametrize(
    ("setting", "message"), [((0, 1, 1), "dst < src"), ((9, 1, 1), "dst < src"), ((2, 1, 2), "odd")]
)
def test_settings_outside_the_model_are_refused(setting, message):
    built = tiny("llava")
    with pytest.raises(ShapeError, match=message):
        back_patch(built.model, pairs_of(built), [setting])


def test_gap_closed_is_the_share_of_the_distance_to_text():
    visual, patched = np.repeat([1, 0], 50), np.repeat([1, 0], [75, 25])
    found = gap_closed(patched, visual, np.ones(100))
    assert found.value == pytest.approx(0.5)
    assert found.low < 0.5 < found.high
    assert np.isnan(gap_closed(patched, visual, visual).value)


def test_alignment_is_one_for_a_prompt_with_itself():
    built = tiny("llava")
    pairs = pairs_of(built, 3)
    table = alignment(built.model, pairs, pairs)
    assert table["layer"].to_list() == [-1, 0, 1, 2]
    assert np.allclose(table["cosine"], 1)
    assert np.allclose(table["centred"], 1)


def test_alignment_follows_its_definition():
    built = tiny("llava")
    model = built.model
    visual, textual = pairs_of(built, 2), pairs_of(built, 2, image=False, words=9)
    from dataclasses import replace

    spans = {
        "prefix": np.arange(1),
        "data": np.arange(1, 5),
        "query": np.arange(5, 9),
        "generation": np.arange(9, 10),
    }
    textual = replace(textual, pairs=tuple(replace(p, spans=spans) for p in textual))
    kept = []
    for pair in (*visual, *textual):
        handle = model.get_decoder().layers[1].register_forward_hook(lambda *a: kept.append(a[2][0]))
        with torch.no_grad():
            model(**pair.clean)
        handle.remove()
    data = torch.from_numpy(visual.pairs[0].spans["data"])
    expected = np.mean(
        [
            torch.nn.functional.cosine_similarity(kept[i][data][:, None], kept[2 + i][1:5][None], dim=-1)
            .max(1)
            .values.mean()
            for i in range(2)
        ]
    )
    table = alignment(model, visual, textual)
    assert table["cosine"][2] == pytest.approx(expected, abs=1e-6)
    assert table["centred"][2] < table["cosine"][2] or table["centred"][2] < 0.9
    with pytest.raises(ShapeError, match="expected 2 prompts"):
        alignment(model, visual, textual[:1])
