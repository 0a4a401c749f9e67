"""`microtome diff`: bad input is one clear line before any work; good input is tables, figures, pages and a report."""

import json

import numpy as np
import polars as pl
import pytest
import torch
from PIL import Image
from typer.testing import CliRunner

import microtome as mt
from diffing_cases import write_store
from microtome import cli
from microtome.errors import Error

HOOK = "blocks.{}.hook_resid_post"
KINDS = ["text"] + ["image"] * 4 + ["text"] * 3
D = 16


def facts(layers=2, cls="LlavaForConditionalGeneration", d=D):
    return {"model": {"class": cls, "n_layers": layers, "d_model": d, "vision": None}}


def store(path, kinds=KINDS, hooks=(0, 1), d=D, n=60, **of):
    rng = np.random.default_rng(len(kinds) + d)
    x = {HOOK.format(i): rng.standard_normal((n * len(kinds), d)) for i in hooks}
    columns = {"task": [("spatial", "colour", "shape")[i % 3] for i in range(n)]}
    write_store(path, x, len(kinds), columns, kinds, facts(**of))


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("diff")
    lm = "LlamaForCausalLM"
    store(folder / "base", ["text"] * 8, cls=lm)
    store(folder / "vlm")
    store(folder / "neutral", n=12)
    store(folder / "narrow", ["text"] * 8, d=8, cls=lm, layers=2)
    store(folder / "deep", ["text"] * 8, cls=lm, layers=9)
    store(folder / "elsewhere", ["text"] * 8, hooks=(7,), cls=lm)
    store(folder / "other_model", cls="Idefics3ForConditionalGeneration", n=12)
    store(folder / "one_layer", hooks=(0,), n=12)
    W = torch.eye(8)
    mt.SAE(W, W, activation="topk", k=2).save_to_disk(folder / "saes" / HOOK.format(0))
    mt.SAE(W, W, activation="topk", k=2).save_to_disk(folder / "saes" / HOOK.format(1))
    Image.new("RGB", (16, 16)).save(folder / "a.png")
    lines = [{"id": f"s{i}", "prompt": "is it left ?", "image": "a.png"} for i in range(60)]
    (folder / "vlm.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (folder / "others.jsonl").write_text('{"id": "z", "prompt": "who ?"}\n')
    (folder / "taken").write_text("a file where the folder should be")
    return folder


def microtome(*words):
    """Exit code and what a user reads, as :func:`microtome.cli.main` gives them."""
    result = CliRunner().invoke(cli.app, ["diff", *map(str, words)], env={"COLUMNS": "400"})
    if isinstance(result.exception, Error | OSError | MemoryError):
        return 2, result.output + str(result.exception)
    assert result.exception is None or isinstance(result.exception, SystemExit), result.exception
    return result.exit_code, " ".join(result.output.split())


BAD = {
    "no store": (["nowhere", "vlm"], "nowhere"),
    "exchanged": (["vlm", "base"], "base: expected rows of a language model, text alone, found image tokens"),
    "no image tokens": (["base", "base"], "vlm: expected image tokens, found text alone"),
    "other hooks": (
        ["elsewhere", "vlm"],
        "expected hooks in common, found blocks.7.hook_resid_post and blocks.0",
    ),
    "other width": (["narrow", "vlm"], "expected one width at blocks.0.hook_resid_post, found 8 and 16"),
    "other depth": (["deep", "vlm"], "found n_layers = 9 in"),
    "unknown column": (
        ["base", "vlm", "--spatial", "topic = 'x'"],
        "spatial: expected columns among sample, position",
    ),
    "no SQL": (["base", "vlm", "--spatial", "task = = 'x'"], "--spatial: expected SQL over columns"),
    "no truth value": (["base", "vlm", "--spatial", "position + 1"], "spatial: expected Boolean values"),
    "other type": (["base", "vlm", "--spatial", "task > 3"], "spatial: "),
    "no such questions": (["base", "vlm", "--spatial", "task = 'none'"], "found no spatial ones"),
    "none but such": (["base", "vlm", "--spatial", "task <> 'none'"], "found no other ones"),
    "vision column": (["base", "vlm", "--vision", "form = 'visual'"], "vision: expected columns among"),
    "cluster": (
        ["base", "vlm", "--spatial", "task = 'spatial'", "--cluster", "image"],
        "cluster: expected columns",
    ),
    "neutral of another model": (
        ["base", "vlm", "--neutral", "other_model"],
        "neutral: expected a run of the VLM",
    ),
    "neutral lacks a hook": (
        ["base", "vlm", "--neutral", "one_layer"],
        "neutral: expected the hook blocks.1",
    ),
    "dictionaries of another width": (
        ["base", "vlm", "--dictionaries", "saes"],
        "expected d_in = 16 at blocks.0",
    ),
    "no dictionaries": (["base", "vlm", "--dictionaries", "."], "--dictionaries"),
    "no tokenizer": (
        ["base", "vlm", "--tokenizer", "saes"],
        "tokenizer: expected a folder or hub id of a tokenizer, found 'saes'",
    ),
    "other data": (["base", "vlm", "--data", "others.jsonl"], "data: expected samples of"),
    "no data": (["base", "vlm", "--data", "nowhere.jsonl"], "nowhere.jsonl"),
    "share": (["base", "vlm", "--p-gap", "2"], "p_gap: expected a number in (0, 1], found 2.0"),
    "holdout": (["base", "vlm", "--holdout", "1"], "holdout: expected a number in (0, 1), found 1"),
    "unit": (["base", "vlm", "--unit", "image"], "unit: expected one of token, sample, found 'image'"),
    "tokens": (["base", "vlm", "--gap-tokens", "video"], "gap_tokens: expected one of all, text, image"),
    "k": (["base", "vlm", "--k", "0"], "k: expected a whole number"),
    "k above d_sae": (
        ["base", "vlm", "--k", "40", "--d-sae", "32"],
        "k: expected at most d_sae = 32, found 40",
    ),
    "no folder": (["base", "vlm", "--out", "taken"], "taken"),
    "unknown option": (["base", "vlm", "--spatail", "x"], "No such option"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_one_line_that_names_it(runs, case, monkeypatch, tmp_path):
    words, message = BAD[case]
    monkeypatch.chdir(runs)
    out = [] if "--out" in words else ["--out", tmp_path / "out"]
    code, said = microtome(*words, *out, "--steps", 2, "--batch-size", 32, "--no-progress")
    assert code == 2
    assert message in said
    assert "Traceback" not in said
    assert not (tmp_path / "out").exists(), "refused before any work"


def test_one_command_gives_tables_figures_pages_and_report(runs, monkeypatch, tmp_path):
    monkeypatch.chdir(runs)
    small = ["--d-sae", 64, "--k", 4, "--steps", 10, "--batch-size", 64, "--draws", 50, "--pages", 3]
    told = ["--spatial", "task = 'spatial'", "--neutral", "neutral", "--data", "vlm.jsonl"]
    code, said = microtome(
        "base", "vlm", *told, *small, "--spatial-top", 1, "--out", tmp_path, "--no-progress"
    )
    assert code == 0, said
    features = pl.read_parquet(tmp_path / "tables" / "features.parquet")
    assert {"layer", "feature", "variance_gap", "decoder_cosine", "frequency_vision", "frequency_text", "frequency_gap",
            "odds_ratio", "q_value", "dead", "adapted", "spatial", "survivor", "label"} <= set(features.columns)  # fmt: skip
    assert features.height == 2 * 64
    top = pl.read_parquet(tmp_path / "tables" / "top_samples.parquet")
    assert set(top["dataset"]) == {"other", "spatial"}
    figures = {path.stem for path in (tmp_path / "figures").glob("*.png")}
    paper = {
        "fvu",
        "fvu_by_layer",
        "cosine_by_layer",
        "joint",
        "adapted_per_layer",
        "frequency_shift",
        "survivors",
    }
    assert paper | {"reconstruction", "thresholds"} <= figures
    assert figures == {path.stem for path in (tmp_path / "figures").glob("*.csv")}
    pages = sorted(path.name for path in (tmp_path / "features").glob("L*.html"))
    assert len(pages) == 3
    index = (tmp_path / "features" / "index.html").read_text()
    assert all(f'href="{page}"' in index for page in pages)
    assert "--h:" in (tmp_path / "features" / pages[0]).read_text()
    assert pl.read_csv(tmp_path / "review.csv").height == 3
    assert "What fine-tuning on pictures changed" in (tmp_path / "report.html").read_text()


def test_labelling_says_what_it_costs_and_stops_above_the_budget(runs, monkeypatch, tmp_path):
    monkeypatch.chdir(runs)
    small = ["--d-sae", 64, "--k", 4, "--steps", 5, "--batch-size", 64, "--pages", 2]
    label = ["--label-model", "m", "--label-url", "http://localhost:9/v1", "--label-budget", "0.0000001"]
    code, said = microtome(
        "base", "vlm", *small, *label, "--data", "vlm.jsonl", "--out", tmp_path, "--no-progress"
    )
    assert code == 2
    assert "labelling by m: 2 requests, about" in said
    assert "--label-budget" in said
