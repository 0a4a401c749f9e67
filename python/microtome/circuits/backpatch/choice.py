"""What back-patching repairs: the setting chosen on some prompts and judged on others, the share of the gap it closes (A14)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import polars as pl

from microtome.circuits.statistics import Interval, bootstrap, mcnemar
from microtome.errors import ShapeError

__all__ = ["WINDOWS", "BackPatch", "Choice", "Setting", "all_settings", "gap_closed"]

Correct = npt.NDArray[np.bool_]
Share = npt.NDArray[np.float64]
WINDOWS = (5, 3, 1)


class Setting(NamedTuple):
    """Which layers' values go where."""

    src: int
    dst: int
    window: int

    def layers(self, n_layers: int) -> dict[int, int]:
        """Destination layer to source layer, clipped to the layers there are."""
        half = self.window // 2
        pairs = ((self.dst + j, self.src + j) for j in range(-half, half + 1))
        return {d: s for d, s in pairs if 0 <= d < n_layers and 0 <= s < n_layers}


def all_settings(n_layers: int, windows: Sequence[int] = WINDOWS) -> list[Setting]:
    """Every destination below every source, in every window."""
    return [Setting(src, dst, w) for w in windows for src in range(n_layers) for dst in range(src)]


@dataclass(frozen=True, eq=False)
class Choice:
    """The setting chosen on one part of the prompts, judged on the other."""

    setting: Setting
    accuracy: float
    """On the prompts that did not choose."""
    baseline: float
    """Accuracy of the unpatched model on the same prompts."""
    gain: Interval
    """accuracy - baseline with its bootstrap interval."""
    p: float
    """McNemar's test against the unpatched model."""
    correct: Correct
    """Which of the judged prompts the patched model answers."""
    baseline_correct: Correct
    judged: npt.NDArray[np.int64]
    """Places of the judged prompts."""
    p_gain: Interval | None = None
    """Gain in the mean probability of the right answer, with its bootstrap interval."""


@dataclass(frozen=True, eq=False)
class BackPatch:
    """Answers under every setting."""

    settings: tuple[Setting, ...]
    correct: Correct
    """Shape ``(settings, n)``."""
    baseline: Correct
    """Answers of the unpatched model, ``(n,)``."""
    p_correct: Share | None = None
    """Probability of the right answer among the labels, ``(settings, n)``: moves where accuracy is at its ceiling."""
    p_baseline: Share | None = None
    """That of the unpatched model, ``(n,)``."""

    def to_polars(self) -> pl.DataFrame:
        """One row per setting: src, dst, window, accuracy, baseline, p_correct, p_baseline.

        These are over all prompts: the best row is chosen and judged on the same ones, which is optimistic.
        """
        columns: dict[str, Any] = {
            name: [getattr(s, name) for s in self.settings] for name in Setting._fields
        }
        columns |= {"accuracy": self.correct.mean(1), "baseline": float(self.baseline.mean())}
        if self.p_correct is not None and self.p_baseline is not None:
            columns |= {"p_correct": self.p_correct.mean(1), "p_baseline": float(self.p_baseline.mean())}
        return pl.DataFrame(columns)

    def choose(self, fraction: float = 0.5, seed: int = 0, n_resamples: int = 1000) -> Choice:
        """Choose the best setting on a random part of the prompts and judge it on the rest.

        The best accuracy wins, between equals the higher mean probability of the right answer, then the first
        setting. ``fraction=1`` chooses and judges on all prompts, which is optimistic.

        Raises:
            ShapeError: a part would be empty.
        """
        n = len(self.baseline)
        k = round(fraction * n)
        if fraction != 1 and not 0 < k < n:
            raise ShapeError(
                f"choose: fraction: expected two non-empty parts of {n} prompts, found {fraction}"
            )
        order = np.random.default_rng(seed).permutation(n)
        chooses, judges = (order, order) if fraction == 1 else (order[:k], order[k:])
        best = self._best(chooses)
        after, before = self.correct[best, judges], self.baseline[judges]
        gain = bootstrap(
            lambda a, b: float(a.mean() - b.mean()),
            [after.astype(np.float64), before.astype(np.float64)],
            n_resamples,
            seed,
        )
        p = mcnemar(before, after)
        return Choice(
            self.settings[best], float(after.mean()), float(before.mean()), gain, p, after, before, judges,
            self._p_gain(best, judges, n_resamples, seed),
        )  # fmt: skip

    def _best(self, chooses: npt.NDArray[np.int64]) -> int:
        accuracy = self.correct[:, chooses].mean(1)
        likely = np.zeros(len(accuracy)) if self.p_correct is None else self.p_correct[:, chooses].mean(1)
        return int(np.lexsort((-likely, -accuracy))[0])

    def _p_gain(
        self, best: int, judges: npt.NDArray[np.int64], n_resamples: int, seed: int
    ) -> Interval | None:
        if self.p_correct is None or self.p_baseline is None:
            return None
        gains = self.p_correct[best, judges] - self.p_baseline[judges]
        return bootstrap(lambda x: float(x.mean()), [gains], n_resamples, seed)


def gap_closed(
    patched: npt.ArrayLike,
    visual: npt.ArrayLike,
    textual: npt.ArrayLike,
    n_resamples: int = 1000,
    seed: int = 0,
) -> Interval:
    """Share of the gap between the forms that patching closes: (acc_patched - acc_visual) / (acc_textual - acc_visual).

    Args:
        patched: which visual prompts the patched model answers, ``(n,)``.
        visual: which of the same prompts the unpatched model answers, ``(n,)``.
        textual: which textual prompts the model answers; resampled by itself.
        n_resamples: bootstrap draws.
        seed: of the draws.

    Returns:
        The share with its interval, not clipped; NaN when the forms are equally accurate.

    Raises:
        ShapeError: the first two differ in length.
    """
    after, before, text = (np.asarray(x, np.float64) for x in (patched, visual, textual))
    if after.shape != before.shape:
        raise ShapeError(
            f"gap_closed: expected answers to the same prompts, found {after.shape} and {before.shape}"
        )

    def share(a: npt.NDArray[np.float64], b: npt.NDArray[np.float64], t: npt.NDArray[np.float64]) -> float:
        gap = float(t.mean() - b.mean())
        return float(a.mean() - b.mean()) / gap if gap else float("nan")

    rng = np.random.default_rng(seed)
    draws = []
    for _ in range(n_resamples):
        rows, others = rng.integers(len(after), size=len(after)), rng.integers(len(text), size=len(text))
        draws.append(share(after[rows], before[rows], text[others]))
    finite = [x for x in draws if np.isfinite(x)]
    low, high = np.quantile(finite, [0.025, 0.975]) if finite else (float("nan"), float("nan"))
    return Interval(share(after, before, text), float(low), float(high))
