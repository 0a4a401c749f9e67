"""Edge attribution patching, plain and with integrated gradients (EAP, EAP-IG; A15).

For source u and destination v, position-free:

    score(u → v) = Σ_positions (z_u(p') - z_u(p)) · mean over points of ∂LD/∂(input of v)

z_u is what u writes into the residual stream (a head writes z_h W_O^h), the input of v what q, k or v of one
head, an MLP or the logits read from it, before their norm. Points are e' + (i/k)(e - e') for ``eap_ig``, the
clean prompt for ``eap``, both ends for ``clean_corrupted``. Scores are signed, mean over pairs.

- i = 0..k-1 as in EAP-IG's package, which leaves the clean end out; its descendants take i = 1..k, as the node
  scores do: ``endpoint="clean"``.

- Keys and values count per query head, as if repeated.
- Where a norm follows the attention or the MLP (Gemma), a source is what passes that norm with its scale held
  fixed.
- DeepStack features belong to ``input`` for the layers after them.
"""

from __future__ import annotations

from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from microtome._core import __version__
from microtome.capture.layers import linear_weight
from microtome.circuits.attribution.passes import finite_pairs, require_finite
from microtome.circuits.attribution.path import interpolated
from microtome.circuits.circuit.edges import EdgeGraph
from microtome.circuits.forward.attention import Watch, watched_attention
from microtome.circuits.forward.decoder import Merged, logit_difference
from microtome.circuits.forward.restore import left_as_found
from microtome.circuits.forward.wiring import LETTERS, Seen, check_wiring, deepstack_deltas, watched_run
from microtome.circuits.pairs.pair_set import PairBatch, PairSet, as_pair_set, check_first, merge_pair
from microtome.errors import ShapeError
from microtome.progress import bar

__all__ = ["attribute_edges"]


def attribute_edges(
    model: Any,
    pairs: PairSet,
    method: Literal["eap_ig", "eap", "clean_corrupted"] = "eap_ig",
    steps: int = 5,
    *,
    endpoint: Literal["corrupted", "clean"] = "corrupted",
    batch_size: int = 4,
    progress: bool = True,
) -> EdgeGraph:
    """Score every edge.

    Args:
        model: a transformers model whose MLP follows its attention; left as it was found.
        pairs: prepared pairs of equal length.
        method: see the module's text.
        steps: points k of ``"eap_ig"``.
        endpoint: the end of the path that is among the points: ``"corrupted"`` for i = 0..k-1, ``"clean"`` for
            i = 1..k.
        batch_size: pairs per forward.
        progress: show a bar.

    Pairs whose logit difference is not finite are left out and counted in the facts, as ``n_skipped``.

    Raises:
        ShapeError: an unknown method, pairs that do not align, or a model whose layers do not add their attention
            and then their MLP to the residual stream.
        Error: the model changes hidden states between its decoder and its head.
        NonFiniteError: a score is NaN or infinite although its logit difference is not.

    Example:
        >>> from microtome import organism
        >>> from microtome.circuits import prepare
        >>> model, processor = organism.load_model(), organism.load_processor()
        >>> pairs = prepare(model, processor, organism.pairs("colour", "textual", 2))
        >>> graph = attribute_edges(model, pairs, steps=2).top(100)
        >>> int(graph.selected.sum()) <= 100
        True
    """
    from microtome.capture.models import adapt

    pairs = as_pair_set(pairs)
    points = _points(method, steps, endpoint)
    if not all(pair.is_aligned for pair in pairs):
        raise ShapeError("pairs: expected counterfactuals of equal length, found unequal ones")
    adapter = adapt(model)
    shape = (1 + adapter.n_layers * (adapter.n_heads + 1), adapter.n_layers * (3 * adapter.n_heads + 1) + 1)
    total, n_pairs = torch.zeros(shape, dtype=torch.float64, device=model.device), 0
    with (
        left_as_found(model),
        torch.inference_mode(False),
        watched_attention(model) as watch,
        bar("edge attribution", len(pairs), progress, "pairs") as done,
    ):
        check_wiring(adapter, check_first(adapter, pairs), watch)
        for batch in pairs.batches(batch_size, model.device, done):
            found, n = _batch(adapter, batch, points, watch)
            total, n_pairs = total + found, n_pairs + n
    graph = EdgeGraph(adapter.n_layers, adapter.n_heads, adapter.d_model, np.zeros(shape, np.float32))
    scores = (total / n_pairs).cpu().numpy().astype(np.float32)
    facts = {
        "method": method, "steps": steps, "endpoint": endpoint, "model": type(model).__name__, "version": __version__,
        "n_pairs": n_pairs, "n_skipped": len(pairs) - n_pairs,
    }  # fmt: skip
    return EdgeGraph(
        graph.n_layers, graph.n_heads, graph.d_model, np.where(graph.real, scores, 0), None, facts
    )


def _points(method: str, steps: int, endpoint: str) -> tuple[float, ...]:
    """Points of the path at which gradients are taken, 0 the counterfactual, 1 the clean prompt."""
    if method not in ("eap_ig", "eap", "clean_corrupted"):
        raise ShapeError(f"method: expected eap_ig, eap or clean_corrupted, found {method!r}")
    if steps < 1:
        raise ShapeError(f"steps: expected 1 or more, found {steps}")
    if endpoint not in ("corrupted", "clean"):
        raise ShapeError(f"endpoint: expected corrupted or clean, found {endpoint!r}")
    if method == "eap":
        return (1.0,)
    if method == "clean_corrupted":
        return (0.0, 1.0)
    first = 0 if endpoint == "corrupted" else 1
    return tuple(i / steps for i in range(first, first + steps))


def _sources(adapter: Any, merged: Merged, watch: Watch) -> Tensor:
    """What every source writes: ``(1 + L (H + 1), b, p, d)`` in float32."""
    with torch.no_grad():
        seen, _ = watched_run(adapter, merged, watch)
    rows = [seen.layer_in[0].float()]  # the decoder may scale what it is given
    for layer in adapter.layers:
        i = layer.index
        weight = linear_weight(layer.o_proj.module).float()  # (d, H d_head)
        per_head = weight.unflatten(1, (adapter.n_heads, -1))  # (d, H, d_head)
        written = torch.einsum("bphe,dhe->hbpd", seen.z[i].float(), per_head)
        rows += list(written * _fixed_scale(seen, seen.attn_out[i]))
        rows.append(seen.after.get(id(seen.mlp_out[i]), seen.mlp_out[i]).float())
    return torch.stack(rows)


def _fixed_scale(seen: Seen, output: Tensor) -> Tensor:
    """The factor of the norm that follows a module, at this output; 1 where none follows."""
    normed = seen.after.get(id(output))
    if normed is None:
        return output.new_ones((), dtype=torch.float32)
    x = output.float()
    return torch.where(x == 0, 0.0, normed.float() / torch.where(x == 0, 1.0, x))


def _batch(adapter: Any, batch: PairBatch, points: tuple[float, ...], watch: Watch) -> tuple[Tensor, int]:
    """Sum of the edge scores of a batch, (sources, destinations), and over how many of its pairs."""
    clean, corrupted = merge_pair(adapter, batch)
    delta = _sources(adapter, corrupted, watch) - _sources(adapter, clean, watch)
    usable = finite_pairs(adapter, clean, batch)
    delta, added = delta[:, usable], [x[usable] for x in deepstack_deltas(clean, corrupted)]
    out = torch.zeros(len(delta), 0, dtype=torch.float64, device=delta.device)
    grads: list[Tensor] = []
    for point in points:
        merged = interpolated(
            adapter, clean, corrupted, batch.partner, (point,), "merged", batch.clean["input_ids"]
        )
        found = _input_gradients(adapter, batch, merged, watch)
        grads = [a + b for a, b in zip(grads, found, strict=True)] if grads else found
    columns = []
    for layer, grad in enumerate(grads):  # (destinations of the layer, b, p, d); the last entry is the logits
        if 0 < layer <= len(added):
            delta[0] += added[layer - 1]
        columns.append(torch.einsum("sbpd,tbpd->st", delta, grad[:, usable] / len(points)).double())
    scores = torch.cat([out, *columns], 1)
    require_finite(scores, "edge attribution: scores")
    return scores, int(usable.sum())


def _input_gradients(adapter: Any, batch: PairBatch, merged: Merged, watch: Watch) -> list[Tensor]:
    """∂LD/∂(input of v): per layer (3 H + 1, b, p, d) in the order q, k, v, MLP; then (1, b, p, d) of the logits."""
    leaf = merged.embeds.detach().requires_grad_()
    with torch.enable_grad():
        seen, logits = watched_run(adapter, merged.at(leaf, merged.deepstack), watch)
        value = logit_difference(logits, batch.answers, batch.corrupted_answers).sum()
    layers = range(adapter.n_layers)
    read = [seen.read[letter, i] for i in layers for letter in LETTERS]
    written = [seen.mlp_out[i] for i in layers]
    grads = torch.autograd.grad(value, [*read, *written, seen.final_in[0]], retain_graph=True)
    out = []
    for i in layers:
        rows = []
        for j in range(3):
            rows.append(_per_head(read[3 * i + j], grads[3 * i + j], seen.layer_in[i]))
        (mlp,) = torch.autograd.grad(
            written[i], seen.mlp_in[i], grads[3 * len(layers) + i], retain_graph=True
        )
        out.append(torch.cat([*rows, mlp[None]]).detach().float())
    out.append(grads[-1][None].float())
    return out


def _per_head(read: Tensor, grad: Tensor, layer_in: Tensor) -> Tensor:
    """Gradient at the residual stream through one head's q, k or v alone, for each head: ``(H, b, p, d)``."""
    rows = []
    for head in range(read.shape[1]):
        only = torch.zeros_like(grad)
        only[:, head] = grad[:, head]
        rows.append(torch.autograd.grad(read, layer_in, only, retain_graph=True)[0])
    return torch.stack(rows)
