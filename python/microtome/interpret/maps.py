"""Activation of a feature over a sample's tokens: the words around the peak, and a map over the patches of its image.

In a causal model image tokens come before the question, so a feature that peaks on a word can still be looked for on the
picture: the map is that of the same feature over the same sample's image tokens, wherever its peak lies.
"""

from __future__ import annotations

import io
import math
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import numpy.typing as npt
import polars as pl

from microtome.errors import ShapeError
from microtome.interpret.evidence import Decode, Evidence, windows
from microtome.store import Activations

__all__ = ["evidence_from", "patch_grid", "png"]

Images = Callable[[Any], Any]
"""From a sample's id to its picture: bytes of an image file, a path, a PIL image, or None."""

_MAX_SIDE = 512


def patch_grid(facts: Mapping[str, Any], n_tokens: int) -> tuple[int, int] | None:
    """Rows and columns of the patches that ``n_tokens`` image tokens stand for.

    The model's facts (``facts["model"]["vision"]``: image and patch size, and how many patches a side are merged into a
    token) decide where they agree with the number of tokens; else a square number is taken for a square. None where
    neither holds, as for pictures of free aspect: give the grid of such a model yourself.

    Example:
        >>> patch_grid({"model": {"vision": {"image_size": [336, 336], "patch_size": 14, "merge": 1}}}, 576)
        (24, 24)
        >>> patch_grid({}, 575) is None
        True
    """
    model = facts.get("model")
    vision = (model.get("vision") if isinstance(model, Mapping) else None) or {}
    if vision.get("image_size") and isinstance(vision.get("patch_size"), int):
        cell = vision["patch_size"] * vision.get("merge", 1)
        rows, columns = (side // cell for side in vision["image_size"])
        if rows * columns == n_tokens:
            return rows, columns
    side = math.isqrt(n_tokens)
    return (side, side) if n_tokens and side * side == n_tokens else None


def evidence_from(
    acts: Activations,
    sae: Any,
    top: pl.DataFrame,
    *,
    texts: Mapping[Any, str] | None = None,
    decode: Decode | None = None,
    images: Images | None = None,
    grid: tuple[int, int] | None = None,
    radius: int = 6,
) -> dict[int, list[Evidence]]:
    """What the reader of a feature's page sees, from the rows of the samples on which it is most active.

    Args:
        acts: rows of the layer, of a store with row tables.
        sae: the layer's dictionary.
        top: columns dataset, feature, rank, sample, id, position, activation; of one layer.
        texts: {sample id: text}; decoded when None.
        decode: token ids to their text, e.g. a tokenizer's ``decode``.
        images: from a sample's id to its picture.
        grid: rows and columns of patches; by :func:`patch_grid` from the store's facts when None.
        radius: tokens on either side of the peak in the window.

    Returns:
        {feature: evidence}, data sets in the order of their names, most active first. Maps are scaled by the feature's
        largest activation in ``top``, so that pictures compare.

    Raises:
        ShapeError: a missing column, or rows of more than one layer.
    """
    needed = ("dataset", "feature", "rank", "sample", "id", "position", "activation")
    if missing := [name for name in needed if name not in top.columns]:
        raise ShapeError(f"top: expected the columns {', '.join(needed)}, found no {missing[0]}")
    if "layer" in top.columns and top["layer"].n_unique() > 1:
        raise ShapeError(f"top: expected samples of one layer, found {sorted(top['layer'].unique())}")
    tokens = _Tokens(acts, sae, top, grid)
    largest = dict(top.group_by("feature").agg(pl.col("activation").max()).iter_rows())
    pictures: dict[Any, bytes | None] = {}
    found: dict[int, list[Evidence]] = {}
    for row in top.sort("feature", "dataset", "rank").iter_rows(named=True):
        if images is not None and row["id"] not in pictures:
            pictures[row["id"]] = png(images(row["id"]))
        shown = tokens.of(row["sample"], int(row["feature"]))
        at = int(np.searchsorted(shown.position, row["position"]))
        on_image = bool(shown.image[at])
        text = _text(row["id"], texts, decode, shown)
        window = _window(decode, shown, at, radius) if decode is not None and not on_image else ""
        heat = None if shown.map is None else (shown.map / max(largest[row["feature"]], 1e-12)).tolist()
        found.setdefault(int(row["feature"]), []).append(
            Evidence(
                dataset=row["dataset"],
                sample_id=str(row["id"]),
                position=int(row["position"]),
                activation=float(row["activation"]),
                text=text,
                window=window,
                on_image=on_image,
                heat=heat,
                image_png=pictures.get(row["id"]),
            )
        )
    return found


def png(image: Any) -> bytes | None:
    """A picture as a PNG of at most 512 pixels a side, as pages embed it."""
    if image is None:
        return None
    from microtome.tensors import extra

    pil = extra("PIL.Image", "models")
    if isinstance(image, bytes):
        image = pil.open(io.BytesIO(image))
    elif not hasattr(image, "convert"):
        image = pil.open(image)
    image = image.convert("RGB")
    image.thumbnail((_MAX_SIDE, _MAX_SIDE))
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return buffer.getvalue()


class _Shown:
    """One feature over one sample: positions, token ids, which are image tokens, activations, and the map."""

    def __init__(
        self, table: pl.DataFrame, values: npt.NDArray[np.float32], grid: tuple[int, int] | None
    ) -> None:
        self.position = table["position"].to_numpy()
        self.ids = table["token_id"].to_numpy()
        self.special = table["special"].to_numpy()
        self.image = (table["kind"].cast(pl.String) == "image").to_numpy()
        on_picture = values[self.image]
        fits = grid is not None and grid[0] * grid[1] == len(on_picture)
        self.map = on_picture.reshape(grid) if fits and grid is not None else None


class _Tokens:
    """Rows and codes of the samples in a table of top samples; encoded once, whatever the number of features."""

    def __init__(self, acts: Activations, sae: Any, top: pl.DataFrame, grid: tuple[int, int] | None) -> None:
        wanted = top["sample"].unique()
        rows = acts.rows.with_row_index("place").collect()
        rows = rows.filter(pl.col("sample").is_in(wanted.implode())).sort("sample", "position")
        self._parts = {key[0]: part for key, part in rows.with_row_index("at").group_by("sample")}
        self._indptr, self._indices, self._values = sae.encode(
            acts.take(rows["place"].to_numpy())[:]
        ).to_csr()
        self._facts, self._grid = acts.store.facts, grid

    def of(self, sample: Any, feature: int) -> _Shown:
        """The feature over the sample's tokens, in their order."""
        part = self._parts[sample].sort("position")
        values = np.zeros(part.height, np.float32)
        for i, at in enumerate(part["at"]):
            span = slice(self._indptr[at], self._indptr[at + 1])
            hit = self._indices[span] == feature
            values[i] = self._values[span][hit].sum()
        n_image = int((part["kind"].cast(pl.String) == "image").sum())
        return _Shown(part, values, self._grid or patch_grid(self._facts, n_image))


def _text(id_: Any, texts: Mapping[Any, str] | None, decode: Decode | None, shown: _Shown) -> str:
    if texts is not None and id_ in texts:
        return texts[id_]
    if decode is None:
        return str(id_)
    return decode(shown.ids[~(shown.special.astype(bool) | shown.image)].tolist()).strip()


def _window(decode: Decode, shown: _Shown, at: int, radius: int) -> str:
    """The words around the peak; image tokens are passed over."""
    ids = shown.ids[~shown.image].tolist()
    return windows(ids, at - int(shown.image[:at].sum()), radius, decode=decode)
