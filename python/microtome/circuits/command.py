"""What ``microtome circuit`` does around the study: models and pairs by name, the verdict on what two forms share."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import polars as pl

from microtome.capture.data import load_model
from microtome.circuits.pairs import Align, PairSet, prepare
from microtome.circuits.study import FORMS, Options, run, shared_more_in_generation, tasks_of
from microtome.errors import ShapeError
from microtome.evaluation.tasks import PromptPair, counterfactual_pairs, load_pairs, load_prompts

__all__ = ["study"]


def study(
    model: str,
    tasks: Sequence[str] | None,
    out: Path,
    n_pairs: int,
    options: Mapping[str, Any],
    *,
    align: Align = "absolute",
    progress: bool = True,
) -> dict[str, pl.DataFrame]:
    """Load, prepare, run; the study's tables, ``shared`` besides where a task has two forms.

    Raises:
        ShapeError: no pairs, or pairs of which none can be used.
    """
    if model == "organism":
        loaded, prepared = _organism(tasks, n_pairs, int(options.get("seed", 42)))
    else:
        if not tasks:
            raise ShapeError("tasks: expected files of pairs, found none. Give --tasks pairs.jsonl")
        loaded, prepared = _from_files(model, tasks, align)
    found = run(loaded, prepared, out, Options(**options), progress=progress)
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


def _organism(tasks: Sequence[str] | None, n: int, seed: int) -> tuple[Any, dict[str, dict[str, PairSet]]]:
    from microtome import organism

    model, processor = organism.load_model(), organism.load_processor()
    out: dict[str, dict[str, PairSet]] = {}
    for task in tasks or organism.TASKS:
        kind = organism.QUESTION_KINDS.get(task, (task,))[0]  # one template, so one length
        out[task] = {
            form: prepare(model, processor, organism.pairs(task, form, n, seed, kind=kind)) for form in FORMS
        }
    return model, out


def _from_files(name: str, files: Sequence[str], align: Align) -> tuple[Any, dict[str, dict[str, PairSet]]]:
    model, processor = load_model(name)
    pairs = [pair for file in files for pair in _pairs(Path(file))]
    prepared = {
        task: {
            form: prepare(model, processor, found, align=align, on_invalid="drop")
            for form, found in forms.items()
        }
        for task, forms in tasks_of(pairs).items()
    }
    return model, prepared


def _pairs(path: Path) -> list[PromptPair]:
    """The pairs of a file; prompts without counterfactuals are paired at random."""
    with path.open(encoding="utf-8") as file:
        paired = '"clean"' in file.readline()
    return load_pairs(path) if paired else counterfactual_pairs(load_prompts(path))
