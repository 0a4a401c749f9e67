"""Interventions against matched controls, on identical items: is this feature, are these heads, what the answers rest on?

Each test is run beside its random controls (spatial-features, section 9). What is reported is the change in
accuracy and in P(correct) with paired intervals, the spread of the same change over controls, and the excess of
the test over the mean control.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any

import numpy as np
import polars as pl

from microtome.circuits.ablation.outcomes import Outcome, effect_of, outcome
from microtome.circuits.pairs.pair_set import PairSet
from microtome.circuits.statistics import bootstrap
from microtome.errors import ShapeError

__all__ = ["ablation_table", "causal_test"]

Begin = Callable[[], AbstractContextManager[None]]
"""Gives the context manager of an intervention, anew for every run."""


def causal_test(
    model: Any,
    items: PairSet,
    tests: Mapping[str, Begin],
    controls: Mapping[str, Sequence[Begin]],
    groups: Sequence[Sequence[int]] | None = None,
    *,
    batch_size: int = 16,
    seed: int = 0,
    progress: bool = True,
) -> pl.DataFrame:
    """Effects of interventions beside those of their controls.

    Args:
        model: a transformers model; left as it was found.
        items: prepared items, the same for every run.
        tests: name -> a function that gives the context manager, such as
            ``lambda: ablate_features(model, {26: W_dec[807]})``.
        controls: name of a test -> the same with other features or heads.
        groups: token ids of each possible answer, such as yes and no; see :func:`outcome`.
        batch_size: prompts per forward.
        seed: of the bootstrap.
        progress: show bars.

    Returns:
        One row per test: test, n, accuracy_before, accuracy, accuracy_change with _low and _high (paired
        bootstrap), p_mcnemar, control_accuracy_change (mean over controls) with _low and _high (2.5 and 97.5 %
        of the controls), accuracy_excess (change less mean control change) with _low and _high (items resampled),
        p_controls (share of controls that change as much, one-sided); the same of p_correct; n_controls.

    Raises:
        ShapeError: no test, or controls of a test that is not there.

    Example:
        >>> from microtome import organism
        >>> from microtome.circuits import ablate_features, prepare
        >>> model, processor = organism.load_model(), organism.load_processor()
        >>> items = prepare(model, processor, organism.pairs("colour", "textual", 4))
        >>> def without(i):
        ...     return lambda: ablate_features(model, {2: np.eye(128)[i]})
        >>> table = causal_test(model, items, {"first": without(0)}, {"first": [without(i) for i in range(1, 4)]})
        >>> table["test"].to_list(), table["n_controls"].to_list()
        (['first'], [3])
    """
    unknown = sorted(set(controls) - set(tests))
    if not tests or unknown:
        raise ShapeError(
            f"controls: expected names of tests ({', '.join(tests) or 'none given'}), found {unknown}"
        )

    def answers(begin: Begin) -> Outcome:
        with begin():
            return outcome(model, items, groups, batch_size=batch_size, progress=progress)

    before = outcome(model, items, groups, batch_size=batch_size, progress=progress)
    rows = []
    for name, begin in tests.items():
        after = answers(begin)
        drawn = [answers(control) for control in controls.get(name, ())]
        rows.append(
            {"test": name, "n": len(items), **_row(before, after, drawn, seed), "n_controls": len(drawn)}
        )
    return pl.DataFrame(rows, infer_schema_length=None)


def _row(before: Outcome, after: Outcome, drawn: Sequence[Outcome], seed: int) -> dict[str, float | None]:
    effect = effect_of(before, after, seed=seed)
    row: dict[str, float | None] = {}
    for name, value, change in (
        ("accuracy", "correct", effect.accuracy_change),
        ("p_correct", "p_correct", effect.p_correct_change),
    ):
        was, now = (np.asarray(getattr(x, value), np.float64) for x in (before, after))
        row |= {f"{name}_before": float(was.mean()), name: float(now.mean())}
        row |= {f"{name}_change": change.value, f"{name}_low": change.low, f"{name}_high": change.high}
        if name == "accuracy":
            row["p_mcnemar"] = effect.p_mcnemar
        if drawn:
            row |= _against(
                name, was, now, np.stack([getattr(x, value) for x in drawn]).astype(np.float64), seed
            )
    return row


def _against(name: str, was: Any, now: Any, controls: Any, seed: int) -> dict[str, float]:
    """Changes over controls ``(draws, n)``, and how far the test goes beyond their mean."""
    changes = controls.mean(1) - was.mean()
    low, high = np.quantile(changes, [0.025, 0.975])
    excess = bootstrap(lambda x: float(x.mean()), [now - controls.mean(0)], seed=seed)
    change = now.mean() - was.mean()
    reached = int((np.sign(change) * changes >= abs(change)).sum()) if change else len(changes)
    return {
        f"control_{name}_change": float(changes.mean()),
        f"control_{name}_low": float(low),
        f"control_{name}_high": float(high),
        f"{name}_excess": excess.value,
        f"{name}_excess_low": excess.low,
        f"{name}_excess_high": excess.high,
        f"p_controls_{name}": (1 + reached) / (len(changes) + 1),
    }


def ablation_table(
    model: Any,
    items: PairSet,
    interventions: Mapping[str, Begin],
    groups: Sequence[Sequence[int]] | None = None,
    *,
    batch_size: int = 16,
    seed: int = 0,
    progress: bool = True,
) -> pl.DataFrame:
    """Effects of several interventions on the same items.

    Args:
        model: a transformers model; left as it was found.
        items: prepared items.
        interventions: name -> a function that gives the context manager, such as
            ``lambda: ablate_features(model, {26: W_dec[807]})``. Give random and mismatched controls besides.
        groups: as in :func:`outcome`.
        batch_size: prompts per forward.
        seed: of the bootstrap.
        progress: show bars.

    Returns:
        One row per intervention, the first named ``none``: name, n, accuracy, p_correct, and changes with 95
        % intervals and McNemar's p.
    """
    before = outcome(model, items, groups, batch_size=batch_size, progress=progress)
    runs = {"none": before}
    for name, begin in interventions.items():
        with begin():
            runs[name] = outcome(model, items, groups, batch_size=batch_size, progress=progress)
    rows = []
    for name, after in runs.items():
        effect = effect_of(before, after, seed=seed)
        rows.append(
            {
                "intervention": name,
                "n": len(items),
                "accuracy": effect.accuracy,
                "accuracy_change": effect.accuracy_change.value,
                "accuracy_low": effect.accuracy_change.low,
                "accuracy_high": effect.accuracy_change.high,
                "p_correct": effect.p_correct,
                "p_correct_change": effect.p_correct_change.value,
                "p_correct_low": effect.p_correct_change.low,
                "p_correct_high": effect.p_correct_change.high,
                "p_mcnemar": effect.p_mcnemar,
            }
        )
    return pl.DataFrame(rows)
