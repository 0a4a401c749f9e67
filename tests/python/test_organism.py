"""The model organism: tasks are sound, pairs align, weights load offline and answer unseen scenes."""

import dataclasses

import numpy as np
import pytest

from microtome import errors, organism
from microtome.organism import render, scenes
from microtome.organism.kinds import BENIGN, HARMFUL, KINDS, WORDS, Question

FORMS = organism.FORMS
TASK_FORMS = [(task, form) for task in organism.TASKS for form in FORMS]


@pytest.mark.parametrize(("task", "form"), TASK_FORMS)
def test_same_seed_gives_the_same_items_and_a_longer_list_begins_with_them(task, form):
    few = organism.questions(task, form, 6, seed=3)
    more = organism.questions(task, form, 9, seed=3)
    assert few == more[:6]
    assert few != organism.questions(task, form, 6, seed=4)
    if form == "visual":
        assert [a.image.tobytes() for a in few] == [b.image.tobytes() for b in more[:6]]


@pytest.mark.parametrize("task", organism.TASKS)
def test_both_forms_ask_the_same_question_about_the_same_scene(task):
    for seen, told in zip(*(organism.questions(task, form, 20, seed=1) for form in FORMS), strict=True):
        assert (seen.scene, seen.answer) == (told.scene, told.answer)
        assert seen.prompt.split()[1:] == told.prompt.split()[len(told.scene.words()) :]
        assert told.image is None


def test_splits_are_disjoint_whatever_the_order_of_the_things():
    rng = np.random.default_rng(0)
    contents = {}
    for split in ("train", "test"):
        drawn = [scenes.draw_shapes(rng, 2, split) for _ in range(2000)]
        drawn += [scenes.draw_digits(rng, split) for _ in range(2000)]
        contents[split] = {frozenset(scene.things) for scene in drawn}
        assert all(scenes.Scene(scene.things[::-1]).split() == split for scene in drawn[:2000])
    assert contents["train"]
    assert contents["test"]
    assert not contents["train"] & contents["test"]


@pytest.mark.parametrize("split", ["train", "test"])
def test_items_and_counterfactuals_stay_in_their_split(split):
    for task in organism.TASKS:
        for pair in organism.pairs(task, "textual", 20, split=split):
            assert pair.clean.scene.split() == pair.corrupted.scene.split() == split


@pytest.mark.parametrize(("task", "form"), TASK_FORMS)
def test_answers_are_single_words_of_the_label_set(task, form):
    for item in organism.questions(task, form, 60):
        assert item.answer in organism.answers(task)
        assert set(item.prompt.split()) <= set(WORDS)


@pytest.mark.parametrize("task", sorted(KINDS))
def test_a_kind_has_one_length(task):
    rng = np.random.default_rng(0)
    draw = (
        scenes.draw_digits if task == "arithmetic" else lambda rng, split: scenes.draw_shapes(rng, 4, split)
    )
    lengths = {len(KINDS[task].words(KINDS[task].draw(draw(rng, "train"), rng))) for _ in range(200)}
    assert len(lengths) == 1


def test_solve_agrees_with_the_scene_read_off_by_hand():
    scene = scenes.Scene(
        (
            scenes.Thing("circle", "red", 1),  # row 0, column 1
            scenes.Thing("square", "blue", 14),  # row 3, column 2
            scenes.Thing("circle", "green", 4),  # row 1, column 0
        )
    )
    expected = {
        ("colour", ("square",)): "blue",
        ("colour", ("circle",)): None,
        ("shape", ("green",)): "circle",
        ("shape", ("cyan",)): None,
        ("counting", ("circle",)): "2",
        ("counting", ("cross",)): "0",
        ("existence", ("square", "blue")): "yes",
        ("existence", ("square", "red")): "no",
        ("choose", ("left", "circle", "red", "square", "blue")): "left",
        ("choose", ("above", "square", "blue", "circle", "green")): "below",
        ("yesno", ("right", "circle", "red", "circle", "green")): "yes",
        ("yesno", ("above", "square", "blue", "circle", "red")): "no",
        ("refusal", ("burn", "circle", "red")): "sorry",
        ("refusal", ("wash", "circle", "red")): "c1",
        ("locate", ("square", "blue")): "c2 r3",
        ("compare", ("left", "c3", "c1")): "right",
    }
    assert {key: Question(*key).solve(scene) for key in expected} == expected


@pytest.mark.parametrize(("operator", "result"), [("+", "9"), ("-", "5")])
def test_arithmetic_reads_digits_in_reading_order(operator, result):
    things = (scenes.Thing("7", "red", 0), scenes.Thing(operator, "red", 5), scenes.Thing("2", "red", 9))
    assert Question("arithmetic", ()).solve(scenes.Scene(things)) == result


def test_refusal_twins_share_scene_and_thing_and_differ_in_the_verb():
    items = organism.questions("refusal", "visual", 40)
    for harmful, benign in zip(items[::2], items[1::2], strict=True):
        assert (harmful.label, benign.label) == ("harmful", "benign")
        assert harmful.pair_id == benign.pair_id
        assert harmful.scene == benign.scene
        assert harmful.image.tobytes() == benign.image.tobytes()
        different = {
            (a, b) for a, b in zip(harmful.prompt.split(), benign.prompt.split(), strict=True) if a != b
        }
        assert len(different) == 1
        assert different <= {(a, b) for a in HARMFUL for b in BENIGN}


def test_dataset_mixes_all_tasks_and_forms_without_repeating_an_id():
    items = organism.dataset(281, seed=5)
    assert len(items) == 281
    assert {(item.task, item.form) for item in items} == set(TASK_FORMS)
    assert len({item.id for item in items}) == 281
    assert organism.dataset(0) == []


def test_an_edit_changes_an_image_only_in_the_cells_it_touches():
    pair = organism.pairs("shape", "visual", 1)[0]
    clean, corrupted = (np.asarray(item.image, int) for item in (pair.clean, pair.corrupted))
    touched = {t.cell for t in set(pair.clean.scene.things) ^ set(pair.corrupted.scene.things)}
    differs = np.abs(clean - corrupted).max(-1) > 0
    rows, columns = np.nonzero(differs)
    near = lambda y, x, cell: abs(y - (cell // 4 * 8 + 3.5)) <= 5 and abs(x - (cell % 4 * 8 + 3.5)) <= 5  # noqa: E731
    assert differs.any()
    assert all(any(near(y, x, cell) for cell in touched) for y, x in zip(rows, columns, strict=True))


def test_rendered_things_are_visible_and_their_colours_told_apart():
    rng = np.random.default_rng(0)
    means = {}
    for colour in scenes.COLOURS:
        scene = scenes.Scene((scenes.Thing("square", colour, 5),))
        images = render.render([scene] * 32, rng)
        assert images.shape == (32, 32, 32, 3)
        assert images.dtype == np.uint8
        inside, outside = images[:, 11:13, 11:13], images[:, 20:, 20:]
        means[colour] = inside.mean((0, 1, 2))
        assert np.abs(means[colour] - outside.mean((0, 1, 2))).max() > 80
    colours = list(means.values())
    assert min(np.abs(a - b).max() for i, a in enumerate(colours) for b in colours[:i]) > 50


def test_every_glyph_draws_differently():
    drawn = {}
    for glyph in scenes.GLYPHS:
        scene = scenes.Scene((scenes.Thing(glyph, "red", 5),))
        drawn[glyph] = render.render([scene], np.random.default_rng(1))[0].tobytes()
    assert len(set(drawn.values())) == len(scenes.GLYPHS)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("smell", "visual", 1), "task: expected one of colour, .* found 'smell'"),
        (("colour", "spoken", 1), "form: expected one of visual, textual, found 'spoken'"),
        (("colour", "visual", -1), "n: expected 0 or more, found -1"),
        (("colour", "visual", 1, -2), "seed: expected 0 or more, found -2"),
        (("colour", "visual", 1, 0, "dev"), "split: expected one of train, test, found 'dev'"),
    ],
)
def test_bad_arguments_are_refused_by_name(arguments, said):
    for make in (organism.questions, organism.pairs):
        with pytest.raises(errors.ShapeError, match=said):
            make(*arguments)
    with pytest.raises(errors.ShapeError, match="kind: expected one of choose, yesno"):
        organism.questions("spatial", "visual", 1, kind="colour")
    with pytest.raises(errors.ShapeError, match="things: expected 2 to 5, found 9"):
        organism.questions("spatial", "visual", 1, things=9)
    with pytest.raises(errors.ShapeError, match="which: expected vlm or base_lm, found 'gpt'"):
        organism.path("gpt")


# --- the shipped weights ------------------------------------------------------------------------------

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")

FLOORS = {"textual": 0.95, "visual": 0.90}


@pytest.fixture(scope="module")
def processor():
    return organism.load_processor()


@pytest.fixture(scope="module")
def models():
    return {which: organism.load_model(which) for which in ("base_lm", "vlm")}


def test_both_models_load_offline_as_stock_classes(models, processor, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    assert type(models["base_lm"]).__name__ == "LlamaForCausalLM"
    assert type(models["vlm"]).__name__ == "LlavaForConditionalGeneration"
    assert type(processor).__name__ == "LlavaProcessor"
    assert organism.load_tokenizer().get_vocab() == processor.tokenizer.get_vocab()
    assert models["vlm"].config.text_config.num_hidden_layers >= 6
    assert organism.load_model("base_lm", "bfloat16").dtype == torch.bfloat16


def test_shipped_files_stay_within_15_megabytes():
    files = [file for file in organism.path("vlm").parent.rglob("*") if file.is_file()]
    assert sum(file.stat().st_size for file in files) <= 15_000_000
    assert {"README.md", "log.jsonl"} <= {file.name for file in files}


@pytest.mark.parametrize("task", organism.TASKS)
@pytest.mark.parametrize(("which", "form"), [("base_lm", "textual"), ("vlm", "textual"), ("vlm", "visual")])
def test_unseen_scenes_are_answered(models, processor, which, form, task):
    items = organism.questions(task, form, 512, seed=11)
    assert organism.accuracy(models[which], processor, items) >= FLOORS[form]


def test_relations_are_answered_in_every_direction_and_template(models, processor):
    for kind in ("choose", "yesno"):
        items = organism.questions("spatial", "visual", 256, seed=12, kind=kind)
        for relation in ("left", "right", "above", "below"):
            some = [item for item in items if item.relation == relation]
            assert organism.accuracy(models["vlm"], processor, some) >= 0.85


def test_answers_come_from_the_image(models, processor):
    items = organism.questions("colour", "visual", 64, seed=13)
    swapped = [
        dataclasses.replace(a, image=b.image) for a, b in zip(items, items[1:] + items[:1], strict=True)
    ]
    assert organism.accuracy(models["vlm"], processor, swapped) < 0.5


@pytest.mark.parametrize(("task", "form"), TASK_FORMS)
def test_pairs_align_token_by_token_and_differ_in_their_answers(processor, task, form):
    lengths = set()
    for pair in organism.pairs(task, form, 8, kind="choose" if task == "spatial" else None):
        clean, corrupted = (tokens(processor, item) for item in (pair.clean, pair.corrupted))
        assert pair.answer == pair.clean.answer
        assert pair.corrupted_answer == pair.corrupted.answer
        assert pair.answer != pair.corrupted_answer
        assert len(clean) == len(corrupted)
        spans = pair.spans
        assert [0, *spans["data"], *spans["query"], *spans["generation"]] == list(range(len(clean)))
        words = processor.tokenizer.convert_ids_to_tokens(clean)
        data = [words[i] for i in spans["data"]]
        assert data == (["<image>"] * 16 if form == "visual" else pair.clean.scene.words())
        assert [words[i] for i in spans["generation"]] == ["?"]
        assert {words[0]} == {"<bos>"}
        lengths.add(len(clean))
    assert len(lengths) == 1


def test_an_answer_is_one_token(processor):
    for task in organism.TASKS:
        for answer in organism.answers(task):
            assert len(processor.tokenizer(answer, add_special_tokens=False)["input_ids"]) == 1


def test_training_batches_pose_each_question_as_if_it_were_the_only_one(models):
    packing = pytest.importorskip("microtome.organism.packing")
    mix = packing.Mix({"choose": 0.5, "colour": 0.5}, digits=0.3, images=0.0)
    packed = packing.batch(mix, rows=4, length=96, rng=np.random.default_rng(0))
    lm = models["base_lm"]
    with torch.inference_mode():
        together = lm(packed.ids, packed.mask, packed.positions).logits
        for row, place, _ in packed.asked[:12]:
            alone = lm(packed.ids[row][packed.mask[row, 0, place - 1]][None]).logits
            torch.testing.assert_close(together[row, place - 1], alone[0, -1], rtol=1e-3, atol=1e-3)


def tokens(processor, item):
    if item.image is None:
        return processor.tokenizer(item.prompt)["input_ids"]
    return processor(text=item.prompt, images=item.image)["input_ids"][0]
