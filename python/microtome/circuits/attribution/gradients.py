"""Gradients of the logit difference with respect to every node, handed over layer by layer.

Two ways give the same numbers. :func:`through_graph` keeps the autograd graph of the whole decoder.
:func:`layer_by_layer` keeps the input of every layer only and runs each layer again on the way down: a
forward more, a fraction of the memory. Both start the graph at the first wanted layer's heads, so nothing is
kept for what lies below.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from microtome.circuits.circuit.nodes import NodeKind
from microtome.circuits.forward.decoder import Merged, decode, head, last_logits
from microtome.circuits.forward.nodes import on_nodes, on_residuals

__all__ = ["Consume", "Objective", "layer_by_layer", "through_graph"]

Consume = Callable[[NodeKind, int, Tensor, Tensor], None]
"""Called with kind, layer, node values and their gradient, both ``(b, p, ...)``, top layers first."""

Objective = Callable[[Tensor], Tensor]
"""Logits at the last position ``(b, v)`` to one number per row ``(b,)``."""


def through_graph(
    adapter: Any, merged: Merged, objective: Objective, consume: Consume, layers: range
) -> Tensor:
    """One forward and one backward; returns the objective ``(b,)``."""
    leaves: list[Tensor] = []
    with torch.enable_grad(), on_nodes(adapter, _listening(consume, leaves, layers.start), layers):
        values = objective(last_logits(adapter, merged))
    torch.autograd.grad(values.sum(), leaves)
    return values.detach()


def _listening(
    consume: Consume, leaves: list[Tensor], first: int
) -> Callable[[NodeKind, int, Tensor], Tensor]:
    """A visitor that starts the graph at the first layer's sites and passes every gradient on as soon as it exists.

    Where attention and MLP stand side by side, the MLP's site does not lie behind the heads: it is a leaf of its own.
    """

    def visit(kind: NodeKind, layer: int, x: Tensor) -> Tensor:
        if layer == first and not x.requires_grad:
            x = x.detach().requires_grad_()
            leaves.append(x)
        values = (
            x.detach()
        )  # a hook that held x itself would be a cycle, and keep every layer until the next collection
        x.register_hook(lambda grad: consume(kind, layer, values, grad))
        return x

    return visit


def layer_by_layer(
    adapter: Any, merged: Merged, objective: Objective, consume: Consume, layers: range
) -> Tensor:
    """The same with one layer's graph at a time; returns the objective ``(b,)``."""
    calls, top = _layer_calls(adapter, merged)
    with torch.enable_grad():
        top = top.requires_grad_()
        values = objective(head(adapter, adapter.final_norm(top)[:, -1]))
    (grad,) = torch.autograd.grad(values.sum(), top)
    for layer in reversed(range(layers.start, adapter.n_layers)):
        hidden, args, kwargs = calls.pop()
        leaves: list[Tensor] = [] if layer == layers.start else [hidden.requires_grad_()]
        with torch.enable_grad(), _nodes_of(adapter, consume, leaves, layer, layers):
            output = adapter.layers[layer].module(hidden, *args, **kwargs)
        output = output[0] if isinstance(output, tuple) else output
        (grad,) = torch.autograd.grad(output, leaves, grad_outputs=grad)
    return values.detach()


def _nodes_of(adapter: Any, consume: Consume, leaves: list[Tensor], layer: int, layers: range) -> Any:
    return on_nodes(adapter, _listening(consume, leaves, layers.start), [layer] if layer in layers else [])


def _layer_calls(
    adapter: Any, merged: Merged
) -> tuple[list[tuple[Tensor, tuple[Any, ...], dict[str, Any]]], Tensor]:
    """Input and other arguments of every layer, and the output of the last."""
    calls: list[tuple[Tensor, tuple[Any, ...], dict[str, Any]]] = []
    top: list[Tensor] = []

    def keep(_module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        others = {name: value for name, value in kwargs.items() if name != "hidden_states"}
        hidden = args[0] if args else kwargs["hidden_states"]
        calls.append((hidden.detach(), args[1:], others))

    handles = [layer.module.register_forward_pre_hook(keep, with_kwargs=True) for layer in adapter.layers]
    try:
        with (
            torch.no_grad(),
            on_residuals(adapter, lambda _, x: top.append(x.detach()), [adapter.n_layers - 1]),
        ):
            decode(adapter, merged)
    finally:
        for handle in handles:
            handle.remove()
    return calls, top[0]
