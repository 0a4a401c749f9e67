"""Which questions are asked when.

A kind enters once what it builds on is solved, and the weakest kinds are asked most.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any

from microtome.organism.packing import Mix

ENTRY: dict[str, dict[str, float]] = {
    "locate": {},
    "compare": {},
    "arithmetic": {},
    "name": {"locate": 0.9},
    "colour": {"locate": 0.9},
    "shape": {"locate": 0.9},
    "existence": {"locate": 0.9},
    "counting": {"locate": 0.9},
    "refusal": {"locate": 0.9},
    "place": {"locate": 0.9},
    "choose": {"locate": 0.9, "compare": 0.9},
    "choose_row": {"choose": 0.8},
    "yesno": {"choose": 0.85},
}
"""The accuracy on other kinds at which a kind enters."""

SOLVED = 0.985
_PRIORITY = {"choose": 3.0, "choose_row": 2.0, "yesno": 2.0}  # relations are the hard part
_FLOOR = 0.06  # solved kinds stay in the mix
_MEMORY = 0.95  # of the running accuracy, a step


@dataclass
class Curriculum:
    """Running accuracy of each kind on fresh training questions, and the mix that follows from it."""

    accuracy: dict[str, float] = field(default_factory=dict)
    entered: list[str] = field(default_factory=lambda: [kind for kind, needs in ENTRY.items() if not needs])

    def update(self, hits: dict[str, list[bool]]) -> None:
        """Take in a step's hits, and admit the kinds whose prerequisites are solved."""
        for kind, hit in hits.items():
            now = sum(hit) / len(hit)
            self.accuracy[kind] = _MEMORY * self.accuracy.get(kind, 0.0) + (1 - _MEMORY) * now
        for kind, needs in ENTRY.items():
            if kind not in self.entered and all(
                self.accuracy.get(k, 0.0) >= least for k, least in needs.items()
            ):
                self.entered.append(kind)

    def mix(self, images: float) -> Mix:
        """Shares by what is missing; digit scenes hold arithmetic alone, so theirs is a share of the rows."""
        missing = {k: _FLOOR + _PRIORITY.get(k, 1.0) * (1 - self.accuracy.get(k, 0.0)) for k in self.entered}
        digits = missing.pop("arithmetic")
        return Mix(missing, min(0.35, digits / (digits + sum(missing.values()))), images)

    def solved(self) -> bool:
        """Whether every kind has entered and is solved."""
        return len(self.entered) == len(ENTRY) and all(
            self.accuracy.get(kind, 0.0) >= SOLVED for kind in ENTRY
        )

    def state(self) -> dict[str, Any]:
        """The state, for a checkpoint."""
        return asdict(self)
