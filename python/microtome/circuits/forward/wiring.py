"""Who reads what from the residual stream in one forward, and who writes what into it.

Queries, keys and values of every head, MLPs and the logits read; heads and MLPs write. DeepStack features are
added to the stream behind the first layers.
"""

from __future__ import annotations

import itertools
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from microtome.circuits.forward.attention import Watch
from microtome.circuits.forward.decoder import Merged, last_logits
from microtome.errors import ShapeError

__all__ = ["LETTERS", "Seen", "check_wiring", "deepstack_deltas", "watched_run"]

LETTERS = ("q", "k", "v")


@dataclass(eq=False)
class Seen:
    """Tensors of one forward, per layer. All are kept alive, so their ids stay unique."""

    layer_in: dict[int, Tensor] = field(default_factory=dict)  # (b, p, d): what q, k, v read, before the norm
    attn_out: dict[int, Tensor] = field(default_factory=dict)
    mlp_in: dict[int, Tensor] = field(default_factory=dict)  # what the MLP reads, before the norm
    mlp_out: dict[int, Tensor] = field(default_factory=dict)
    z: dict[int, Tensor] = field(default_factory=dict)  # (b, p, H, d_head)
    read: dict[tuple[str, int], Tensor] = field(default_factory=dict)  # q, k, v: (b, H, p, d_head)
    norms: dict[int, tuple[Tensor, Tensor, Any]] = field(
        default_factory=dict
    )  # id of a norm's output -> input, output, norm
    after: dict[int, Tensor] = field(default_factory=dict)  # id of a norm's input -> its output
    taken: dict[int, Tensor] = field(default_factory=dict)  # id of an attention or MLP -> its input
    final_in: list[Tensor] = field(default_factory=list)

    def norm_before(self, module: Any) -> Any:
        """The norm that an attention or MLP takes its input from, None where it reads the stream itself."""
        found = self.norms.get(id(self.taken[id(module)]))
        return None if found is None else found[2]

    def norm_after(self, output: Tensor) -> Any:
        """The norm that follows an output, None where none does."""
        normed = self.after.get(id(output))
        return None if normed is None else self.norms[id(normed)][2]


def watched_run(adapter: Any, merged: Merged, watch: Watch) -> tuple[Seen, Tensor]:
    """One forward with everything that edges need; logits at the last position."""
    seen = Seen()

    def read(site: str, layer: int, x: Tensor) -> Tensor:
        if site in LETTERS:
            seen.read[site, layer] = x
        return x

    def norm(module: Any, args: tuple[Any, ...], output: Tensor) -> None:
        seen.norms[id(output)] = args[0], output, module
        seen.after[id(args[0])] = output

    def take(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        seen.taken[id(module)] = args[0] if args else kwargs["hidden_states"]

    points = adapter.hook_points()
    with ExitStack() as stack:
        for layer in adapter.layers:
            i = layer.index
            for name, into in (
                ("hook_resid_pre", seen.layer_in), ("hook_attn_out", seen.attn_out), ("hook_mlp_out", seen.mlp_out),
                ("attn.hook_z", seen.z),
            ):  # fmt: skip
                stack.callback(points[f"blocks.{i}.{name}"].observe(_keep(into, i)).remove)
            for module in layer.norms.values():
                stack.callback(module.register_forward_hook(norm).remove)
            for module in (layer.attention.module, layer.mlp.module):
                stack.callback(module.register_forward_pre_hook(take, with_kwargs=True).remove)
        final = adapter.final_norm.register_forward_pre_hook(lambda _, args: seen.final_in.append(args[0]))
        stack.callback(final.remove)
        watch(read)
        try:
            logits = last_logits(adapter, merged)
        finally:
            watch(None)
    for layer in adapter.layers:
        taken = seen.taken[id(layer.mlp.module)]
        before = seen.norms.get(id(taken))
        seen.mlp_in[layer.index] = taken if before is None else before[0]
    return seen, logits


def _keep(into: dict[int, Tensor], layer: int) -> Any:
    return lambda x: into.__setitem__(layer, x)


def check_wiring(adapter: Any, merged: Merged, watch: Watch, tolerance: float = 1e-3) -> None:
    """That each MLP reads the stream with what the attention wrote, and the next layer that with what the MLP wrote.

    Raises:
        ShapeError: they do not: attention and MLP side by side, or outputs scaled on their way into the stream.
    """
    with torch.no_grad():
        seen, _ = watched_run(adapter, merged, watch)
    streams = [seen.layer_in[layer.index] for layer in adapter.layers] + [seen.final_in[0]]
    for i, (before, behind) in enumerate(itertools.pairwise(streams)):
        attention, mlp = (seen.after.get(id(x), x) for x in (seen.attn_out[i], seen.mlp_out[i]))
        behind = behind.float()
        if i < len(merged.deepstack):
            behind = behind - _at_visual(merged, merged.deepstack[i])
        for name, source, written, found in (
            ("MLP", before, attention, seen.mlp_in[i].float()), ("end", seen.mlp_in[i], mlp, behind),
        ):  # fmt: skip
            error = float((source.float() + written.float() - found).abs().max() / (found.abs().max() + 1e-6))
            if error > (tolerance if source.dtype == torch.float32 else 0.05):
                raise ShapeError(
                    f"edges: {type(adapter.model).__name__}: expected each layer to add its attention and then its MLP to "
                    f"the residual stream, found another sum at the {name} of layer {i} (relative difference {error:.2g})"
                )


def _at_visual(merged: Merged, features: Tensor) -> Tensor:
    """DeepStack features at all positions, ``(b, p, d)`` in float32."""
    x = torch.zeros_like(merged.embeds, dtype=torch.float32)
    x[merged.visual()] = features.float()
    return x


def deepstack_deltas(clean: Merged, corrupted: Merged) -> list[Tensor]:
    """Counterfactual less clean DeepStack features at all positions, ``(b, p, d)``, by the layer that they follow."""
    pairs = zip(clean.deepstack, corrupted.deepstack, strict=True)
    return [_at_visual(clean, b.float() - a.float()) for a, b in pairs]
