"""Back-patching and alignment: what is put where, chosen and judged on different prompts, on every family."""

import numpy as np
import pytest
import torch

import tiny_models
from circuit_cases import assert_same_state, pairs_of, state, tiny
from microtome.circuits import alignment, back_patch, back_patch_iterated, gap_closed
from microtome.circuits.repair import BackPatch, Setting, all_settings
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
    assert found.to_polars().columns == ["src", "dst", "window", "accuracy", "baseline"]


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


def test_values_imposed_again_undo_the_patch_above_it():
    built = tiny("llava")
    pairs = pairs_of(built, 3)
    again = back_patch(built.model, pairs, [Setting(1, 0, 1)], repeat_processing=False)
    assert again.correct.shape == (1, 3)


def test_question_before_the_data_is_refused():
    built = tiny("llava")
    pairs = pairs_of(built, 2)
    pairs.pairs[1].clean["input_ids"][0, 0] = 30
    with pytest.raises(ShapeError, match="same words before the data"):
        back_patch(built.model, pairs)
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
