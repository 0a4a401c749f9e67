"""The model organism: a small language model, the LLaVA-style VLM made from it, and what they are asked.

    >>> from microtome import organism
    >>> item = organism.questions("colour", "visual", 1)[0]
    >>> item.prompt
    '<image> what colour is circle ?'

Both models are stock transformers classes and load offline: what runs on them runs on published LLaVA models.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

from microtome.errors import ShapeError
from microtome.organism.answering import accuracy, predict
from microtome.organism.tasks import (
    FORMS,
    QUESTION_KINDS,
    TASKS,
    Item,
    Pair,
    answers,
    dataset,
    pairs,
    questions,
)
from microtome.tensors import extra

__all__ = [
    "FORMS",
    "QUESTION_KINDS",
    "TASKS",
    "Item",
    "Pair",
    "accuracy",
    "answers",
    "dataset",
    "load_model",
    "load_processor",
    "load_tokenizer",
    "pairs",
    "path",
    "predict",
    "questions",
]

Which = Literal["vlm", "base_lm"]

_CLASSES = {"vlm": "LlavaForConditionalGeneration", "base_lm": "LlamaForCausalLM"}


def path(which: str = "vlm") -> Path:
    """The folder of a bundled model, as ``from_pretrained`` takes it.

    Args:
        which: ``"vlm"`` or ``"base_lm"``.

    Raises:
        ShapeError: ``which`` is neither.
    """
    if which not in _CLASSES:
        raise ShapeError(f"organism: which: expected vlm or base_lm, found {which!r}")
    return Path(__file__).with_name("weights") / which


def load_model(which: str = "vlm", dtype: str = "float32") -> Any:
    """A bundled model in evaluation mode.

    Args:
        which: ``"vlm"`` (``LlavaForConditionalGeneration``) or ``"base_lm"`` (``LlamaForCausalLM``).
        dtype: Element type of the weights; they are stored in bfloat16.

    Raises:
        ShapeError: There is no such model.
        MissingExtraError: transformers is not installed.
    """
    folder = path(which)
    model_class = getattr(extra("transformers", "models"), _CLASSES[which])
    return model_class.from_pretrained(folder, dtype=dtype, local_files_only=True).eval()


def load_processor() -> Any:
    """The processor of the VLM: ``processor(text=item.prompt, images=item.image, return_tensors="pt")``.

    Raises:
        MissingExtraError: transformers is not installed.
    """
    return extra("transformers", "models").AutoProcessor.from_pretrained(path("vlm"), local_files_only=True)


def load_tokenizer() -> Any:
    """The tokenizer of both models, one token a word, ``<bos>`` first.

    Raises:
        MissingExtraError: transformers is not installed.
    """
    return extra("transformers", "models").AutoTokenizer.from_pretrained(
        path("base_lm"), local_files_only=True
    )
