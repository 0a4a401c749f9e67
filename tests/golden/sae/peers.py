"""The peers' own classes at work on a dictionary: load it, encode with it, save it again.

    python tests/golden/sae/peers.py FORMAT FOLDER [FOLDER ...]

Every folder holds a dictionary in the peer's format under ``ours`` and rows in ``x.npy``. The peer's codes and
reconstruction go to ``peer.npz``, and the dictionary as the peer saves it goes to ``theirs``. A process of its own, because
what the peers import for other purposes (model loading, logging, databases) is replaced by stand-ins where it is missing.
"""

from __future__ import annotations

import importlib.abc
import importlib.machinery
import importlib.util
import json
import os
import sys
import types
from pathlib import Path
from typing import Any

import numpy as np
import torch

MODULES = {
    "saelens": "sae_lens",
    "sparsify": "sparsify",
    "dictionary_learning": "dictionary_learning",
    "llamascopium": "llamascopium",
    "circuit_tracer": "circuit_tracer",
}
"""Format to the module of its library."""

UNUSED = (
    *(
        "transformer_lens",
        "datasets",
        "wandb",
        "pandas",
        "requests",
        "nnsight",
        "zstandard",
        "natsort",
        "schedulefree",
    ),
    *("json_repair", "gridfs", "pymongo", "bson", "pydantic_settings"),
)
"""What the libraries import without needing it for any code."""


class _Hooked(torch.nn.Module):
    """What a hooked root module does when nobody hooks it."""

    def setup(self) -> None:
        """Nothing to name."""


KNOWN = {"HookedRootModule": _Hooked, "HookPoint": torch.nn.Identity}


class _StandIn(types.ModuleType):
    """A module in which every name but the known ones is an empty class."""

    __path__: list[str] = []

    def __getattr__(self, name: str) -> type:
        if name.startswith("__"):
            raise AttributeError(name)
        setattr(self, name, KNOWN.get(name) or type(name, (), {}))
        return getattr(self, name)


class _StandIns(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Finds stand-ins for what no other finder found."""

    def find_spec(self, name: str, *_: Any) -> importlib.machinery.ModuleSpec | None:
        known = name.split(".")[0] in UNUSED
        return importlib.machinery.ModuleSpec(name, self, is_package=True) if known else None

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> types.ModuleType:
        return _StandIn(spec.name)

    def exec_module(self, module: types.ModuleType) -> None:
        """Nothing to run."""


def install_stand_ins() -> None:
    """Let the libraries import without the packages in :data:`UNUSED`."""
    sys.meta_path.append(_StandIns())


class SAELens:
    """sae-lens: ``SAE.load_from_disk``, ``encode``, ``forward``, ``save_model``."""

    def load(self, folder: Path) -> Any:
        from sae_lens import SAE

        return SAE.load_from_disk(folder)

    def codes(self, loaded: Any, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return loaded.encode(x), loaded(x)

    def save(self, loaded: Any, folder: Path) -> None:
        loaded.save_model(folder)


class Sparsify:
    """eai-sparsify: ``SparseCoder.load_from_disk``, ``encode``, ``forward``, ``save_to_disk``."""

    def load(self, folder: Path) -> Any:
        from sparsify import SparseCoder

        return SparseCoder.load_from_disk(folder)

    def codes(self, loaded: Any, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        top = loaded.encode(x)
        dense = torch.zeros(len(x), loaded.num_latents).scatter_(1, top.top_indices, top.top_acts)
        return dense, loaded(x).sae_out

    def save(self, loaded: Any, folder: Path) -> None:
        loaded.save_to_disk(folder)


class DictionaryLearning:
    """dictionary-learning: ``load_dictionary``, ``encode``, ``forward``; saved as its trainers save."""

    def load(self, folder: Path) -> Any:
        from dictionary_learning.utils import load_dictionary

        loaded, self.config = load_dictionary(str(folder), "cpu")
        return loaded

    def codes(self, loaded: Any, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return loaded.encode(x), loaded(x)

    def save(self, loaded: Any, folder: Path) -> None:
        folder.mkdir()
        torch.save(loaded.state_dict(), folder / "ae.pt")
        (folder / "config.json").write_text(json.dumps(self.config))


class Llamascopium:
    """llamascopium: ``from_pretrained``, ``encode`` and ``decode`` between its scales, ``save_pretrained``."""

    def load(self, folder: Path) -> Any:
        from llamascopium.models.sae import SparseAutoEncoder

        return SparseAutoEncoder.from_pretrained(str(folder), device="cpu")

    def codes(self, loaded: Any, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        hook, root = loaded.cfg.hook_point_in, loaded.cfg.d_model**0.5
        scale = root / x.norm(dim=1, keepdim=True)
        if loaded.cfg.norm_activation == "dataset-wise":
            scale = root / loaded.dataset_average_activation_norm[hook]
        codes = loaded.encode(x * scale)
        return codes, loaded.decode(codes) / scale

    def save(self, loaded: Any, folder: Path) -> None:
        loaded.save_pretrained(folder)
        loaded.cfg.save_hyperparameters(folder)


class CircuitTracer:
    """circuit-tracer: ``load_relu_transcoder``, ``encode``, ``forward``, ``to_safetensors``."""

    def load(self, folder: Path) -> Any:
        from circuit_tracer.transcoder.single_layer_transcoder import load_relu_transcoder

        (file,) = folder.glob("layer_*.safetensors")
        self.name = file.name
        return load_relu_transcoder(str(file), 3, torch.device("cpu"), lazy_encoder=False, lazy_decoder=False)

    def codes(self, loaded: Any, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return loaded.encode(x), loaded(x)

    def save(self, loaded: Any, folder: Path) -> None:
        folder.mkdir()
        loaded.to_safetensors(str(folder / self.name))


PEERS = {
    "saelens": SAELens,
    "sparsify": Sparsify,
    "dictionary_learning": DictionaryLearning,
    "llamascopium": Llamascopium,
    "circuit_tracer": CircuitTracer,
}


def main(form: str, folders: list[str]) -> None:
    """Load, encode and save every dictionary."""
    install_stand_ins()
    os.environ["SPARSIFY_DISABLE_TRITON"] = "1"  # its decoder would look for a GPU
    torch.set_num_threads(1)
    for folder in map(Path, folders):
        peer, x = PEERS[form](), torch.from_numpy(np.load(folder / "x.npy"))
        loaded = peer.load(folder / "ours")
        with torch.no_grad():
            codes, x_hat = peer.codes(loaded, x)
        np.savez(folder / "peer.npz", codes=codes.numpy(), x_hat=x_hat.numpy())
        peer.save(loaded, folder / "theirs")


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2:])
