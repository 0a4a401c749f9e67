"""One pass over activations gives what separate passes give, bit for bit."""

from __future__ import annotations

import math
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import polars as pl
import pytest

import microtome as mt
import stored
from microtome import _core
from microtome.errors import DtypeError, NonFiniteError, ShapeError
from microtome.metrics import TopKEncoder, features, sample_fires
from process_memory import anonymous_bytes, needs_procfs

F32 = np.float32
RNG = np.random.default_rng(0)
N, D, D_SAE, K = 9000, 16, 64, 4  # three blocks of rows, the last one partly filled
X = RNG.standard_normal((N, D), dtype=F32)
W_ENC = RNG.standard_normal((D, D_SAE), dtype=F32)
W_DEC = RNG.standard_normal((D_SAE, D), dtype=F32)
B_DEC = RNG.standard_normal(D, dtype=F32)
ROWS = pl.DataFrame(
    {"sample": np.arange(N) // 7, "position": np.arange(N) % 7, "kind": ["image", "text"] * (N // 2)}
)


def encoder(**options):
    return TopKEncoder(W_ENC, None, k=K, **options)


def assert_equal(a, b):
    assert a.n_tokens == b.n_tokens
    assert all(getattr(a, f).tobytes() == getattr(b, f).tobytes() for f in ("fires", "sum", "sum_sq", "max"))


def test_one_pass_equals_separate_passes_bit_for_bit():
    one = mt.analyse(X, encoder(), W_dec=W_DEC, b_dec=B_DEC, rows=ROWS, top=3)
    codes = encoder()(X)
    assert_equal(one.stats, mt.feature_stats(codes))
    assert one.top.equals(mt.top_samples(codes, ROWS, n=3))
    assert one.fvu == mt.fvu(X, codes, W_dec=W_DEC, b_dec=B_DEC)
    assert math.isclose(one.l0, (codes.values > 0).sum(1).mean())
    assert one.n_rows == N


def test_groups_and_ragged_codes():
    relu = TopKEncoder(W_ENC, None, activation="jump_relu", threshold=1.0)
    one = mt.analyse(X, relu, by=pl.col("kind"), rows=ROWS.lazy(), top=2)
    codes = relu(X)
    separate = mt.feature_stats(codes, by="kind", rows=ROWS)
    assert set(one.stats) == {"image", "text"}
    for kind, stats in one.stats.items():
        assert_equal(stats, separate[kind])
    assert one.top.equals(mt.top_samples(codes, ROWS, n=2, by="kind"))
    assert math.isnan(one.fvu)


def test_without_a_row_table_every_row_is_a_sample():
    one = mt.analyse(X[:50], encoder(), top=1)
    assert one.top["sample"].max() < 50
    assert one.top["position"].unique().to_list() == [0]
    assert mt.analyse(X[:50], encoder(), top=0).top is None


def test_a_dictionary_brings_its_own_decoder():
    class Dictionary:
        d_sae = D_SAE
        encode = staticmethod(lambda x: encoder()(x, progress=False))
        decode = staticmethod(lambda codes, x: codes.decode(W_DEC, B_DEC))

    found = mt.analyse(X, Dictionary(), top=0).fvu
    assert math.isclose(found, mt.fvu(X, encoder()(X), W_dec=W_DEC, b_dec=B_DEC), rel_tol=1e-6)


def stored_encoder():
    W_enc = np.random.default_rng(1).standard_normal((64, D_SAE), dtype=F32)
    return TopKEncoder(W_enc, None, k=K), np.ascontiguousarray(W_enc.T)


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_a_store_is_analysed_as_its_rows_in_memory(tmp_path, dtype):
    memory = stored.write(tmp_path / "run", dtype=dtype)
    acts = mt.ActivationStore(tmp_path / "run")[stored.HOOK]
    topk, W_dec = stored_encoder()
    parity = pl.col("position") % 2
    for chosen in (acts, acts.where(pl.col("position") > 3)):
        one = mt.analyse(chosen, topk, W_dec=W_dec, by=parity, top=2)
        rows = memory[chosen.row_numbers]
        codes = topk(rows)
        separate = mt.feature_stats(codes, by=parity, rows=chosen.rows.collect())
        assert set(one.stats) == {0, 1}
        assert_equal(one.stats[1], separate[1])
        assert one.top.equals(mt.top_samples(codes, chosen, n=2, by=parity))
        assert one.fvu == mt.fvu(chosen, codes, W_dec=W_dec) == mt.fvu(rows, codes, W_dec=W_dec)


def test_stored_codes_give_what_codes_in_memory_give(tmp_path, monkeypatch):
    stored.write(tmp_path / "run")
    store = mt.ActivationStore(tmp_path / "run")
    acts = store[stored.HOOK]
    topk, W_dec = stored_encoder()
    codes = topk(acts)
    with store.write_codes("topk", acts, k=K, d_sae=D_SAE, dictionary="d", step_rows=300) as out:
        out.append(codes)
    found = store.codes("topk")
    monkeypatch.setattr(features, "STORED_BLOCK_ROWS", 512)
    kind = pl.col("kind")
    assert_equal(mt.feature_stats(found), mt.feature_stats(codes))
    assert_equal(
        mt.feature_stats(found, by=kind, rows=acts)["image"],
        mt.feature_stats(codes, by=kind, rows=acts)["image"],
    )
    assert mt.top_samples(found, acts, n=3).equals(mt.top_samples(codes, acts, n=3))
    assert mt.fvu(acts, found, W_dec=W_dec) == mt.fvu(acts, codes, W_dec=W_dec)
    assert sample_fires(found, acts).fires.tolist() == sample_fires(codes, acts).fires.tolist()


@needs_procfs
@pytest.mark.parametrize("backend", ["mmap", "direct"])
def test_memory_does_not_grow_with_the_store(tmp_path, backend):
    steps, width = (20_000,) * 6, 256
    stored_rows = np.random.default_rng(0).standard_normal((steps[0], width), dtype=F32)
    with _core.StoreWriter(
        str(tmp_path / "run"), hooks=[(stored.HOOK, width, "tokens")], dtype="float32", facts="{}"
    ) as out:
        for _ in steps:
            out.append("tokens", stored.rows(steps[0]), {stored.HOOK: stored_rows})
            out.commit(stored.samples(0, 1))
    acts = mt.ActivationStore(tmp_path / "run", backend=backend)[stored.HOOK]
    W_enc = np.random.default_rng(1).standard_normal((width, 128), dtype=F32)
    topk, W_dec = TopKEncoder(W_enc, None, k=K), np.ascontiguousarray(W_enc.T)
    run = lambda x: mt.analyse(x, topk, W_dec=W_dec, by=pl.col("kind"), top=2)  # noqa: E731
    run(acts.take(slice(0, 10_000)))  # pools and buffers are there
    before, peak, over = anonymous_bytes(), [0], threading.Event()

    def watch():
        while not over.wait(0.002):
            peak[0] = max(peak[0], anonymous_bytes())

    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        found = run(acts)
    finally:
        over.set()
        watcher.join()
    assert found.n_rows == sum(steps)
    total = sum(steps) * width * 4
    # Labels take 16 bytes a row and polars as much again for a moment; the rows themselves are 1024 bytes each.
    assert peak[0] - before < total // 3, (peak[0] - before, total)


REFUSALS = {
    "no rows": (lambda: mt.analyse(X[:0], encoder()), ShapeError, "no rows selected"),
    "not an encoder": (lambda: mt.analyse(X, W_ENC), DtypeError, "encoder"),
    "codes of a whole batch": (
        lambda: mt.analyse(X, encoder(activation="batch_topk")),
        ShapeError,
        "batch_topk",
    ),
    "bias without decoder": (lambda: mt.analyse(X, encoder(), b_dec=B_DEC), ShapeError, "W_dec"),
    "decoder of another width": (lambda: mt.analyse(X, encoder(), W_dec=W_DEC[1:]), ShapeError, "W_dec"),
    "negative top": (lambda: mt.analyse(X, encoder(), top=-1), ShapeError, "top"),
    "labels too few": (lambda: mt.analyse(X, encoder(), by=[1, 2]), ShapeError, "by"),
    "row table too short": (lambda: mt.analyse(X, encoder(), rows=ROWS[:5]), ShapeError, "rows"),
    "NaN": (lambda: mt.analyse(np.full_like(X, np.nan), encoder()), NonFiniteError, "x"),
}


@pytest.mark.parametrize("case", REFUSALS)
def test_bad_input_is_refused_by_name(case):
    call, kind, message = REFUSALS[case]
    with pytest.raises(kind) as caught:
        call()
    assert message in str(caught.value)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_store_is_analysed_without_importing_torch(tmp_path: Path, dtype):
    stored.write(tmp_path / "run", dtype=dtype)
    script = f"""
import sys, numpy as np, microtome as mt
acts = mt.ActivationStore({str(tmp_path / "run")!r})[{stored.HOOK!r}]
eye = np.eye(64, dtype=np.float32)
print(mt.analyse(acts, mt.TopKEncoder(eye, None, k=4), W_dec=eye).fvu, "torch" in sys.modules)
"""
    run = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    fvu, imported = run.stdout.split()
    acts, eye = mt.ActivationStore(tmp_path / "run")[stored.HOOK], np.eye(64, dtype=F32)
    assert float(fvu) == mt.analyse(acts, TopKEncoder(eye, None, k=4), W_dec=eye).fvu
    assert imported == "False"


def test_a_row_that_is_refused_is_named_by_its_block():
    topk, _ = stored_encoder()
    x = np.zeros((5000, topk.d_in), np.float32)
    x[4500, 2] = np.nan
    with pytest.raises(NonFiniteError, match="row 404, column 2, counted from row 4096"):
        mt.analyse(x, topk)
