"""The forms of a task: which of its prompts are answered, and what a study has found in them so far."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

from microtome.circuits.attribution.blocks import Blocks
from microtome.circuits.circuit.nodes import Circuit
from microtome.circuits.pairs.pair_set import PairSet
from microtome.circuits.pairs.preparation import answers_correctly
from microtome.circuits.study.options import FORMS, Options
from microtome.errors import ShapeError

__all__ = ["Side"]

_LEAST_PAIRS = 4


@dataclass(eq=False)
class Side:
    """One form of a task, and what the study has found in it so far."""

    everything: PairSet
    right: npt.NDArray[np.bool_]
    discovery: PairSet
    evaluation: PairSet
    has_other: bool
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
        return cls(pairs, right, discovery, evaluation, set(forms) == set(FORMS))
