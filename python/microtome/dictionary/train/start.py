"""Where a run begins: fresh weights from the data, or a base dictionary whose features keep their index."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from microtome.dictionary import folds
from microtome.dictionary.recipe import Recipe
from microtome.dictionary.train.config import TrainConfig
from microtome.dictionary.train.data import RowSource
from microtome.errors import CheckpointError, ShapeError

if TYPE_CHECKING:
    from microtome.dictionary.sae import SAE

__all__ = ["Start", "geometric_median", "start"]

_SAMPLE_ROWS = 32_768
_UNIT = 1e-3


class Start(NamedTuple):
    """First weights and what was measured on the first rows."""

    weights: dict[str, Tensor]
    """``encoder (d_sae, d)`` = ``W_encᵀ``, ``W_dec``, biases, ``log_threshold``."""
    recipe: Recipe
    """The recipe of the dictionary that will come out."""
    variance: float
    """Variance of the scaled rows, the sum over dimensions."""
    largest_norm: float
    """Rows with a larger norm (of the scaled row) stay out of the loss."""


def start(
    source: RowSource,
    rows: np.ndarray,
    config: TrainConfig,
    base: SAE | None,
    origin: dict[str, Any],
    parts: int = 1,
) -> Start:
    """Measure the data on up to 32,768 training rows and make the first weights.

    Raises:
        ShapeError: a base dictionary of another width.
        CheckpointError: a base dictionary whose recipe cannot be trained on as it is.
    """
    rng = np.random.default_rng([config.seed, 1 << 32])
    chosen = np.sort(rng.choice(rows, min(_SAMPLE_ROWS, len(rows)), replace=False))
    sample = source.read(chosen)  # (m, d)
    norms = sample.double().norm(dim=1)
    limit = float(norms.median()) * config.max_norm_multiple if config.max_norm_multiple else math.inf
    sample, norms = sample[norms <= limit], norms[norms <= limit]
    if not len(norms):
        raise ShapeError(
            f"max_norm_multiple: expected rows within it, found none of norm {config.max_norm_multiple} medians or less"
        )
    if float(norms.max()) == 0:
        raise ShapeError("acts: expected rows that differ from zero, found zeros alone")
    weights, recipe = (
        _fresh(sample, float(norms.mean()), config, origin, parts)
        if base is None
        else _warm(base, source.d, config, origin)
    )
    scaled = sample.double() * recipe.input_scale
    variance = float((scaled - scaled.mean(0)).square().sum(1).mean()) or 1.0
    if recipe.activation == "jumprelu" and "log_threshold" not in weights:
        weights["log_threshold"] = _first_threshold(weights, scaled.float(), recipe, config.k)
    return Start(weights, recipe, variance, limit * recipe.input_scale)


def _fresh(
    sample: Tensor, mean_norm: float, config: TrainConfig, origin: dict[str, Any], parts: int
) -> tuple[dict[str, Tensor], Recipe]:
    d = sample.shape[1]
    d_sae = config.features(d)
    scale = math.sqrt(d) / mean_norm if config.normalize else 1.0
    generator = torch.Generator().manual_seed(config.seed)
    W_dec = torch.nn.functional.normalize(torch.randn(d_sae, d, generator=generator), dim=1)
    center = geometric_median(sample * scale) if config.b_dec_init == "geometric_median" else torch.zeros(d)
    recipe = Recipe(
        activation=config.activation,
        k=config.k if config.activation in ("topk", "batch_topk") else None,
        apply_b_dec_to_input=parts == 1,
        norm_aware=parts > 1,
        input_scale=scale,
        output_scale=1 / scale,
        **origin,
    )
    weights = {"encoder": W_dec.clone(), "W_dec": W_dec, "b_dec": center}
    names = ("b_gate", "b_mag", "r_mag") if config.activation == "gated" else ("b_enc",)
    return weights | {name: torch.zeros(d_sae) for name in names}, recipe


def _warm(base: SAE, d: int, config: TrainConfig, origin: dict[str, Any]) -> tuple[dict[str, Tensor], Recipe]:
    """The base's weights with the architecture of the run; row ``f`` of either matrix stays feature ``f``."""
    if (base.d_in, base.d_out) != (d, d):
        raise ShapeError(
            f"base: expected a dictionary of width {d} as the rows, found d_in={base.d_in}, "
            f"d_out={base.d_out}"
        )
    if config.d_sae not in (None, base.d_sae):
        raise ShapeError(f"d_sae: expected {base.d_sae} as in the base dictionary, found {config.d_sae}")
    if "W_skip" in base.tensors or base.recipe.hook_name_out not in (None, base.recipe.hook_name):
        raise CheckpointError(
            f"base: expected an autoencoder, found a transcoder to {base.recipe.hook_name_out or 'its rows'}"
            f"{' with W_skip' if 'W_skip' in base.tensors else ''}"
        )
    if base.recipe.normalize != "none" or (config.activation == "gated") != (
        base.recipe.activation == "gated"
    ):
        raise CheckpointError(
            f"base: expected a dictionary that becomes {config.activation} by its threshold alone, "
            f"found {base.recipe.activation} with normalize={base.recipe.normalize!r}"
        )
    tensors, recipe = _trainable(base, config)
    weights = {
        name: t.detach().cpu().clone() for name, t in tensors.items() if name not in ("W_enc", "threshold")
    }
    weights["encoder"] = tensors["W_enc"].detach().cpu().T.contiguous().clone()
    if config.activation == "jumprelu" and "threshold" in tensors:
        weights["log_threshold"] = tensors["threshold"].cpu().clamp(min=1e-6).log()
    k = config.k if config.activation in ("topk", "batch_topk") else None
    known = {name: value for name, value in origin.items() if value is not None}
    return weights, recipe.replace(activation=config.activation, k=k, source="microtome", **known)


def _trainable(base: SAE, config: TrainConfig) -> tuple[dict[str, Tensor], Recipe]:
    """Scales that are each other's inverse, and unit decoder rows where the run keeps them so."""
    tensors, recipe = dict(base.tensors), base.recipe
    if abs(recipe.input_scale * recipe.output_scale - 1) > 1e-6:
        tensors, recipe = folds.fold_scale(tensors, recipe)
    if config.activation == "jumprelu":
        tensors, recipe = folds.bare_threshold(tensors, recipe)
    unit = bool((tensors["W_dec"].norm(dim=1) - 1).abs().max() < _UNIT)
    if recipe.rescale_acts_by_decoder_norm or (config.decoder_norm == "unit" and not unit):
        ranks = recipe.activation in ("topk", "batch_topk") and not recipe.norm_aware
        if ranks:
            raise CheckpointError(
                "base: expected unit decoder rows or a norm-aware Top-K, found neither. "
                'Train with decoder_norm="free"'
            )
        tensors, recipe = folds.fold_W_dec_norm(tensors, recipe)
    if config.activation == "jumprelu" and "threshold" not in tensors:
        recipe = recipe.replace(norm_aware=False)  # the threshold that is learnt is one on pre-activations
    return tensors, recipe


def _first_threshold(weights: dict[str, Tensor], x: Tensor, recipe: Recipe, k: int) -> Tensor:
    """The threshold that lets k features per row pass at the start, as a logarithm per feature."""
    u = x - weights["b_dec"] if recipe.apply_b_dec_to_input else x
    m = min(len(u), max(1, (1 << 24) // len(weights["encoder"])))
    pre = u[:m] @ weights["encoder"].T + weights["b_enc"]
    least = torch.topk(pre.flatten(), min(k * m, pre.numel()), sorted=True).values[-1].clamp(min=1e-3)
    return least.log().expand(len(weights["encoder"])).clone()


def geometric_median(x: Tensor, iterations: int = 50, tolerance: float = 1e-4) -> Tensor:
    """The point with the least sum of distances to the rows of ``x (n, d)``, by Weiszfeld's iteration.

    Example:
        >>> geometric_median(torch.tensor([[0.0], [0.0], [9.0]])).round(decimals=2)
        tensor([0.])
    """
    rows, median = x.float(), x.double().mean(0)
    for _ in range(iterations):
        distance = torch.linalg.vector_norm(rows - median.float(), dim=1)
        weight = 1 / distance.double().clamp(min=1e-10)
        following = (weight.float() @ rows).double() / weight.sum()
        moved = float((following - median).norm())
        median = following
        if moved <= tolerance * (1 + float(median.norm())):
            break
    return median.float()
