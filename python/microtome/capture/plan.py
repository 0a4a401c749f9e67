"""What a capture wants of every forward, checked before the first one."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from microtome.capture.models import ModelAdapter
from microtome.capture.points import HookPoint
from microtome.errors import DtypeError, Error, ShapeError

__all__ = ["KINDS", "Plan", "plan", "stored_widths"]

KINDS = {"text": 0, "image": 1, "video": 2}
_DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}


@dataclasses.dataclass(frozen=True, eq=False)
class Plan:
    """Points, type and rows of a capture."""

    points: list[HookPoint]
    dtype_name: str
    step_rows: int
    """Tokens per step."""
    pool: str | None
    pool_by_kind: bool
    kinds: frozenset[int] | None
    """Kinds of tokens to keep; None keeps all."""
    pattern_keys: int
    special: Any
    """Ids of special tokens, sorted."""

    @property
    def dtype(self) -> torch.dtype:
        """Element type on disk."""
        return _DTYPES[self.dtype_name]

    @property
    def token_points(self) -> list[HookPoint]:
        """The points with one value per token."""
        return [point for point in self.points if point.space == "tokens"]

    def space(self, point: HookPoint) -> str:
        """The row space that a point is stored in."""
        return "samples" if self.pool and point.space == "tokens" else point.space

    def spaces(self) -> dict[str, list[HookPoint]]:
        """The points by row space."""
        spaces: dict[str, list[HookPoint]] = {}
        for point in self.points:
            spaces.setdefault(self.space(point), []).append(point)
        return spaces

    def empty(self, point: HookPoint) -> torch.Tensor:
        """No rows of a point."""
        return torch.empty((0, point.width or 0), dtype=self.dtype)

    def options(self) -> dict[str, Any]:
        """What the manifest says about the rows."""
        kinds = (
            None if self.kinds is None else sorted(name for name, kind in KINDS.items() if kind in self.kinds)
        )
        return {"pool": self.pool, "pool_by_kind": self.pool_by_kind, "where": kinds}


def is_pattern(point: HookPoint) -> bool:
    """Whether a point is the attention pattern, whose rows are as wide as a sample is long."""
    return point.name.endswith(".attn.hook_pattern")


def plan(
    adapter: ModelAdapter,
    hooks: Iterable[str],
    dtype: str | torch.dtype,
    step_rows: int,
    *,
    pool: str | None,
    pool_by_kind: bool,
    where: str | Sequence[str] | None,
    pattern_keys: int | None,
    processor: Any,
) -> Plan:
    """Check the arguments of a capture, raising what :func:`microtome.capture.capture` says."""
    name = str(dtype).removeprefix("torch.")
    if name not in _DTYPES:
        raise DtypeError(f"dtype: expected one of {list(_DTYPES)}, found {name!r}")
    if isinstance(step_rows, bool) or not isinstance(step_rows, int) or step_rows < 1:
        raise ShapeError(f"step_rows: expected a positive integer, found {step_rows!r}")
    if pool not in (None, "mean"):
        raise ShapeError(f"pool: expected None or 'mean', found {pool!r}")
    if pool_by_kind and pool is None:
        raise ShapeError("pool_by_kind: expected pool='mean' with it, found pool=None")
    points = [
        _pattern(adapter, point, pattern_keys) if is_pattern(point) else point
        for point in adapter.select(hooks)
    ]
    special = np.array(sorted(adapter.special_ids(processor)), np.int64)
    return Plan(points, name, step_rows, pool, pool_by_kind, _kinds(where), pattern_keys or 0, special)


def _kinds(where: str | Sequence[str] | None) -> frozenset[int] | None:
    if where is None:
        return None
    names = [where] if isinstance(where, str) else list(where)
    if not names or any(name not in KINDS for name in names):
        raise ShapeError(f"where: expected kinds of tokens out of {list(KINDS)}, found {where!r}")
    return frozenset(KINDS[name] for name in names)


def _pattern(adapter: ModelAdapter, point: HookPoint, keys: int | None) -> HookPoint:
    """The pattern's point with the width that it is stored in."""
    if adapter.attn_implementation != "eager":
        raise Error(
            f"hook {point.name}: expected eager attention, found {adapter.attn_implementation}, which keeps "
            f"no weights. "
            f"Call model.set_attn_implementation('eager') first"
        )
    if not keys:
        raise ShapeError(
            f"hook {point.name}: expected pattern_keys=N, the keys kept per head, found {keys!r}. "
            f"A row of the pattern is as wide as its sample is long"
        )
    return dataclasses.replace(point, width=adapter.n_heads * keys)


def stored_widths(path: Path) -> dict[str, int]:
    """Widths of the hooks of the store at ``path``, none where there is no store."""
    if not (path / "manifest.json").exists():
        return {}
    from microtome.store import ActivationStore

    store = ActivationStore(path)
    return {name: store[name].shape[1] for name in store.hooks}
