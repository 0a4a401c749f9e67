"""The organism's models before training: configurations, and the VLM put together from its two sides."""

from __future__ import annotations

from transformers import (
    CLIPVisionConfig,
    CLIPVisionModel,
    LlamaConfig,
    LlamaForCausalLM,
    LlavaConfig,
    LlavaForConditionalGeneration,
)

from microtome.organism.kinds import WORDS
from microtome.organism.render import CELL, SIDE
from microtome.organism.scenes import CELLS


def text_config() -> LlamaConfig:
    """The language side: 6 layers, d = 128, 4 heads."""
    return LlamaConfig(
        vocab_size=len(WORDS),
        hidden_size=128,
        intermediate_size=384,
        num_hidden_layers=6,
        num_attention_heads=4,
        num_key_value_heads=4,
        max_position_embeddings=256,
        tie_word_embeddings=True,
        initializer_range=0.08,  # about d ** -0.5: attention starts peaked enough for heads to form
        pad_token_id=WORDS.index("<pad>"),
        bos_token_id=WORDS.index("<bos>"),
        eos_token_id=WORDS.index("<eos>"),
    )


def vision_config() -> CLIPVisionConfig:
    """The vision side: 3 layers, d = 96, 16 patches and a class token."""
    return CLIPVisionConfig(
        hidden_size=96,
        intermediate_size=384,
        num_hidden_layers=3,
        num_attention_heads=4,
        image_size=SIDE,
        patch_size=CELL,
        projection_dim=96,
    )


def llava_config() -> LlavaConfig:
    """Both sides and LLaVA's projector; it reads the last vision layer but one, without the class token."""
    return LlavaConfig(
        vision_config=vision_config(),
        text_config=text_config(),
        image_token_id=WORDS.index("<image>"),
        image_seq_length=CELLS,
        vision_feature_layer=-2,
        vision_feature_select_strategy="default",
        tie_word_embeddings=True,
        pad_token_id=WORDS.index("<pad>"),
        bos_token_id=WORDS.index("<bos>"),
        eos_token_id=WORDS.index("<eos>"),
    )


def assemble(language: LlamaForCausalLM, vision: CLIPVisionModel) -> LlavaForConditionalGeneration:
    """The VLM with the weights of both sides and a new projector."""
    vlm = LlavaForConditionalGeneration(llava_config())
    vlm.model.language_model.load_state_dict(language.model.state_dict())
    vlm.model.vision_tower.load_state_dict(vision.state_dict())
    vlm.tie_weights()
    return vlm
