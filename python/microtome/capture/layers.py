"""The parts of one decoder layer, told by what its modules are: which project, and to what width."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import Any

from torch import nn

__all__ = [
    "DecoderLayer",
    "Projection",
    "in_features",
    "layer_list",
    "linear_weight",
    "out_features",
    "read_layer",
]

_ATTENTION = re.compile(r"attn|attention", re.IGNORECASE)
_QKV = re.compile(r"(^|_)(q|k|v|query|key|value|qkv|kv)(_|$)|c_attn|wqkv|query_key_value", re.IGNORECASE)
_DOWN = re.compile(r"^(down_proj|c_proj|fc2|w2|fc_out|dense_4h_to_h|wo|output_linear)$")
_STACKED = re.compile(r"^(c_attn|qkv_proj|qkv|wqkv)$", re.IGNORECASE)


@dataclass(frozen=True, eq=False)
class Projection:
    """A linear map, or a range of the output columns of a fused one."""

    path: str
    module: Any
    columns: tuple[int, int] | None = None
    """Start and stop in the module's output; None for all of it."""


@dataclass(frozen=True, eq=False)
class DecoderLayer:
    """One decoder layer and its parts; a part the layer does not have is None."""

    index: int
    path: str
    module: Any
    attention: Projection | None
    """The attention module as a whole."""
    q_proj: Projection | None
    k_proj: Projection | None
    v_proj: Projection | None
    o_proj: Projection | None
    """Its input is every head's output z, side by side."""
    mlp: Projection | None
    down_proj: Projection | None
    """Its input is the neurons; None in a mixture of experts."""
    n_heads: int
    n_kv_heads: int
    d_head: int
    norms: dict[str, Any] = field(default_factory=dict)
    """The layer's own norms by attribute name, in order."""

    @property
    def d_mlp(self) -> int:
        """Neurons of the layer, 0 where they are not one vector."""
        return in_features(self.down_proj.module) if self.down_proj else 0


def out_features(module: Any) -> int:
    """Output width of a linear map (``Linear``, ``Conv1D``, quantised, adapted), 0 for anything else."""
    found = getattr(module, "out_features", getattr(module, "nf", 0))
    return found if isinstance(found, int) else 0


def in_features(module: Any) -> int:
    """Input width of a linear map, 0 for anything else."""
    found = getattr(module, "in_features", None) or getattr(module, "nx", None)
    if found is None and out_features(module) and getattr(module, "weight", None) is not None:
        found = module.weight.shape[0]
    return found if isinstance(found, int) else 0


def linear_weight(module: Any) -> Any:
    """The weight as ``(out_features, in_features)``, a view also where the module keeps it transposed."""
    return module.weight.T if hasattr(module, "nf") else module.weight


def layer_list(tower: nn.Module) -> tuple[str, nn.ModuleList] | None:
    """Path and list of a tower's layers: the longest list of modules that attend, the outermost of equals."""
    found: tuple[str, nn.ModuleList] | None = None
    for path, module in tower.named_modules():
        if not isinstance(module, nn.ModuleList) or not len(module):
            continue
        attends = any(
            _ATTENTION.search(f"{name} {type(m).__name__}") for name, m in module[0].named_modules()
        )
        if attends and (found is None or len(module) > len(found[1])):
            found = path, module
    return found


def read_layer(index: int, path: str, layer: nn.Module, d_model: int, config: Any) -> DecoderLayer:
    """Find the parts of one layer.

    The attention is the first child that attends; its output projection the last of its linear maps onto
    d_model that is no query, key or value. The MLP is the remaining child with linear maps, its down
    projection the map onto d_model.
    """
    attention = next((c for c in layer.named_children() if _is_attention(*c)), None)
    n_heads, n_kv_heads = _head_counts(config)
    q = k = v = o = None
    d_head = 0
    if attention is not None:
        inner = f"{path}.{attention[0]}"
        o = _output_projection(inner, attention[1], d_model)
        d_head = in_features(o.module) // n_heads if o else 0
        q, k, v = _query_key_value(inner, attention[1], n_heads * d_head, n_kv_heads * d_head)
    mlp, down = _feed_forward(path, layer, attention and attention[1], d_model)
    norms = {name: m for name, m in layer.named_children() if "norm" in type(m).__name__.lower()}
    whole = Projection(f"{path}.{attention[0]}", attention[1]) if attention else None
    return DecoderLayer(index, path, layer, whole, q, k, v, o, mlp, down, n_heads, n_kv_heads, d_head, norms)


def _head_counts(config: Any) -> tuple[int, int]:
    n_heads = getattr(config, "num_attention_heads", None) or 1
    n_kv_heads = getattr(config, "num_key_value_heads", None) or n_heads
    if getattr(config, "multi_query", False):
        n_kv_heads = 1
    return n_heads, n_kv_heads


def _is_attention(name: str, module: nn.Module) -> bool:
    named = _ATTENTION.search(f"{name} {type(module).__name__}") and "norm" not in name
    return bool(named) and any(out_features(m) for m in module.modules())


def _output_projection(path: str, attention: nn.Module, d_model: int) -> Projection | None:
    found = [
        (name, m)
        for name, m in attention.named_modules()
        if out_features(m) == d_model and not _QKV.search(name.rpartition(".")[2])
    ]
    return Projection(f"{path}.{found[-1][0]}", found[-1][1]) if found else None


def _query_key_value(path: str, attention: nn.Module, width: int, kv_width: int) -> list[Projection | None]:
    """The three projections, separate or cut out of one that stacks them as ``[q | k | v]``.

    Interleaved fusions (per head or per group) and gated queries have other widths or names and are left out.
    """
    separate: list[Projection | None] = []
    for letter, wanted in (("q", width), ("k", kv_width), ("v", kv_width)):
        name = next((n for n, m in attention.named_children() if re.match(rf"{letter}(_|$)", n)), None)
        module = getattr(attention, name) if name else None
        separate.append(
            Projection(f"{path}.{name}", module) if out_features(module) == wanted and wanted else None
        )
    if any(separate):
        return separate
    for name, module in attention.named_children():
        if _STACKED.match(name) and out_features(module) == width + 2 * kv_width:
            cuts = [(0, width), (width, width + kv_width), (width + kv_width, width + 2 * kv_width)]
            return [Projection(f"{path}.{name}", module, cut) for cut in cuts]
    return [None, None, None]


def _feed_forward(
    path: str, layer: nn.Module, attention: nn.Module | None, d_model: int
) -> tuple[Projection | None, Projection | None]:
    """The MLP and its down projection, which is all there is where the maps lie in the layer itself."""
    children = [(n, m) for n, m in layer.named_children() if m is not attention and not _is_attention(n, m)]
    blocks = [
        (n, m)
        for n, m in children
        if any(True for _ in m.parameters()) and "norm" not in type(m).__name__.lower()
    ]
    named = [(n, m) for n, m in blocks if not out_features(m)]
    if named:
        name, mlp = next(((n, m) for n, m in named if re.search(r"mlp|feed_?forward|ffn|moe", n)), named[-1])
        down = _down_projection(f"{path}.{name}", mlp.named_children(), d_model)
        return Projection(f"{path}.{name}", mlp), down
    down = _down_projection(path, blocks, d_model)
    return (down, down) if down else (None, None)


def _down_projection(path: str, children: Any, d_model: int) -> Projection | None:
    onto = [(n, m) for n, m in children if out_features(m) == d_model]
    name, module = next(((n, m) for n, m in onto if _DOWN.match(n)), onto[-1] if onto else ("", None))
    return Projection(f"{path}.{name}", module) if module is not None else None
