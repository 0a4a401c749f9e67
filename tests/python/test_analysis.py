"""One pass over activations gives what separate passes give, bit for bit."""

from __future__ import annotations

import math

import numpy as np
import polars as pl
import pytest

import microtome as mt
from microtome.errors import DtypeError, NonFiniteError, ShapeError
from microtome.metrics import TopKEncoder

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


def test_a_store_is_analysed_as_its_rows_in_memory(tmp_path):
    torch = pytest.importorskip("torch")
    store = pytest.importorskip("microtome.store")
    if not hasattr(mt, "capture") or not hasattr(store, "ActivationStore"):
        pytest.skip("needs capture")
    transformers = pytest.importorskip("transformers")
    config = transformers.LlamaConfig(
        vocab_size=50,
        hidden_size=D,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=2,
    )
    model = transformers.LlamaForCausalLM(config)
    path = tmp_path / "run"
    with mt.capture(
        model, path, hooks=["blocks.0.hook_resid_post"], dtype="bfloat16", step_rows=40
    ) as recorder:
        for i in range(5):
            recorder.samples(ids=[i], half=["a" if i < 2 else "b"])
            with torch.no_grad():
                model(input_ids=torch.randint(0, 50, (1, 20 + i)))
    acts = mt.ActivationStore(path)["blocks.0.hook_resid_post"]
    for chosen in (acts, acts.where(pl.col("position") > 3)):
        one = mt.analyse(chosen, encoder(), W_dec=W_DEC, by=pl.col("position") % 2, top=2)
        memory = torch.as_tensor(chosen[:]).clone()
        table = chosen.rows.collect()
        codes = encoder()(memory)
        separate = mt.feature_stats(codes, by=pl.col("position") % 2, rows=table)
        assert_equal(one.stats[1], separate[1])
        assert one.top.equals(mt.top_samples(codes, chosen, n=2, by=pl.col("position") % 2))
        assert one.fvu == mt.fvu(chosen, codes, W_dec=W_DEC) == mt.fvu(memory, codes, W_dec=W_DEC)


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
