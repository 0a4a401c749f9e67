"""``microtome encode`` and ``stats`` with dictionaries of every activation, fixed-k and ragged."""

from __future__ import annotations

import contextlib
import io
import subprocess
import sys
from types import SimpleNamespace
from unittest import mock

import numpy as np
import polars as pl
import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("typer")

import microtome as mt  # noqa: E402
import stored  # noqa: E402
from microtome import cli  # noqa: E402
from microtome.store import StoredCodes, StoredRaggedCodes  # noqa: E402
from stored import HOOK  # noqa: E402

D, D_SAE, K = 64, 128, 4


def microtome(*words):
    """The command line in this process: exit code, standard output and error."""
    out, error = io.StringIO(), io.StringIO()
    with (
        mock.patch.object(sys, "argv", ["microtome", *map(str, words)]),
        contextlib.redirect_stdout(out),
        contextlib.redirect_stderr(error),
        pytest.raises(SystemExit) as end,
    ):
        cli.main()
    return SimpleNamespace(returncode=end.value.code, stdout=out.getvalue(), stderr=error.getvalue())


def dictionary(activation: str, *, threshold: float | None = None, **recipe) -> mt.SAE:
    W = torch.nn.functional.normalize(
        torch.randn(D_SAE, D, generator=torch.Generator().manual_seed(0)), dim=1
    )
    tensors = {} if threshold is None else {"threshold": torch.full((D_SAE,), threshold)}
    return mt.SAE(W.T, W, -torch.ones(D_SAE), activation=activation, tensors=tensors, **recipe)


DICTIONARIES = {
    "jumprelu": lambda: dictionary("jumprelu", threshold=9.0),
    "relu": lambda: dictionary("relu"),
    "batch_topk": lambda: dictionary("batch_topk", k=K, threshold=9.0),
    "batch_topk, threshold never set": lambda: dictionary("batch_topk", k=K),
    "topk": lambda: dictionary("topk", k=K),
}


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    path = tmp_path_factory.mktemp("cli_codes") / "run"
    stored.write(path)
    return mt.ActivationStore(path)


@pytest.mark.parametrize("activation", DICTIONARIES)
def test_encode_and_stats_take_a_dictionary_of_every_activation(store, tmp_path, activation):
    sae = DICTIONARIES[activation]()
    sae.save_to_disk(tmp_path / "sae")
    name = activation.split(",")[0] + ("-bare" if "," in activation else "")
    done = microtome("encode", store.path, "--sae", tmp_path / "sae", "--hook", HOOK, "--name", name)
    assert done.returncode == 0, done.stderr
    found, codes = store.codes(name), sae.encode(store[HOOK])
    if sae.slots is None:
        assert isinstance(found, StoredRaggedCodes)
        assert np.array_equal(found.indptr, codes.indptr)
        assert f"{len(codes.indices) / 1000:.1f} per row on average" in done.stdout
        assert 0 < np.diff(codes.indptr).min() < np.diff(codes.indptr).max() or activation != "relu"
    else:
        assert isinstance(found, StoredCodes)
        assert f"{K} per row" in done.stdout
    assert "1,000 rows in 128 features" in done.stdout
    assert np.array_equal(found.indices[:], codes.indices)
    assert np.array_equal(found.values[:], codes.values)
    assert torch.equal(sae.decode(found), sae.decode(codes))
    out = tmp_path / "stats.parquet"
    done = microtome("stats", store.path, "--codes", name, "--by", "kind", "--out", out)
    assert done.returncode == 0, done.stderr
    groups = mt.feature_stats(codes, by=pl.col("kind").cast(pl.String), rows=store[HOOK])
    table = pl.read_parquet(out)
    assert set(table["group"]) == {"text", "image", "video"}
    for kind, group in groups.items():
        assert table.filter(pl.col("group") == kind).drop("group").equals(group.to_polars())
    assert microtome("stats", store.path, "--codes", name, "--out", out).returncode == 0
    assert pl.read_parquet(out)["group"].unique().to_list() == ["all"]
    assert microtome("verify", store.path).returncode == 0


KILLED = """
import os, signal, sys
from microtome import SAE
from microtome.cli import app
encode, calls = SAE.encode, []
def dying(self, x):
    calls.append(1)
    if len(calls) == 4:
        os.kill(os.getpid(), signal.SIGKILL)
    return encode(self, x)
SAE.encode = dying
app(sys.argv[1:])
"""


def files(path):
    return {str(p.relative_to(path)): p.read_bytes() for p in sorted(path.rglob("*")) if p.is_file()}


def test_a_killed_encode_goes_on_from_its_last_commit_to_the_same_bytes(tmp_path):
    stored.write(tmp_path / "run", steps=(140_000,))
    store = mt.ActivationStore(tmp_path / "run")
    DICTIONARIES["jumprelu"]().save_to_disk(tmp_path / "sae")
    words = ["encode", store.path, "--sae", tmp_path / "sae", "--hook", HOOK, "--block-rows", 40_000]
    killed = subprocess.run([sys.executable, "-c", KILLED, *map(str, words), "--name", "killed"], check=False)
    assert killed.returncode == -9
    assert len(store.codes("killed")) == 80_000
    for name in ("killed", "whole"):
        done = microtome(*words, "--name", name)
        assert done.returncode == 0, done.stderr
    killed, whole = (files(store.path / "codes" / name) for name in ("killed", "whole"))
    assert killed == whole
    assert store.codes("killed").verify() == []


def test_what_does_not_fit_is_said_in_a_line(store, tmp_path):
    hook = "blocks.7.hook_resid_post"
    dictionary("relu", hook_name=hook).save_to_disk(tmp_path / "elsewhere")
    for name, activation in (("ragged", "jumprelu"), ("slots", "topk")):
        DICTIONARIES[activation]().save_to_disk(tmp_path / name)
    encode = ["encode", store.path, "--hook", HOOK, "--name", "one-name", "--sae"]
    done = microtome(*encode, tmp_path / "elsewhere")
    assert (done.returncode, hook in done.stderr, HOOK in done.stderr) == (2, True, True)
    assert "one-name" not in store.code_names
    assert microtome(*encode, tmp_path / "ragged").returncode == 0
    done = microtome(*encode, tmp_path / "slots")
    assert done.returncode == 2
    assert done.stderr.count("\n") == 1
    assert 'cannot resume: fact "dictionary"' in done.stderr


def test_codes_say_how_many_slots_they_have():
    slots = {name: make().slots for name, make in DICTIONARIES.items()}
    assert slots == {
        "jumprelu": None,
        "relu": None,
        "batch_topk": None,
        "batch_topk, threshold never set": K,
        "topk": K,
    }
