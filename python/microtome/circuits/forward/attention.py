"""Queries, keys and values as attention uses them: after RoPE and norms, one key and value per query head."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from microtome.circuits.forward.restore import attention_implementation

__all__ = ["See", "Watch", "watched_attention"]

See = Callable[[str, int, Tensor], Tensor]
Watch = Callable[[See | None], None]
_IMPLEMENTATION = "microtome_repeated_keys"


@contextmanager
def watched_attention(model: Any) -> Iterator[Watch]:
    """Eager attention with keys and values repeated for every query head, shown on their way.

    Inside, ``watch(see)`` makes every attention of the decoder call ``see(site, layer, x)`` with x ``(b, H,
    p, d_head)`` for the sites q, k (after RoPE), v and z; what it returns is used. ``watch(None)`` ends that.
    """
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.masking_utils import eager_mask, sdpa_mask

    seen: list[See] = []

    def attend(
        module: Any, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **options: Any
    ) -> tuple[Tensor, Tensor]:
        repeats = query.shape[1] // key.shape[1]
        key, value = key.repeat_interleave(repeats, 1), value.repeat_interleave(repeats, 1)
        layer = int(getattr(module, "layer_idx", None) or 0)
        see = seen[0] if seen else lambda _site, _layer, x: x
        query, key, value = see("q", layer, query), see("k", layer, key), see("v", layer, value)
        scaling = options.get("scaling")
        scores = query @ key.transpose(-1, -2) * (query.shape[-1] ** -0.5 if scaling is None else scaling)
        cap = options.get("softcap")
        scores = scores if cap is None else torch.tanh(scores / cap) * cap
        weights = (
            (scores + _additive(attention_mask, scores, _is_causal(module, options)))
            .softmax(-1, torch.float32)
            .to(query.dtype)
        )
        z = see("z", layer, weights @ value)
        return z.transpose(1, 2).contiguous(), weights

    AttentionInterface.register(_IMPLEMENTATION, attend)
    # The model's own kind of mask: some classes attend differently under eager and sdpa.
    own = getattr(model.config.get_text_config(), "_attn_implementation", None)
    AttentionMaskInterface.register(_IMPLEMENTATION, eager_mask if own == "eager" else sdpa_mask)

    def watch(see: See | None) -> None:
        seen[:] = [] if see is None else [see]

    with attention_implementation(model, _IMPLEMENTATION):
        yield watch


def _is_causal(module: Any, options: dict[str, Any]) -> bool:
    given = options.get("is_causal")
    return bool(getattr(module, "is_causal", True) if given is None else given)


def _additive(mask: Tensor | None, scores: Tensor, is_causal: bool) -> Tensor:
    """A mask to add to the scores: as given, from booleans, or causal where none is given."""
    lowest = torch.finfo(scores.dtype).min
    if mask is None:
        if not is_causal:
            return scores.new_zeros(())
        seen = torch.ones(scores.shape[-2:], dtype=torch.bool, device=scores.device).tril()
        return scores.new_zeros(seen.shape).masked_fill(~seen, lowest)
    mask = mask[..., : scores.shape[-1]]
    return scores.new_zeros(mask.shape).masked_fill(~mask, lowest) if mask.dtype == torch.bool else mask
