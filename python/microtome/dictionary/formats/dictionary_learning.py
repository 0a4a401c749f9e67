"""dictionary_learning (saprmarks): ``ae.pt`` beside ``config.json`` with ``trainer.dict_class``.

The class is in the configuration alone: Top-K and BatchTopK files have the same keys. ``b_dec`` is called
``bias``, ``b_dec``, ``decoder.bias`` or ``decoder_bias``. A backup keeps the state under ``ae`` with a
``norm_factor`` that its biases do not have yet. A threshold below zero was never set.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from microtome.dictionary.formats.files import Checkpoint, write_json, write_pickle
from microtome.dictionary.formats.plain import layer_of, plain, refuse_transcoder
from microtome.dictionary.parameters import Parameters
from microtome.dictionary.recipe import Activation, Recipe
from microtome.errors import CheckpointError

NAME = "dictionary_learning"

_CLASSES: dict[str, tuple[Activation, bool]] = {  # activation, and whether b_dec is subtracted from the input
    "AutoEncoder": ("relu", True),
    "AutoEncoderNew": ("relu", False),
    "GatedAutoEncoder": ("gated", True),
    "JumpReluAutoEncoder": ("jumprelu", False),
    "AutoEncoderTopK": ("topk", True),
    "BatchTopKSAE": ("batch_topk", True),
    "MatryoshkaBatchTopKSAE": ("batch_topk", True),
}


def matches(checkpoint: Checkpoint) -> bool:
    """A configuration with ``trainer.dict_class``."""
    cfg = checkpoint.config("trainer")
    return cfg is not None and isinstance(cfg["trainer"], dict) and "dict_class" in cfg["trainer"]


def read(checkpoint: Checkpoint, k: int | None) -> Parameters:
    """The dictionary, with a backup's norm factor as its scale."""
    trainer = (checkpoint.config("trainer") or {}).get("trainer", {})
    name = trainer.get("dict_class")
    if name not in _CLASSES:
        raise CheckpointError(
            f"dict_class: {checkpoint.path}: expected one of {', '.join(_CLASSES)}, found {name!r}"
        )
    activation, apply_b_dec = _CLASSES[name]
    state = _State(checkpoint)
    norm = state.norm_factor
    recipe = Recipe(
        activation=activation,
        k=k or trainer.get("k"),
        apply_b_dec_to_input=apply_b_dec,
        input_scale=1 / norm,
        output_scale=norm,
        hook_name=_hook(trainer),
        model_name=trainer.get("lm_name"),
        source=NAME,
        metadata={"dict_class": name, "submodule_name": trainer.get("submodule_name")},
    )
    if activation not in ("topk", "batch_topk"):
        recipe = recipe.replace(k=None)
    return Parameters(*state.matrices(), recipe=recipe, tensors=state.vectors(activation))


class _State:
    """The state dictionary of any of the classes, in our names."""

    def __init__(self, checkpoint: Checkpoint) -> None:
        content = checkpoint.contents[0]
        wrapped = isinstance(content.get("ae"), dict)
        self.state: dict[str, Any] = content["ae"] if wrapped else content
        self.norm_factor = float(content.get("norm_factor") or 1.0) if wrapped else 1.0
        self.path = checkpoint.path

    def tensor(self, *names: str) -> torch.Tensor:
        for name in names:
            if isinstance(self.state.get(name), torch.Tensor):
                return self.state[name]
        raise CheckpointError(
            f"missing tensor: {self.path}: expected {' or '.join(names)}, found "
            f"{', '.join(sorted(self.state))}"
        )

    def matrices(self) -> tuple[torch.Tensor, torch.Tensor]:
        if "W_enc" in self.state:
            return self.tensor("W_enc"), self.tensor("W_dec")
        return self.tensor("encoder.weight").T, self.tensor("decoder.weight").T

    def vectors(self, activation: Activation) -> dict[str, torch.Tensor]:
        found = {"b_dec": self.tensor("b_dec", "decoder_bias", "decoder.bias", "bias")}
        if activation == "gated":
            names = {"b_gate": "gate_bias", "b_mag": "mag_bias", "r_mag": "r_mag"}
            return found | {ours: self.tensor(theirs) for ours, theirs in names.items()}
        found["b_enc"] = self.tensor("b_enc", "encoder.bias")
        if activation == "jumprelu" or (activation == "batch_topk" and float(self.tensor("threshold")) >= 0):
            found["threshold"] = self.tensor("threshold")
        return found


def _hook(trainer: dict[str, Any]) -> str | None:
    if trainer.get("hook_name"):
        return str(trainer["hook_name"])
    layer, place = trainer.get("layer"), str(trainer.get("submodule_name"))
    if layer is None or not place.startswith("resid_post"):
        return None  # a layer has other places, whose names are the trainer's own
    return f"blocks.{layer}.hook_resid_post"


def write(sae: Parameters, path: Path) -> Path:
    """As the class that has this activation; a BatchTopK threshold must be one number."""
    refuse_transcoder(sae, NAME)
    names = {activation: name for name, (activation, _) in reversed(_CLASSES.items())}
    activation = sae.recipe.activation
    made = plain(sae, NAME, tuple(names), apply_b_dec_to_input=_CLASSES[names[activation]][1])
    trainer = {
        "dict_class": names[activation],
        "activation_dim": made.d_in,
        "dict_size": made.d_sae,
        "k": made.k,
        "layer": layer_of(made) if made.recipe.hook_name else None,
        "lm_name": made.recipe.model_name,
        "submodule_name": made.recipe.metadata.get("submodule_name"),
        "hook_name": made.recipe.hook_name,
    }
    state = _state(made)  # refuses before anything is written
    write_json(path / "config.json", {"trainer": trainer, "buffer": {}})
    return write_pickle(path / "ae.pt", state)


def _state(sae: Parameters) -> dict[str, torch.Tensor]:
    tensors, activation = sae.tensors, sae.recipe.activation
    if activation == "jumprelu":
        return dict(tensors)
    state = {"encoder.weight": sae.W_enc.T, "decoder.weight": sae.W_dec.T}
    if activation == "gated":
        names = {"decoder_bias": "b_dec", "r_mag": "r_mag", "gate_bias": "b_gate", "mag_bias": "b_mag"}
        return state | {theirs: tensors[ours] for theirs, ours in names.items()}
    state["encoder.bias"] = sae.b_enc
    if activation == "relu":
        return state | {"bias": sae.b_dec}
    threshold = torch.tensor(-1.0) if sae.threshold is None else sae.threshold[0]
    if sae.threshold is not None and not bool((sae.threshold == threshold).all()):
        raise CheckpointError(
            "save_to_disk: dictionary_learning holds one threshold for all features, found one per feature"
        )
    return state | {"b_dec": sae.b_dec, "k": torch.tensor(sae.k, dtype=torch.int), "threshold": threshold}
