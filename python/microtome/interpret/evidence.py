"""The samples on which a feature is most active, with the words around the peak and the activation over the picture."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import polars as pl

from microtome.errors import ShapeError

__all__ = ["Evidence", "collect", "windows"]


@dataclass(frozen=True)
class Evidence:
    """One top-activating sample of one feature."""

    dataset: str
    sample_id: str
    position: int
    """Position of the token on which the activation peaks."""
    activation: float
    text: str
    """The sample's text."""
    window: str = ""
    """The words around the peak, the peak in brackets; empty when it lies on an image token."""
    on_image: bool = False
    heat: list[list[float]] | None = field(default=None, compare=False)
    """Activation over the grid of image patches, scaled to 0..1."""
    image_png: bytes | None = field(default=None, compare=False, repr=False)


Decode = Callable[[list[int]], str]
"""From token ids to their text, as a tokenizer's ``decode``."""


def windows(
    tokens: Sequence[str] | Sequence[int],
    position: int,
    radius: int = 6,
    *,
    decode: Decode | None = None,
    mark: bool = True,
) -> str:
    """The text around ``position``, the token at it in brackets.

    Args:
        tokens: whole words, which are joined by spaces; or token ids, with ``decode``.
        position: the token in the middle.
        radius: tokens on either side.
        decode: a tokenizer's own ``decode``, which knows where the words of subword tokens begin and end. A token that
            is part of a character gets its brackets around the character.
        mark: whether to draw the brackets.

    Raises:
        ShapeError: a position beyond the tokens, or token ids without ``decode``.

    Example:
        >>> windows("is the cup left of the plate".split(), 3, radius=2)
        'the cup [left] of the'
        >>> windows([0, 1, 2], 1, decode=lambda ids: "".join([" the", " cup", "board"][i] for i in ids))
        'the [cup]board'
    """
    if not 0 <= position < len(tokens):
        raise ShapeError(f"position: expected 0 to {len(tokens) - 1}, found {position}")
    low, high = max(0, position - radius), min(len(tokens), position + radius + 1)
    near: list[Any] = list(tokens[low:high])
    if decode is None:
        if not all(isinstance(token, str) for token in near):
            raise ShapeError(
                f"decode: expected a tokenizer's decode for token ids, found None with {near[0]!r}"
            )
        return " ".join(
            f"[{token}]" if mark and i == position else token for i, token in enumerate(near, low)
        )
    text = decode(near)
    if mark:
        text = _marked(text, *_span(near, position - low, text, decode))
    return " ".join(text.split())


def _span(ids: list[int], at: int, text: str, decode: Decode) -> tuple[int, int]:
    """Where the token stands in the text of all: between what the ids before it and the ids up to it agree upon with it.

    Decoding tokens one by one would not do: some tokenizers drop the space of the first word they are given.
    """
    reached = [_agreed(decode(ids[:n]), text) for n in range(at, len(ids) + 1)]
    start, ends = reached[0], (end for end in reached[1:] if end > reached[0])
    own = decode([ids[at]])
    return (start, next(ends, len(text))) if own else (start, start)


def _agreed(a: str, b: str) -> int:
    """Number of characters up to the first in which the two differ."""
    shorter = min(len(a), len(b))
    return next((i for i in range(shorter) if a[i] != b[i]), shorter)


def _marked(text: str, start: int, end: int) -> str:
    piece = text[start:end]
    word = piece.strip()
    before, _, after = piece.partition(word) if word else (piece, "", "")
    return f"{text[:start]}{before}[{word or '·'}]{after}{text[end:]}"


def collect(
    top: Mapping[str, pl.DataFrame],
    texts: Mapping[str, Mapping[Any, str]] | None,
    *,
    tokens: Mapping[str, Mapping[Any, Sequence[str] | Sequence[int]]] | None = None,
    decode: Decode | None = None,
    image_positions: Mapping[str, Mapping[Any, frozenset[int]]] | None = None,
    radius: int = 6,
) -> dict[int, list[Evidence]]:
    """Evidence for each feature from one or more data sets (the paper takes a general and a spatial one).

    Args:
        top: data set to its table of top samples, as :func:`microtome.top_samples` returns it, with the column ``id``.
        texts: data set to {sample id: its text}; None takes the words around the peak, which tell more of a long document.
        tokens: data set to {sample id: its words or token ids, one per position}; gives the window around the peak.
        decode: a tokenizer's ``decode``, where ``tokens`` are ids; as in :func:`windows`.
        image_positions: data set to {sample id: positions that hold image tokens}.
        radius: tokens on either side of the peak in the window.

    Returns:
        {feature: evidence}, data sets in the order given, most active first.

    Raises:
        ShapeError: neither a sample's text nor its tokens.
    """
    found: dict[int, list[Evidence]] = {}
    for dataset, table in top.items():
        for row in table.sort("feature", "rank").iter_rows(named=True):
            key, position = row["id"], int(row["position"])
            pieces = (tokens or {}).get(dataset, {}).get(key)
            on_image = position in (image_positions or {}).get(dataset, {}).get(key, frozenset())
            if pieces is None and texts is None:
                raise ShapeError(
                    f"texts, tokens: expected either for sample {key!r} of {dataset}, found neither"
                )
            text, window = texts[dataset][key] if texts is not None else "", ""
            if pieces is not None and not on_image:
                window = windows(pieces, position, radius, decode=decode)
                text = text or windows(pieces, position, radius, decode=decode, mark=False)
            found.setdefault(int(row["feature"]), []).append(
                Evidence(
                    dataset=dataset,
                    sample_id=str(key),
                    position=position,
                    activation=float(row["activation"]),
                    text=text,
                    window=window,
                    on_image=on_image,
                )
            )
    return found
