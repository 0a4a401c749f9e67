"""What ``microtome circuit`` does around the study: models and pairs by name, the verdict on what two forms share."""

from __future__ import annotations

import errno
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import polars as pl

from microtome.arguments import parse_bytes
from microtome.capture.data import load_model
from microtome.circuits.attribution.settings import Settings
from microtome.circuits.pairs.pair_set import Align, PairSet
from microtome.circuits.pairs.preparation import prepare
from microtome.circuits.study.options import FORMS, Options
from microtome.circuits.study.runner import run
from microtome.circuits.study.verdict import shared_more_in_generation
from microtome.errors import ShapeError
from microtome.evaluation.tasks import PromptPair, counterfactual_pairs, load_pairs, load_prompts

__all__ = ["numbers", "study"]


def study(
    model: str,
    tasks: Sequence[str] | None,
    out: Path,
    n_pairs: int,
    options: Mapping[str, Any],
    *,
    align: str = "absolute",
    progress: bool = True,
    say: Callable[[str], None] | None = None,
    estimate_only: bool = False,
) -> dict[str, pl.DataFrame]:
    """Load, prepare, run; the study's tables, ``shared`` besides where a task has two forms.

    Raises:
        ShapeError: an option or a task that is not known, no pairs, or pairs of which none can be used.
    """
    told = Options(**options)
    told.check()
    Settings(told.method, told.steps, "merged", "abs_sum", False).check()
    parse_bytes(told.memory_budget)
    if align not in ("absolute", "spans"):
        raise ShapeError(f"align: expected absolute or spans, found {align!r}")
    if model == "organism":
        loaded, prepared = _organism(tasks, n_pairs, told.seed)
    else:
        loaded, prepared = _from_files(model, tasks, align)  # type: ignore[arg-type]
    found = run(loaded, prepared, out, told, progress=progress, say=say, estimate_only=estimate_only)
    if estimate_only:
        return found.tables
    if "overlap" in found.tables:
        found.tables["shared"] = shared_more_in_generation(found.tables)
        found.tables["shared"].write_parquet(out / "shared.parquet")
    facts = {
        "model": model,
        "tasks": list(prepared),
        "dropped": {t: {f: p.dropped for f, p in v.items()} for t, v in prepared.items()},
    }
    (out / "run.json").write_text(json.dumps(facts, indent=1))
    return found.tables


def numbers(name: str, text: str, kind: type[int] | type[float]) -> tuple[Any, ...]:
    """Numbers with commas between them.

    Raises:
        ShapeError: one of them is none.

    Example:
        >>> numbers("windows", "5, 3,1", int)
        (5, 3, 1)
    """
    try:
        return tuple(kind(part) for part in text.split(",") if part.strip())
    except ValueError:
        wanted = {int: "whole numbers", float: "numbers"}[kind]
        raise ShapeError(f"{name}: expected {wanted} with commas between them, found {text!r}") from None


def _organism(tasks: Sequence[str] | None, n: int, seed: int) -> tuple[Any, dict[str, dict[str, PairSet]]]:
    from microtome import organism

    unknown = [task for task in tasks or () if task not in organism.TASKS]
    if unknown:
        raise ShapeError(f"tasks: expected some of {', '.join(organism.TASKS)}, found {unknown[0]!r}")
    if n < 6:
        raise ShapeError(f"pairs: expected 6 or more of each task and form, found {n}")
    model, processor = organism.load_model(), organism.load_processor()
    out: dict[str, dict[str, PairSet]] = {}
    for task in tasks or organism.TASKS:
        kind = organism.QUESTION_KINDS.get(task, (task,))[0]  # one template, so one length
        out[task] = {
            form: prepare(model, processor, organism.pairs(task, form, n, seed, kind=kind)) for form in FORMS
        }
    return model, out


def _from_files(
    name: str, files: Sequence[str] | None, align: Align
) -> tuple[Any, dict[str, dict[str, PairSet]]]:
    if not files:
        raise ShapeError("tasks: expected files of pairs, found none. Give --tasks pairs.jsonl")
    missing = [file for file in files if not Path(file).is_file()]
    if missing:
        raise FileNotFoundError(errno.ENOENT, "tasks: expected a file of pairs, found none", missing[0])
    pairs = [pair for file in files for pair in _pairs(Path(file))]
    forms = sorted({pair.clean.form for pair in pairs} - set(FORMS))
    if forms:
        raise ShapeError(f"tasks: expected prompts of form {' or '.join(FORMS)}, found {forms[0]!r}")
    model, processor = load_model(name)
    prepared = {
        task: {form: _prepared(model, processor, task, form, found, align) for form, found in forms.items()}
        for task, forms in _tasks_of(pairs).items()
    }
    return model, prepared


def _prepared(
    model: Any, processor: Any, task: str, form: str, pairs: Sequence[Any], align: Align
) -> PairSet:
    try:
        return prepare(model, processor, pairs, align=align, on_invalid="drop")
    except ShapeError as error:
        raise ShapeError(f"{task}, {form}: {error}") from None


def _pairs(path: Path) -> list[PromptPair]:
    """The pairs of a file; prompts without counterfactuals are paired at random."""
    with path.open(encoding="utf-8") as file:
        paired = '"clean"' in file.readline()
    return load_pairs(path) if paired else counterfactual_pairs(load_prompts(path))


def _tasks_of(pairs: Sequence[Any]) -> dict[str, dict[str, list[Any]]]:
    """Pairs by task and form, as their clean prompts say."""
    out: dict[str, dict[str, list[Any]]] = {}
    for pair in pairs:
        task = pair.clean.task or "task"
        out.setdefault(task, {}).setdefault(pair.clean.form, []).append(pair)
    return out
