"""Where a model keeps its layers, heads, neurons and image tokens, read from the model itself.

The decoder is what ``get_decoder()`` returns, its layers the list of modules that attend; the vision tower
and the projector are its neighbours. No table of model names is involved, so a new architecture of the usual
shape works as it is.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from microtome.capture.layers import DecoderLayer, Projection, layer_list, out_features, read_layer
from microtome.capture.points import HookPoint, Side, Space, select
from microtome.errors import Error

__all__ = ["ModelAdapter", "VisionTower", "adapt"]

TEXT, IMAGE, VIDEO = 0, 1, 2
"""Kinds of a row, as stored."""

_PROJECTOR = re.compile(r"projector|connector|merger|aligner|resampler|mlp1", re.IGNORECASE)


@dataclass(frozen=True, eq=False)
class VisionTower:
    """The vision encoder and its layers."""

    path: str
    module: Any
    layers: list[Any]
    layers_path: str
    width: int | None


@dataclass(frozen=True, eq=False)
class ModelAdapter:
    """One model, its parts by their common names; made by :func:`adapt`."""

    model: Any
    decoder: Any
    decoder_path: str
    layers: list[DecoderLayer]
    n_layers: int
    d_model: int
    n_heads: int
    n_kv_heads: int
    d_head: int
    d_mlp: int
    d_vocab: int
    embedding: Any
    """The token embedding."""
    final_norm: Any
    lm_head: Any
    vision: VisionTower | None
    projector: Projection | None
    """From the tower's width to the decoder's; inside the tower in the Qwen family."""
    image_token_id: int | None
    video_token_id: int | None
    deepstack_layers: tuple[int, ...]
    """Decoder layers after which visual features are added outside any module (Qwen3-VL): there
    ``blocks.{i+1}.hook_resid_pre`` is not ``blocks.{i}.hook_resid_post`` at image tokens."""

    @property
    def config(self) -> Any:
        """The model's own configuration."""
        return self.model.config

    @property
    def attn_implementation(self) -> str:
        """``"eager"``, ``"sdpa"`` and so on, of the decoder."""
        return str(getattr(self.config.get_text_config(), "_attn_implementation", None) or "unknown")

    def hook_points(self) -> dict[str, HookPoint]:
        """Every canonical point of the model by name, in the order of the forward pass.

        - ``hook_embed``: what enters the first decoder layer, image features merged in.
        - ``blocks.{i}.hook_resid_pre``, ``.hook_resid_post``: input and output of decoder layer i.
        - ``blocks.{i}.attn.hook_q``, ``hook_k``, ``hook_v``: outputs of the projections, before any norm and
          before RoPE.
        - ``blocks.{i}.attn.hook_pattern``: attention weights (batch, head, query, key). They need eager
          attention, and a wildcard that spells ``pattern``.
        - ``blocks.{i}.attn.hook_z``: the heads' outputs, side by side in the input of the output projection.
        - ``blocks.{i}.hook_attn_out``, ``hook_mlp_out``: what the modules return. Models with post norms
          (Gemma) norm that once more before they add it to the residual stream.
        - ``blocks.{i}.mlp.hook_post``: the neurons, in the input of the down projection.
        - ``vision_encoder.blocks.{i}.hook_resid_post``, ``vision_projector.hook_out``: in the tower's own row
          order (Qwen2.5-VL orders patches by window).
        """
        first = self.layers[0]
        points = [HookPoint("hook_embed", first.path, first.module, "input", "tokens", self.d_model)]
        points += [point for layer in self.layers for point in self._layer_points(layer)]
        if self.vision is not None:
            tower = self.vision
            for i, layer in enumerate(tower.layers):
                name, path = f"vision_encoder.blocks.{i}.hook_resid_post", f"{tower.layers_path}.{i}"
                points.append(HookPoint(name, path, layer, "output", "vision_encoder", tower.width))
        if self.projector is not None:
            path, module = self.projector.path, self.projector.module
            name = "vision_projector.hook_out"
            points.append(HookPoint(name, path, module, "output", "vision_projector", self.d_model))
        return {point.name: point for point in points}

    def select(self, hooks: Iterable[str]) -> list[HookPoint]:
        """The points that the patterns name: canonical names, synonyms, module paths; ``fnmatch`` wildcards.

        Raises:
            ShapeError: a pattern that names nothing in this model.
        """
        modules = dict(self.model.named_modules())
        return select(hooks, self.hook_points(), lambda path: self._native(path, modules[path]), modules)

    def row_kinds(self, input_ids: torch.Tensor) -> torch.Tensor:
        """0 for text, 1 for image, 2 for video, from the placeholder token ids; uint8 of the same shape."""
        kinds = torch.zeros_like(input_ids, dtype=torch.uint8)
        for token, kind in ((self.video_token_id, VIDEO), (self.image_token_id, IMAGE)):
            if token is not None:
                kinds[input_ids == token] = kind
        return kinds

    def special_ids(self, processor: Any = None) -> frozenset[int]:
        """Ids of special tokens: those the configuration names, and those of the processor's tokenizer.

        Beginning, end, padding and the wrappers of images count; the placeholders of image and video features
        do not.
        """
        content = {self.image_token_id, self.video_token_id}
        configs = [self.config, self.config.get_text_config(), getattr(self.model, "generation_config", None)]
        found: set[int] = set()
        for config in configs:
            for key, value in (config.to_dict() if config is not None else {}).items():
                if re.search(r"_token_(id|index)$", key):
                    found.update(
                        v for v in (value if isinstance(value, list) else [value]) if isinstance(v, int)
                    )
        tokenizer = getattr(processor, "tokenizer", processor)
        found.update(
            set(getattr(tokenizer, "all_special_ids", [])) - {getattr(tokenizer, "unk_token_id", None)}
        )
        return frozenset(i for i in found if i not in content and i >= 0)

    def _layer_points(self, layer: DecoderLayer) -> list[HookPoint]:
        d, width, kv_width = self.d_model, layer.n_heads * layer.d_head, layer.n_kv_heads * layer.d_head
        whole = Projection(layer.path, layer.module)
        parts: list[tuple[str, Projection | None, Side, int | None, int, int]] = [
            ("hook_resid_pre", whole, "input", d, 0, 0),
            ("attn.hook_q", layer.q_proj, "output", width, layer.n_heads, 0),
            ("attn.hook_k", layer.k_proj, "output", kv_width, layer.n_kv_heads, 0),
            ("attn.hook_v", layer.v_proj, "output", kv_width, layer.n_kv_heads, 0),
            ("attn.hook_pattern", layer.attention, "output", None, 0, 1),
            ("attn.hook_z", layer.o_proj, "input", width, layer.n_heads, 0),
            ("hook_attn_out", layer.attention, "output", d, 0, 0),
            ("mlp.hook_post", layer.down_proj, "input", layer.d_mlp, 0, 0),
            ("hook_mlp_out", layer.mlp, "output", d, 0, 0),
            ("hook_resid_post", whole, "output", d, 0, 0),
        ]
        return [
            HookPoint(
                f"blocks.{layer.index}.{name}", at.path, at.module, side, "tokens", n, heads, at.columns, item
            )
            for name, at, side, n, heads, item in parts
            if at is not None
        ]

    def _native(self, path: str, module: Any) -> HookPoint:
        """The output of a module by its own path."""
        space: Space = "tokens"
        if self.projector is not None and _within(path, self.projector.path):
            space = "vision_projector"
        elif self.vision is not None and _within(path, self.vision.path):
            space = "vision_encoder"
        canonical = (
            p for p in self.hook_points().values() if p.side == "output" and p.columns is None and p.item == 0
        )
        same = next((p for p in canonical if p.module is module), None)
        width = same.width if same else out_features(module) or getattr(module, "embedding_dim", None)
        return HookPoint(path, path, module, "output", space, width)


def _within(path: str, root: str) -> bool:
    return path == root or path.startswith(f"{root}.")


def adapt(model: Any) -> ModelAdapter:
    """Find the layers, heads, neurons, vision tower and image tokens of a transformers model.

    Args:
        model: a decoder-only language model or a vision-language model around one.

    Raises:
        Error: no decoder layers were found; the message says what was looked for.

    Example:
        >>> from transformers import GPT2Config, GPT2LMHeadModel
        >>> adapter = adapt(GPT2LMHeadModel(GPT2Config(n_layer=2, n_embd=8, n_head=2, vocab_size=10)))
        >>> adapter.n_layers, adapter.d_model, adapter.d_head, adapter.layers[0].o_proj.path
        (2, 8, 4, 'transformer.h.0.attn.c_proj')
    """
    if isinstance(model, ModelAdapter):
        return model
    model = getattr(model, "_orig_mod", model)
    decoder = _decoder(model)
    paths = {module: path for path, module in model.named_modules()}
    found = layer_list(decoder)
    if found is None:
        raise _unknown(model, f"no list of layers with an attention in {type(decoder).__name__}")
    config = model.config.get_text_config()
    d_model = config.hidden_size
    layers_path = ".".join(part for part in (paths[decoder], found[0]) if part)
    layers = [read_layer(i, f"{layers_path}.{i}", layer, d_model, config) for i, layer in enumerate(found[1])]
    attending = next((layer for layer in layers if layer.o_proj is not None), None)
    if attending is None:
        raise _unknown(model, f"no attention with an output projection onto {d_model} in {layers_path}.0")
    vision, projector = _vision(model, decoder, paths, d_model)
    embedding = model.get_input_embeddings()
    return ModelAdapter(
        model,
        decoder,
        paths[decoder],
        layers,
        len(layers),
        d_model,
        attending.n_heads,
        attending.n_kv_heads,
        attending.d_head,
        max(layer.d_mlp for layer in layers),
        embedding.weight.shape[0],
        embedding,
        _final_norm(decoder),
        model.get_output_embeddings(),
        vision,
        projector,
        *_placeholders(model.config),
        _deepstack(model.config),
    )


def _decoder(model: Any) -> Any:
    if not isinstance(model, nn.Module) or not hasattr(getattr(model, "config", None), "get_text_config"):
        raise Error(f"model: expected a transformers model with a config, found {type(model).__name__}")
    if getattr(model.config, "is_encoder_decoder", False):
        raise _unknown(model, "an encoder-decoder, whose decoder has no tokens of the input")
    return model.get_decoder() if hasattr(model, "get_decoder") else model


def _unknown(model: Any, found: str) -> Error:
    return Error(
        f"model: expected a decoder with a list of layers, each with an attention and its output projection "
        f"(get_decoder().layers or the like), found {found}. {type(model).__name__} is not supported"
    )


def _final_norm(decoder: Any) -> Any:
    norms = [
        m for name, m in decoder.named_children() if "norm" in type(m).__name__.lower() and "emb" not in name
    ]
    return norms[-1] if norms else None


def _placeholders(config: Any) -> tuple[int | None, int | None]:
    def first(*names: str) -> int | None:
        found = (getattr(config, name, None) for name in names)
        return next((value for value in found if isinstance(value, int)), None)

    return first("image_token_id", "image_token_index"), first("video_token_id", "video_token_index")


def _deepstack(config: Any) -> tuple[int, ...]:
    indices = getattr(getattr(config, "vision_config", None), "deepstack_visual_indexes", None) or []
    return tuple(range(len(indices)))


def _vision(
    model: Any, decoder: Any, paths: dict[Any, str], d_model: int
) -> tuple[VisionTower | None, Projection | None]:
    tower = model.get_encoder("image") if hasattr(model, "get_encoder") and decoder is not model else None
    if (
        not isinstance(tower, nn.Module)
        or tower is model
        or tower is decoder
        or decoder in set(tower.modules())
    ):
        return None, None
    found = layer_list(tower)
    if found is None:
        return None, _projector(model, decoder, tower, paths, d_model)
    layers_path = f"{paths[tower]}.{found[0]}"
    norms = (
        m.weight.shape[-1]
        for m in found[1][0].modules()
        if "norm" in type(m).__name__.lower() and hasattr(m, "weight")
    )
    vision = VisionTower(paths[tower], tower, list(found[1]), layers_path, next(norms, None))
    return vision, _projector(model, decoder, tower, paths, d_model)


def _projector(
    model: Any, decoder: Any, tower: Any, paths: dict[Any, str], d_model: int
) -> Projection | None:
    """The decoder's neighbour named as one, else the part of the tower that ends at the decoder's width."""
    parent = model.get_submodule(paths[decoder].rpartition(".")[0])
    beside = [(n, m) for n, m in parent.named_children() if any(True for _ in m.parameters())]
    inside = [
        (n, m) for n, m in tower.named_children() if not isinstance(m, nn.ModuleList) and _ends_at(m, d_model)
    ]
    named = (m for n, m in (*beside, *inside) if _PROJECTOR.search(n) and m is not decoder and m is not tower)
    found = next(named, None)
    return Projection(paths[found], found) if found is not None else None


def _ends_at(module: nn.Module, width: int) -> bool:
    widths = [out_features(m) for m in module.modules() if out_features(m)]
    return bool(widths) and widths[-1] == width
