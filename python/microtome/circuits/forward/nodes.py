"""The nodes of a run: listened to, overwritten, kept.

Nodes are the inputs of the attention output projection (``hook_z``, heads) and of the MLP's down projection
(``mlp.hook_post``, neurons).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor

from microtome.circuits.circuit.nodes import NodeKind
from microtome.circuits.forward.decoder import Merged, decode
from microtome.errors import ShapeError

__all__ = ["NodeValues", "node_values", "on_nodes", "on_residuals", "partnered"]

NodeValues = dict[tuple[NodeKind, int], Tensor]
"""``(kind, layer)`` -> values of all nodes there."""

Visit = Callable[[NodeKind, int, Tensor], Tensor | None]
HOOKS: dict[NodeKind, str] = {"heads": "blocks.{}.attn.hook_z", "neurons": "blocks.{}.mlp.hook_post"}


@contextmanager
def on_nodes(adapter: Any, visit: Visit, layers: Sequence[int] | None = None) -> Iterator[None]:
    """Call ``visit(kind, layer, values)`` at every node site; what it returns replaces the values.

    ``values`` is ``(b, p, n_heads, d_head)`` for heads and ``(b, p, d_mlp)`` for neurons.

    Raises:
        ShapeError: the model has no such site.
    """
    points = adapter.hook_points()
    with ExitStack() as stack:
        for layer in range(adapter.n_layers) if layers is None else layers:
            for kind, name in HOOKS.items():
                handle = _site(adapter, points, name.format(layer)).replace(partial(visit, kind, layer))
                stack.callback(handle.remove)
        yield


def _site(adapter: Any, points: dict[str, Any], name: str) -> Any:
    if name not in points:
        raise ShapeError(
            f"nodes: {type(adapter.model).__name__}: expected one output projection in the attention and one down "
            f"projection in the MLP of every layer, found no {name}. The neurons of experts are no nodes"
        )
    return points[name]


@contextmanager
def on_residuals(
    adapter: Any,
    visit: Callable[[int, Tensor], Tensor | None],
    layers: Sequence[int] | None = None,
    *,
    with_deepstack: bool = False,
) -> Iterator[None]:
    """Call ``visit(layer, resid_post)`` on the output of every decoder layer; what it returns replaces the output.

    ``resid_post`` is what the layer module returns. DeepStack features are added after it, and stay in place;
    ``with_deepstack`` gives the residual stream behind that addition instead, which is what the next layer is
    given.
    """
    points = adapter.hook_points()
    behind = set(adapter.deepstack_layers) if with_deepstack else set()
    with ExitStack() as stack:
        for layer in range(adapter.n_layers) if layers is None else layers:
            name = f"blocks.{layer}.hook_resid_post"
            if layer in behind and layer + 1 < adapter.n_layers:
                name = f"blocks.{layer + 1}.hook_resid_pre"
            stack.callback(points[name].replace(partial(visit, layer)).remove)
        yield


def node_values(
    adapter: Any, merged: Merged, layers: Sequence[int] | None = None, partner: Tensor | None = None
) -> NodeValues:
    """Values of all nodes in one forward: ``(kind, layer) -> (b, p, ...)``, shaped as :func:`on_nodes` gives them.

    With ``partner`` ``(b, p')``, of those positions alone and in that order.
    """
    values: NodeValues = {}

    def keep(kind: NodeKind, layer: int, x: Tensor) -> None:
        values[kind, layer] = x.detach().clone() if partner is None else partnered(x.detach(), partner)

    with torch.no_grad(), on_nodes(adapter, keep, layers):
        decode(adapter, merged)
    return values


def partnered(values: Tensor, partner: Tensor) -> Tensor:
    """``values`` of counterfactual positions, in the order of the clean ones. ``(b, p', ...), (b, p) -> (b, p, ...)``."""
    rows = torch.arange(len(values), device=values.device)[:, None]
    return values[rows, partner]
