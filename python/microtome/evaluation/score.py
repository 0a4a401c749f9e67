"""Single-token answers of a model to a list of questions, in batches of equal length."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any, Protocol

import polars as pl

from microtome.errors import ShapeError
from microtome.progress import bar

if TYPE_CHECKING:
    from microtome.capture import Recorder

__all__ = ["Question", "accuracy", "encode", "equal_length_batches", "score"]


class Question(Protocol):
    """What is asked: a prompt, perhaps an image, and the one-token answer."""

    @property
    def id(self) -> str:
        """Name of the question, unique in its list."""

    @property
    def prompt(self) -> str:
        """The prompt as the processor takes it."""

    @property
    def image(self) -> Any:
        """A PIL image, or None."""

    @property
    def answer(self) -> str:
        """The right answer, one token."""

    @property
    def task(self) -> str:
        """The task it belongs to."""

    @property
    def form(self) -> str:
        """``"visual"`` or ``"textual"``."""


def encode(processor: Any, items: Sequence[Question]) -> dict[str, Any]:
    """Model inputs for ``items``, which all have an image or all have none; left-padded tensors."""
    images = [item.image for item in items if item.image is not None]
    if images and len(images) != len(items):
        raise ShapeError(
            f"items: expected an image in every item or in none, found {len(images)} of {len(items)}"
        )
    prompts = [item.prompt for item in items]
    tokenizer = getattr(processor, "tokenizer", processor)
    tokenizer.padding_side = "left"
    if images:
        batch = processor(images=images, text=prompts, return_tensors="pt", padding=True)
    else:
        batch = tokenizer(prompts, return_tensors="pt", padding=True)
        batch.pop("token_type_ids", None)
    batch.pop("labels", None)
    return dict(batch)


def equal_length_batches(
    processor: Any, items: Sequence[Question], batch_size: int
) -> Iterator[tuple[list[Question], dict[str, Any]]]:
    """Batches of items whose prompts have the same form and the same number of words, so that padding is rare."""
    groups: dict[tuple[bool, int], list[Question]] = defaultdict(list)
    for item in items:
        groups[item.image is not None, len(item.prompt.split())].append(item)
    for group in groups.values():
        for start in range(0, len(group), batch_size):
            part = group[start : start + batch_size]
            yield part, encode(processor, part)


def score(
    model: Any,
    processor: Any,
    items: Sequence[Question],
    *,
    batch_size: int = 64,
    recorder: Recorder | None = None,
    label: str = "answering",
    progress: bool = True,
) -> pl.DataFrame:
    """Ask ``model`` every question and compare the most likely next token with the answer.

    Args:
        model: a causal language model or VLM of transformers.
        processor: its processor; a tokenizer suffices where no item has an image.
        items: questions with one-token answers.
        batch_size: questions per forward pass.
        recorder: an open capture; every item becomes one of its samples (columns task, form, answer), and items
            that it holds already are not asked again.
        label: what the progress bar says.
        progress: whether to draw a bar.

    Returns:
        One row per question asked: id, task, form, answer, predicted, correct, p_correct (softmax over the vocabulary).
    """
    import torch

    tokenizer = getattr(processor, "tokenizer", processor)
    asked = [item for item in items if recorder is None or item.id not in recorder.done]
    rows: list[dict[str, Any]] = []
    with torch.inference_mode(), bar(label, len(asked), progress, "questions") as done:
        for part, batch in equal_length_batches(processor, asked, batch_size):
            if recorder is not None:
                columns = {
                    name: [getattr(item, name) for item in part] for name in ("task", "form", "answer")
                }
                recorder.samples(ids=[item.id for item in part], **columns)
            inputs = {name: value.to(model.device) for name, value in batch.items()}
            logits = model(**inputs, use_cache=False).logits[:, -1].float()  # (batch, vocabulary)
            rows += _rows(part, logits, tokenizer)
            done(len(rows))
    schema = {"id": pl.String, "task": pl.String, "form": pl.String, "answer": pl.String}
    return pl.DataFrame(
        rows, schema=schema | {"predicted": pl.String, "correct": pl.Boolean, "p_correct": pl.Float64}
    )


def _rows(part: list[Question], logits: Any, tokenizer: Any) -> list[dict[str, Any]]:
    predicted = tokenizer.convert_ids_to_tokens(logits.argmax(-1).tolist())
    wanted = tokenizer.convert_tokens_to_ids([item.answer for item in part])
    p_correct = logits.softmax(-1)[range(len(part)), wanted].tolist()
    return [
        {"id": item.id, "task": item.task, "form": item.form, "answer": item.answer}
        | {"predicted": said, "correct": said == item.answer, "p_correct": p}
        for item, said, p in zip(part, predicted, p_correct, strict=True)
    ]


def accuracy(scores: pl.DataFrame, by: Sequence[str] = ("task", "form")) -> pl.DataFrame:
    """Share of right answers for each group, with its Wilson 95 % interval.

    Returns:
        One row per group: the columns of ``by``, n, accuracy, low, high.
    """
    z = 1.959963984540054
    p, n = pl.col("accuracy"), pl.col("n")
    middle, spread = (
        (p + z**2 / (2 * n)) / (1 + z**2 / n),
        z / (1 + z**2 / n) * (p * (1 - p) / n + z**2 / (4 * n**2)).sqrt(),
    )
    grouped = scores.group_by(*by, maintain_order=True).agg(n=pl.len(), accuracy=pl.col("correct").mean())
    return grouped.with_columns(low=middle - spread, high=middle + spread)
