"""The command line: every verb explains itself, exits as it says, and writes what it names."""

import subprocess
import sys

import numpy as np
import polars as pl
import pytest
import torch

import microtome as mt
from microtome import organism
from microtome.evaluation import score
from microtome.record import read_record

VERBS = ("capture", "info", "verify", "encode", "stats", "cka", "diff", "circuit", "demo")


def microtome(*words, cwd=None):
    command = [sys.executable, "-m", "microtome", *map(str, words)]
    return subprocess.run(command, capture_output=True, text=True, cwd=cwd)


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    path = tmp_path_factory.mktemp("cli") / "store"
    model, processor = organism.load_model("vlm"), organism.load_processor()
    with mt.capture(model, path, ["blocks.[23].hook_resid_post"], processor=processor) as recorder:
        score(model, processor, organism.dataset(28), recorder=recorder, progress=False)
    W = torch.nn.functional.normalize(torch.randn(64, 128, generator=torch.Generator().manual_seed(0)), dim=1)
    mt.SAE(W.T, W, activation="topk", k=4).save_to_disk(path.parent / "sae")
    return path


@pytest.mark.parametrize("verb", VERBS)
def test_every_verb_shows_an_example(verb):
    help_ = microtome(verb, "--help")
    assert help_.returncode == 0
    assert "Example:" in help_.stdout
    assert "--config" in help_.stdout


def test_store_goes_from_info_to_codes_to_tables(store, tmp_path):
    assert "blocks.3.hook_resid_post" in microtome("info", store).stdout
    assert microtome("verify", store).returncode == 0
    hook = "blocks.3.hook_resid_post"
    done = microtome("encode", store, "--sae", store.parent / "sae", "--hook", hook, "--name", "four")
    assert done.returncode == 0, done.stderr
    codes = mt.ActivationStore(store).codes("four")
    assert len(codes) == mt.ActivationStore(store).n_rows
    out = tmp_path / "stats.parquet"
    assert microtome("stats", store, "--codes", "four", "--by", "kind", "--out", out).returncode == 0
    table = pl.read_parquet(out)
    assert set(table["group"]) == {"image", "text"}
    assert table["fires"].sum() == int((np.asarray(codes.values[:]) > 0).sum())
    out = tmp_path / "cka.parquet"
    assert microtome("cka", store, "--where", "form = 'visual'", "--out", out).returncode == 0
    diagonal = pl.read_parquet(out).filter(pl.col("hook_a") == pl.col("hook_b"))["cka"]
    assert np.allclose(diagonal, 1)


def test_tables_say_what_made_them(store, tmp_path):
    out = tmp_path / "cka.parquet"
    assert microtome("cka", store, "--hooks", "blocks.2.*", "--out", out).returncode == 0
    made, opened = read_record(out), mt.ActivationStore(store)
    assert made.inputs == {str(store): opened.fingerprint}
    assert made.parameters == {"hooks": "blocks.2.*", "where": None, "debiased": True}
    assert made.rows == opened.n_rows


def test_config_file_gives_defaults_and_the_command_line_the_last_word(store, tmp_path):
    config = tmp_path / "cka.yaml"
    config.write_text(f"hooks: blocks.2.*\nout: {tmp_path / 'a.parquet'}\n")
    assert microtome("cka", store, "--config", config).returncode == 0
    assert pl.read_parquet(tmp_path / "a.parquet").height == 1
    assert microtome("cka", store, "--config", config, "--hooks", "blocks.*").returncode == 0
    assert pl.read_parquet(tmp_path / "a.parquet").height == 4


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["info", "nowhere"], "not a store"),
        (["verify", "nowhere"], "not a store"),
        (["encode", "STORE", "--sae", "nowhere", "--hook", "blocks.3.hook_resid_post"], "nowhere"),
        (
            ["encode", "STORE", "--sae", "SAE", "--hook", "blocks.9.hook_resid_post"],
            "blocks.9.hook_resid_post",
        ),
        (["stats", "STORE", "--codes", "none"], "none"),
        (["cka", "STORE", "--hooks", "layers.*"], "matches none of"),
        (["cka", "STORE", "--config", "nowhere.yaml"], "nowhere.yaml"),
        (["cka"], "Missing argument"),
    ],
    ids=lambda value: " ".join(value[:2]) if isinstance(value, list) else "",
)
def test_bad_usage_is_said_in_a_line_and_exits_with_two(store, tmp_path, words, says):
    told = [{"STORE": store, "SAE": store.parent / "sae"}.get(word, word) for word in words]
    done = microtome(*told, cwd=tmp_path)
    assert done.returncode == 2
    assert "Traceback" not in done.stderr
    assert says in " ".join(done.stderr.replace("│", " ").split())


def test_damage_is_found_and_exits_with_one(store, tmp_path):
    import shutil

    copy = tmp_path / "copy"
    shutil.copytree(store, copy)
    [shard] = copy.glob("000000/blocks.2*")
    shard.chmod(0o644)
    data = bytearray(shard.read_bytes())
    data[5000] ^= 1
    shard.write_bytes(data)
    done = microtome("verify", copy)
    assert done.returncode == 1
    assert "damaged block 0" in done.stdout
