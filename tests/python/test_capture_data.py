"""Data sets of every kind, read and captured as the command line does it."""

import json

import numpy as np
import polars as pl
import pytest
import torch
from PIL import Image
from tokenizers import Tokenizer, pre_tokenizers
from tokenizers import models as tokenizer_models
from transformers import LlavaProcessor, PreTrainedTokenizerFast

import tiny_models
from microtome.capture import data
from microtome.capture.data import DataItem, capture_dataset, load_model, read_items
from microtome.errors import Error, ShapeError
from test_capture import Stored

WORDS = ["is", "the", "red", "circle", "left", "of", "blue", "square", "yes", "no", "user", "assistant"]
HOOKS = ["blocks.*.hook_resid_post"]


def tokenizer():
    named = ["<pad>", "<bos>", "<eos>", "<image>", "<unk>"]
    vocabulary = {word: i for i, word in enumerate(named)} | {word: 16 + i for i, word in enumerate(WORDS)}
    raw = Tokenizer(tokenizer_models.WordLevel(vocabulary, unk_token="<unk>"))
    raw.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    raw.add_special_tokens(named)
    return PreTrainedTokenizerFast(
        tokenizer_object=raw,
        pad_token="<pad>",
        bos_token="<bos>",
        eos_token="<eos>",
        unk_token="<unk>",
        extra_special_tokens={"image_token": "<image>"},
    )


def llava_processor():
    return LlavaProcessor(
        tiny_models.clip_images(),
        tokenizer(),
        patch_size=14,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template="{% for m in messages %}{{ m.role }} {% for c in m.content %}"
        "{% if c.type == 'image' %}<image> {% else %}{{ c.text }}{% endif %}{% endfor %}{% endfor %} assistant",
    )


def picture(path, size=(60, 40)):
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (size[1], size[0], 3), dtype=np.uint8)).save(
        path
    )
    return path


@pytest.fixture(scope="module")
def llava():
    return tiny_models.build("llava").model


@pytest.fixture
def questions(tmp_path):
    picture(tmp_path / "a.png")
    rows = [
        {"id": "q1", "image": "a.png", "prompt": "is the circle red", "answer": "yes"},
        {"id": "q2", "prompt": "is the square left of the circle", "answer": "no", "hops": 2},
        {"id": "q3", "image": "a.png", "prompt": "is the blue square red", "answer": "no"},
        {"id": "q4", "prompt": "is the square red", "boxes": [1, 2]},
    ]
    path = tmp_path / "questions.jsonl"
    path.write_text("\n".join(json.dumps(row) for row in rows) + "\n\n")
    return path


def test_questions_with_and_without_images_are_captured(llava, questions, tmp_path):
    items = read_items(questions)
    n = capture_dataset(llava, llava_processor(), items, tmp_path / "s", HOOKS, batch_size=2, progress=False)
    assert n == 4
    store = Stored(tmp_path / "s")
    assert sorted(store.samples["id"]) == ["q1", "q2", "q3", "q4"]
    assert dict(store.samples.select("id", "answer").rows()) == {
        "q1": "yes",
        "q2": "no",
        "q3": "no",
        "q4": None,
    }
    assert dict(store.samples.select("id", "hops").rows())["q2"] == 2
    tokens = dict(store.rows().join(store.samples, on="sample").group_by("id").len().rows())
    assert tokens == {"q1": 4 + 16, "q2": 7, "q3": 5 + 16, "q4": 4}
    kinds = dict(
        store.rows().join(store.samples, on="sample").group_by("id").agg(pl.col("kind").sum()).rows()
    )
    assert kinds == {"q1": 16, "q2": 0, "q3": 16, "q4": 0}
    assert (
        capture_dataset(llava, llava_processor(), items, tmp_path / "s", HOOKS, batch_size=2, progress=False)
        == 0
    )


def test_an_interrupted_data_set_resumes_to_the_same_bytes(llava, questions, tmp_path, monkeypatch):
    items = [
        DataItem(f"{item.id}-{i}", item.prompt, item.image)
        for i in range(6)
        for item in read_items(questions)
    ]
    options = {"batch_size": 3, "step_rows": 40, "progress": False}
    capture_dataset(llava, llava_processor(), items, tmp_path / "whole", HOOKS, **options)
    calls, inputs = [], data.model_inputs

    def fails_later(*args, **kwargs):
        calls.append(1)
        if len(calls) in (3, 6):
            raise OSError("the image server is away")
        return inputs(*args, **kwargs)

    monkeypatch.setattr(data, "model_inputs", fails_later)
    for _ in range(2):
        with pytest.raises(OSError, match="away"):
            capture_dataset(llava, llava_processor(), items, tmp_path / "resumed", HOOKS, **options)
    capture_dataset(llava, llava_processor(), items, tmp_path / "resumed", HOOKS, **options)
    assert Stored(tmp_path / "resumed").files() == Stored(tmp_path / "whole").files()


def test_a_chat_template_wraps_prompts_and_places_the_image(llava, questions):
    processor = llava_processor()
    items = [item for item in read_items(questions) if item.image]
    inputs = data.model_inputs(llava, processor, items, chat=True)
    words = processor.tokenizer.convert_ids_to_tokens(inputs["input_ids"][1])
    assert words == ["user", *["<image>"] * 16, *["is", "the", "blue", "square", "red", "assistant"]]
    assert inputs["attention_mask"][0].tolist() == [0] + [1] * 22
    with pytest.raises(Error, match="chat: expected a processor with a chat template"):
        data.model_inputs(llava, tokenizer(), [DataItem(0, "is")], chat=True)


def test_the_processors_padding_side_is_left_as_found(llava):
    found = tokenizer()
    found.padding_side = "right"
    inputs = data.model_inputs(llava, found, [DataItem(0, "is"), DataItem(1, "is the circle")])
    assert inputs["attention_mask"].tolist() == [[0, 0, 1], [1, 1, 1]]
    assert found.padding_side == "right"
    with pytest.raises(Error, match="found a tokenizer"):
        data.model_inputs(llava, found, [DataItem(0, "is", Image.new("RGB", (8, 8)))])


def test_parquet_image_folders_and_saved_data_sets_are_read(questions, tmp_path):
    words = ["is the circle red", "is the square blue"]
    image = {"bytes": picture(tmp_path / "b.png").read_bytes(), "path": "b.png"}
    frame = pl.DataFrame({"question": words, "image": [image, image], "n": [1, 2]})
    frame.write_parquet(tmp_path / "d.parquet")
    (tmp_path / "saved").mkdir()
    frame.write_ipc_stream(tmp_path / "saved" / "data-00000-of-00001.arrow")
    for path in (tmp_path / "d.parquet", tmp_path / "saved"):
        items = read_items(path)
        assert [(item.id, item.prompt, item.columns) for item in items] == [
            (i, w, {"n": i + 1}) for i, w in enumerate(words)
        ]
        assert data._decoded(items[0].image, 0).size == (60, 40)
    (tmp_path / "photos" / "more").mkdir(parents=True)
    for name in ("x.png", "more/y.JPG"):
        picture(tmp_path / "photos" / name)
    items = read_items(tmp_path / "photos", prompt="is the circle red")
    assert [item.id for item in items] == ["more/y.JPG", "x.png"]
    assert len(read_items(tmp_path / "photos", prompt="is", limit=1)) == 1


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"prompt": "a"}\n{"prompt": ', "line 2: expected JSON"),
        ('{"words": "a"}', r"row 0: expected one of \['prompt', 'text', 'question'\], found \['words'\]"),
        ("[1]", "row 0: expected an object with a prompt, found list"),
        ('{"id": 1, "prompt": "a"}\n{"id": 1, "prompt": "b"}', "expected every id once, found 1 again"),
        ("", "expected rows, found none"),
    ],
)
def test_bad_rows_are_refused_with_file_and_row(tmp_path, text, message):
    (tmp_path / "d.jsonl").write_text(text)
    with pytest.raises(ShapeError, match=message):
        read_items(tmp_path / "d.jsonl")


def test_what_is_not_there_is_said(tmp_path):
    with pytest.raises(FileNotFoundError, match="no such data"):
        read_items(tmp_path / "none.jsonl")
    (tmp_path / "d.jsonl").write_text('{"prompt": "a", "image": "gone.png"}')
    with pytest.raises(FileNotFoundError, match=r"no such image .*row 0"):
        read_items(tmp_path / "d.jsonl")
    (tmp_path / "d.csv").write_text("a,b")
    with pytest.raises(ShapeError, match=r"expected \.jsonl, \.parquet or a folder, found '\.csv'"):
        read_items(tmp_path / "d.csv")


def test_a_decompression_bomb_is_refused_before_it_is_decoded(tmp_path):
    Image.new("1", (20_000, 6_000)).save(tmp_path / "bomb.png")
    with (
        pytest.warns(Image.DecompressionBombWarning),
        pytest.raises(ShapeError, match="at most 100,000,000 pixels"),
    ):
        data._decoded(tmp_path / "bomb.png", "bomb")


def test_a_saved_model_and_processor_load_offline_and_capture_alike(llava, questions, tmp_path):
    llava.save_pretrained(tmp_path / "model")
    llava_processor().save_pretrained(tmp_path / "model")
    model, processor = load_model(str(tmp_path / "model"))
    items = read_items(questions)
    for name, pair in (("live", (llava, llava_processor())), ("loaded", (model, processor))):
        capture_dataset(*pair, items, tmp_path / name, HOOKS, dtype="float32", progress=False)
    live, loaded = Stored(tmp_path / "live"), Stored(tmp_path / "loaded")
    assert torch.equal(live["blocks.1.hook_resid_post"], loaded["blocks.1.hook_resid_post"])
    modules = loaded.manifest["facts"]["modules"]
    assert modules["blocks.0.hook_resid_post"] == "model.language_model.layers.0", (
        "live names, not those of the file"
    )


def test_items_without_columns_bring_task_form_and_answer(llava, tmp_path):
    class Question:
        image, task, form = None, "colour", "textual"

        def __init__(self, id_, answer):
            self.id, self.answer, self.prompt = id_, answer, "is the circle red"

    capture_dataset(
        llava, tokenizer(), [Question("a", "yes"), Question("b", "no")], tmp_path / "s", HOOKS, progress=False
    )
    assert Stored(tmp_path / "s").samples.rows() == [
        (0, "a", "colour", "textual", "yes"),
        (1, "b", "colour", "textual", "no"),
    ]
