"""Changes of the weights that leave the function as it is: scales and norms folded, Top-K as a threshold."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
import torch
from torch import Tensor

from microtome.dictionary import forward
from microtome.dictionary.forward import Tensors
from microtome.dictionary.recipe import Recipe
from microtome.errors import CheckpointError, ShapeError

__all__ = ["bare_threshold", "fold_W_dec_norm", "fold_scale", "move_b_dec", "to_jumprelu"]


def fold_W_dec_norm(tensors: Tensors, recipe: Recipe) -> tuple[dict[str, Tensor], Recipe]:  # noqa: N802
    """Unit decoder rows: ``W_dec / r``, and encoder, biases and threshold times ``r = ‖W_dec,f‖``.

    A feature whose decoder row is zero keeps it, and gets a zero encoder: it wrote nothing before, and fires
    no more.
    """
    if recipe.activation in ("topk", "batch_topk") and not recipe.norm_aware and "threshold" not in tensors:
        raise CheckpointError(
            f"fold_W_dec_norm: expected a norm-aware Top-K, found {recipe.activation} that ranks by the bare "
            "pre-activation. Folding would change which features are kept"
        )
    norms = tensors["W_dec"].double().norm(dim=1)
    divisor = torch.where(norms > 0, norms, torch.ones_like(norms))
    folded = dict(tensors)
    folded["W_dec"] = (tensors["W_dec"].double() / divisor[:, None]).float()
    folded["W_enc"] = (tensors["W_enc"].double() * norms).float()
    # r_mag multiplies u W_enc, which has the norm already
    scaled = ["b_enc", "b_gate", "b_mag"] + ([] if recipe.norm_aware else ["threshold"])
    for name in scaled:
        if name in tensors:
            folded[name] = (tensors[name].double() * norms).float()
    return folded, recipe.replace(norm_aware=False, rescale_acts_by_decoder_norm=False)


def fold_scale(tensors: Tensors, recipe: Recipe) -> tuple[dict[str, Tensor], Recipe]:
    """Scales ``s`` (input) and ``o`` (output) in the weights: ``s W_enc, o W_dec, o b_dec, o s W_skip``.

    Codes stay as they are. Where ``b_dec`` is subtracted from the input and ``o s ≠ 1``, it moves into the
    encoder's bias. Norms grow by ``o``, and so does a threshold on norm-aware scores.
    """
    s, o = recipe.input_scale, recipe.output_scale
    if not recipe.scaled:
        return dict(tensors), recipe
    if recipe.rescale_acts_by_decoder_norm:
        tensors, recipe = fold_W_dec_norm(tensors, recipe)
    if recipe.apply_b_dec_to_input and abs(s * o - 1) > 1e-12:
        tensors, recipe = move_b_dec(tensors, recipe, False)
    folded = dict(tensors)
    for name, factor in (("W_enc", s), ("W_dec", o), ("b_dec", o), ("W_skip", o * s)):
        if name in tensors:
            folded[name] = (tensors[name].double() * factor).float()
    if recipe.norm_aware and "threshold" in tensors:
        folded["threshold"] = (tensors["threshold"].double() * o).float()
    return folded, recipe.replace(input_scale=1.0, output_scale=1.0)


def bare_threshold(tensors: Tensors, recipe: Recipe) -> tuple[dict[str, Tensor], Recipe]:
    """A threshold on ``pre · ‖W_dec,f‖`` as one on ``pre``: ``θ_f / ‖W_dec,f‖``. Codes unchanged.

    A feature whose decoder row is zero never fires, and gets the largest finite threshold.
    """
    if "threshold" not in tensors or not recipe.norm_aware or recipe.rescale_acts_by_decoder_norm:
        return dict(tensors), recipe
    norms = tensors["W_dec"].norm(dim=1)
    highest = torch.finfo(norms.dtype).max
    threshold = torch.where(norms > 0, tensors["threshold"] / norms, torch.full_like(norms, highest))
    return {**tensors, "threshold": threshold.clamp(max=highest)}, recipe.replace(norm_aware=False)


def move_b_dec(
    tensors: Tensors, recipe: Recipe, apply_b_dec_to_input: bool
) -> tuple[dict[str, Tensor], Recipe]:
    """The same function with ``b_dec`` subtracted from the input, or not: ``b_enc ± b_dec W_enc``."""
    if recipe.apply_b_dec_to_input == apply_b_dec_to_input:
        return dict(tensors), recipe
    shift = tensors["b_dec"].double() @ tensors["W_enc"].double()  # (d_sae,)
    shift = shift if apply_b_dec_to_input else -shift
    moved = dict(tensors)
    if recipe.activation == "gated":
        moved["b_gate"] = (tensors["b_gate"].double() + shift).float()
        moved["b_mag"] = (tensors["b_mag"].double() + shift * tensors["r_mag"].double().exp()).float()
    else:
        moved["b_enc"] = (tensors["b_enc"].double() + shift).float()
    return moved, recipe.replace(apply_b_dec_to_input=apply_b_dec_to_input)


def to_jumprelu(
    tensors: Tensors, recipe: Recipe, blocks: Iterable[Tensor], n: int
) -> tuple[dict[str, Tensor], Recipe]:
    """The threshold that ``k`` scores per calibration row pass, on average over the ``n`` rows of ``blocks``.

    Memory: the k·n largest scores and those of one block.
    """
    if recipe.activation not in ("topk", "batch_topk") or recipe.k is None:
        raise CheckpointError(
            f"to_jumprelu: expected a Top-K or BatchTopK dictionary with k, found {recipe.activation}"
        )
    if n == 0:
        raise ShapeError("x: expected calibration rows, found none")
    best = tensors["W_enc"].new_zeros(0)
    with torch.no_grad():
        for block in blocks:
            pre = forward.preactivations(block.to(tensors["W_enc"]), tensors, recipe)
            score = forward.scores(pre, tensors, recipe)
            pool = torch.cat([best, score[score > 0]])
            best = torch.topk(pool, min(recipe.k * n, len(pool)), sorted=True).values
    lowest = np.float32(best[-1].item()) if len(best) else np.float32(0)
    threshold = max(float(np.nextafter(lowest, np.float32(-1))), 0.0)
    calibrated = {**tensors, "threshold": torch.full_like(tensors["b_enc"], threshold)}
    return bare_threshold(calibrated, recipe.replace(activation="jumprelu", k=None))
