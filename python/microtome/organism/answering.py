"""What a model answers: the most likely next token of each prompt."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from microtome.organism.tasks import Item
from microtome.tensors import extra


def predict(model: Any, processor: Any, items: Sequence[Item], batch_size: int = 128) -> list[str]:
    """The word a model gives to each item.

    Args:
        model: A causal language model (textual items only) or a VLM of the organism's vocabulary.
        processor: The organism's processor.
        items: Prompts, of any mixture of tasks and forms.
        batch_size: Prompts a forward pass.

    Returns:
        One word an item.
    """
    torch = extra("torch", "models")
    words: dict[int, str] = {}
    for form in ("visual", "textual"):
        numbers = [i for i, item in enumerate(items) if item.form == form]
        for start in range(0, len(numbers), batch_size):
            chosen = numbers[start : start + batch_size]
            inputs = _inputs(processor, [items[i] for i in chosen])
            with torch.inference_mode():
                logits = model(
                    **inputs.to(model.device), use_cache=False, logits_to_keep=1
                ).logits  # (b, 1, vocabulary)
            best = processor.tokenizer.convert_ids_to_tokens(logits[:, -1].argmax(-1).tolist())
            words.update(zip(chosen, best, strict=True))
    return [words[i] for i in range(len(items))]


def _inputs(processor: Any, items: list[Item]) -> Any:
    prompts = [item.prompt for item in items]
    if items[0].image is None:
        return processor.tokenizer(prompts, padding=True, return_tensors="pt", return_token_type_ids=False)
    return processor(text=prompts, images=[item.image for item in items], padding=True, return_tensors="pt")


def accuracy(model: Any, processor: Any, items: Sequence[Item]) -> float:
    """The share of items answered right; NaN for none."""
    given = predict(model, processor, items)
    right = sum(word == item.answer for word, item in zip(given, items, strict=True))
    return right / len(items) if items else float("nan")
