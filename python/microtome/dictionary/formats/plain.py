"""A dictionary brought to what most formats can say: no scale, no norm-aware ranking."""

from __future__ import annotations

import re
from collections.abc import Collection

from microtome.dictionary import folds
from microtome.dictionary.parameters import Parameters
from microtome.errors import CheckpointError

__all__ = ["file_of_layer", "layer_of", "plain", "refuse_transcoder"]


def plain(
    sae: Parameters,
    form: str,
    activations: Collection[str],
    *,
    apply_b_dec_to_input: bool,
    keep_normalize: bool = False,
) -> Parameters:
    """``sae`` with scales and norms folded in; reconstructions are unchanged.

    A norm-aware Top-K gets unit decoder rows, so its codes are then times the old norms. All else keeps its
    codes.

    Raises:
        CheckpointError: ``form`` has no place for the activation or for a normalisation of every row.
    """
    if sae.recipe.activation not in activations:
        raise CheckpointError(
            f"save_to_disk: {form} holds {', '.join(activations)} dictionaries, found {sae.recipe.activation}"
        )
    if sae.recipe.normalize != "none" and not keep_normalize:
        raise CheckpointError(f"save_to_disk: {form} has no place for normalize={sae.recipe.normalize!r}")
    recipe = sae.recipe
    if recipe.activation == "relu" and not recipe.rescale_acts_by_decoder_norm:
        recipe = recipe.replace(norm_aware=False)  # a positive norm changes no sign
    made = sae.with_tensors(*folds.bare_threshold(sae.tensors, recipe)).fold_scale()
    if made.recipe.norm_aware:
        made = made.fold_W_dec_norm()
    if made.d_in != made.d_out and not made.recipe.apply_b_dec_to_input:
        return made
    return made.with_tensors(*folds.move_b_dec(made.tensors, made.recipe, apply_b_dec_to_input))


def refuse_transcoder(sae: Parameters, form: str, skip: bool = False) -> None:
    """Raise for a format that holds autoencoders alone."""
    if sae.d_in != sae.d_out:
        raise CheckpointError(
            f"save_to_disk: {form} holds d_out = d_in, found d_in={sae.d_in} and d_out={sae.d_out}"
        )
    if "W_skip" in sae.tensors and not skip:
        raise CheckpointError(f"save_to_disk: {form} has no place for W_skip")


def file_of_layer(sae: Parameters, form: str, place: str, name: str) -> str:
    """``name`` with the layer of ``blocks.{i}.{place}`` in its braces; without a layer where no hook is known.

    Raises:
        CheckpointError: another hook, which the file could not say.
    """
    hook = sae.recipe.hook_name
    if hook is not None and re.fullmatch(rf"blocks\.\d+\.{place}", hook) is None:
        raise CheckpointError(
            f"save_to_disk: {form} holds dictionaries of blocks.{{i}}.{place}, found {hook}. Another format keeps the "
            "hook; or leave it out: sae.with_tensors(sae.tensors, sae.recipe.replace(hook_name=None))"
        )
    return name.format("" if hook is None else layer_of(sae))


def layer_of(sae: Parameters) -> int:
    """The layer in ``blocks.{i}.…``, 0 when the hook name has none."""
    parts = (sae.recipe.hook_name or "").split(".")
    return next((int(part) for part in parts if part.isdigit()), 0)
