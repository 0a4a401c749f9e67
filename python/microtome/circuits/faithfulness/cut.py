"""Edges cut: one batch of pairs run with every edge outside a circuit at its counterfactual value.

Each destination v (q, k or v of one head, an MLP, the logits) reads its own copy of the residual stream:

    input of v = Σ_{u → v in the circuit} z_u + Σ_{u → v outside} z_u(p')

z_u is what u writes in this very run, so what is cut upstream is felt downstream; z_u(p') is what u writes in
the counterfactual run.

- Nodes that no edge of the circuit leaves are not computed: a circuit costs about as much as its heads do.
- Where a norm follows the attention (Gemma), a destination reads norm(Σ heads), with the heads it is given.
"""

from __future__ import annotations

from contextlib import ExitStack, suppress
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from microtome.capture.layers import linear_weight
from microtome.circuits.circuit.edges import EdgeGraph
from microtome.circuits.forward.attention import Watch
from microtome.circuits.forward.decoder import head, logit_difference
from microtome.circuits.forward.wiring import LETTERS, Seen, deepstack_deltas, watched_run
from microtome.circuits.pairs.pair_set import PairBatch, merge_pair

__all__ = ["EdgesCut"]

Mask = npt.NDArray[np.bool_]
Call = tuple[tuple[Any, ...], dict[str, Any]]


class _HaveRead(Exception):
    """Raised inside attention once queries, keys and values are known."""


@dataclass(eq=False)
class _Layer:
    """What one decoder layer is made of, found by watching it run."""

    attention: Any
    call: Call  # the attention's arguments beside the hidden states
    before_attention: Any  # norms; None where there is none
    after_attention: Any
    mlp: Any
    before_mlp: Any
    after_mlp: Any
    per_head: Tensor  # (d, H, d_head): output projection


@dataclass(eq=False)
class EdgesCut:
    """One batch of pairs: the counterfactual run, and circuits on top of it."""

    adapter: Any
    batch: PairBatch
    watch: Watch
    layers: list[_Layer]
    corrupted: Seen
    clean_input: Tensor  # (b, p, d)
    deepstack: list[Tensor]  # clean minus counterfactual, by the layer that they follow
    full: Tensor  # logits of the clean run (b, v)
    empty: Tensor  # logits of the counterfactual run

    @classmethod
    def of(cls, adapter: Any, batch: PairBatch, watch: Watch) -> EdgesCut:
        """Run both sides of a batch, and see what the layers are made of."""
        clean, corrupted = merge_pair(adapter, batch)
        calls: dict[int, Call] = {}
        with ExitStack() as stack:
            for layer in adapter.layers:
                hook = _arguments(calls, layer.index)
                module = layer.attention.module
                stack.callback(module.register_forward_pre_hook(hook, with_kwargs=True).remove)
            own, full = watched_run(adapter, clean, watch)
        other, empty = watched_run(adapter, corrupted, watch)
        layers = [_parts(adapter, own, layer, calls[layer.index]) for layer in adapter.layers]
        added = [-x for x in deepstack_deltas(clean, corrupted)]
        return cls(adapter, batch, watch, layers, other, own.layer_in[0].float(), added, full, empty)

    def difference(self, logits: Tensor) -> npt.NDArray[np.float64]:
        """LD of logits ``(b, v)``. Shape ``(b,)``."""
        found = logit_difference(logits, self.batch.answers, self.batch.corrupted_answers)
        return np.asarray(found.double().cpu())

    def logits(self, graph: EdgeGraph) -> Tensor:
        """Logits at the last position with the edges outside ``graph`` cut. Shape ``(b, v)``."""
        heads, edges = self.adapter.n_heads, graph.selected
        written = _Written(self, self.clean_input - self.corrupted.layer_in[0].float())
        for i in range(self.adapter.n_layers):
            if 0 < i <= len(self.deepstack):
                written.input = written.input + self.deepstack[i - 1]
            row, column = 1 + i * (heads + 1), i * (3 * heads + 1)
            live = [h for h in range(heads) if edges[row + h].any()]
            if live:
                columns = edges[:, column : column + 3 * heads]
                written.heads[i] = self._heads(written, i, live, columns)
            if edges[row + heads].any():
                written.mlps[i] = self._mlp(written, i, edges[:, column + 3 * heads])
        last = self.corrupted.final_in[0]
        stream = (last.float() + written.into(edges[:, -1])).to(last.dtype)
        return head(self.adapter, self.adapter.final_norm(stream)[:, -1])

    def _heads(self, written: _Written, i: int, live: list[int], columns: Mask) -> dict[int, Tensor]:
        """What each live head writes, less what it writes in the counterfactual run; before a norm that follows."""
        layer, stream = self.layers[i], self.corrupted.layer_in[i]
        wanted: dict[bytes, list[tuple[str, int]]] = {}
        for j, letter in enumerate(LETTERS):
            for h in live:
                wanted.setdefault(columns[:, j * self.adapter.n_heads + h].tobytes(), []).append((letter, h))
        read = {letter: self.corrupted.read[letter, i].clone() for letter in LETTERS}
        for column, readers in wanted.items():  # destinations that read the same are computed once
            mask = np.frombuffer(column, np.bool_)
            found = self._read(layer, (stream.float() + written.into(mask)).to(stream.dtype))
            for letter, h in readers:
                read[letter][:, h] = found[letter][:, h]
        z = self._attend(layer, stream, read)  # (b, H, p, d_head)
        delta = z.float() - self.corrupted.z[i].transpose(1, 2).float()
        return {h: delta[:, h] @ layer.per_head[:, h].T for h in live}

    def _read(self, layer: _Layer, stream: Tensor) -> dict[str, Tensor]:
        """Queries, keys and values (b, H, p, d_head) of all heads that read ``stream``."""
        found: dict[str, Tensor] = {}

        def see(site: str, _layer: int, x: Tensor) -> Tensor:
            found[site] = x
            if len(found) == len(LETTERS):
                raise _HaveRead
            return x

        with suppress(_HaveRead):
            self._call(layer, stream, see)
        return found

    def _attend(self, layer: _Layer, stream: Tensor, read: dict[str, Tensor]) -> Tensor:
        z: list[Tensor] = []

        def see(site: str, _layer: int, x: Tensor) -> Tensor:
            if site == "z":
                z.append(x)
            return read.get(site, x)

        self._call(layer, stream, see)
        return z[0]

    def _call(self, layer: _Layer, stream: Tensor, see: Any) -> None:
        args, kwargs = layer.call
        self.watch(see)
        try:
            layer.attention(_through(layer.before_attention, stream), *args, **kwargs)
        finally:
            self.watch(None)

    def _mlp(self, written: _Written, i: int, column: Mask) -> Tensor:
        layer, stream = self.layers[i], self.corrupted.mlp_in[i]
        x = (stream.float() + written.into(column)).to(stream.dtype)
        out = _through(layer.after_mlp, _first(layer.mlp(_through(layer.before_mlp, x))))
        known = self.corrupted.mlp_out[i]
        return out.float() - self.corrupted.after.get(id(known), known).float()


@dataclass(eq=False)
class _Written:
    """What the sources of a circuit write, less what they write in the counterfactual run."""

    run: EdgesCut
    input: Tensor  # (b, p, d)
    heads: dict[int, dict[int, Tensor]] = field(default_factory=dict)  # layer, head
    mlps: dict[int, Tensor] = field(default_factory=dict)

    def into(self, column: Mask) -> Tensor:
        """The sum over the sources of one destination, ``(b, p, d)``."""
        n = self.run.adapter.n_heads
        total = self.input.clone() if column[0] else torch.zeros_like(self.input)
        for i, by_head in self.heads.items():
            chosen = [x for h, x in by_head.items() if column[1 + i * (n + 1) + h]]
            if chosen:
                total += self._after_attention(i, torch.stack(chosen).sum(0))
        for i, x in self.mlps.items():
            if column[(i + 1) * (n + 1)]:
                total += x
        return total

    def _after_attention(self, i: int, delta: Tensor) -> Tensor:
        norm = self.run.layers[i].after_attention
        if norm is None:
            return delta
        known = self.run.corrupted.attn_out[i]
        after: Tensor = norm((known.float() + delta).to(known.dtype))
        return after.float() - self.run.corrupted.after[id(known)].float()


def _through(norm: Any, x: Tensor) -> Tensor:
    return x if norm is None else norm(x)


def _first(output: Any) -> Tensor:
    found: Tensor = output[0] if isinstance(output, tuple) else output
    return found


def _arguments(calls: dict[int, Call], layer: int) -> Any:
    """A hook that keeps what an attention is given beside the hidden states."""

    def hook(_module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        calls[layer] = args[1:], {name: x for name, x in kwargs.items() if name != "hidden_states"}

    return hook


def _parts(adapter: Any, seen: Seen, layer: Any, call: Call) -> _Layer:
    """Which norms stand before and after the parts of a layer: those whose output or input the parts took."""
    i = layer.index
    weight = linear_weight(layer.o_proj.module).float()  # (d, H d_head)
    return _Layer(
        layer.attention.module,
        call,
        seen.norm_before(layer.attention.module),
        seen.norm_after(seen.attn_out[i]),
        layer.mlp.module,
        seen.norm_before(layer.mlp.module),
        seen.norm_after(seen.mlp_out[i]),
        weight.unflatten(1, (adapter.n_heads, -1)),
    )
