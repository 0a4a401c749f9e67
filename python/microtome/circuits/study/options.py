"""How a study is done."""

from __future__ import annotations

from dataclasses import dataclass

from microtome.circuits.circuit.scores import SIZES
from microtome.errors import ShapeError

__all__ = ["FORMS", "N_AUDITED", "N_ITERATIONS", "Options"]

FORMS = ("visual", "textual")
N_AUDITED = 8
"""Evaluation pairs on which scores are audited against exact patching."""
N_ITERATIONS = 10
"""Iterations of back-patching with the chosen setting."""


@dataclass(frozen=True)
class Options:
    """How a study is done."""

    method: str = "ig"
    steps: int = 5
    sizes: tuple[float, ...] = SIZES
    threshold: float = 0.8
    """Faithfulness that the chosen circuit exceeds."""
    n_random: int = 20
    """Random sub-circuits of the interchange, and random circuits of the overlap's chance."""
    n_exact: int = 100
    """Heads, and as many neurons, that are patched exactly to audit the scores; 0 leaves that out."""
    n_blocks: int = 10
    """Blocks of discovery pairs, for the overlap's intervals and noise floor."""
    n_splits: int = 20
    """Split halves of the noise floor; 0 leaves that out."""
    n_heads: int = 3
    """Attributed heads that are mean-ablated; 0 leaves that out."""
    n_controls: int = 20
    """Random sets of heads beside them."""
    windows: tuple[int, ...] = (5, 3, 1)
    """Windows of back-patching; none leaves that out."""
    allow_prefix: bool = False
    """Back-patch prompts whose words before the data differ."""
    fraction: float = 0.75
    seed: int = 42
    batch_size: int = 16
    memory_budget: int | str | None = None

    def check(self) -> None:
        """Refuse what no study can do.

        Raises:
            ShapeError: an option is out of range.
        """
        for name in ("n_random", "n_exact", "n_splits", "n_heads", "n_controls", "seed"):
            if getattr(self, name) < 0:
                raise ShapeError(f"{name}: expected 0 or more, found {getattr(self, name)}")
        for name in ("steps", "n_blocks", "batch_size"):
            if getattr(self, name) < 1:
                raise ShapeError(f"{name}: expected 1 or more, found {getattr(self, name)}")
        if not 0 < self.fraction < 1:
            raise ShapeError(f"fraction: expected a share between 0 and 1, found {self.fraction}")
        if (
            not self.sizes
            or any(not 0 <= s <= 1 for s in self.sizes)
            or list(self.sizes) != sorted(set(self.sizes))
        ):
            raise ShapeError(f"sizes: expected rising shares from 0 to 1, found {list(self.sizes)}")
        even = [w for w in self.windows if w < 1 or w % 2 == 0]
        if even:
            raise ShapeError(f"windows: expected odd widths, found {even[0]}")
