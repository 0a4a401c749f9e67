"""Two hooks of a store of which other rows are skipped: no metric pairs row i of one with row i of the other."""

from __future__ import annotations

import warnings

import numpy as np
import pytest

import microtome as mt
from microtome import _core, errors, metrics
from stored import rows, samples

HOOKS = ["a", "b"]
WIDTH = 1024  # 256 rows per block


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    """Hooks of the same bytes, damaged at different places, skipped rows left out."""
    path = tmp_path_factory.mktemp("skipped") / "run"
    x = np.random.default_rng(0).standard_normal((1024, WIDTH), dtype=np.float32)
    hooks = [(name, WIDTH, "tokens") for name in HOOKS]
    with _core.StoreWriter(str(path), hooks=hooks, dtype="float32", facts="{}") as writer:
        writer.append("tokens", rows(1024), dict.fromkeys(HOOKS, x))
        writer.commit(samples(0, 52))
    for block, name in enumerate(HOOKS):
        shard = path / "000000" / f"{name}.safetensors"
        shard.chmod(0o644)
        damaged = bytearray(shard.read_bytes())
        damaged[4096 + (block << 20)] ^= 1
        shard.write_bytes(damaged)
    store = mt.ActivationStore(path, on_corrupt="skip")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        return [store[name] for name in HOOKS]


@pytest.mark.parametrize(
    ("metric", "name"),
    [
        (lambda x, y: mt.linear_cka(x, y, progress=False), "y"),
        (lambda x, y: mt.cka_matrix([x, y], progress=False), r"xs\[1\]"),
        (lambda x, y: mt.cka_matrix([x], [y], progress=False), r"ys\[0\]"),
        (lambda x, y: metrics.minibatch_cka([x], [y], batch=64, progress=False), r"ys\[0\]"),
        (lambda x, y: metrics.rbf_cka(x, y, sigma=1.0), "y"),
        (metrics.cka_interval, "y"),
        (lambda x, y: mt.fvu(x, y, progress=False), "x_hat"),
    ],
)
def test_hooks_that_skip_other_rows_are_not_paired(pair, metric, name):
    with pytest.raises(
        errors.ShapeError, match=rf"^{name}: expected the rows of .*256 rows of a and 256 of b"
    ):
        metric(*pair)


def test_the_rows_that_both_have_are_paired(pair):
    x, y = pair
    both = np.intersect1d(x.row_numbers, y.row_numbers)
    x, y = (acts.take(np.isin(acts.row_numbers, both)) for acts in pair)
    assert len(x) == 512
    assert mt.linear_cka(x, y, progress=False) == pytest.approx(1, abs=1e-9)
    assert mt.fvu(x, y, progress=False) == 0
    assert mt.linear_cka(pair[0], pair[0].take(slice(None)), progress=False) == pytest.approx(1, abs=1e-9)
