"""Qwen Scope: ``layer{n}.sae.pt`` with ``W_enc (d_sae, d_in)``, ``W_dec (d_in, d_sae)``, transposed here.

``k`` is in no file, only in the repository's name (``SAE-Res-Qwen3-1.7B-Base-W32K-L0_50``): it is taken from
the path or asked for.
"""

from __future__ import annotations

import re
from pathlib import Path

from microtome.dictionary.formats.files import Checkpoint, write_pickle
from microtome.dictionary.formats.plain import file_of_layer, plain, refuse_transcoder
from microtome.dictionary.parameters import Parameters
from microtome.dictionary.recipe import Recipe
from microtome.errors import CheckpointError

NAME = "qwen_scope"


def matches(checkpoint: Checkpoint) -> bool:
    """``W_enc`` with features first and ``W_dec`` with features last, in a torch file without a threshold."""
    if checkpoint.path.suffix not in (".pt", ".pth") or not checkpoint.has(
        "W_enc", "W_dec", "b_enc", "b_dec"
    ):
        return False
    d_sae, d_in = len(checkpoint.tensors["b_enc"]), len(checkpoint.tensors["b_dec"])
    shapes = tuple(checkpoint.tensors["W_enc"].shape), tuple(checkpoint.tensors["W_dec"].shape)
    return shapes == ((d_sae, d_in), (d_in, d_sae)) and d_sae != d_in and not checkpoint.has("threshold")


def read(checkpoint: Checkpoint, k: int | None) -> Parameters:
    """The Top-K dictionary."""
    k = _k_in(checkpoint.path) if k is None else k
    if k is None:
        raise CheckpointError(
            f"k: {checkpoint.path}: expected it in the path (…-L0_50/…) or as an argument, found neither. "
            "Pass k="
        )
    layer = re.search(r"layer(\d+)", checkpoint.path.name)
    return Parameters(
        checkpoint.tensor("W_enc").T,
        checkpoint.tensor("W_dec").T,
        checkpoint.tensor("b_enc"),
        checkpoint.tensor("b_dec"),
        recipe=Recipe(
            activation="topk",
            k=k,
            hook_name=f"blocks.{layer.group(1)}.hook_resid_post" if layer else None,
            source=NAME,
        ),
    )


def write(sae: Parameters, path: Path) -> Path:
    """A Top-K dictionary; ``k`` goes into the name of a folder, as in the source."""
    refuse_transcoder(sae, NAME)
    made = plain(sae, NAME, ("topk",), apply_b_dec_to_input=False)
    file = path / file_of_layer(made, NAME, "hook_resid_post", "layer{}.sae.pt")
    if _k_in(path) != made.k:
        raise CheckpointError(
            f"save_to_disk: qwen_scope keeps k in the path alone: expected the innermost L0_… of the path to be L0_{made.k}, "
            f"found {path}"
        )
    tensors = {"W_enc": made.W_enc.T, "W_dec": made.W_dec.T, "b_enc": made.b_enc, "b_dec": made.b_dec}
    return write_pickle(file, tensors)


def _k_in(path: Path) -> int | None:
    """The number behind the innermost ``L0_`` of a path: a folder of many may be named after a sweep."""
    told = re.findall(r"L0_(\d+)", path.resolve().as_posix())
    return int(told[-1]) if told else None
