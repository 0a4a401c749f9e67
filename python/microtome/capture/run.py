"""One run: what the hooks saw while the named samples went through the model.

A run is one forward, or a generation. It gathers the pieces of its forwards, each copied inside the hook, and
turns them into one block of rows by sample.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from microtome.capture.plan import KINDS, Plan, is_pattern
from microtome.capture.points import HookPoint
from microtome.capture.rows import Flags, Ints, TokenRows, merged_order, row_arrays, unpadded
from microtome.capture.samples import SampleTable
from microtome.capture.vision import VisionCalls
from microtome.capture.writer import Block, Cut, Matrix
from microtome.errors import DtypeError, ShapeError

__all__ = ["Run"]

_SEEN = "seen"


class Run:
    """The samples of the next forward, and what it and the forwards that go on from it leave behind."""

    def __init__(self, plan: Plan, records: list[dict[str, Any]], wanted: Sequence[bool]) -> None:
        self.records = records
        """Names and columns of the samples, in batch order."""
        self.begun = False
        self.pixels: Any = None
        self._plan = plan
        self._wanted = np.array(wanted, bool)  # samples that the store does not hold yet
        self._seen = np.zeros(len(records), np.int64)  # tokens of each sample so far
        self._ended = np.zeros(len(records), bool)
        self._forwards: list[TokenRows] = []
        self._open: TokenRows | None = None
        self._fired: dict[str, str] = {}
        self._pieces: dict[str, list[torch.Tensor]] = defaultdict(list)
        self._sums: dict[tuple[str, int, int], torch.Tensor] = {}
        self._vision = VisionCalls(plan)
        self._placeholders: dict[int, Flags] = {}
        self._events: list[Any] = []

    # --- a forward of the model -----------------------------------------------------------------------------

    def open(
        self, ids: Ints, mask: Any, past: int, kinds: Ints, ends: tuple[int, Sequence[int]] | None
    ) -> None:
        """Begin a forward.

        Args:
            ids: token ids (samples, columns).
            mask: attention mask, with the cached columns or without; None where all are tokens.
            past: columns in the cache.
            kinds: kind of each token, as ``ids``.
            ends: while generating, the columns of the prompt and the ids that end a sequence after it.
        """
        if len(ids) != len(self.records):
            raise ShapeError(
                f"input_ids: expected a batch of {len(self.records)}, the samples that were named, found "
                f"{len(ids)}. "
                f"Beams and several sequences per prompt cannot be captured"
            )
        shape = (ids.shape[0], ids.shape[1])
        tokens, positions, attended = unpadded(mask, shape, past, self._seen)
        keep = tokens & (positions >= self._seen[:, None])
        if not self.begun:
            self._placeholders = {kind: tokens & (kinds == kind) for kind in (KINDS["image"], KINDS["video"])}
        elif ends is not None:
            keep &= self._going_on(ids, keep, past, *ends)
        self._seen = np.maximum(self._seen, np.where(keep, positions + 1, 0).max(1, initial=0))
        keep &= self._wanted[:, None]
        if self._plan.kinds is not None:
            keep &= np.isin(kinds, list(self._plan.kinds))
        special = np.isin(ids[keep], self._plan.special).astype(np.int64)
        keys = [np.flatnonzero(row) for row in attended]
        sample, column = np.nonzero(keep)
        self._open = TokenRows(shape, sample, column, positions[keep], ids[keep], kinds[keep], special, keys)
        self._fired = {}
        self.begun = True

    def close(self) -> None:
        """End the forward; every point of the tokens must have been seen once.

        Raises:
            ShapeError: a point that was not seen, or only with other rows than the tokens.
        """
        if self._open is None:
            return
        for point in self._plan.token_points:
            found = self._fired.get(point.name, "none")
            if found != _SEEN:
                raise ShapeError(
                    f"hook {point.name} at {point.path}: expected one value for {self._open.shape} tokens, "
                    f"found {found}"
                )
        self._forwards.append(self._open)
        self._open = None

    @property
    def is_open(self) -> bool:
        """Whether a forward is under way."""
        return self._open is not None

    def complete(self) -> bool:
        """Whether the forward under way has nothing more to give."""
        if self._plan.token_points:
            return all(self._fired.get(point.name) == _SEEN for point in self._plan.token_points)
        return self._vision.complete(self._placeholders)

    def _going_on(
        self, ids: Ints, keep: Flags, past: int, prompt_columns: int, end_ids: Sequence[int]
    ) -> Flags:
        """Tokens of sequences that have not ended; end tokens, and the padding after them, are no rows."""
        new = keep & (past + np.arange(ids.shape[1]) >= prompt_columns)
        after_end = np.logical_or.accumulate(new & np.isin(ids, end_ids), 1) | (self._ended[:, None] & new)
        self._ended |= after_end.any(1)
        going: Flags = ~after_end
        return going

    # --- values, as the hooks see them ----------------------------------------------------------------------

    def see(self, point: HookPoint, value: torch.Tensor) -> None:
        """Copy a point's value of the forward under way."""
        value = value.detach()
        if not value.is_floating_point():
            raise DtypeError(f"hook {point.name}: expected a floating-point value, found {value.dtype}")
        if point.space != "tokens":
            self._vision.see(point, value)
        elif self._open is not None:
            self._see_tokens(point, value, self._open)
        if value.is_cuda:
            event = torch.cuda.Event()
            event.record(torch.cuda.current_stream(value.device))
            self._events.append(event)

    def _see_tokens(self, point: HookPoint, value: torch.Tensor, rows: TokenRows) -> None:
        shaped = (
            self._pattern(point, value, rows) if is_pattern(point) else _by_token(point, value, rows.shape)
        )
        if shaped is None:
            self._fired.setdefault(point.name, f"shape {tuple(value.shape)}")
            return
        if self._fired.get(point.name) == _SEEN:
            raise ShapeError(
                f"hook {point.name} at {point.path}: expected one value per forward, found two. "
                f"The model calls this module more than once"
            )
        self._fired[point.name] = _SEEN
        if not len(rows):
            return
        if self._plan.pool:
            self._add(point, shaped, rows)
        else:
            self._pieces[point.name].append(rows.gather(shaped, self._plan.dtype))

    def _pattern(self, point: HookPoint, value: torch.Tensor, rows: TokenRows) -> torch.Tensor | None:
        """Attention weights by query (samples, queries, d), keys counted from the sample's first token."""
        keys = self._plan.pattern_keys
        if value.ndim != 4 or (value.shape[0], value.shape[2]) != rows.shape:
            return None
        out = value.new_zeros(*rows.shape, value.shape[1], keys)
        for i, attended in enumerate(rows.keys):
            if len(attended) > keys or (len(attended) and attended[-1] >= value.shape[3]):
                raise ShapeError(
                    f"hook {point.name}: expected at most pattern_keys={keys} keys, all of them in the "
                    f"weights, found "
                    f"{len(attended)} of {value.shape[3]}. Raise pattern_keys"
                )
            index = torch.from_numpy(attended).to(value.device)
            out[i, :, :, : len(attended)] = value[i][:, :, index].transpose(0, 1)
        return out.flatten(-2)

    def _add(self, point: HookPoint, value: torch.Tensor, rows: TokenRows) -> None:
        """Add the rows to the sums of their samples, in float32 on the model's device."""
        for (sample, kind), index in _groups(rows, self._plan.pool_by_kind).items():
            first, last = int(index[0]), int(index[-1]) + 1
            part = value[sample, first:last]
            if len(index) != last - first:
                part = value[sample, torch.from_numpy(index).to(value.device)]
            total = part.sum(0, dtype=torch.float32)
            key = (point.name, sample, kind)
            self._sums[key] = self._sums[key] + total if key in self._sums else total

    # --- the block ------------------------------------------------------------------------------------------

    def widths(self) -> dict[str, int]:
        """Width of every value seen."""
        seen = {name: pieces[0].shape[-1] for name, pieces in self._pieces.items()}
        seen |= {name: total.shape[-1] for (name, _, _), total in self._sums.items()}
        return seen | self._vision.widths()

    def block(self, table: SampleTable) -> Block:
        """The run's rows for the store, cut where steps end; the table gives the samples their ordinals."""
        tokens = TokenRows.merged(self._forwards)
        spaces = {space: self._space(space, points, tokens) for space, points in self._plan.spaces().items()}
        n_tokens = np.bincount(tokens.sample, minlength=len(self.records))
        ordinals = np.zeros(len(self.records), np.uint64)
        stops, cuts = dict.fromkeys(spaces, 0), []
        for i in np.flatnonzero(self._wanted).tolist():
            rows = {space: int(counts[i]) for space, (_, counts, _) in spaces.items()}
            ordinals[i] = table.add(self.records[i], int(n_tokens[i]), sum(rows.values()))
            stops = {space: stops[space] + rows[space] for space in stops}
            if table.open_tokens >= self._plan.step_rows and table.open_rows:
                cuts.append(Cut(stops, *table.close_step()))
        cuts.append(Cut(stops))
        block = Block({}, {}, cuts, self._events)
        for space, (columns, counts, matrices) in spaces.items():
            block.rows[space] = row_arrays(np.repeat(ordinals, counts), **columns)
            block.matrices[space] = matrices
        return block

    def _space(
        self, space: str, points: Sequence[HookPoint], tokens: TokenRows
    ) -> tuple[dict[str, Any], Ints, dict[str, Matrix]]:
        """Row columns, rows per sample and values of one space."""
        if space == "samples":
            return self._means(points, tokens)
        if space != "tokens":
            return self._vision.rows(points, self._placeholders, self.pixels, self._wanted)
        order = merged_order(self._forwards) if len(self._forwards) > 1 else None
        columns = {name: getattr(tokens, name) for name in ("position", "token_id", "kind", "special")}
        matrices = {p.name: Matrix(self._pieces[p.name] or [self._plan.empty(p)], order) for p in points}
        return columns, np.bincount(tokens.sample, minlength=len(self.records)), matrices

    def _means(
        self, points: Sequence[HookPoint], tokens: TokenRows
    ) -> tuple[dict[str, Any], Ints, dict[str, Matrix]]:
        """One row per sample (and kind): its mean."""
        groups = [(key, len(index)) for key, index in _groups(tokens, self._plan.pool_by_kind).items()]
        matrices = {}
        for point in points:
            means = [self._sums[point.name, *key] / n for key, n in groups]
            rows = torch.stack(means).to(self._plan.dtype).cpu() if means else self._plan.empty(point)
            matrices[point.name] = Matrix([rows], None)
        kinds = np.array([kind for (_, kind), _ in groups], np.int64)
        samples = np.array([sample for (sample, _), _ in groups], np.int64)
        return {"kind": kinds}, np.bincount(samples, minlength=len(self.records)), matrices


def _by_token(point: HookPoint, value: torch.Tensor, shape: tuple[int, int]) -> torch.Tensor | None:
    """The value as (samples, columns, d) without a copy; None when it has other rows."""
    if point.heads:
        value = value.flatten(-2)
    if value.ndim == 3 and value.shape[:2] == shape:
        return value
    if value.ndim == 2 and value.shape[0] == shape[0] * shape[1]:
        return value.unflatten(0, shape)
    return None


def _groups(rows: TokenRows, by_kind: bool) -> dict[tuple[int, int], Ints]:
    """Columns of each sample's rows, or of each sample's rows of one kind, in order."""
    kind = rows.kind if by_kind else np.zeros_like(rows.kind)
    key = rows.sample * len(KINDS) + kind
    return {(int(k) // len(KINDS), int(k) % len(KINDS)): rows.column[key == k] for k in np.unique(key)}
