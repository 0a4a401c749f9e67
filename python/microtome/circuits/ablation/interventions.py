"""Causal tests: project a feature out of the residual stream, put means in the place of heads (spatial-features, B15, B16).

The interventions are context managers on the model itself, so they hold for every forward inside,
``generate()`` included.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from microtome.arguments import require_one_of
from microtome.circuits.ablation.replacements import mean_values
from microtome.circuits.forward.directions import finite_direction
from microtome.circuits.forward.restore import left_as_found
from microtome.circuits.pairs.pair_set import PairSet, as_pair_set
from microtome.errors import ShapeError

__all__ = ["Heads", "ablate_features", "ablate_heads", "head_means"]

Heads = Sequence[tuple[int, int]]
"""(layer, head) pairs."""
Positions = Literal["text", "image", "all"]


@contextmanager
def ablate_features(
    model: Any, directions: Mapping[int, Any], positions: Positions = "text"
) -> Iterator[None]:
    """Project directions out of the output of decoder layers: y ← y - Q Qᵀ y.

    Q is an orthonormal basis of a layer's directions, so for one unit direction v this is y - (yᵀv) v, and
    for several the order does not matter.

    Args:
        model: a transformers model. Its forward must be given ``input_ids``, which tell the positions.
        directions: layer -> ``(d,)`` or ``(k, d)``, for example rows of ``W_dec``.
        positions: ``"text"`` leaves image tokens unchanged; generated tokens are text.

    Raises:
        ShapeError: a layer that does not exist, another width, or a direction of length 0.
        NonFiniteError: a direction with NaN or infinity.

    Example:
        >>> import numpy as np
        >>> from microtome import organism
        >>> model = organism.load_model("base_lm")
        >>> with ablate_features(model, {2: np.ones(model.config.hidden_size, np.float32)}):
        ...     logits = model(torch.tensor([[1, 5, 6]])).logits
    """
    from microtome.capture.models import adapt

    require_one_of("positions", positions, get_args(Positions))
    adapter = adapt(model)
    bases = {layer: _basis(adapter, layer, vectors) for layer, vectors in directions.items()}
    where = _Where(adapter, positions)
    changes = {
        f"blocks.{i}.hook_resid_post": partial(_project_out, basis, where) for i, basis in bases.items()
    }
    with _changed(adapter, where, changes):
        yield


def _basis(adapter: Any, layer: int, vectors: Any) -> Tensor:
    """Orthonormal rows that span the directions, ``(rank, d)``."""
    if not 0 <= layer < adapter.n_layers:
        raise ShapeError(f"directions: expected layers 0 to {adapter.n_layers - 1}, found {layer}")
    rows = torch.atleast_2d(finite_direction(f"directions: layer {layer}", vectors))
    if rows.ndim != 2 or rows.shape[-1] != adapter.d_model:
        raise ShapeError(
            f"directions: layer {layer}: expected width {adapter.d_model}, found shape {tuple(rows.shape)}"
        )
    norms = rows.norm(dim=-1, keepdim=True)
    if bool((norms == 0).any()):
        raise ShapeError(
            f"directions: layer {layer}: expected directions of positive length, found a zero vector"
        )
    _, singular, basis = torch.linalg.svd(rows / norms, full_matrices=False)
    return basis[singular > 1e-6 * singular[0]]


class _Where:
    """Which positions of the present forward an intervention is for."""

    def __init__(self, adapter: Any, positions: str) -> None:
        self._adapter, self._positions = adapter, positions
        self._mask: Tensor | None = None

    def see(self, _module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Read the token ids of the forward that begins."""
        ids = kwargs.get("input_ids", args[0] if args else None)
        if self._positions == "all":
            self._mask = None
        elif ids is None:
            raise ShapeError(
                "input_ids: expected token ids, which tell image from text, found none. Use positions='all'"
            )
        else:
            image = self._adapter.row_kinds(ids) != 0
            self._mask = image if self._positions == "image" else ~image

    def put(self, x: Tensor, changed: Tensor) -> Tensor:
        """``changed`` at the wanted positions, ``x`` elsewhere."""
        if self._mask is None:
            return changed
        mask = self._mask.to(x.device)
        return torch.where(mask.reshape(*mask.shape, *[1] * (x.ndim - 2)), changed, x)


@contextmanager
def _changed(
    adapter: Any, where: _Where, changes: Mapping[str, Callable[[Tensor], Tensor]]
) -> Iterator[None]:
    """Hook name -> what becomes of the values there, in every forward inside."""
    points = adapter.hook_points()
    with ExitStack() as stack:
        stack.callback(adapter.model.register_forward_pre_hook(where.see, with_kwargs=True).remove)
        for name, change in changes.items():
            stack.callback(points[name].replace(change).remove)
        yield


def _project_out(basis: Tensor, where: _Where, x: Tensor) -> Tensor:
    q = basis.to(x.device, torch.float32)
    y = x.float()
    return where.put(x, (y - y @ q.T @ q).to(x.dtype))


@contextmanager
def ablate_heads(
    model: Any, heads: Heads, means: Mapping[int, Any], positions: Positions = "all"
) -> Iterator[None]:
    """Put a mean in the place of each head's output z (mean-patching).

    Args:
        model: a transformers model.
        heads: (layer, head) pairs.
        means: layer -> ``(H, d_head)``, see :func:`head_means`; or ``(P, H, d_head)``, a mean for each
            position of prompts of exactly that length.
        positions: where.

    Raises:
        ShapeError: a head that does not exist, a layer without a mean, a mean of another shape.
    """
    from microtome.capture.models import adapt

    require_one_of("positions", positions, get_args(Positions))
    adapter = adapt(model)
    of_layer: dict[int, list[int]] = {}
    for layer, head in heads:
        if not (0 <= layer < adapter.n_layers and 0 <= head < adapter.n_heads):
            raise ShapeError(
                f"heads: expected layers below {adapter.n_layers} and heads below {adapter.n_heads}, found {(layer, head)}"
            )
        if layer not in means:
            raise ShapeError(f"means: expected a mean of layer {layer}, found layers {sorted(means)}")
        of_layer.setdefault(layer, []).append(head)
    tensors = {layer: torch.as_tensor(means[layer]).detach() for layer in of_layer}
    for layer, mean in tensors.items():
        if mean.shape[-2:] != (adapter.n_heads, adapter.d_head):
            raise ShapeError(
                f"means: layer {layer}: expected (..., {adapter.n_heads}, {adapter.d_head}), found {tuple(mean.shape)}"
            )
    where = _Where(adapter, positions)
    changes = {
        f"blocks.{layer}.attn.hook_z": partial(_put_means, tensors[layer], chosen, where)
        for layer, chosen in of_layer.items()
    }
    with _changed(adapter, where, changes):
        yield


def _put_means(mean: Tensor, heads: list[int], where: _Where, z: Tensor) -> Tensor:
    """``z`` (b, p, H, d_head) with the heads' rows replaced."""
    if mean.ndim == 3 and mean.shape[0] != z.shape[1]:
        raise ShapeError(
            f"means: expected prompts of {mean.shape[0]} tokens, found {z.shape[1]}. Use means over positions"
        )
    changed = z.clone()
    changed[:, :, heads] = mean.to(z.device, z.dtype)[..., heads, :].expand(
        *z.shape[:2], len(heads), z.shape[-1]
    )
    return where.put(z, changed)


def head_means(
    model: Any, pairs: PairSet, *, positional: bool = False, batch_size: int = 16
) -> dict[int, Tensor]:
    """Mean output z of every head over a calibration set's clean prompts.

    Returns:
        layer -> ``(H, d_head)``, or ``(P, H, d_head)`` when ``positional``.
    """
    from microtome.capture.models import adapt

    adapter = adapt(model)
    with left_as_found(model), torch.no_grad():
        values = mean_values(adapter, as_pair_set(pairs), positional, batch_size)
    return {layer: mean for (kind, layer), mean in values.items() if kind == "heads"}
