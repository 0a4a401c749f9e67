"""Crosscoders: one set of features read from, and written to, several models at one layer.

With ``x^m (n, d)`` of model ``m``, scaled to a mean norm of √d::

    f    = act(Σ_m x^m W_enc^m + b_enc)           x̂^m = f W_dec^m + b_dec^m

trained by ``Σ_m ‖x^m − x̂^m‖²`` with either ``λ Σ_f f Σ_m ‖W_dec,f^m‖`` (``relu``; Lindsey et al., Sparse
Crosscoders, 2024) or a BatchTopK over ``f · Σ_m ‖W_dec,f^m‖`` (``batch_topk``; Minder et al., arXiv
2504.02922). Rows of all models lie side by side, so encoder, training loop and file are those of a dictionary
of width ``M d``.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import polars as pl
import torch
from torch import Tensor

from microtome.dictionary.encoding import joined
from microtome.dictionary.sae import SAE
from microtome.dictionary.train.config import TrainConfig
from microtome.dictionary.train.run import train_rows
from microtome.dictionary.weights import rows_of
from microtome.errors import CheckpointError, ShapeError

if TYPE_CHECKING:
    from microtome.metrics.codes import RaggedCodes, SparseCodes

__all__ = ["Crosscoder", "CrosscoderResult", "StackedRows", "train_crosscoder"]

_SAMPLE_ROWS = 32_768
_BLOCK_ROWS = 16_384
_PLACE = ("sample", "position", "token_id")


class StackedRows:
    """The same tokens in several models, side by side: rows ``(n, M d)``, each part times its scale.

    Args:
        acts: rows ``(n, d)`` by the model's name: activations of stores, tensors or arrays.
        scales: factor on each model's rows; ``√d / mean norm`` of up to 32,768 rows when left out.

    Raises:
        ShapeError: rows that differ in number or width, or rows of stores that are not the same tokens.
    """

    def __init__(self, acts: Mapping[str, Any], scales: Sequence[float] | None = None) -> None:
        shapes = {name: tuple(x.shape) for name, x in acts.items()}
        if len(acts) < 2 or len(set(shapes.values())) != 1 or len(next(iter(shapes.values()))) != 2:
            raise ShapeError(
                f"acts: expected rows (n, d) of two or more models, all of one shape, found {shapes}"
            )
        self.acts = dict(acts)
        n, self.d = next(iter(shapes.values()))
        self.shape = (n, self.d * len(acts))
        self._stored = all(hasattr(x, "rows") and hasattr(x, "where") for x in acts.values())
        if self._stored:
            self._check_tokens()
        self.scales = tuple(scales) if scales is not None else tuple(self._scale(x) for x in acts.values())

    def _check_tokens(self) -> None:
        """Sample numbers are each store's own count, so the ids behind them and the tokens decide."""
        columns = [x.rows.collect_schema().names() for x in self.acts.values()]
        places = [name for name in _PLACE if all(name in names for names in columns)]
        parts = {
            "samples, positions or token ids": [x.rows.select(places).collect() for x in self.acts.values()]
        }
        if all(hasattr(x, "store") for x in self.acts.values()):
            parts["sample ids"] = [_ids(x) for x in self.acts.values()]
        for what, tables in parts.items():
            for name, table in zip(self.acts, tables, strict=True):
                if not table.equals(tables[0]):
                    raise ShapeError(
                        f"acts: expected the same tokens in {' and '.join(self.acts)}, found other {what} in {name}"
                    )

    def _scale(self, x: Any) -> float:
        chosen = np.unique(
            np.linspace(0, self.shape[0] - 1, min(_SAMPLE_ROWS, self.shape[0])).astype(np.int64)
        )
        mean = float(_gather(x, chosen).double().norm(dim=1).mean())
        return math.sqrt(self.d) / mean if mean else 1.0

    def __len__(self) -> int:
        return int(self.shape[0])

    def __getitem__(self, rows: Any) -> Tensor:
        return torch.cat(
            [_gather(x, rows) * s for x, s in zip(self.acts.values(), self.scales, strict=True)], dim=1
        )

    def blocks(self, n: int = _BLOCK_ROWS) -> Iterator[Tensor]:
        """Blocks of at most ``n`` rows."""
        for start in range(0, len(self), n):
            yield self[start : start + n]

    @property
    def rows(self) -> pl.LazyFrame:
        """The row table of the first store."""
        if not self._stored:
            raise AttributeError("rows")
        table: pl.LazyFrame = next(iter(self.acts.values())).rows
        return table

    def where(self, predicate: pl.Expr) -> StackedRows:
        """The rows of all models that meet an expression, scales kept."""
        if not self._stored:
            raise ShapeError(
                "loss_where: expected activations of stores, found arrays. Select their rows before"
            )
        return StackedRows({name: x.where(predicate) for name, x in self.acts.items()}, self.scales)


def _ids(x: Any) -> pl.DataFrame:
    """``sample`` and ``id`` of the samples that rows of a store belong to."""
    seen = x.rows.select("sample").unique()
    ids: pl.DataFrame = x.store.samples.select("sample", "id").join(seen, on="sample", how="semi").collect()
    return ids.sort("sample")


def _gather(x: Any, rows: Any) -> Tensor:
    if isinstance(x, Tensor) and isinstance(rows, np.ndarray):
        rows = torch.from_numpy(rows)
    return torch.as_tensor(x[rows]).float()


@dataclass(frozen=True, eq=False)
class Crosscoder:
    """Features shared by several models, over a dictionary of the rows side by side."""

    sae: SAE
    """The dictionary of width ``M d``; its metadata holds names and scales."""

    def __post_init__(self) -> None:
        facts = self.sae.recipe.metadata
        if "models" not in facts or "scales" not in facts or self.sae.d_in % len(facts["models"]):
            raise CheckpointError(
                f"crosscoder: expected a dictionary with models and scales of a crosscoder, found {self.sae!r}"
            )

    @property
    def models(self) -> tuple[str, ...]:
        """Names of the models, in the order of the rows."""
        return tuple(self.sae.recipe.metadata["models"])

    @property
    def scales(self) -> tuple[float, ...]:
        """Factor on each model's rows."""
        return tuple(self.sae.recipe.metadata["scales"])

    @property
    def W_dec(self) -> Tensor:  # noqa: N802
        """Decoder rows ``(M, d_sae, d)``, on the scaled side."""
        return self.sae.W_dec.unflatten(1, (len(self.models), -1)).transpose(0, 1)

    def stack(self, acts: Mapping[str, Any]) -> StackedRows:
        """Rows of all models side by side, as this crosscoder takes them."""
        if set(acts) != set(self.models):
            raise ShapeError(f"acts: expected rows of {', '.join(self.models)}, found {', '.join(acts)}")
        return StackedRows({name: acts[name] for name in self.models}, self.scales)

    def encode(self, acts: Mapping[str, Any]) -> SparseCodes | RaggedCodes:
        """Sparse codes of the tokens, from all models together; rows are read block by block."""
        return joined([self.sae.encode(block) for block in rows_of(self.stack(acts), _BLOCK_ROWS)])

    def decode(self, codes: Any) -> dict[str, Tensor]:
        """Reconstruction ``(n, d)`` of every model's rows, on their own scale."""
        parts = self.sae.decode(codes).chunk(len(self.models), dim=1)
        return {name: part / s for name, part, s in zip(self.models, parts, self.scales, strict=True)}

    def explained_variance(self, acts: Mapping[str, Any]) -> dict[str, float]:
        """``1 − FVU`` of every model's rows, sums over the whole set; rows are read twice, block by block."""
        stacked = self.stack(acts)
        mean = torch.stack([block.double().sum(0) for block in rows_of(stacked, _BLOCK_ROWS)]).sum(0) / len(
            stacked
        )
        error, spread = torch.zeros(2, len(self.models), dtype=torch.double)
        for block in rows_of(stacked, _BLOCK_ROWS):
            x, x_hat = block.double(), self.sae.reconstruct(block).detach().cpu().double()
            error += (x - x_hat).square().unflatten(1, (len(self.models), -1)).sum((0, 2))
            spread += (x - mean).square().unflatten(1, (len(self.models), -1)).sum((0, 2))
        return {name: float(1 - e / s) for name, e, s in zip(self.models, error, spread, strict=True)}

    def compare(self, a: str | None = None, b: str | None = None) -> pl.DataFrame:
        """What each feature is to two of the models.

        Returns:
            ``feature``; ``relative_norm`` ``‖d^b‖ / (‖d^a‖ + ‖d^b‖)`` (0: only in a, 1: only in b; Kissane et
            al. call 0.3 to 0.7 shared); ``log_norm_ratio`` ``ln ‖d^b‖/‖d^a‖``; ``raw_log_norm_ratio`` the
            same on the models' own scales; ``cosine`` of the two decoder rows. Where one of the rows is zero,
            the relative norm is 0 or 1, the ratios are infinite and the cosine is NaN; where both are, all are
            NaN.

        Raises:
            ShapeError: a name that is none of the models.
        """
        for argument, name in (("a", a), ("b", b)):
            if name is not None and name not in self.models:
                raise ShapeError(f"{argument}: expected one of {', '.join(self.models)}, found {name!r}")
        first, second = (self.models.index(name or self.models[i]) for i, name in enumerate((a, b)))
        d_a, d_b = self.W_dec[first].double(), self.W_dec[second].double()
        norm_a, norm_b = d_a.norm(dim=1), d_b.norm(dim=1)
        ratio = (norm_b / norm_a).log()
        return pl.DataFrame(
            {
                "feature": np.arange(self.sae.d_sae, dtype=np.uint32),
                "relative_norm": (norm_b / (norm_a + norm_b)).numpy(),
                "log_norm_ratio": ratio.numpy(),
                "raw_log_norm_ratio": (ratio + math.log(self.scales[first] / self.scales[second])).numpy(),
                "cosine": ((d_a * d_b).sum(1) / (norm_a * norm_b)).numpy(),
            }
        )

    def save_to_disk(self, path: str | Path) -> Path:
        """Write it as a dictionary in microtome's own format."""
        return self.sae.save_to_disk(path)

    @classmethod
    def load_from_disk(cls, path: str | Path) -> Crosscoder:
        """The crosscoder of :meth:`save_to_disk`.

        Raises:
            CheckpointError: a dictionary that is no crosscoder.
        """
        return cls(SAE.load_from_disk(path))


@dataclass(frozen=True)
class CrosscoderResult:
    """A trained crosscoder and its curves."""

    crosscoder: Crosscoder
    """The crosscoder."""
    curves: pl.DataFrame
    """As those of :class:`TrainResult`, over all models together."""


def train_crosscoder(
    acts: Mapping[str, Any],
    config: TrainConfig | None = None,
    *,
    checkpoint_dir: str | Path | None = None,
    resume: bool = True,
    progress: bool = True,
) -> CrosscoderResult:
    """Train a crosscoder on the same tokens in two or more models.

    Args:
        acts: rows ``(n, d)`` by the model's name.
        config: what to train; ``activation`` is ``relu`` or ``batch_topk`` (the default here, k 100).
        checkpoint_dir: folder for checkpoints, as in :func:`train_sae`.
        resume: whether to continue from there.
        progress: draw a bar on a terminal.

    Raises:
        ShapeError: rows that do not belong together, or another activation.

    Example:
        >>> x = torch.randn(500, 8, generator=torch.Generator().manual_seed(0))
        >>> told = TrainConfig(activation="batch_topk", d_sae=16, k=4, steps=5, batch_size=64)
        >>> train_crosscoder({"base": x, "pruned": 2 * x}, told).crosscoder.models
        ('base', 'pruned')
    """
    config = config or TrainConfig(activation="batch_topk", k=100)
    if config.activation not in ("relu", "batch_topk"):
        raise ShapeError(
            f"activation: expected relu or batch_topk for a crosscoder, found {config.activation!r}"
        )
    stacked = StackedRows(acts)
    told = config.replace(normalize=False, decoder_norm="free")
    result = train_rows(
        stacked, told, checkpoint_dir=checkpoint_dir, resume=resume, progress=progress, parts=len(acts)
    )
    facts = {**result.sae.recipe.metadata, "models": list(acts), "scales": list(stacked.scales)}
    sae = result.sae.with_tensors(result.sae.tensors, result.sae.recipe.replace(metadata=facts))
    return CrosscoderResult(Crosscoder(sae), result.curves)
