"""The recorder: hooks on a model, gone again on every way out.

While a recorder is open, each forward of the model leaves its wanted values in the store:

1. ``recorder.samples`` names the samples of the next forward;
2. a pre-hook on the model reads token ids and padding, which no inner module sees;
3. a hook per point copies its value in the store's type and returns nothing, so the model computes what it
   always does;
4. the next ``samples`` (or the end) hands the rows to the writer thread.

Steps end between samples, as soon as they hold ``step_rows`` tokens. An exception drops the open step: what a
resumed run writes then is what an uninterrupted one would have written.
"""

from __future__ import annotations

import functools
import inspect
import json
import os
from collections.abc import Iterable, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType
from typing import Any

import torch

from microtome.capture.calls import (
    Generation,
    Stop,
    cached_columns,
    refuse_compiled,
    replaced,
    stopping,
)
from microtome.capture.facts import run_facts
from microtome.capture.guard import Guard
from microtome.capture.models import ModelAdapter, adapt
from microtome.capture.plan import Plan, plan, stored_widths
from microtome.capture.points import HookPoint
from microtome.capture.run import Run
from microtome.capture.samples import CommittedIds, SampleTable
from microtome.capture.writer import Block, Cut, WriterThread
from microtome.errors import Error, ShapeError, StoreError
from microtome.progress import bar

__all__ = ["Recorder", "capture"]


class Recorder:
    """An open capture; made by :func:`capture`, used as a context manager."""

    def __init__(
        self,
        adapter: ModelAdapter,
        path: str | os.PathLike[str],
        wanted: Plan,
        facts: str,
        *,
        stop_early: bool = False,
        queue_mib: int = 256,
        nonfinite: str = "error",
        allow_compiled: bool = False,
        progress: bool = False,
    ) -> None:
        self.adapter = adapter
        self.path = Path(path)
        self._plan, self._facts = wanted, facts
        self._stop_early, self._limit, self._nonfinite = stop_early, queue_mib << 20, nonfinite
        self._compiled, self._progress = allow_compiled, progress
        self._stack = ExitStack()
        self._reset()

    def _reset(self) -> None:
        """Nothing named, seen or written yet."""
        self._guard = Guard()
        self._run: Run | None = None
        self._generation: Generation | None = None
        self._named = self._forwards = self._written = 0
        self._store: Any = None
        self._writer: WriterThread | None = None
        self._table: SampleTable | None = None
        self._is_open = False

    @property
    def hooks(self) -> list[str]:
        """Names of the captured points."""
        return [point.name for point in self._plan.points]

    @property
    def done(self) -> CommittedIds:
        """Ids whose step is committed, by this run and those before it: a set that grows with the run."""
        return self._opened().done

    def samples(self, ids: Sequence[Any], **columns: Sequence[Any]) -> None:
        """Name the samples of the next forward, in batch order, with any columns for the sample table.

        Samples that the store held when the capture was opened are not stored again. The rows of the forward
        before are handed to the writer.

        Raises:
            ShapeError: a duplicate id; a column of another length, or other columns than before.
            DtypeError: a value that does not fit its column's type. The recorder takes nothing more after it.
        """
        self._guard.usable()
        self._flush()
        table = self._opened()
        records = table.reserve(ids, columns)
        self._run = Run(self._plan, records, [record["id"] not in table.resumed for record in records])
        self._named += len(records)

    def __enter__(self) -> Recorder:
        self._guard.same_process()
        if self._is_open:
            raise Error("capture: expected a closed recorder to open, found an open one")
        self._reset()
        with ExitStack() as stack:
            stack.callback(self._release)
            self._open_store(stored_widths(self.path))
            self._table = self._table or SampleTable(self.path, 0)
            self._install(stack)
            self._show = stack.enter_context(bar("capturing", None, self._progress, "samples"))
            self._stack = stack.pop_all()
        self._is_open = True
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._guard.is_forked:
            return  # a forked child leaves the block; the capture is its parent's
        with self._stack:  # unwinds whatever happens: hooks go, then the store is closed
            if kind is None:
                self._guard.usable()
                self._flush()
                self._finish()

    def _release(self) -> None:
        """Let go of the store; what waits for the writer is dropped, unless it has been waited for."""
        self._is_open = False
        if self._writer is not None:
            self._writer.close(keep=False)
        if self._store is not None:
            self._store.close()

    # --- the store ------------------------------------------------------------------------------------------

    def _open_store(self, widths: Mapping[str, int]) -> None:
        """Open the store once every width is known: at once, or after the first forward."""
        from microtome._core import StoreWriter

        known = [(p.name, p.width or widths.get(p.name), self._plan.space(p)) for p in self._plan.points]
        if any(width is None for _, width, _ in known):
            return
        hooks = [(name, width, space) for name, width, space in known if width is not None]
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self._store = StoreWriter(
            str(self.path),
            hooks=hooks,
            dtype=self._plan.dtype_name,
            facts=self._facts,
            nonfinite=self._nonfinite,
        )
        if self._table is not None and self._store.steps:
            raise StoreError(
                f"capture: {self.path}: expected a store without steps, as it was when the capture began, found "
                f"{self._store.steps} by another capture. Open mt.capture on this path again: it goes on after them"
            )
        self._table = self._table or SampleTable(self.path, self._store.steps)
        self._writer = WriterThread(self._store, self._limit, self._table.done.add)

    def _flush(self) -> None:
        """Hand the rows of the run to the writer."""
        run, self._run = self._run, None
        if run is None:
            return
        table = self._opened()
        if run.is_open or not run.begun:  # its forward failed, or never came
            table.release(run.records)
            return
        with self._guard.building():
            self._hand_over(run, table)

    def _hand_over(self, run: Run, table: SampleTable) -> None:
        if self._writer is None:
            self._open_store(run.widths())
        if self._writer is None:
            unseen = [p.name for p in self._plan.points if not p.width and p.name not in run.widths()]
            raise ShapeError(
                f"hook {unseen[0]}: expected a value in the first forward, to tell its width, found none"
            )
        self._writer.check()
        self._writer.put(run.block(table))
        self._written += len(run.records)
        self._show(self._written)

    def _finish(self) -> None:
        """Commit the last, short step and wait for the writer."""
        if self._named and not self._forwards:
            raise Error(
                "capture: expected forwards of the model that was given, found none. Call that very object"
            )
        if self._writer is not None:
            table = self._opened()
            if table.open_rows:
                self._writer.put(Block({}, {}, [Cut({}, *table.close_step())]))
            self._writer.close(keep=True)

    def _opened(self) -> SampleTable:
        if self._table is None:
            raise Error("capture: expected an open recorder, found one outside of its with block")
        return self._table

    # --- hooks ----------------------------------------------------------------------------------------------

    def _install(self, stack: ExitStack) -> None:
        model = self.adapter.model
        outside: Any = torch.compiler.disable if self._compiled else lambda hook: hook
        if self._compiled:
            torch.compiler.reset()  # compiled code does not look for hooks that came after it
            stack.callback(torch.compiler.reset)
        self._signature = inspect.signature(model.forward)
        stack.enter_context(model.register_forward_pre_hook(outside(self._before), with_kwargs=True))
        for point in self._plan.points:
            stack.enter_context(point.observe(outside(functools.partial(self._see, point))))
        stack.enter_context(model.register_forward_hook(outside(self._after)))
        if self._stop_early:
            stack.enter_context(replaced(model, "forward", stopping(model.forward, self)))
        if hasattr(model, "generate"):
            stack.enter_context(replaced(model, "generate", self._generating(model.generate)))

    def _before(self, _: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        """Before a forward of the whole model: tell which rows it will have."""
        self._guard.usable()
        if self._writer is not None:
            self._writer.check()
        given = dict(self._signature.bind_partial(*args, **kwargs).arguments)
        given |= given.pop("kwargs", {})
        ids, past, run, generation = (
            given.get("input_ids"),
            cached_columns(given),
            self._run,
            self._generation,
        )
        if run is None or (run.begun and (run.is_open or not (past or generation))):
            raise Error(
                "capture: expected recorder.samples(ids=[...]) before each forward, found a forward without "
                "names"
            )
        if not isinstance(ids, torch.Tensor):
            found = "inputs_embeds alone" if given.get("inputs_embeds") is not None else "none"
            raise ShapeError(f"input_ids: expected token ids, which say what the rows are, found {found}")
        if not run.begun:
            run.pixels = given.get("pixel_values") if generation is None else generation.pixels
        mask = given.get("attention_mask")
        if generation is not None and mask is not None and getattr(mask, "ndim", 0) != 2:
            mask = generation.mask(len(ids), past + ids.shape[1])
        if isinstance(mask, torch.Tensor):
            mask = mask.detach().cpu().numpy()
        kinds = self.adapter.row_kinds(ids).cpu().long().numpy()
        ends = None if generation is None else (generation.prompt_columns, generation.end_ids)
        run.open(ids.detach().cpu().numpy(), mask, past, kinds, ends)
        self._forwards += 1

    def _see(self, point: HookPoint, value: torch.Tensor) -> None:
        run, vision = self._run, point.space != "tokens"
        if run is None or not (run.is_open or (vision and self._generation is not None)):
            if vision or torch._C._current_graph_task_id() != -1:
                return  # an encoder asked for alone, or a checkpointed layer computed again in backward
            raise Error(
                f"hook {point.name}: expected a forward of the whole model, found one of a part of it"
            )
        run.see(point, value)
        if self._stop_early and run.is_open and run.complete():
            raise Stop(self)

    def _after(self, *_: Any) -> None:
        if self._run is not None:
            self._run.close()

    def _generating(self, generate: Any) -> Any:
        """``generate``, known to the recorder: in it a VLM's vision tower runs before the first forward."""

        @functools.wraps(generate)
        def generating(*args: Any, **kwargs: Any) -> Any:
            self._guard.same_process()
            if self._stop_early:
                raise Error(
                    "generate: expected stop_early=False, which leaves the logits, found stop_early=True"
                )
            self._generation = Generation(self.adapter.model, args, kwargs)
            try:
                return generate(*args, **kwargs)
            except BaseException:
                if self._run is not None:
                    self._opened().release(self._run.records)
                    self._run = None
                raise
            finally:
                self._generation = None

        return generating


def capture(
    model: Any,
    path: str | os.PathLike[str],
    hooks: Iterable[str],
    dtype: str | torch.dtype = "bfloat16",
    step_rows: int = 65_536,
    *,
    pool: str | None = None,
    pool_by_kind: bool = False,
    where: str | Sequence[str] | None = None,
    pattern_keys: int | None = None,
    stop_early: bool = False,
    queue_mib: int = 256,
    nonfinite: str = "error",
    processor: Any = None,
    model_facts: Mapping[str, Any] | None = None,
    allow_compiled: bool = False,
    progress: bool = False,
) -> Recorder:
    """Capture activations of a running model into the store at ``path``; an existing one is continued.

    Each unpadded token of each sample becomes one row of every hook. Steps are committed between samples, as
    soon as they hold ``step_rows`` tokens; a clean end commits the rest. An exception drops the step that is
    open, so that a run that was killed, interrupted or failed and then resumed with the same batches writes
    the same bytes as one that never was.

    Args:
        model: any transformers model with a decoder; it is called as ever, by forward or by ``generate``.
        path: folder of the store.
        hooks: hook names, with ``fnmatch`` wildcards; module paths of the model as well (captured = the
            output).
        dtype: element type on disk, "bfloat16", "float16" or "float32".
        step_rows: tokens per committed step: what a crash can cost.
        pool: "mean" stores one row per sample, the mean over its tokens (summed in float32), instead of one
            per token.
        pool_by_kind: with ``pool``, one row per sample and kind of token.
        where: kinds of tokens to keep: "text", "image", "video" or a list of them. Vision hooks keep all
            their rows.
        pattern_keys: keys stored per head for ``hook_pattern``, zero where a sample is shorter.
        stop_early: leave the model after the last wanted value; ``model(**batch)`` then returns None.
        queue_mib: memory for rows that wait for the disk; beyond it the model waits.
        nonfinite: "error" refuses NaN and infinity, "keep" stores them.
        processor: processor or tokenizer, for its special tokens and the record of what made the inputs.
        model_facts: further facts to keep in the manifest, JSON values.
        allow_compiled: take a compiled model and compile it anew with the hooks in place.
        progress: draw a progress line on a terminal.

    Raises:
        ShapeError, DtypeError, Error: an argument that cannot work, before any forward.
        StoreError: the store at ``path`` holds another run; the message names both sides.
        LockedError: another writer holds the store.

    Example:
        >>> import tempfile, torch
        >>> from transformers import LlamaConfig, LlamaForCausalLM
        >>> model = LlamaForCausalLM(LlamaConfig(vocab_size=9, hidden_size=8, intermediate_size=8,
        ...                                      num_hidden_layers=2, num_attention_heads=2))
        >>> path = tempfile.mkdtemp() + "/run"
        >>> with capture(model, path, ["blocks.*.hook_resid_post"]) as recorder, torch.no_grad():
        ...     recorder.samples(ids=["a", "b"], domain=["maths", "art"])
        ...     _ = model(torch.tensor([[1, 2, 3], [4, 5, 6]]))
        >>> sorted(recorder.done)
        ['a', 'b']
    """
    if not allow_compiled:
        refuse_compiled(model)
    if nonfinite not in ("error", "keep"):
        raise ShapeError(f"nonfinite: expected 'error' or 'keep', found {nonfinite!r}")
    if not isinstance(queue_mib, int) or queue_mib < 1:
        raise ShapeError(f"queue_mib: expected a positive integer, found {queue_mib!r}")
    adapter = adapt(model)
    wanted = plan(
        adapter,
        hooks,
        dtype,
        step_rows,
        pool=pool,
        pool_by_kind=pool_by_kind,
        where=where,
        pattern_keys=pattern_keys,
        processor=processor,
    )
    facts = run_facts(adapter, wanted, processor, model_facts)
    return Recorder(
        adapter,
        path,
        wanted,
        json.dumps(facts),
        stop_early=stop_early,
        queue_mib=queue_mib,
        nonfinite=nonfinite,
        allow_compiled=allow_compiled,
        progress=progress,
    )
