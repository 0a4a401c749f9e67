"""The loop over a data set: read items, make the model's inputs, capture.

Data is a JSONL file, a parquet file, a folder of images, or the folder of a data set saved by the
``datasets`` library. A row has a prompt (``prompt``, ``text`` or ``question``), an image or none, an ``id``
or its number; its other plain columns go into the sample table.
"""

from __future__ import annotations

import inspect
import io
import itertools
import json
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import polars as pl
import torch

from microtome.capture.hooks import capture
from microtome.errors import Error, ShapeError
from microtome.progress import bar
from microtome.tensors import extra

__all__ = ["DataItem", "capture_dataset", "load_model", "model_inputs", "read_items"]

MAX_PIXELS = 100_000_000
"""Pixels of the largest image that is decoded; beyond it a small file could claim all memory."""

_PROMPTS = ("prompt", "text", "question")
_IMAGES = ("image", "image_path", "image_file")
_IMAGE_FILES = {".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff"}
_WINDOW = 32  # batches that are sorted by length together


@dataclass(frozen=True)
class DataItem:
    """One sample of a data set."""

    id: Any
    prompt: str
    image: Any = field(default=None, repr=False)
    """A path, the bytes of an image file, a PIL image, or None."""
    columns: Mapping[str, Any] = field(default_factory=dict)
    """What goes into the sample table beside the id."""


def read_items(
    data: str | os.PathLike[str], *, prompt: str | None = None, limit: int | None = None
) -> list[DataItem]:
    """Read a data set.

    Args:
        data: JSONL or parquet file, folder of images, or folder of a saved data set.
        prompt: the prompt of rows that have none.
        limit: take the first rows only.

    Raises:
        FileNotFoundError: the data or one of its images is not there.
        ShapeError: a row without a prompt, an id twice, or a file of another kind; the message names file and
            row.

    Example:
        >>> import pathlib, tempfile
        >>> path = pathlib.Path(tempfile.mkdtemp()) / "questions.jsonl"
        >>> _ = path.write_text('{"prompt": "is the sky blue ?", "answer": "yes"}')
        >>> read_items(path)[0].columns
        {'answer': 'yes'}
    """
    path = Path(data)
    if not path.exists():
        raise FileNotFoundError(2, "no such data", str(path))
    items = list(itertools.islice(_items(path, prompt), limit))
    if not items:
        raise ShapeError(f"data: {path}: expected rows, found none")
    seen: set[Any] = set()
    for item in items:
        if item.id in seen:
            raise ShapeError(f"data: {path}: expected every id once, found {item.id!r} again")
        seen.add(item.id)
    return items


def _items(path: Path, prompt: str | None) -> Iterator[DataItem]:
    if path.is_dir() and any(path.rglob("*.arrow")):
        frames = (pl.read_ipc_stream(file) for file in sorted(path.rglob("*.arrow")))
        rows: Iterable[Any] = itertools.chain.from_iterable(frame.iter_rows(named=True) for frame in frames)
    elif path.is_dir():
        files = sorted(file for file in path.rglob("*") if file.suffix.lower() in _IMAGE_FILES)
        rows = ({"id": str(file.relative_to(path)), "image": str(file)} for file in files)
    elif path.suffix == ".parquet":
        rows = pl.read_parquet(path, glob=False).iter_rows(named=True)
    elif path.suffix in (".jsonl", ".ndjson"):
        rows = _json_lines(path)
    else:
        raise ShapeError(
            f"data: {path}: expected .jsonl, .parquet or a folder, found {path.suffix or 'no suffix'!r}"
        )
    base = path if path.is_dir() else path.parent
    return (_item(row, f"{path}: row {i}", i, base, prompt) for i, row in enumerate(rows))


def _json_lines(path: Path) -> Iterator[Any]:
    with path.open(encoding="utf-8") as lines:
        for number, line in enumerate(lines, 1):
            if not line.strip():
                continue
            try:
                yield json.loads(line)
            except json.JSONDecodeError as error:
                raise ShapeError(f"data: {path}: line {number}: expected JSON, found {error}") from error


def _item(row: Any, where: str, number: int, base: Path, prompt: str | None) -> DataItem:
    if not isinstance(row, dict):
        raise ShapeError(f"data: {where}: expected an object with a prompt, found {type(row).__name__}")
    text = next((row[name] for name in _PROMPTS if isinstance(row.get(name), str)), prompt)
    if text is None:
        raise ShapeError(
            f"data: {where}: expected one of {list(_PROMPTS)}, found {sorted(row)}. Give prompt=... for all "
            f"rows"
        )
    image = next((row[name] for name in _IMAGES if row.get(name) is not None), None)
    if isinstance(image, dict):  # as the datasets library stores it
        image = image.get("bytes") or image.get("path")
    if isinstance(image, str):
        image = base / image
        if not image.is_file():
            raise FileNotFoundError(2, f"no such image ({where})", str(image))
    taken = {"id", *_IMAGES} | {name for name in _PROMPTS if row.get(name) is text}
    plain = {
        k: v for k, v in row.items() if k not in taken and isinstance(v, (str, int, float, bool, type(None)))
    }
    return DataItem(number if row.get("id") is None else row["id"], text, image, plain)


def load_model(name: str, *, device: str = "cpu", dtype: str = "auto") -> tuple[Any, Any]:
    """Model and processor (or tokenizer) of a local folder or a hub id, in evaluation mode.

    Raises:
        OSError: there is no such model.
        MissingExtraError: transformers is not installed.
    """
    transformers = extra("transformers", "models")
    config = transformers.AutoConfig.from_pretrained(name)
    sees = getattr(config, "vision_config", None) is not None
    model_class = transformers.AutoModelForImageTextToText if sees else transformers.AutoModelForCausalLM
    processor = (transformers.AutoProcessor if sees else transformers.AutoTokenizer).from_pretrained(name)
    model = model_class.from_pretrained(name, dtype=dtype)
    return model.to(device).eval(), processor


def capture_dataset(
    model: Any,
    processor: Any,
    items: Sequence[Any],
    path: str | os.PathLike[str],
    hooks: Iterable[str],
    *,
    batch_size: int = 8,
    chat: bool = False,
    stop_early: bool = True,
    progress: bool = True,
    **options: Any,
) -> int:
    """Run a model over items and capture its activations; what the store holds already is skipped.

    Batches join items of like length and are the same in every run, so a resumed capture writes the same
    bytes. Samples are therefore not stored in the order of the items: the id says which is which.

    Args:
        model: a transformers model.
        processor: its processor, or its tokenizer where no item has an image.
        items: objects with id, prompt, image and perhaps columns, such as :class:`DataItem` or the organism's
            items (whose task, form and answer become columns).
        path: folder of the store.
        hooks: as in :func:`microtome.capture.capture`.
        batch_size: samples per forward.
        chat: wrap prompts in the model's chat template.
        stop_early: leave the model after the last wanted value.
        progress: draw a bar on a terminal.
        **options: further arguments of :func:`microtome.capture.capture`.

    Returns:
        Number of samples captured by this call.
    """
    if not isinstance(batch_size, int) or batch_size < 1:
        raise ShapeError(f"batch_size: expected a positive integer, found {batch_size!r}")
    columns = dict(zip([item.id for item in items], _columns(items), strict=True))
    extras = {"use_cache": False} if _accepts(model, "use_cache") else {}
    captured = passed = 0
    recorder = capture(model, path, hooks, stop_early=stop_early, processor=processor, **options)
    with recorder, torch.no_grad(), bar("capturing", len(items), progress, "samples") as show:
        for batch in _batches(items, batch_size):
            fresh = [item for item in batch if item.id not in recorder.done]
            if fresh:
                inputs = model_inputs(model, processor, batch, chat=chat)
                rows = [columns[item.id] for item in batch]
                named = {name: [row[name] for row in rows] for name in rows[0]}
                recorder.samples([item.id for item in batch], **named)
                model(**inputs, **extras)
            captured += len(fresh)
            passed += len(batch)
            show(passed)
    return captured


def _batches(items: Sequence[Any], batch_size: int) -> Iterator[list[Any]]:
    """Items with and without images apart, within a window sorted by the length of their prompts."""
    for seeing in (False, True):
        group = [item for item in items if (item.image is not None) == seeing]
        window = batch_size * _WINDOW
        for start in range(0, len(group), window):
            part = sorted(group[start : start + window], key=lambda item: len(item.prompt))
            yield from (part[i : i + batch_size] for i in range(0, len(part), batch_size))


def _columns(items: Sequence[Any]) -> list[dict[str, Any]]:
    """Columns of the sample table for each item: the union of all, None where an item has none."""
    found = []
    for item in items:
        given = getattr(item, "columns", None)
        names = ("task", "form", "answer")
        found.append(
            dict(given) if given is not None else {n: getattr(item, n) for n in names if hasattr(item, n)}
        )
    union = dict.fromkeys(itertools.chain(*found))
    return [{name: columns.get(name) for name in union} for columns in found]


def model_inputs(model: Any, processor: Any, batch: Sequence[Any], *, chat: bool = False) -> dict[str, Any]:
    """One forward's inputs for items, padded on the left, on the model's device."""
    tokenizer = getattr(processor, "tokenizer", processor)
    images = [_decoded(item.image, item.id) for item in batch if item.image is not None]
    texts = [_prompt(processor, item, chat) for item in batch]
    side, tokenizer.padding_side = tokenizer.padding_side, "left"
    try:
        if tokenizer.pad_token is None:
            tokenizer.pad_token = tokenizer.eos_token
        if images:
            if tokenizer is processor:
                raise Error(
                    "processor: expected one that takes images, found a tokenizer. Load it with AutoProcessor"
                )
            found = dict(processor(images=images, text=texts, padding=True, return_tensors="pt"))
        else:
            found = dict(tokenizer(texts, padding=True, return_tensors="pt"))
    finally:
        tokenizer.padding_side = side
    dropped = [n for n in found if n == "labels" or (n == "token_type_ids" and not _accepts(model, n))]
    for name in dropped:
        del found[name]
    tensors = {
        name: value.to(model.device) for name, value in found.items() if isinstance(value, torch.Tensor)
    }
    return {name: x.to(model.dtype) if x.is_floating_point() else x for name, x in tensors.items()}


def _prompt(processor: Any, item: Any, chat: bool) -> str:
    if chat:
        if not getattr(processor, "chat_template", None):
            raise Error(
                "chat: expected a processor with a chat template, found none. Capture with chat=False"
            )
        text = {"type": "text", "text": item.prompt}
        content = [{"type": "image"}, text] if item.image is not None else [text]
        plain = item.prompt if not hasattr(processor, "tokenizer") else content
        turn = [{"role": "user", "content": plain}]
        return str(processor.apply_chat_template(turn, add_generation_prompt=True, tokenize=False))
    token = getattr(processor, "boi_token", None) or getattr(processor, "image_token", None)
    if item.image is None or token is None or token in item.prompt:
        return str(item.prompt)
    return f"{token} {item.prompt}"


def _decoded(image: Any, id_: Any) -> Any:
    """The image in RGB, decoded only when it is of a sane size."""
    pil = extra("PIL.Image", "models")
    if isinstance(image, (str, os.PathLike)):
        image = pil.open(image)
    elif isinstance(image, bytes):
        image = pil.open(io.BytesIO(image))
    width, height = image.size
    if width * height > MAX_PIXELS:
        raise ShapeError(
            f"image of {id_!r}: expected at most {MAX_PIXELS:,} pixels, found {width} x {height}"
        )
    return image.convert("RGB")


def _accepts(model: Any, name: str) -> bool:
    """Whether the forward takes an argument by this name."""
    return name in inspect.signature(model.forward).parameters
