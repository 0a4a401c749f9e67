"""What a diffing study is told. Every threshold is here; the defaults are the paper's where it gives a number."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Literal

import polars as pl

from microtome.dictionary import TrainConfig
from microtome.dictionary.fields import Bounds, check_flags, check_numbers, check_whole, check_words
from microtome.errors import ShapeError

__all__ = ["REGIMES", "DiffConfig"]

REGIMES: dict[str, pl.Expr | None] = {
    "text": pl.col("kind") == "text",
    "image": pl.col("kind") == "image",
    "full": None,
    "random": None,
}
"""Which tokens enter the loss; ``random`` sees all of them but starts from random weights."""

TextDictionary = Literal["adapted", "base"]
Tokens = Literal["all", "text", "image"]
Unit = Literal["token", "sample"]
Frequency = Literal["frequency_vision", "frequency_text", "frequency_spatial", "frequency_base"]

_WORDS = {
    "text_dictionary": TextDictionary,
    "gap_tokens": Tokens,
    "gap_average": Unit,
    "unit": Unit,
    "match": Frequency,
}
_NUMBERS = {
    **dict.fromkeys(("p_gap", "p_cos", "spatial_top"), Bounds(0, 1, with_high=True)),
    **dict.fromkeys(("holdout", "level"), Bounds(0, 1)),
    **dict.fromkeys(("max_q", "min_neutral_frequency", "min_image_mass"), Bounds(0, 1, True, True)),
    "min_gap": Bounds(-1, 1, with_low=True, with_high=True),
    "min_odds_ratio": Bounds(0, with_low=True),
}


@dataclass(frozen=True, kw_only=True)
class DiffConfig:
    """What a study is told.

    Example:
        >>> DiffConfig(spatial=pl.col("task") == "spatial", p_gap=0.1).holdout
        0.5
    """

    train: TrainConfig = field(default_factory=lambda: TrainConfig(k=50))
    """How base dictionaries are trained; adaptation uses the same with a regime of its own."""
    adapt_steps: int | None = None
    """Steps of the adaptation; as many as the base dictionaries' when None."""
    lr: Mapping[str, float] | Callable[[str], float] | None = None
    """Learning rate of the adaptation by hook (the paper's is scaled by layer, by a rule it does not give)."""
    regimes: tuple[str, ...] = ("text", "image", "full", "random")
    """Regimes to train; the first is the one that signals are taken from."""

    vision: pl.Expr | None = None
    """Which VLM rows stand for vision; all by default."""
    text_dictionary: TextDictionary = "adapted"
    """The dictionary that encodes the base model's side of the variance gap: the adapted one, or its own."""
    gap_tokens: Tokens = "all"
    """Tokens of the VLM that the variance gap is taken over."""
    gap_average: Unit = "token"
    """Whether the variance gap weighs every token the same, or every sample."""
    p_gap: float = 0.2
    """Share of features kept by variance gap."""
    p_cos: float = 0.2
    """Share of those kept by decoder cosine."""

    spatial: pl.Expr | None = None
    """Which VLM rows are spatial questions, over row and sample columns; None leaves that part out."""
    base_is_complement: bool = True
    """Compare spatial with the other questions; False: with all of them (nested, as in the paper)."""
    unit: Unit = "token"
    """What firing is counted by: tokens, as in the paper, or samples with any firing token."""
    spatial_top: float = 0.2
    """Share of living features that counts as a large frequency gap; unused with ``min_gap``."""
    min_gap: float | None = None
    """Least frequency gap, instead of a share."""
    min_odds_ratio: float = 1.0
    """Least odds ratio, exclusive."""
    max_q: float | None = None
    """Largest Benjamini-Hochberg q-value; None does not ask for significance."""
    min_neutral_frequency: float = 0.01
    """Least share of samples on which a survivor fires under the neutral prompt."""
    min_image_mass: float = 0.5
    """Least share of its activation there that lies on image tokens, exclusive."""

    cluster: str = "sample"
    """Sample column that names the image: images are held out, and drawn in the bootstrap, as wholes."""
    holdout: float = 0.5
    """Share of images that spatial features are not chosen by, but compared with random features on."""
    match: Frequency = "frequency_vision"
    """Column of the frequency that random features are matched by."""
    neighbours: int = 20
    """Nearest features that a control is drawn from."""
    draws: int = 1000
    """Control sets, and replicates of the bootstrap."""
    level: float = 0.95
    """Level of intervals."""
    top_samples: int = 20
    """Top samples per feature and data set."""

    def __post_init__(self) -> None:
        given: object = self.regimes
        if isinstance(given, str) or not given:
            raise ShapeError(f"regimes: expected a tuple of at least one, found {given!r}")
        if unknown := sorted(set(self.regimes) - set(REGIMES)):
            raise ShapeError(f"regimes: expected some of {', '.join(REGIMES)}, found {unknown[0]!r}")
        check_words(self, _WORDS)
        check_whole(self, ["adapt_steps", "neighbours", "draws", "top_samples"])
        check_numbers(self, _NUMBERS)
        check_flags(self, ["base_is_complement"])
