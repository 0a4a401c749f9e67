"""Randomly initialised models of every common family, small enough for tests.

No hub, no tokenizer files, no torchvision.

``build(name)`` gives a :class:`Tiny`: the model and a way to make batches of its inputs, padded on either
side, with or without an image per sample. Sizes are those of the constants below; families differ in what a
real checkpoint of theirs differs in.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
import transformers as T  # noqa: N812
from PIL import Image

D_MODEL, N_LAYERS, N_HEADS, N_KV_HEADS, D_MLP, D_HEAD = 64, 3, 4, 2, 128, 16
VISION = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
PAD, BOS, EOS, IMAGE, VIDEO, OPEN, CLOSE, BREAK = range(8)
WORDS = range(16, 64)
VOCABULARY = 64


@dataclass
class Tiny:
    """A model and its inputs."""

    name: str
    model: Any
    image_processor: Any = None
    placeholders: Callable[[dict[str, Any], int], list[int]] | None = None
    """(pixel inputs, number of the image) -> the tokens that stand for it."""
    more_inputs: Callable[[torch.Tensor], dict[str, Any]] = field(default=lambda ids: {})

    def batch(
        self,
        lengths: Sequence[int] = (5,),
        images: Sequence[bool] | bool = True,
        seed: int = 0,
        side: str = "left",
        size: tuple[int, int] | Sequence[tuple[int, int]] = (56, 56),
    ) -> dict[str, Any]:
        """Inputs of one forward: ``lengths[i]`` words, after an image where ``images[i]``, padded."""
        rng = np.random.default_rng(seed)
        wanted = [
            bool(self.image_processor) and (images if isinstance(images, bool) else images[i])
            for i in range(len(lengths))
        ]
        sizes = [size] * len(lengths) if isinstance(size[0], int) else list(size)
        pictures = [random_image(rng, sizes[i]) for i, want in enumerate(wanted) if want]
        pixels = self._pixels(pictures)
        rows, seen = [], 0
        for n_words, want in zip(lengths, wanted, strict=True):
            row = [BOS, *(self.placeholders(pixels, seen) if want else [])]
            seen += want
            rows.append(row + rng.choice(WORDS, n_words).tolist())
        ids, mask = pad(rows, side)
        return {"input_ids": ids, "attention_mask": mask, **pixels, **self.more_inputs(ids)}

    def _pixels(self, pictures: list[Image.Image]) -> dict[str, Any]:
        if not pictures:
            return {}
        nested = self.name in ("idefics3", "smolvlm")
        found = dict(
            self.image_processor([[p] for p in pictures] if nested else pictures, return_tensors="pt")
        )
        return {key: value for key, value in found.items() if key not in ("rows", "cols", "num_crops")}


def random_image(rng: np.random.Generator, size: tuple[int, int]) -> Image.Image:
    """Noise of ``size`` (width, height)."""
    return Image.fromarray(rng.integers(0, 255, (size[1], size[0], 3), dtype=np.uint8))


def pad(rows: list[list[int]], side: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Token ids and attention mask, both ``(len(rows), longest)``."""
    longest = max(map(len, rows))
    gaps = [longest - len(row) for row in rows]
    left = side == "left"
    ids = [[PAD] * gap + row if left else row + [PAD] * gap for row, gap in zip(rows, gaps, strict=True)]
    mask = [
        [0] * gap + [1] * len(row) if left else [1] * len(row) + [0] * gap
        for row, gap in zip(rows, gaps, strict=True)
    ]
    return torch.tensor(ids), torch.tensor(mask)


def text_config(cls: Any, **changes: Any) -> Any:
    """A decoder's configuration."""
    sizes = {
        "vocab_size": VOCABULARY,
        "hidden_size": D_MODEL,
        "intermediate_size": D_MLP,
        "num_hidden_layers": N_LAYERS,
        "num_attention_heads": N_HEADS,
        "num_key_value_heads": N_KV_HEADS,
        "max_position_embeddings": 512,
        "pad_token_id": PAD,
        "bos_token_id": BOS,
        "eos_token_id": EOS,
    }
    return cls(**{**sizes, **changes})


def clip_config() -> Any:
    return T.CLIPVisionConfig(**VISION, image_size=56, patch_size=14, projection_dim=32)


def siglip_config(**changes: Any) -> Any:
    return T.SiglipVisionConfig(**VISION, image_size=56, patch_size=14, vision_use_head=False, **changes)


def clip_images() -> Any:
    return T.CLIPImageProcessorPil(size={"shortest_edge": 56}, crop_size={"height": 56, "width": 56})


def repeat(
    n: int, *, before: Sequence[int] = (), after: Sequence[int] = ()
) -> Callable[[dict[str, Any], int], list[int]]:
    """The same number of placeholders for every image, between wrappers."""
    return lambda pixels, i: [*before, *[IMAGE] * n, *after]


def llava() -> Tiny:
    config = T.LlavaConfig(
        vision_config=clip_config(),
        text_config=text_config(T.LlamaConfig),
        image_token_id=IMAGE,
        vision_feature_layer=-2,
        vision_feature_select_strategy="default",
    )
    return Tiny("llava", T.LlavaForConditionalGeneration(config), clip_images(), repeat(16))


def llava_next() -> Tiny:
    grids = [[56, 112], [112, 56], [112, 112]]
    config = T.LlavaNextConfig(
        vision_config=clip_config(),
        text_config=text_config(T.LlamaConfig),
        image_token_id=IMAGE,
        vision_feature_layer=-2,
        vision_feature_select_strategy="default",
        image_grid_pinpoints=grids,
    )
    images = T.LlavaNextImageProcessorPil(
        size={"shortest_edge": 56}, crop_size={"height": 56, "width": 56}, image_grid_pinpoints=grids
    )

    def tokens(pixels: dict[str, Any], i: int) -> list[int]:
        # 16 of the thumbnail, then the tiles without the padding and a newline feature per row of patches
        height, width = pixels["image_sizes"][i].tolist()
        rows, columns = {True: (4, 8), False: (8, 4)}[width > height] if width != height else (4, 4)
        return [IMAGE] * (16 + rows * columns + rows)

    return Tiny("llava_next", T.LlavaNextForConditionalGeneration(config), images, tokens)


def _qwen(name: str, config_class: str, model_class: str, vision: Any, patch: int, **rope: Any) -> Tiny:
    module = __import__(f"transformers.models.{name}.configuration_{name}", fromlist=["x"])
    text = text_config(
        getattr(module, config_class.replace("Config", "TextConfig")),
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 3, 3], **rope},
        **({"head_dim": D_HEAD} if name == "qwen3_vl" else {}),
    )
    config = getattr(T, config_class)(
        text_config=text,
        vision_config=vision(module),
        image_token_id=IMAGE,
        video_token_id=VIDEO,
        vision_start_token_id=OPEN,
        vision_end_token_id=CLOSE,
    )
    images = T.Qwen2VLImageProcessorPil(
        patch_size=patch,
        merge_size=2,
        size={"shortest_edge": (4 * patch) ** 2, "longest_edge": (8 * patch) ** 2},
    )

    def tokens(pixels: dict[str, Any], i: int) -> list[int]:
        return [OPEN, *[IMAGE] * (int(pixels["image_grid_thw"][i].prod()) // 4), CLOSE]

    def types(ids: torch.Tensor) -> dict[str, Any]:
        # 0 text, 1 image, 2 video: the multimodal RoPE asks for it
        return {"mm_token_type_ids": (ids == IMAGE).int() + 2 * (ids == VIDEO).int()}

    return Tiny(name, getattr(T, model_class)(config), images, tokens, types)


def qwen2_vl() -> Tiny:
    def vision(module: Any) -> Any:
        sizes = {"depth": 2, "embed_dim": 32, "hidden_size": D_MODEL, "num_heads": 4, "mlp_ratio": 2}
        return module.Qwen2VLVisionConfig(**sizes, patch_size=14)

    return _qwen("qwen2_vl", "Qwen2VLConfig", "Qwen2VLForConditionalGeneration", vision, 14)


def qwen2_5_vl() -> Tiny:
    def vision(module: Any) -> Any:
        return module.Qwen2_5_VLVisionConfig(
            depth=2,
            hidden_size=32,
            out_hidden_size=D_MODEL,
            intermediate_size=64,
            num_heads=4,
            patch_size=14,
            window_size=56,
            fullatt_block_indexes=[1],
        )

    return _qwen("qwen2_5_vl", "Qwen2_5_VLConfig", "Qwen2_5_VLForConditionalGeneration", vision, 14)


def qwen3_vl() -> Tiny:
    def vision(module: Any) -> Any:
        return module.Qwen3VLVisionConfig(
            depth=3,
            hidden_size=32,
            out_hidden_size=D_MODEL,
            intermediate_size=64,
            num_heads=4,
            patch_size=16,
            num_position_embeddings=64,
            deepstack_visual_indexes=[0, 1],
        )

    return _qwen(
        "qwen3_vl", "Qwen3VLConfig", "Qwen3VLForConditionalGeneration", vision, 16, mrope_interleaved=True
    )


def gemma3() -> Tiny:
    text = text_config(
        T.Gemma3TextConfig,
        head_dim=D_HEAD,
        query_pre_attn_scalar=16,
        sliding_window=16,
        layer_types=["sliding_attention", "sliding_attention", "full_attention"],
    )
    config = T.Gemma3Config(
        vision_config=siglip_config(),
        text_config=text,
        mm_tokens_per_image=4,
        boi_token_index=OPEN,
        eoi_token_index=CLOSE,
        image_token_index=IMAGE,
    )
    images = T.Gemma3ImageProcessorPil(size={"height": 56, "width": 56})
    return Tiny(
        "gemma3", T.Gemma3ForConditionalGeneration(config), images, repeat(4, before=[OPEN], after=[CLOSE])
    )


def _pixtral_tokens(merge: int) -> Callable[[dict[str, Any], int], list[int]]:
    """Rows of placeholders, a break after each and an end after the last."""

    def tokens(pixels: dict[str, Any], i: int) -> list[int]:
        rows, columns = (int(edge) // (14 * merge) for edge in pixels["image_sizes"][i])
        return [*([*[IMAGE] * columns, BREAK] * rows)[:-1], CLOSE]

    return tokens


def mistral3() -> Tiny:
    vision = T.PixtralVisionConfig(**VISION, image_size=112, patch_size=14)
    text = text_config(T.MistralConfig, head_dim=D_HEAD, sliding_window=None)
    config = T.Mistral3Config(
        vision_config=vision,
        text_config=text,
        image_token_index=IMAGE,
        spatial_merge_size=2,
        vision_feature_layer=-1,
    )
    images = T.PixtralImageProcessorPil(patch_size={"height": 14, "width": 14}, size={"longest_edge": 112})
    return Tiny("mistral3", T.Mistral3ForConditionalGeneration(config), images, _pixtral_tokens(2))


def pixtral() -> Tiny:
    vision = T.PixtralVisionConfig(**VISION, image_size=56, patch_size=14)
    text = text_config(T.MistralConfig, head_dim=D_HEAD, sliding_window=None)
    config = T.LlavaConfig(
        vision_config=vision,
        text_config=text,
        image_token_id=IMAGE,
        vision_feature_layer=-1,
        vision_feature_select_strategy="full",
    )
    images = T.PixtralImageProcessorPil(patch_size={"height": 14, "width": 14}, size={"longest_edge": 56})
    return Tiny("pixtral", T.LlavaForConditionalGeneration(config), images, _pixtral_tokens(1))


def _idefics(name: str, family: str) -> Tiny:
    module = __import__(f"transformers.models.{name}.configuration_{name}", fromlist=["x"])
    vision = getattr(module, f"{family}VisionConfig")(**VISION, image_size=56, patch_size=14)
    config = getattr(T, f"{family}Config")(
        vision_config=vision,
        text_config=text_config(T.LlamaConfig),
        image_token_id=IMAGE,
        scale_factor=2,
        pad_token_id=PAD,
    )
    images = getattr(T, f"{family}ImageProcessorPil")(
        size={"longest_edge": 112}, max_image_size={"longest_edge": 56}, do_image_splitting=False
    )
    model = getattr(T, f"{family}ForConditionalGeneration")(config)
    return Tiny(name, model, images, repeat(4, before=[OPEN, BREAK], after=[OPEN]))


def idefics3() -> Tiny:
    return _idefics("idefics3", "Idefics3")


def smolvlm() -> Tiny:
    return _idefics("smolvlm", "SmolVLM")


def paligemma() -> Tiny:
    text = text_config(T.GemmaConfig, head_dim=D_HEAD)
    config = T.PaliGemmaConfig(
        vision_config=siglip_config(projection_dim=D_MODEL),
        text_config=text,
        image_token_index=IMAGE,
        projection_dim=D_MODEL,
        hidden_size=D_MODEL,
    )
    images = T.SiglipImageProcessorPil(size={"height": 56, "width": 56})
    return Tiny("paligemma", T.PaliGemmaForConditionalGeneration(config), images, repeat(16))


def internvl() -> Tiny:
    vision = T.InternVLVisionConfig(**VISION, image_size=[56, 56], patch_size=[14, 14])
    config = T.InternVLConfig(
        vision_config=vision,
        text_config=text_config(T.Qwen2Config),
        image_token_id=IMAGE,
        image_seq_length=4,
        downsample_ratio=0.5,
        vision_feature_layer=-1,
    )
    return Tiny("internvl", T.InternVLForConditionalGeneration(config), clip_images(), repeat(4))


def llama() -> Tiny:
    return Tiny("llama", T.LlamaForCausalLM(text_config(T.LlamaConfig)))


def qwen2() -> Tiny:
    return Tiny("qwen2", T.Qwen2ForCausalLM(text_config(T.Qwen2Config)))


def gemma() -> Tiny:
    return Tiny("gemma", T.GemmaForCausalLM(text_config(T.GemmaConfig, head_dim=D_HEAD)))


def gpt2() -> Tiny:
    config = T.GPT2Config(
        vocab_size=VOCABULARY,
        n_embd=D_MODEL,
        n_layer=N_LAYERS,
        n_head=N_HEADS,
        n_inner=D_MLP,
        n_positions=512,
        pad_token_id=PAD,
        bos_token_id=BOS,
        eos_token_id=EOS,
    )
    return Tiny("gpt2", T.GPT2LMHeadModel(config))


VLMS = {
    f.__name__: f
    for f in (
        llava,
        llava_next,
        qwen2_vl,
        qwen2_5_vl,
        qwen3_vl,
        gemma3,
        mistral3,
        pixtral,
        idefics3,
        smolvlm,
        paligemma,
        internvl,
    )
}
LANGUAGE_MODELS = {f.__name__: f for f in (llama, qwen2, gemma, gpt2)}
FAMILIES = {**VLMS, **LANGUAGE_MODELS}


def build(name: str, seed: int = 0) -> Tiny:
    """The family's model in evaluation mode, with weights fixed by the seed."""
    torch.manual_seed(seed)
    tiny = FAMILIES[name]()
    tiny.model.eval()
    return tiny
