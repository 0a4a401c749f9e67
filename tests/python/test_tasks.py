"""Task files: published formats read, pairs made by the rules, bad lines named, prepared for a model."""

import json
from collections import Counter

import numpy as np
import pytest
from PIL import Image

from microtome.circuits import prepare
from microtome.errors import ShapeError
from microtome.evaluation.tasks import (
    Prompt,
    PromptPair,
    counterfactual_pairs,
    load_pairs,
    load_prompts,
    save_pairs,
    split,
)


@pytest.fixture
def folder(tmp_path):
    for name in ("a.png", "COCO_val2014_000000000042.jpg", "000000000007.jpg", "CLEVR_val_000000.png"):
        Image.fromarray(np.zeros((4, 6, 3), np.uint8)).save(tmp_path / name)
    return tmp_path


def write(path, content):
    path.write_text(content if isinstance(content, str) else json.dumps(content))
    return path


def test_vqav2_gives_its_most_common_answer_and_its_pictures(folder):
    questions = write(folder / "questions.json", {"data_subtype": "val2014", "questions": [
        {"question_id": 1, "image_id": 42, "question": "Is it red?"},
        {"question_id": 2, "image_id": 42, "question": "Which colour?"},
    ]})  # fmt: skip
    notes = write(folder / "annotations.json", {"annotations": [
        {"question_id": 1, "answer_type": "yes/no", "question_type": "is it", "multiple_choice_answer": "yes", "answers": []},
        {"question_id": 2, "answer_type": "other", "question_type": "which",
         "answers": [{"answer": a} for a in ("red", "blue", "red")]},
    ]})  # fmt: skip
    prompts = load_prompts(questions, folder, annotations=notes, template="USER: {question} ASSISTANT:")
    assert [p.answer for p in prompts] == ["yes", "red"]
    assert prompts[0].prompt == "USER: Is it red? ASSISTANT:"
    assert prompts[0].image.size == (6, 4)
    assert [p.id for p in load_prompts(questions, folder, annotations=notes, yes_no=True)] == ["1"]
    with pytest.raises(ShapeError, match="expected the path of VQAv2's annotations"):
        load_prompts(questions, folder)


def test_vsr_becomes_yes_no_questions_with_their_relation(folder):
    rows = [
        {"image": "a.png", "caption": "The cat is left of the dog.", "label": i, "relation": "left of"}
        for i in (1, 0)
    ]
    prompts = load_prompts(write(folder / "vsr.jsonl", "\n".join(map(json.dumps, rows))))
    assert [p.answer for p in prompts] == ["yes", "no"]
    assert "The cat is left of the dog." in prompts[0].prompt
    assert prompts[0].facts["relation"] == prompts[0].template == "left of"
    assert prompts[0].image is not None


def test_clevr_and_coco_are_told_by_their_keys(folder):
    clevr = write(folder / "clevr.json", {"questions": [
        {"question": "How many cubes?", "answer": 3, "image_filename": "CLEVR_val_000000.png", "question_family_index": 5},
    ]})  # fmt: skip
    assert load_prompts(clevr)[0].answer == "3"
    assert load_prompts(clevr)[0].template == "5"
    coco = write(folder / "coco.json", {
        "images": [{"id": 7, "file_name": "000000000007.jpg"}],
        "annotations": [{"image_id": 7, "caption": " A cat. "}, {"image_id": 7, "caption": "A pet."}],
    })  # fmt: skip
    found = load_prompts(coco)[0]
    assert found.data == "A cat."
    assert found.facts["captions"] == ["A cat.", "A pet."]
    assert found.form == "visual"
    with pytest.raises(ShapeError, match="format: expected one of"):
        load_prompts(coco, format="gqa")
    with pytest.raises(ShapeError, match="Give format"):
        load_prompts(write(folder / "x.json", {"rows": []}))


def test_counterfactuals_have_another_answer_and_the_same_template():
    prompts = [Prompt(f"q{i}", str(i % 3), task=f"t{i % 2}", template=str(i % 4)) for i in range(60)]
    pairs = counterfactual_pairs(prompts)
    for pair in pairs:
        assert pair.answer != pair.corrupted_answer == pair.corrupted.answer
        assert (pair.clean.task, pair.clean.template) == (pair.corrupted.task, pair.corrupted.template)
    assert counterfactual_pairs(prompts) == pairs
    assert counterfactual_pairs(prompts, seed=1) != pairs
    drawn = Counter(p.corrupted.prompt for p in pairs if p.clean.template == "0")
    assert len(drawn) > 3, "drawn at random"


def test_counterfactual_of_another_template_when_its_own_has_one_answer():
    prompts = [Prompt("a", "1", template="x"), Prompt("b", "1", template="x"), Prompt("c", "2", template="y")]
    assert counterfactual_pairs(prompts)[0].corrupted.prompt == "c"
    with pytest.raises(ShapeError, match="another answer than '1', found none"):
        counterfactual_pairs(prompts[:2])


def test_split_is_seeded_and_leaves_nothing_out():
    prompts = [Prompt(str(i), "a") for i in range(20)]
    found, held_out = split(prompts)
    assert (len(found), len(held_out)) == (15, 5)
    assert sorted(p.prompt for p in found + held_out) == sorted(p.prompt for p in prompts)
    assert split(prompts) == (found, held_out)
    with pytest.raises(ShapeError, match="two non-empty parts"):
        split(prompts[:1])


def test_pairs_survive_saving_and_bad_lines_are_named(folder):
    pair = PromptPair(
        Prompt("what ?", "1", str(folder / "a.png")), Prompt("what ?", "2"), "1", "2", {"data": [1, 2]}
    )
    save_pairs([pair, pair], folder / "pairs.jsonl")
    assert load_pairs(folder / "pairs.jsonl") == [pair, pair]
    write(folder / "bad.jsonl", '{"clean": {"prompt": "x", "answer": "1"}}\n')
    with pytest.raises(
        ShapeError, match=r"bad\.jsonl:1: corrupted: expected an object with prompt and answer"
    ):
        load_pairs(folder / "bad.jsonl")
    write(folder / "bad.jsonl", '\n{"clean": \n')
    with pytest.raises(ShapeError, match=r"bad\.jsonl:2: expected a line of JSON"):
        load_pairs(folder / "bad.jsonl")
    write(folder / "bad.jsonl", "[1]\n")
    with pytest.raises(ShapeError, match="expected an object, found list"):
        load_prompts(folder / "bad.jsonl", format="jsonl")


def test_pictures_that_unpack_to_too_much_are_refused(folder, monkeypatch):
    from microtome.evaluation import tasks

    monkeypatch.setattr(tasks, "MAX_PIXELS", 10)
    with pytest.raises(ShapeError, match="expected at most 10 pixels, found 6 x 4"):
        _ = Prompt("x", "1", str(folder / "a.png")).image


class Letters:
    """A tokenizer with a token for every word and position offsets."""

    unk_token_id = 0

    def __call__(self, text, add_special_tokens=True, return_tensors=None, return_offsets_mapping=False):
        import torch

        ids, offsets, at = ([1], [(0, 0)], 0) if add_special_tokens else ([], [], 0)
        for word in text.split():
            at = text.index(word, at)
            ids.append(16 + sum(map(ord, word)) % 48)
            offsets.append((at, at + len(word)))
            at += len(word)
        found = {"input_ids": torch.tensor([ids]) if return_tensors else ids}
        if return_tensors:
            found["token_type_ids"] = torch.zeros(1, len(ids), dtype=torch.long)
        return found | ({"offset_mapping": offsets} if return_offsets_mapping else {})


def worded(data, answer, other, corrupted=None):
    clean, wrong = (
        Prompt(f"{d} so what ?", a, data=d) for d, a in ((data, answer), (corrupted or data, other))
    )
    return PromptPair(clean, wrong, answer, other)


def test_prompts_are_prepared_with_their_groups():
    from circuit_cases import tiny

    model = tiny("llama").model
    pairs = prepare(model, Letters(), [worded("red cat", "yes", "no", "red dog")])
    assert pairs.groups == {"prefix": (0,), "data": (1, 2), "query": (3, 4), "generation": (5,)}
    assert "token_type_ids" not in pairs.pairs[0].clean
    assert pairs.pairs[0].is_aligned


def test_prompts_of_unequal_length_pair_by_spans():
    import microtome as mt
    from circuit_cases import tiny

    model = tiny("llama").model
    raw = [worded("red cat", "yes", "no", "big red dog here"), worded("a b c", "yes", "no", "d e f")]
    with pytest.raises(ShapeError, match="pair 0: counterfactual: expected the layout"):
        prepare(model, Letters(), raw)
    with pytest.raises(ShapeError, match="pair 1: expected 6 tokens like pair 0, found 7"):
        prepare(model, Letters(), [worded("a b", "yes", "no", "c d"), raw[1]])
    pairs = prepare(model, Letters(), raw, align="spans")
    assert pairs.pairs[0].partner.tolist() == [0, 1, 4, 5, 6, 7]
    assert pairs.n_slots == 4
    scores = mt.attribute(model, pairs)
    assert scores.heads.shape == (3, 4, 4)
    exact = mt.attribute(model, pairs, "exact", nodes=scores.circuit(0.5, 0.02))
    measured = ~np.isnan(exact.heads)
    assert np.corrcoef(exact.heads[measured], scores.heads[measured])[0, 1] > 0.7
    assert float(mt.faithfulness(model, pairs, scores.circuit(1.0))) == pytest.approx(1, abs=1e-4)
    assert float(mt.faithfulness(model, pairs, scores.circuit(0.0))) == 0
    from microtome.circuits import PositionMap

    assert PositionMap.between(pairs.groups, pairs.groups).pairs.trace() == 4


@pytest.mark.parametrize(("pair", "message"), [
    (worded("x", "yes please", "no"), "answer: expected one token, found 2"),
    (worded("x", "yes", "yes"), "expected two different tokens"),
    (PromptPair(Prompt("x y", "yes"), Prompt("x z", "no"), "yes", "no", {"data": [1, 9]}),
     "expected positions before the last"),
    (PromptPair(Prompt("x y", "a", data="q"), Prompt("x z", "b"), "a", "b"), "expected a part of the prompt"),
    ({"clean": {}, "corrupted": {}}, "prompt: expected a field of this name"),
])  # fmt: skip
def test_pairs_that_cannot_be_used_are_refused_or_dropped(pair, message):
    from circuit_cases import tiny

    model = tiny("llama").model
    good = worded("red cat", "yes", "no", "red dog")
    with pytest.raises(ShapeError, match=f"pairs: pair 1: .*{message}"):
        prepare(model, Letters(), [good, pair])
    kept = prepare(model, Letters(), [good, pair], on_invalid="drop")
    assert len(kept) == 1
    assert kept.dropped[0][0] == 1
    with pytest.raises(ShapeError, match="at least one usable pair"):
        prepare(model, Letters(), [pair], on_invalid="drop")


@pytest.mark.parametrize(
    ("name", "content", "options", "message"),
    [
        ("a.json", "{", {}, r"a\.json: expected JSON, found .* in line 1"),
        ("a.json", "[1]", {}, r"a\.json: expected an object, found list"),
        ("a.json", '{"questions": 5}', {}, r"a\.json: expected prompts"),
        (
            "a.json",
            '{"questions": [{"image_filename": "x", "answer": 1}]}',
            {},
            "expected the key 'question' of clevr",
        ),
        ("a.json", '{"images": [{}], "annotations": []}', {}, "expected the key 'id' of coco"),
        ("a.jsonl", '{"prompt": "a", "answer": "b", "image": 5}', {}, r"a\.jsonl: expected jsonl, found"),
        (
            "a.jsonl",
            '{"prompt": "a", "answer": "b", "facts": [1]}',
            {},
            r"a\.jsonl:1: facts: expected an object",
        ),
        ("a.jsonl", '{"prompt": "a", "answer": "b"}', {"typo": 5}, "options: expected some of .* found typo"),
        (
            "a.jsonl",
            '{"image": "a", "caption": "c", "relation": "r", "label": 1}',
            {"template": "{q}"},
            "template: ",
        ),
    ],
)
def test_files_that_are_no_prompts_are_refused_by_name_and_key(name, content, options, message, tmp_path):
    (tmp_path / name).write_text(content)
    with pytest.raises(ShapeError, match=message):
        load_prompts(tmp_path / name, **options)


def test_annotations_and_spans_are_refused_by_their_file(tmp_path):
    (tmp_path / "q.json").write_text('{"questions": []}')
    (tmp_path / "a.json").write_text("{}")
    with pytest.raises(ShapeError, match=r"a\.json: expected the key 'annotations' of VQAv2's annotations"):
        load_prompts(tmp_path / "q.json", annotations=tmp_path / "a.json")
    side = {"prompt": "a", "answer": "b"}
    (tmp_path / "p.jsonl").write_text(json.dumps({"clean": side, "corrupted": side, "spans": 5}))
    with pytest.raises(ShapeError, match=r"p\.jsonl:1: spans: expected positions by group, found 5"):
        load_pairs(tmp_path / "p.jsonl")
