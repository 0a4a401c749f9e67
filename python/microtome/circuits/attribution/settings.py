"""What defines the scores of an attribution run."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

from microtome.arguments import require_one_of
from microtome.errors import ShapeError

__all__ = ["METHODS", "Method", "Settings"]

Method = Literal["ig", "plain", "clean_corrupted", "ig_activations", "exact"]
METHODS: tuple[Method, ...] = get_args(Method)


@dataclass(frozen=True)
class Settings:
    """What defines the scores."""

    method: str
    steps: int
    ig_path: str
    head_reduce: str
    signed: bool

    def check(self) -> None:
        """Refuse what no run can do.

        Raises:
            ShapeError: an option is not one of those there are.
        """
        options = {
            "method": METHODS,
            "ig_path": ("merged", "text_only"),
            "head_reduce": ("abs_sum", "sum_abs"),
        }
        for name, allowed in options.items():
            require_one_of(name, getattr(self, name), allowed)
        if self.signed and self.head_reduce == "sum_abs":
            raise ShapeError(
                "head_reduce: expected 'abs_sum' with signed=True, found 'sum_abs'. Its absolute values have no sign"
            )
        if self.steps < 1:
            raise ShapeError(f"steps: expected 1 or more, found {self.steps}")

    @property
    def points(self) -> tuple[float, ...]:
        """Points of the path at which gradients are taken, 0 the counterfactual, 1 the clean prompt; 1 comes last."""
        if self.method == "plain":
            return (1.0,)
        if self.method == "clean_corrupted":
            return (0.0, 1.0)
        return tuple((i + 1) / self.steps for i in range(self.steps))
