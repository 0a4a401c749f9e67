"""The forms of a task: which of its prompts are answered, and what a study has found in them so far."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

from microtome.circuits.attribution.blocks import Blocks
from microtome.circuits.backpatch.patching import check_data_first
from microtome.circuits.circuit.nodes import Circuit
from microtome.circuits.pairs.pair_set import PairSet
from microtome.circuits.pairs.preparation import answers_correctly
from microtome.circuits.study.options import FORMS, Options
from microtome.errors import ShapeError

__all__ = ["Side", "matched"]

_LEAST_PAIRS = 4


@dataclass(eq=False)
class Side:
    """One form of a task, and what the study has found in it so far."""

    everything: PairSet
    right: npt.NDArray[np.bool_]
    discovery: PairSet
    evaluation: PairSet
    has_other: bool
    n_matched: int
    """Pairs that the other form has too."""
    left_out: Mapping[str, str]
    """Steps on both forms that the prompts do not allow, and why."""
    blocks: Blocks = field(init=False)
    circuit: Circuit = field(init=False)
    size: float = field(init=False)

    @classmethod
    def of(cls, model: Any, task: str, form: str, forms: Mapping[str, PairSet], how: Options) -> Side:
        """Ask the model, and split the pairs that it answers.

        Raises:
            ShapeError: it answers too few.
        """
        pairs = forms[form]
        right = answers_correctly(model, pairs, how.batch_size)
        if right.sum() < _LEAST_PAIRS:
            raise ShapeError(
                f"{task}, {form}: expected at least {_LEAST_PAIRS} pairs whose two prompts the model answers, found "
                f"{int(right.sum())} of {len(pairs)}"
            )
        discovery, evaluation = pairs[np.flatnonzero(right)].split(how.fraction, how.seed)
        has_other = set(forms) == set(FORMS)
        n_matched = len(matched(task, forms)[0]) if has_other else 0
        skipped = _left_out(forms, how)
        return cls(pairs, right, discovery, evaluation, has_other, n_matched, skipped)


def matched(task: str, forms: Mapping[str, PairSet]) -> tuple[PairSet, PairSet]:
    """The pairs that both forms have, by their numbers in the source, in one order.

    Raises:
        ShapeError: the forms share no number, or have none and differ in length.
    """
    seen, told = (forms[form] for form in FORMS)
    places = [{pair.number: i for i, pair in enumerate(form)} for form in (seen, told)]
    if any(None in of for of in places):
        if len(seen) != len(told):
            raise ShapeError(
                f"{task}: expected pairs numbered by their source or as many of each form, found {len(seen)} and "
                f"{len(told)} without numbers. Prepare both forms with prepare()"
            )
        return seen, told
    shared = [number for number in places[0] if number in places[1]]
    if not shared or any(len(of) < len(form) for of, form in zip(places, (seen, told), strict=True)):
        raise ShapeError(
            f"{task}: expected visual and textual pairs of the same source, each once, found {len(shared)} numbers "
            f"shared by {len(seen)} and {len(told)} pairs"
        )
    return seen[[places[0][n] for n in shared]], told[[places[1][n] for n in shared]]


def _left_out(forms: Mapping[str, PairSet], how: Options) -> dict[str, str]:
    """Steps on both forms that need data positions, or one beginning, where the prompts have none: step -> why."""
    if set(forms) != set(FORMS):
        return {}
    found: dict[str, str] = {}
    for steps, allow_prefix in (
        (("alignment", "back-patching"), True),
        (("back-patching",), how.allow_prefix),
    ):
        for form in FORMS:
            try:
                check_data_first(forms[form], "data", allow_prefix)
            except ShapeError as error:
                found |= {step: f"{form}: {error}" for step in steps if step not in found}
    return found
