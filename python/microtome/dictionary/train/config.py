"""What a training run is told: one frozen record, saved in its checkpoints."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from typing import Any, Literal

import polars as pl

from microtome.dictionary.fields import Bounds, check_flags, check_numbers, check_whole, check_words
from microtome.dictionary.recipe import Activation
from microtome.errors import DtypeError, ShapeError

__all__ = ["TrainConfig"]

DecoderNorm = Literal["unit", "free"]
FirstBias = Literal["geometric_median", "zeros"]

_WORDS = {"activation": Activation, "decoder_norm": DecoderNorm, "b_dec_init": FirstBias}
_WHOLE = (
    *("d_sae", "expansion", "k", "k_start", "auxk_k", "dead_after_tokens"),
    *("steps", "tokens", "batch_size", "eval_every", "eval_rows", "checkpoint_every"),
    *("shuffle_block_rows", "shuffle_pool_rows"),
)
_SHARE, _POSITIVE, _WEIGHT = Bounds(0, 1, with_low=True), Bounds(0), Bounds(0, with_low=True)
_NUMBERS = {
    **dict.fromkeys(("warmup", "decay", "k_annealing", "eval_fraction", "threshold_beta"), _SHARE),
    **dict.fromkeys(("lr", "bandwidth", "max_norm_multiple"), _POSITIVE),
    **dict.fromkeys(("auxk_alpha", "sparsity"), _WEIGHT),
}


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """How a dictionary is trained. Fractions are of the run's steps; losses in units of rows of mean norm √d.

    Example:
        >>> TrainConfig(d_sae=1024, k=16, steps=2000).learning_rate(1024)
        0.0008
    """

    d_sae: int | None = None
    """Number of features; ``expansion · d_in`` when left out."""
    expansion: int = 8
    """Features per input dimension, where ``d_sae`` is left out."""
    activation: Activation = "topk"
    """Architecture (Gao 2406.04093; Bussmann 2412.06410; Rajamanoharan 2407.14435, 2404.16014)."""
    k: int = 32
    """Features per row: exact for ``topk``, the average for ``batch_topk``, the target of ``jumprelu``."""
    loss_where: pl.Expr | None = None
    """Which rows enter the loss, over the columns of rows and samples: the regime. None: all rows."""
    regime: str = "full"
    """The regime's name in the curves."""

    steps: int | None = None
    """Optimiser steps; one pass over the rows when neither steps nor tokens are given."""
    tokens: int | None = None
    """Rows to see, instead of ``steps``."""
    batch_size: int = 4096
    """Rows per step."""
    lr: float | None = None
    """Learning rate of Adam; ``2e-4 / sqrt(d_sae / 2¹⁴)`` when left out (Gao et al.)."""
    warmup: float = 0.05
    """Fraction of the steps over which the rate rises linearly from zero."""
    decay: float = 0.2
    """Fraction of the steps, at the end, over which it falls linearly to zero."""
    k_annealing: float = 0.0
    """Fraction of the steps over which k falls linearly from ``k_start`` (Llama Scope)."""
    k_start: int | None = None
    """First k of the annealing; ``4 k`` when left out."""

    auxk_alpha: float = 1 / 32
    """Weight of the AuxK loss, which lets dead features explain the residual; 0 leaves it out."""
    auxk_k: int | None = None
    """Dead features used per row; ``d_in / 2`` when left out."""
    dead_after_tokens: int | None = None
    """Rows without firing after which a feature is dead; 10 million or a tenth of the run, what is less."""
    decoder_norm: DecoderNorm = "unit"
    """``unit``: decoder rows have norm 1 after every step, and their gradient no part along them."""
    sparsity: float | None = None
    """Weight of the sparsity loss, 0 for none. None: 5 for ``relu``, ``gated`` (L1 times norm), 1 for ``jumprelu`` (L0)."""
    bandwidth: float = 0.05
    """Width of the straight-through window of a JumpReLU threshold."""
    threshold_beta: float = 0.999
    """Memory of the running threshold of ``batch_topk``."""

    normalize: bool = True
    """Scale rows to a mean norm of √d_in, as the recipe of the dictionary then says."""
    b_dec_init: FirstBias = "geometric_median"
    """Where ``b_dec`` starts, from up to 32,768 rows."""
    max_norm_multiple: float | None = None
    """Leave rows out of the loss whose norm exceeds this multiple of the median (attention sinks)."""

    eval_fraction: float = 0.05
    """Fraction of samples held out; with 0, curves are measured on training rows."""
    eval_every: int | None = None
    """Steps between points of the curves; 20 points when left out."""
    eval_rows: int = 4096
    """Held-out rows measured, at most."""
    checkpoint_every: int | None = None
    """Steps between checkpoints, where a folder is given; a tenth of the run when left out."""
    shuffle_block_rows: int = 32
    """Neighbouring rows that are shuffled as one, before all rows of a pool are shuffled."""
    shuffle_pool_rows: int = 262_144
    """Rows of a pool: with fewer training rows than this the shuffle is a full permutation."""
    autocast: Literal["bfloat16"] | None = None
    """Element type of the large matrix products; float32 when left out."""
    device: str = "cpu"
    """Where the dictionary is trained."""
    seed: int = 0
    """Decides the first weights, the split and the order of rows."""

    def __post_init__(self) -> None:
        check_words(self, _WORDS)
        if self.autocast not in (None, "bfloat16"):
            raise ShapeError(f"autocast: expected None or 'bfloat16', found {self.autocast!r}")
        check_whole(self, _WHOLE)
        check_whole(self, ["seed"], least=0)
        check_numbers(self, _NUMBERS)
        check_flags(self, ["normalize"])
        if self.steps is not None and self.tokens is not None:
            raise ShapeError(f"steps: expected steps or tokens, found both ({self.steps} and {self.tokens})")
        if self.d_sae is not None:
            self.check_k(self.d_sae)
        if self.loss_where is not None and not isinstance(self.loss_where, pl.Expr):
            raise DtypeError(
                f"loss_where: expected a polars expression, found {type(self.loss_where).__name__}"
            )

    def check_k(self, d_sae: int) -> None:
        """Refuse a Top-K of more features than there are."""
        if self.activation in ("topk", "batch_topk") and self.k > d_sae:
            raise ShapeError(f"k: expected at most d_sae = {d_sae}, found {self.k}")

    def replace(self, **changes: Any) -> TrainConfig:
        """A configuration with some fields changed."""
        return dataclasses.replace(self, **changes)

    def to_dict(self) -> dict[str, Any]:
        """The fields as plain values; the expression as its text."""
        fields = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        return {**fields, "loss_where": None if self.loss_where is None else str(self.loss_where)}

    def features(self, d_in: int) -> int:
        """Number of features for rows of width ``d_in``."""
        return self.d_sae or self.expansion * d_in

    def total_steps(self, n_rows: int) -> int:
        """Steps of the run over ``n_rows`` training rows."""
        return self.steps or max(1, math.ceil((self.tokens or n_rows) / self.batch_size))

    def learning_rate(self, d_sae: int) -> float:
        """The peak learning rate."""
        return self.lr or 2e-4 / math.sqrt(d_sae / 2**14)

    def rate_at(self, step: int, total: int) -> float:
        """Share of the peak rate at ``step``: of the step alone, so that a resumed run follows it."""
        rise = max(1, round(self.warmup * total))
        fall = round(self.decay * total)
        return min((step + 1) / rise, 1.0) * (min((total - step) / fall, 1.0) if fall else 1.0)

    def k_at(self, step: int, total: int, d_sae: int) -> int:
        """Features kept per row at ``step``."""
        length = round(self.k_annealing * total)
        if step >= length:
            return self.k
        start = min(self.k_start or 4 * self.k, d_sae)
        return round(start + (self.k - start) * step / length)

    def dead_after(self, total_tokens: int) -> int:
        """Rows without firing after which a feature is dead."""
        return self.dead_after_tokens or min(10_000_000, max(1, total_tokens // 10))
