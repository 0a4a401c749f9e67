"""The decoder on merged embeddings: run it, listen to its nodes, overwrite them.

The vision tower runs once per prompt. What the model then hands its decoder (embeddings with the image
features merged in, DeepStack features, masks, positions) is kept as :class:`Merged`, and every later forward
starts from there. That makes interpolated *merged* embeddings possible, and costs nothing for the image.

Nodes are the inputs of the attention output projection (``hook_z``, heads) and of the MLP's down projection
(``mlp.hook_post``, neurons). Everything here leaves weights, hooks, random state, training mode and attention
implementation as it found them.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from microtome.circuits.pairs.pair_set import PairBatch, PairSet
from microtome.errors import Error, NonFiniteError, ShapeError

__all__ = [
    "Kind",
    "Merged",
    "answers_correctly",
    "decode",
    "last_logits",
    "left_as_found",
    "logit_difference",
    "merge",
    "merge_pair",
    "model_logits",
    "node_values",
    "on_nodes",
    "on_residuals",
]

Kind = Literal["heads", "neurons"]
KINDS: tuple[Kind, ...] = ("heads", "neurons")


@dataclass(frozen=True, eq=False)
class Merged:
    """What a decoder is given for a batch of prompts."""

    embeds: Tensor  # (b, p, d): image features merged in
    deepstack: tuple[Tensor, ...]  # each (visual tokens of the batch, d): added after the first layers
    keywords: dict[str, Any]
    """The decoder's other arguments: masks, positions."""

    def repeat(self, n: int) -> Merged:
        """The batch ``n`` times over, copy after copy."""
        if n == 1:
            return self
        b = self.embeds.shape[0]
        keywords = {name: _repeat(name, value, b, n) for name, value in self.keywords.items()}
        return Merged(self.embeds.repeat(n, 1, 1), tuple(x.repeat(n, 1) for x in self.deepstack), keywords)

    def at(self, embeds: Tensor, deepstack: Sequence[Tensor]) -> Merged:
        """The same masks and positions with other embeddings."""
        return replace(self, embeds=embeds, deepstack=tuple(deepstack))

    def visual(self) -> Tensor | None:
        """Where DeepStack features are added, ``(b, p)``."""
        mask = self.keywords.get("visual_pos_masks")
        return None if mask is None else mask.to(self.embeds.device)


def _repeat(name: str, value: Any, b: int, n: int) -> Any:
    if isinstance(value, dict):
        return {key: _repeat(name, v, b, n) for key, v in value.items()}
    if not torch.is_tensor(value) or value.ndim < 2:
        return value
    axis = value.ndim - 2 if name == "position_ids" else 0  # M-RoPE positions are (3, b, p)
    if value.shape[axis] != b:
        return value  # broadcast over the batch
    return value.repeat(*(n if i == axis else 1 for i in range(value.ndim)))


class _ReachedDecoder(Exception):
    """Raised inside a hook to leave a forward once the decoder's arguments are known."""


def merge(adapter: Any, inputs: dict[str, Tensor]) -> Merged:
    """What the model hands its decoder for ``inputs``, found by running the model up to there."""
    found: dict[str, Any] = {}

    def keep(_module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        found.update(kwargs)
        if args:
            found["input_ids"] = args[0]
        raise _ReachedDecoder

    handle = adapter.decoder.register_forward_pre_hook(keep, with_kwargs=True)
    try:
        with torch.no_grad():
            adapter.model(**inputs, use_cache=False)
    except _ReachedDecoder:
        pass
    finally:
        handle.remove()
    embeds, ids = found.pop("inputs_embeds", None), found.pop("input_ids", None)
    if embeds is None:
        with torch.no_grad():
            embeds = adapter.decoder.get_input_embeddings()(ids)
    deepstack = tuple(found.pop("deepstack_visual_embeds", None) or ())
    settings = {
        "cache",
        "past_key_values",
        "use_cache",
        "return_dict",
        "output_attentions",
        "output_hidden_states",
    }
    keywords = {name: value for name, value in found.items() if name not in settings and value is not None}
    return Merged(embeds.detach(), tuple(x.detach() for x in deepstack), keywords)


def merge_pair(adapter: Any, batch: PairBatch) -> tuple[Merged, Merged]:
    """Both sides of a batch of pairs."""
    return merge(adapter, batch.clean), merge(adapter, batch.corrupted)


def decode(adapter: Any, merged: Merged) -> Tensor:
    """Output of the decoder after its final norm, ``(b, p, d)``."""
    keywords = dict(merged.keywords)
    if merged.deepstack:
        keywords["deepstack_visual_embeds"] = list(merged.deepstack)
    return adapter.decoder(inputs_embeds=merged.embeds, use_cache=False, **keywords)[0]


def last_logits(adapter: Any, merged: Merged) -> Tensor:
    """Logits at the last position in float32, ``(b, vocabulary)``."""
    return head(adapter, decode(adapter, merged)[:, -1])


def head(adapter: Any, hidden: Tensor) -> Tensor:
    """Logits of normed residuals ``(b, d)`` in float32, with the softcap of the models that have one."""
    logits = adapter.lm_head(hidden).float()
    cap = _softcap(adapter.model)
    return logits if cap is None else torch.tanh(logits / cap) * cap


def _softcap(model: Any) -> float | None:
    """The cap, for the classes that apply it: a multimodal Gemma carries the setting without using it."""
    config = model.config
    return getattr(config, "final_logit_softcapping", None) if config is config.get_text_config() else None


def check_replay(adapter: Any, inputs: dict[str, Tensor], merged: Merged, tolerance: float = 1e-3) -> None:
    """That the decoder started from ``merged`` says what the model says.

    Raises:
        Error: logits at the last position differ by more than ``tolerance`` of their range.
    """
    with torch.no_grad():
        ours = last_logits(adapter, merged)
        theirs = model_logits(adapter.model, inputs)
    known = torch.isfinite(theirs)
    bound = tolerance if merged.embeds.dtype == torch.float32 else 0.05
    error = float(
        ((ours - theirs)[known].abs().max() / (theirs[known].abs().max() + 1e-6)) if known.any() else 0
    )
    if not error <= bound:
        raise Error(
            f"replaying the decoder: {type(adapter.model).__name__}: expected the model's own logits, found a relative "
            f"difference of {error:.2g}. The model changes hidden states between its decoder and its head"
        )


def model_logits(model: Any, inputs: dict[str, Tensor]) -> Tensor:
    """The model's own logits at the last position ``(b, v)`` in float32; others are not made if the class allows it."""
    takes = inspect.signature(model.forward).parameters
    only = {"logits_to_keep": 1} if "logits_to_keep" in takes else {}
    last: Tensor = model(**inputs, use_cache=False, **only).logits[:, -1]
    return last.float()


def logit_difference(logits: Tensor, answers: Tensor, corrupted_answers: Tensor) -> Tensor:
    """LD = logit[r] - logit[r'] (same-task-different-circuits, A2). Shapes ``(b, v), (b,), (b,) -> (b,)``."""
    values = logits.float()
    rows = torch.arange(len(values), device=values.device)
    return values[rows, answers] - values[rows, corrupted_answers]


Visit = Callable[[Kind, int, Tensor], Tensor | None]

HOOKS: dict[Kind, str] = {"heads": "blocks.{}.attn.hook_z", "neurons": "blocks.{}.mlp.hook_post"}


@contextmanager
def on_nodes(adapter: Any, visit: Visit, layers: Sequence[int] | None = None) -> Iterator[None]:
    """Call ``visit(kind, layer, values)`` at every node site; what it returns replaces the values.

    ``values`` is ``(b, p, n_heads, d_head)`` for heads and ``(b, p, d_mlp)`` for neurons.
    """
    points = adapter.hook_points()
    with ExitStack() as stack:
        for layer in range(adapter.n_layers) if layers is None else layers:
            for kind, name in HOOKS.items():
                handle = points[name.format(layer)].replace(partial(visit, kind, layer))
                stack.callback(handle.remove)
        yield


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
) -> dict[tuple[Kind, int], Tensor]:
    """Values of all nodes in one forward: ``(kind, layer) -> (b, p, ...)``, shaped as :func:`on_nodes` gives them.

    With ``partner`` ``(b, p')``, of those positions alone and in that order.
    """
    values: dict[tuple[Kind, int], Tensor] = {}

    def keep(kind: Kind, layer: int, x: Tensor) -> None:
        values[kind, layer] = x.detach().clone() if partner is None else partnered(x.detach(), partner)

    with torch.no_grad(), on_nodes(adapter, keep, layers):
        decode(adapter, merged)
    return values


def partnered(values: Tensor, partner: Tensor) -> Tensor:
    """``values`` of counterfactual positions, in the order of the clean ones. ``(b, p', ...), (b, p) -> (b, p, ...)``."""
    rows = torch.arange(len(values), device=values.device)[:, None]
    return values[rows, partner]


def counterfactual_embeddings(
    clean: Merged, corrupted: Merged, partner: Tensor
) -> tuple[Tensor, tuple[Tensor, ...]]:
    """Embeddings and DeepStack features of the counterfactual at the clean prompt's positions."""
    embeds = partnered(corrupted.embeds, partner)
    ours, theirs = clean.visual(), corrupted.visual()
    if not clean.deepstack or ours is None or theirs is None:
        return embeds, ()
    added = []
    for features in corrupted.deepstack:
        everywhere = corrupted.embeds.new_zeros(corrupted.embeds.shape)
        everywhere[theirs] = features.to(everywhere.dtype)
        added.append(partnered(everywhere, partner)[ours])
    return embeds, tuple(added)


@contextmanager
def left_as_found(model: Any) -> Iterator[None]:
    """Evaluation mode and frozen parameters inside; modes, ``requires_grad`` and random state restored on every exit."""
    training = [(module, module.training) for module in model.modules()]
    grads = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    random = torch.get_rng_state()
    on_gpu = torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else None
    try:
        model.eval()
        for parameter, _ in grads:
            parameter.requires_grad_(False)
        yield
    finally:
        for parameter, wanted in grads:
            parameter.requires_grad_(wanted)
        for module, mode in training:
            module.training = mode
        torch.set_rng_state(random)
        if on_gpu is not None:
            torch.cuda.set_rng_state_all(on_gpu)


def as_pair_set(pairs: Any) -> PairSet:
    """``pairs`` when they are prepared already.

    Raises:
        ShapeError: they are not.
    """
    if not isinstance(pairs, PairSet):
        raise ShapeError(
            f"pairs: expected a PairSet, found {type(pairs).__name__}. "
            "Call microtome.circuits.prepare(model, processor, pairs) first"
        )
    return pairs


def answers_correctly(model: Any, pairs: PairSet, batch_size: int = 16) -> npt.NDArray[np.bool_]:
    """Which pairs the model answers correctly on both sides, by the most likely token. Shape ``(n,)``."""
    from microtome.capture.models import adapt

    adapter = adapt(model)
    right = np.zeros(len(pairs), bool)
    with left_as_found(model), torch.no_grad():
        for batch in pairs.batches(batch_size, model.device):
            clean, corrupted = (last_logits(adapter, side) for side in merge_pair(adapter, batch))
            ok = (clean.argmax(-1) == batch.answers) & (corrupted.argmax(-1) == batch.corrupted_answers)
            right[list(batch.indices)] = ok.cpu().numpy()
    return right


def require_finite(values: Tensor, what: str) -> None:
    """Refuse NaN and infinity.

    Raises:
        NonFiniteError: there are some.
    """
    bad = int((~torch.isfinite(values)).sum())
    if bad:
        raise NonFiniteError(f"{what}: expected finite numbers, found {bad} of {values.numel()} that are not")
