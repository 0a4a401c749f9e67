"""A dictionary that leaves in a peer's format is the same dictionary to the peer, and comes back as it went.

Slow: needs the peers' wheels (``pip install --no-deps sae-lens eai-sparsify dictionary-learning circuit-tracer llamascopium``
and the small packages they import); each runs in a process of its own.
"""

from __future__ import annotations

import functools
import importlib.util
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
import pytest

torch = pytest.importorskip("torch")

import microtome as mt  # noqa: E402
from microtome.errors import CheckpointError  # noqa: E402
from test_sae import RECIPES, dictionary, rows  # noqa: E402

PROGRAM = Path(__file__).resolve().parents[1] / "golden" / "sae" / "peers.py"
MODULES = {
    "saelens": "sae_lens",
    "sparsify": "sparsify",
    "dictionary_learning": "dictionary_learning",
    "llamascopium": "llamascopium",
    "circuit_tracer": "circuit_tracer",
}
PAIRS = [(form, name) for form in MODULES for name in RECIPES]

pytestmark = pytest.mark.slow


@functools.cache
def exchanged(form: str) -> dict[str, Path | str]:
    """Recipe to its folder, after the peer has loaded, used and saved every dictionary that its format holds; or the error."""
    root, folders = Path(tempfile.mkdtemp()), {}
    for number, (name, recipe) in enumerate(RECIPES.items()):
        folder = root / str(number)
        try:
            dictionary(**recipe, hook_name="blocks.3.hook_resid_post").save_to_disk(folder / "ours", form)
        except CheckpointError:  # refused, as test_sae_formats shows
            continue
        np.save(folder / "x.npy", rows().numpy())
        folders[name] = folder
    done = subprocess.run(
        [sys.executable, PROGRAM, form, *map(str, folders.values())],
        capture_output=True,
        text=True,
        check=False,
    )
    return folders if done.returncode == 0 else dict.fromkeys(folders, done.stderr[-2000:])


@pytest.mark.parametrize(("form", "recipe"), PAIRS, ids=[f"{form}/{recipe}" for form, recipe in PAIRS])
def test_peer_gives_the_same_codes_and_its_own_file_comes_back(form, recipe):
    if importlib.util.find_spec(MODULES[form]) is None:
        pytest.skip(f"needs the package of {MODULES[form]}")
    if recipe not in exchanged(form):
        pytest.skip(f"{form} has no place for {recipe}")
    folder, x = exchanged(form)[recipe], rows()
    assert isinstance(folder, Path), folder
    peer = np.load(folder / "peer.npz")
    assert 0 < (peer["codes"] > 0).mean() < 1
    for where in ("ours", "theirs"):  # the file as we wrote it, and as the peer wrote what it had read of it
        sae = mt.SAE.load_from_disk(folder / where)
        assert sae.recipe.source == form
        # load_dictionary brings an AutoEncoder's decoder to unit rows, and its codes with it
        unit = form == "dictionary_learning" and recipe == "relu"
        norms = sae.W_dec.norm(dim=1).numpy() if unit else 1
        for codes in (sae.encode_torch(x).numpy() * norms, np.asarray(sae.encode(x).to_dense()) * norms):
            assert np.array_equal(codes > 0, peer["codes"] > 0)
            np.testing.assert_allclose(codes, peer["codes"], rtol=1e-4, atol=1e-5)
        np.testing.assert_allclose(sae.reconstruct(x).numpy(), peer["x_hat"], rtol=1e-4, atol=1e-4)
    written = dictionary(**RECIPES[recipe])
    np.testing.assert_allclose(written.reconstruct(x).numpy(), peer["x_hat"], rtol=1e-3, atol=1e-3)
