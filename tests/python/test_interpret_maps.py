"""Activation maps: the same feature over the image tokens of a sample, wherever its peak lies."""

import io

import numpy as np
import polars as pl
import pytest
import torch
from PIL import Image

import microtome as mt
from diffing_cases import write_store
from microtome.errors import ShapeError
from microtome.interpret import Label, evidence_from, patch_grid
from microtome.report import feature_page

HOOK = "blocks.0.hook_resid_post"
WORDS = ["<bos>", "<image>", "is", "it", "left", "?"]
VISION = {"model": {"vision": {"image_size": [16, 24], "patch_size": 8, "merge": 1}}}


@pytest.mark.parametrize(
    ("vision", "n", "grid"),
    [
        ({"image_size": [336, 336], "patch_size": 14, "merge": 1}, 576, (24, 24)),
        ({"image_size": [32, 64], "patch_size": 8, "merge": 2}, 8, (2, 4)),
        ({"image_size": [896, 896], "patch_size": 14, "merge": 1}, 256, (16, 16)),  # pooled to a square
        ({"image_size": None, "patch_size": 14, "merge": 2}, 12, None),  # free aspect
        (None, 575, None),
        (None, 0, None),
    ],
)
def test_grid_comes_from_the_facts_then_from_a_square_number_else_nothing(vision, n, grid):
    assert patch_grid({"model": {"vision": vision}}, n) == grid


@pytest.fixture(scope="module")
def acts(tmp_path_factory):
    """Two samples of bos, 2 x 3 image tokens and four words. Feature 0: a patch and a word; 1: words alone."""
    x = np.zeros((2, 11, 3), np.float32)
    x[0, 3, 0], x[0, 9, 0] = 2.0, 4.0  # patch (0, 2) and "left"
    x[1, 5, 0] = 3.0  # patch (1, 1)
    x[0, 8, 1] = 1.0
    kinds = ["text"] + ["image"] * 6 + ["text"] * 4
    ids = ([0] + [1] * 6 + [2, 3, 4, 5]) * 2
    path = tmp_path_factory.mktemp("maps") / "store"
    store = write_store(path, {HOOK: x.reshape(-1, 3)}, 11, {}, kinds, VISION, ids)
    return store[HOOK]


def found(acts, **options):
    sae = mt.SAE(torch.eye(3), torch.eye(3), activation="topk", k=3)
    top = mt.top_samples(sae.encode(acts), acts.rows, n=5)
    named = top.with_columns(dataset=pl.lit("vqa"), id=pl.format("s{}", "sample"))
    return evidence_from(acts, sae, named, decode=lambda ids: " ".join(WORDS[i] for i in ids), **options)


def test_map_is_the_feature_over_the_grid_also_when_the_peak_is_a_word(acts):
    first, second = found(acts)[0]
    assert (first.sample_id, first.on_image, first.activation) == ("s0", False, 4.0)
    assert first.heat == [[0, 0, 0.5], [0, 0, 0]]  # as a share of the feature's largest activation
    assert (second.sample_id, second.on_image) == ("s1", True)
    assert second.heat == [[0, 0, 0], [0, 0.75, 0]]
    (silent,) = found(acts)[1]
    assert np.sum(silent.heat) == 0


def test_window_marks_the_peak_and_passes_over_the_picture(acts):
    first, second = found(acts, radius=2)[0]
    assert first.window == "is it [left] ?"
    assert second.window == ""
    assert first.text == "<bos> is it left ?"
    assert found(acts, texts={"s0": "a question", "s1": "b"})[0][0].text == "a question"


def test_a_grid_that_does_not_fit_gives_no_map(acts):
    assert found(acts, grid=(2, 2))[0][0].heat is None
    assert found(acts, grid=(3, 2))[0][0].heat == [[0, 0], [0.5, 0], [0, 0]]


def test_page_shows_picture_map_and_words(acts):
    buffer = io.BytesIO()
    Image.new("RGB", (2000, 1000)).save(buffer, "PNG")
    evidence = found(acts, images={"s0": buffer.getvalue()}.get)
    assert Image.open(io.BytesIO(evidence[0][0].image_png)).size == (512, 256)
    assert evidence[0][1].image_png is None
    html = feature_page(Label(0, 0, "left of", 0.9), evidence[0]).html()
    assert html.count("--h: 0.50") == 1
    assert html.count("--h: 0.00") == 5
    assert "[left]" in html
    assert "repeat(3, 1fr)" in html
    assert "silent on the picture" in feature_page(Label(0, 1, "?", 0.1), evidence[1]).html()


def test_samples_of_several_layers_or_without_ids_are_refused(acts):
    sae = mt.SAE(torch.eye(3), torch.eye(3), activation="topk", k=3)
    top = mt.top_samples(sae.encode(acts), acts.rows, n=2)
    with pytest.raises(ShapeError, match="found no dataset"):
        evidence_from(acts, sae, top)
    named = top.with_columns(dataset=pl.lit("vqa"), id=pl.lit("s0"), layer=pl.int_range(pl.len()))
    with pytest.raises(ShapeError, match="samples of one layer"):
        evidence_from(acts, sae, named)
