"""Back-patching: late representations of the data, put into early layers, and what that repairs (A14).

1. A clean run keeps resid_post of every layer at the data positions.
2. A second run overwrites resid_post[dst + j] there with the kept resid_post[src + j], |j| ≤ w // 2, dst <
   src; the layers after recompute (``repeat_processing``), or are given their clean values again.
3. The answer is the most likely of the task's labels at the last position.

The best (src, dst, window) is chosen on one part of the prompts and judged on the other. In a causal decoder
whose data come first nothing of the question can flow back into the patched positions.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import polars as pl
import torch
from torch import Tensor

from microtome.circuits.forward import as_pair_set, last_logits, left_as_found, merge, on_residuals
from microtome.circuits.pairs import PairBatch, PairSet
from microtome.circuits.statistics import Interval, bootstrap, mcnemar
from microtome.errors import ShapeError
from microtome.progress import bar

__all__ = [
    "BackPatch",
    "Choice",
    "Setting",
    "all_settings",
    "back_patch",
    "back_patch_iterated",
    "gap_closed",
]

Correct = npt.NDArray[np.bool_]
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


@dataclass(frozen=True, eq=False)
class BackPatch:
    """Answers under every setting."""

    settings: tuple[Setting, ...]
    correct: Correct
    """Shape ``(settings, n)``."""
    baseline: Correct
    """Answers of the unpatched model, ``(n,)``."""

    def to_polars(self) -> pl.DataFrame:
        """One row per setting: src, dst, window, accuracy, baseline. Chosen and judged on the same prompts: optimistic."""
        columns = {name: [getattr(s, name) for s in self.settings] for name in Setting._fields}
        return pl.DataFrame({**columns, "accuracy": self.correct.mean(1)}).with_columns(
            pl.lit(float(self.baseline.mean())).alias("baseline")
        )

    def choose(self, fraction: float = 0.5, seed: int = 0, n_resamples: int = 1000) -> Choice:
        """Choose the best setting on a random part of the prompts and judge it on the rest.

        Ties go to the first setting. ``fraction=1`` chooses and judges on all prompts, which is optimistic.

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
        best = int(self.correct[:, chooses].mean(1).argmax())
        after, before = self.correct[best, judges], self.baseline[judges]
        gain = bootstrap(
            lambda a, b: float(a.mean() - b.mean()),
            [after.astype(np.float64), before.astype(np.float64)],
            n_resamples,
            seed,
        )
        p = mcnemar(before, after)
        return Choice(self.settings[best], float(after.mean()), float(before.mean()), gain, p, after, before)


def back_patch(
    model: Any,
    pairs: PairSet,
    settings: Sequence[Setting] | None = None,
    *,
    windows: Sequence[int] = WINDOWS,
    labels: Sequence[int] | None = None,
    group: str = "data",
    repeat_processing: bool = True,
    allow_prefix: bool = False,
    batch_size: int = 16,
    progress: bool = True,
) -> BackPatch:
    """Answers of the clean prompts under every setting, and without patching.

    Args:
        model: a transformers model; left as it was found.
        pairs: prepared pairs; all prompts, not only the ones that the model answers. Their counterfactuals
            are not used. Run it on the textual form as well: that is the control.
        settings: (src, dst, window) triples; all pairs of layers in all ``windows`` when None.
        windows: odd widths.
        labels: token ids among which the answer is chosen; the answers of all pairs when None.
        group: the positions that are patched.
        repeat_processing: layers after the patched ones recompute; else their values at the data stay those
            of the clean run.
        allow_prefix: accept prompts whose words before the data differ: these may carry the question into the
            data.
        batch_size: prompts per forward.
        progress: show a bar.

    Raises:
        ShapeError: a setting with dst ≥ src or outside the model, or data that do not come first.
    """
    from microtome.capture.models import adapt

    pairs = as_pair_set(pairs)
    adapter = adapt(model)
    chosen = tuple(
        all_settings(adapter.n_layers, windows) if settings is None else map(Setting._make, settings)
    )
    _check(chosen, adapter.n_layers)
    _check_data_first(pairs, group, allow_prefix)
    ids = _labels(pairs, labels, model.device)
    correct = np.zeros((len(chosen) + 1, len(pairs)), bool)
    with left_as_found(model), torch.no_grad(), bar("back-patching", len(pairs), progress, "prompts") as done:
        seen = 0
        for batch in pairs.batches(batch_size, model.device):
            correct[:, list(batch.indices)] = _answers(
                adapter, pairs, batch, chosen, ids, group, repeat_processing
            )
            seen += len(batch)
            done(seen)
    return BackPatch(chosen, correct[:-1], correct[-1])


def _check(settings: Sequence[Setting], n_layers: int) -> None:
    for setting in settings:
        if not 0 <= setting.dst < setting.src < n_layers:
            raise ShapeError(f"settings: expected 0 ≤ dst < src < {n_layers}, found {tuple(setting)}")
        if setting.window < 1 or setting.window % 2 == 0:
            raise ShapeError(f"settings: window: expected an odd width, found {setting.window}")


def _check_data_first(pairs: PairSet, group: str, allow_prefix: bool) -> None:
    heads = set()
    for i, pair in enumerate(pairs):
        where = np.asarray(pair.spans.get(group, ()), np.int64)
        if not len(where):
            raise ShapeError(f"pair {i}: expected {group} positions to patch, found none")
        heads.add(tuple(pair.clean["input_ids"][0, : int(where[0])].tolist()))
    if len(heads) > 1 and not allow_prefix:
        raise ShapeError(
            f"pairs: expected the same words before the {group} of every prompt, found {len(heads)} beginnings. "
            "A question before the data flows into them; allow_prefix=True runs all the same"
        )


def _labels(pairs: PairSet, labels: Sequence[int] | None, device: Any) -> Tensor:
    found = set(labels) if labels is not None else {i for p in pairs for i in (p.answer, p.corrupted_answer)}
    missing = {p.answer for p in pairs} - found
    if missing:
        raise ShapeError(f"labels: expected every answer among them, found {sorted(missing)} missing")
    return torch.tensor(sorted(found), device=device)


def _mask(pairs: PairSet, batch: PairBatch, group: str) -> Tensor:
    mask = torch.zeros(batch.slots.shape, dtype=torch.bool, device=batch.slots.device)
    for row, i in enumerate(batch.indices):
        mask[row, torch.from_numpy(np.asarray(pairs.pairs[i].spans[group]))] = True
    return mask[..., None]  # (b, p, 1)


def _answers(
    adapter: Any,
    pairs: PairSet,
    batch: PairBatch,
    settings: Sequence[Setting],
    ids: Tensor,
    group: str,
    repeat: bool,
) -> Correct:
    """Whether each setting, and in the last row no setting, answers right. Shape ``(settings + 1, b)``."""
    merged = merge(adapter, batch.clean)
    mask = _mask(pairs, batch, group)
    kept: dict[int, Tensor] = {}
    with on_residuals(adapter, lambda layer, x: kept.__setitem__(layer, x.clone())):
        rows = [_right(last_logits(adapter, merged), ids, batch)]
    for setting in settings:
        put = _values(setting, kept, adapter.n_layers, repeat)
        with on_residuals(adapter, lambda layer, x, put=put: torch.where(mask, put[layer], x), sorted(put)):  # type: ignore[misc]
            rows.append(_right(last_logits(adapter, merged), ids, batch))
    return np.stack([*rows[1:], rows[0]])


def _values(setting: Setting, kept: dict[int, Tensor], n_layers: int, repeat: bool) -> dict[int, Tensor]:
    """What is put into which layer."""
    layers = setting.layers(n_layers)
    put = {d: kept[s] for d, s in layers.items()}
    if not repeat:
        put |= {layer: kept[layer] for layer in range(max(layers) + 1, n_layers)}
    return put


def _right(logits: Tensor, ids: Tensor, batch: PairBatch) -> Correct:
    return (ids[logits[:, ids].argmax(-1)] == batch.answers).cpu().numpy()  # type: ignore[no-any-return]


def back_patch_iterated(
    model: Any,
    pairs: PairSet,
    setting: Setting,
    iterations: int = 10,
    *,
    labels: Sequence[int] | None = None,
    group: str = "data",
    batch_size: int = 16,
) -> Correct:
    """Answers after patching again and again, each time with the values of the patched run before.

    Returns:
        Shape ``(iterations + 1, n)``; row 0 is the unpatched model.
    """
    from microtome.capture.models import adapt

    pairs = as_pair_set(pairs)
    adapter = adapt(model)
    setting = Setting._make(setting)
    _check([setting], adapter.n_layers)
    ids = _labels(pairs, labels, model.device)
    correct = np.zeros((iterations + 1, len(pairs)), bool)
    with left_as_found(model), torch.no_grad():
        for batch in pairs.batches(batch_size, model.device):
            merged, mask = merge(adapter, batch.clean), _mask(pairs, batch, group)
            put: dict[int, Tensor] = {}
            for i in range(iterations + 1):
                kept: dict[int, Tensor] = {}

                def visit(
                    layer: int, x: Tensor, put: dict[int, Tensor] = put, kept: dict[int, Tensor] = kept
                ) -> Any:
                    x = torch.where(mask, put[layer], x) if layer in put else x  # noqa: B023  called in this round
                    kept[layer] = x.clone()
                    return x

                with on_residuals(adapter, visit):
                    correct[i, list(batch.indices)] = _right(last_logits(adapter, merged), ids, batch)
                put = {d: kept[s] for d, s in setting.layers(adapter.n_layers).items()}
    return correct


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
