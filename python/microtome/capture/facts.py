"""What made a capture: the model, its code and its options, as kept in the manifest.

Equal for every part of an interrupted run: no times, no process numbers, nothing of the machine.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

import torch

from microtome._core import __version__
from microtome.capture.models import ModelAdapter
from microtome.capture.plan import Plan
from microtome.errors import ShapeError

__all__ = ["run_facts"]


def run_facts(
    adapter: ModelAdapter,
    wanted: Plan,
    processor: Any,
    model_facts: Mapping[str, Any] | None,
) -> dict[str, Any]:
    """The facts of a run as a JSON object."""
    import transformers

    config = adapter.config
    parameter = next(adapter.model.parameters())
    facts = {
        "model": {
            "class": type(adapter.model).__name__,
            "name": getattr(config, "_name_or_path", "") or "",
            "revision": getattr(config, "_commit_hash", None),
            "dtype": str(parameter.dtype).removeprefix("torch."),
            "attn_implementation": adapter.attn_implementation,
            "n_layers": adapter.n_layers,
            "d_model": adapter.d_model,
            "n_heads": adapter.n_heads,
            "n_kv_heads": adapter.n_kv_heads,
            "d_head": adapter.d_head,
            "d_mlp": adapter.d_mlp,
            "vision": _patches(config),
        },
        "modules": {point.name: point.path for point in wanted.points},
        "dtype": wanted.dtype_name,
        "rows": wanted.options(),
        "processor": type(processor).__name__ if processor is not None else None,
        "versions": {
            "microtome": __version__,
            "torch": torch.__version__,
            "transformers": transformers.__version__,
        },
        **(model_facts or {}),
    }
    try:
        return json.loads(json.dumps(facts))  # type: ignore[no-any-return]
    except TypeError as error:
        raise ShapeError(f"model_facts: expected JSON values, found other ({error})") from error


def _patches(config: Any) -> dict[str, Any] | None:
    """How a picture is cut: its size in pixels (None where it is free), pixels a patch, patches a side per token."""
    vision = getattr(config, "vision_config", None)
    if vision is None:
        return None
    size = getattr(vision, "image_size", None)
    merge = getattr(vision, "spatial_merge_size", None) or getattr(config, "scale_factor", None) or 1
    return {
        "image_size": [size, size] if isinstance(size, int) else list(size) if size else None,
        "patch_size": getattr(vision, "patch_size", None),
        "merge": merge,
    }
