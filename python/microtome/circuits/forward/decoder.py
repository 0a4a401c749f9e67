"""The decoder on merged embeddings.

The vision tower runs once per prompt. What the model then hands its decoder (embeddings with the image
features merged in, DeepStack features, masks, positions) is kept as :class:`Merged`, and every later forward
starts from there. That makes interpolated *merged* embeddings possible, and costs nothing for the image.
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from microtome.errors import Error

__all__ = [
    "Merged",
    "check_replay",
    "decode",
    "head",
    "last_logits",
    "logit_difference",
    "merge",
    "model_logits",
]


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
