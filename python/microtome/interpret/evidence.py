"""The samples on which a feature is most active, with the words around the peak and the activation over the picture."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
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


def windows(tokens: Sequence[str], position: int, radius: int = 6) -> str:
    """The tokens around ``position``, the one at it in brackets.

    Example:
        >>> windows("is the cup left of the plate".split(), 3, radius=2)
        'the cup [left] of the'
    """
    if not 0 <= position < len(tokens):
        raise ShapeError(f"position: expected 0 to {len(tokens) - 1}, found {position}")
    low, high = max(0, position - radius), min(len(tokens), position + radius + 1)
    return " ".join(f"[{token}]" if i == position else token for i, token in enumerate(tokens[low:high], low))


def collect(
    top: Mapping[str, pl.DataFrame],
    texts: Mapping[str, Mapping[Any, str]],
    *,
    tokens: Mapping[str, Mapping[Any, Sequence[str]]] | None = None,
    image_positions: Mapping[str, Mapping[Any, frozenset[int]]] | None = None,
    radius: int = 6,
) -> dict[int, list[Evidence]]:
    """Evidence for each feature from one or more data sets (the paper takes a general and a spatial one).

    Args:
        top: data set to its table of top samples, as :func:`microtome.top_samples` returns it, with the column ``id``.
        texts: data set to {sample id: its text}.
        tokens: data set to {sample id: its tokens, one per position}; gives the window around the peak.
        image_positions: data set to {sample id: positions that hold image tokens}.
        radius: tokens on either side of the peak in the window.

    Returns:
        {feature: evidence}, data sets in the order given, most active first.
    """
    found: dict[int, list[Evidence]] = {}
    for dataset, table in top.items():
        for row in table.sort("feature", "rank").iter_rows(named=True):
            key, position = row["id"], int(row["position"])
            pieces = (tokens or {}).get(dataset, {}).get(key)
            on_image = position in (image_positions or {}).get(dataset, {}).get(key, frozenset())
            found.setdefault(int(row["feature"]), []).append(
                Evidence(
                    dataset=dataset,
                    sample_id=str(key),
                    position=position,
                    activation=float(row["activation"]),
                    text=texts[dataset][key],
                    window=windows(pieces, position, radius) if pieces is not None and not on_image else "",
                    on_image=on_image,
                )
            )
    return found
