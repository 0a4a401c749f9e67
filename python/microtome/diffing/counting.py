"""Firings counted over activations in one pass: a block of rows in memory, never the codes of a store.

Blocks end where a sample ends, so that "does any token of the sample fire" is answered within one block.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import polars as pl

from microtome.errors import ShapeError, first_line
from microtome.metrics import SampleFires, sample_fires
from microtome.metrics.codes import CSR
from microtome.store import Activations, ActivationStore
from microtome.store.tables import ordered_join

__all__ = [
    "by_sample",
    "check_expression",
    "cluster_fires",
    "fires_by_label",
    "labels_of",
    "mean_square_by_sample",
]

BLOCK_ROWS = 65_536

_Ints = npt.NDArray[np.int64]


def check_expression(store: ActivationStore, expression: pl.Expr, name: str, dtype: Any = pl.Boolean) -> None:
    """Refuse an expression that the store's rows and samples cannot answer, before any work.

    Raises:
        ShapeError: an unknown column, or values of another type; names the argument and the columns there are.
    """
    table = _joined(store.rows, store)
    columns = table.collect_schema().names()
    try:
        found = table.head(1).select(expression.alias("value")).collect().to_series().dtype
    except pl.exceptions.ColumnNotFoundError:
        unknown = [root for root in expression.meta.root_names() if root not in columns]
        raise ShapeError(
            f"{name}: expected columns among {', '.join(columns)}, found {', '.join(unknown)}"
        ) from None
    except pl.exceptions.PolarsError as error:
        raise ShapeError(
            f"{name}: expected an expression over rows and samples, found {expression}: {first_line(error)}"
        ) from None
    if dtype is not None and found != dtype:
        raise ShapeError(f"{name}: expected {dtype} values, found {found}")


def labels_of(acts: Activations, *expressions: pl.Expr) -> pl.DataFrame:
    """Expressions over row and sample columns, evaluated for each row of ``acts``, in their order."""
    return _joined(acts.rows, acts.store).select(*expressions).collect()


def by_sample(acts: Activations) -> Activations:
    """``acts`` with the rows of every sample side by side."""
    samples = acts.rows.select("sample").collect().to_series().to_numpy()
    if len(np.flatnonzero(np.diff(samples))) + 1 == len(np.unique(samples)):
        return acts
    return acts.take(np.argsort(samples, kind="stable"))


def code_blocks(acts: Activations, sae: Any, samples: _Ints) -> Iterator[tuple[slice, Any]]:
    """Codes of whole samples, about :data:`BLOCK_ROWS` rows at a time; ``samples`` (n,) has each one's rows together."""
    ends = np.append(np.flatnonzero(np.diff(samples)) + 1, len(samples))
    start = 0
    while start < len(samples):
        stop = int(ends[min(int(np.searchsorted(ends, start + BLOCK_ROWS)), len(ends) - 1)])
        yield slice(start, stop), sae.encode(acts[start:stop])
        start = stop


def fires_by_label(acts: Activations, sae: Any, labels: pl.Series) -> dict[Any, SampleFires]:
    """In how many samples of each label a feature fires; ``labels`` (n,) says what each row of ``acts`` counts for."""
    acts, order = _sorted(acts, len(labels))
    labels = labels.gather(order)
    samples = _samples(acts)
    found: dict[Any, SampleFires] = {}
    for span, codes in code_blocks(acts, sae, samples):
        part = labels[span]
        for label in part.unique(maintain_order=True).to_list():
            mask = (part == label).to_numpy()
            fires = sample_fires(codes[mask], {"sample": samples[span][mask]})
            found[label] = found[label].merge(fires) if label in found else fires
    return found


def cluster_fires(
    acts: Activations,
    sae: Any,
    clusters: _Ints,
    n_clusters: int,
    features: Sequence[int] | _Ints,
    *,
    unit: str = "token",
) -> Iterator[tuple[_Ints, npt.NDArray[np.float32]]]:
    """Firings of a few features per cluster (image), block by block.

    Args:
        acts: rows (n, d), those of a sample side by side.
        sae: the dictionary.
        clusters: number of each row's cluster, (n,), below ``n_clusters``.
        n_clusters: number of clusters.
        features: features counted, (m,).
        unit: ``"token"`` counts rows, ``"sample"`` samples with any firing row.

    Yields:
        Numbers of the clusters of a block, (c,), and what their rows in it add, (c, m).
    """
    wanted: _Ints = np.asarray(features, np.int64)
    slot = np.full(sae.d_sae, -1, np.int64)
    slot[wanted] = np.arange(len(wanted))
    samples = _samples(acts)
    for span, codes in code_blocks(acts, sae, samples):
        row, column = _fired(codes.to_csr(), slot)
        if unit == "sample":
            pairs = np.unique(samples[span][row] * len(wanted) + column, return_index=True)[1]
            row, column = row[pairs], column[pairs]
        here, place = np.unique(clusters[span], return_inverse=True)
        key = place[row] * len(wanted) + column
        counts = np.bincount(key, minlength=len(here) * len(wanted)).reshape(len(here), len(wanted))
        yield here, counts.astype(np.float32)


def mean_square_by_sample(acts: Activations, sae: Any) -> npt.NDArray[np.float64]:
    """``E_samples[E_tokens[h_f²]]``, (d_sae,): every sample weighs the same, however long it is."""
    acts = by_sample(acts)
    samples = _samples(acts)
    sizes = np.diff(np.append(np.flatnonzero(np.diff(samples, prepend=-1)), len(samples)))
    weight = np.repeat(1.0 / sizes, sizes)
    total = np.zeros(sae.d_sae)
    for span, codes in code_blocks(acts, sae, samples):
        indptr, indices, values = codes.to_csr()
        of_row = np.repeat(weight[span], np.diff(indptr))
        total += np.bincount(indices, values.astype(np.float64) ** 2 * of_row, sae.d_sae)
    mean: npt.NDArray[np.float64] = total / len(sizes)
    return mean


def _fired(codes: CSR, slot: _Ints) -> tuple[_Ints, _Ints]:
    """Row and slot of every firing of a wanted feature."""
    indptr, indices, values = codes
    row = np.repeat(np.arange(len(indptr) - 1), np.diff(indptr))
    column = slot[indices]
    kept = (values > 0) & (column >= 0)
    return row[kept], column[kept]


def _sorted(acts: Activations, n: int) -> tuple[Activations, _Ints]:
    if n != len(acts):
        raise ShapeError(f"labels: expected {len(acts)}, one for each row, found {n}")
    order = np.argsort(_samples(acts), kind="stable")
    return (acts, order) if (np.diff(order) == 1).all() else (acts.take(order), order)


def _samples(acts: Activations) -> _Ints:
    return acts.rows.select("sample").collect().to_series().to_numpy().astype(np.int64)


def _joined(rows: pl.LazyFrame, store: ActivationStore) -> pl.LazyFrame:
    return ordered_join(rows, store.samples, "sample")
