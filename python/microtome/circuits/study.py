"""The whole study of same-task-different-circuits on one model: tables in a folder, from which the figures are drawn.

For every task and form: the pairs that the model answers, split into discovery and evaluation; scores;
faithfulness over sizes; the smallest circuit above the threshold. For every task in two forms: overlap,
interchange, alignment, back-patching.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl

from microtome.circuits.alignment import alignment
from microtome.circuits.attribution import attribute
from microtome.circuits.audit import exact_agreement, rank_correlation, split_half
from microtome.circuits.backpatch import BackPatch, back_patch, gap_closed
from microtome.circuits.circuit import Circuit
from microtome.circuits.faithfulness import faithfulness_curve
from microtome.circuits.forward import answers_correctly
from microtome.circuits.interchange import interchange, interchange_table
from microtome.circuits.overlap import compare_circuits
from microtome.circuits.pairs import PairSet
from microtome.circuits.plan import estimate
from microtome.circuits.scores import SIZES, NodeScores
from microtome.errors import ShapeError

__all__ = ["FORMS", "Options", "Study", "run"]

FORMS = ("visual", "textual")


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
    n_splits: int = 2
    """Split halves of the noise floor; 0 leaves that out."""
    windows: tuple[int, ...] = (5, 3, 1)
    """Windows of back-patching; none leaves that out."""
    fraction: float = 0.75
    seed: int = 42
    batch_size: int = 16
    memory_budget: int | str | None = None


@dataclass(eq=False)
class Study:
    """Tables of a study by name, and the circuits by task and form."""

    tables: dict[str, pl.DataFrame] = field(default_factory=dict)
    circuits: dict[tuple[str, str], Circuit] = field(default_factory=dict)

    def add(self, name: str, table: pl.DataFrame, **columns: Any) -> None:
        """Append rows to a table, with constant columns in front."""
        rows = table.select(*(pl.lit(value).alias(key) for key, value in columns.items()), pl.all())
        before = self.tables.get(name)
        self.tables[name] = rows if before is None else pl.concat([before, rows], how="diagonal_relaxed")

    def save(self, folder: Path) -> None:
        """Write every table and circuit as parquet."""
        folder.mkdir(parents=True, exist_ok=True)
        for name, table in self.tables.items():
            table.write_parquet(folder / f"{name}.parquet")
        for (task, form), circuit in self.circuits.items():
            circuit.save(folder / f"circuit-{task}-{form}.parquet")


@dataclass(eq=False)
class _Side:
    """One form of a task."""

    everything: PairSet
    evaluation: PairSet
    scores: NodeScores
    circuit: Circuit


def run(
    model: Any,
    tasks: Mapping[str, Mapping[str, PairSet]],
    out: str | Path,
    options: Options | None = None,
    *,
    progress: bool = True,
) -> Study:
    """Do the study, and write its tables to ``out``.

    Args:
        model: a transformers model; left as it was found.
        tasks: task -> form (``"visual"``, ``"textual"``) -> prepared pairs, all prompts, not only the ones
            answered.
        out: folder; scores in it are resumed when the study runs again.
        options: see :class:`Options`.
        progress: show bars.

    Returns:
        The tables: ``accuracy``, ``curves``, ``sizes``, ``effects``, ``agreement``, ``noise``, ``overlap``,
        ``interchange``,
        ``alignment``, ``backpatch``, ``repair``, ``cost``.

    Raises:
        ShapeError: no task, a form that is not known, or too few prompts that the model answers.
    """
    how = options or Options()
    folder = Path(out)
    if not tasks or any(not forms or set(forms) - set(FORMS) for forms in tasks.values()):
        raise ShapeError(
            f"tasks: expected tasks with pairs of {' and '.join(FORMS)}, found {dict.fromkeys(tasks)}"
        )
    study = Study()
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "options.json").write_text(json.dumps(asdict(how), indent=1))
    for task, forms in tasks.items():
        sides = {
            form: _one_form(model, task, form, forms[form], study, how, folder, progress) for form in forms
        }
        if set(sides) == set(FORMS):
            _both_forms(model, task, sides, study, how, progress)
        study.save(folder)
    return study


def _one_form(
    model: Any, task: str, form: str, pairs: PairSet, study: Study, how: Options, folder: Path, progress: bool
) -> _Side:
    right = answers_correctly(model, pairs, how.batch_size)
    if right.sum() < 4:
        raise ShapeError(
            f"{task}, {form}: expected at least 4 pairs that the model answers, found {int(right.sum())}"
        )
    study.add(
        "accuracy", pl.DataFrame({"n": len(pairs), "both_right": float(right.mean())}), task=task, form=form
    )
    discovery, evaluation = pairs[np.flatnonzero(right)].split(how.fraction, how.seed)
    budget: dict[str, Any] = {"batch_size": how.batch_size, "memory_budget": how.memory_budget}
    cost = estimate(model, discovery, how.method, how.steps, **budget)
    study.add("cost", pl.DataFrame(asdict(cost)), task=task, form=form)
    scores = attribute(
        model, discovery, how.method, how.steps,  # type: ignore[arg-type]
        out=folder / "scores" / f"{task}-{form}", progress=progress, **budget,
    )  # fmt: skip
    curve = faithfulness_curve(
        model, evaluation, scores, how.sizes, batch_size=how.batch_size, progress=progress
    )
    study.add("curves", curve.to_polars(seed=how.seed), task=task, form=form)
    found = curve.smallest(how.threshold)
    size = found if found is not None else float(curve.sizes[int(np.nanargmax(curve.values))])
    at = int(np.flatnonzero(curve.sizes == size)[0])
    row = {"size": size, "reached": found is not None, "faithfulness": float(curve.values[at])}
    study.add("sizes", pl.DataFrame(row | {"cpr": curve.cpr(), "cmd": curve.cmd()}), task=task, form=form)
    study.add("effects", _effects(scores), task=task, form=form)
    if how.n_exact:
        _audit(model, evaluation, scores, study, how, progress, task=task, form=form)
    if how.n_splits:
        noise = split_half(
            model, discovery, size, n_splits=how.n_splits, seed=how.seed, method=how.method, steps=how.steps,
            progress=progress, **budget,
        )  # fmt: skip
        study.add("noise", noise, task=task, form=form)
    circuit = scores.circuit(size)
    study.circuits[task, form] = circuit
    return _Side(pairs, evaluation, scores, circuit)


def _effects(scores: NodeScores) -> pl.DataFrame:
    """The patching-effect map as rows: layer, position, group, effect."""
    values = scores.effect_map()
    layers, positions = np.indices(values.shape)
    group_of = {p: group for group, where in scores.groups.items() for p in where}
    columns = {"layer": layers.ravel(), "position": positions.ravel(), "effect": values.ravel()}
    groups = [group_of.get(int(p), "") for p in positions.ravel()]
    return pl.DataFrame({**columns, "group": groups})


def _audit(
    model: Any, pairs: PairSet, scores: NodeScores, study: Study, how: Options, progress: bool, **columns: str
) -> None:
    """Rank correlation of attribution with exact patching, both on the same evaluation pairs."""
    few = pairs[: min(len(pairs), 8)]
    own = attribute(model, few, how.method, how.steps, batch_size=how.batch_size, progress=progress)  # type: ignore[arg-type]
    table = exact_agreement(model, few, own, how.n_exact, batch_size=how.batch_size, progress=progress)
    parts = {kind: table.filter(pl.col("kind") == kind) for kind in ("head", "neuron")}
    parts["all"] = table.sort("score", descending=True, maintain_order=True).head(how.n_exact)
    for kind, part in parts.items():
        row = {
            "kind": kind,
            "n": part.height,
            "rank_correlation": rank_correlation(part["score"], part["exact"]),
        }
        study.add("agreement", pl.DataFrame(row), **columns)


def _both_forms(
    model: Any, task: str, sides: Mapping[str, _Side], study: Study, how: Options, progress: bool
) -> None:
    visual, textual = (sides[form] for form in FORMS)
    overlap = compare_circuits(visual.circuit, textual.circuit, n_draws=max(how.n_random, 1), seed=how.seed)
    study.add("overlap", overlap, task=task)
    shared = [
        g
        for g in ("data", "query", "generation")
        if visual.circuit.groups.get(g) and textual.circuit.groups.get(g)
    ]
    if how.n_random:
        found = interchange(
            model, (visual.evaluation, textual.evaluation), (visual.circuit, textual.circuit), shared,
            n_random=how.n_random, seed=how.seed, batch_size=how.batch_size, progress=progress,
        )  # fmt: skip
        study.add("interchange", interchange_table(found, FORMS, how.seed), task=task)
    n = min(len(visual.everything), len(textual.everything))
    study.add(
        "alignment", alignment(model, visual.everything[:n], textual.everything[:n], seed=how.seed), task=task
    )
    if how.windows:
        _repair(model, task, sides, study, how, progress)


def _repair(
    model: Any, task: str, sides: Mapping[str, _Side], study: Study, how: Options, progress: bool
) -> None:
    """Back-patching of the pictures, and of the text as the control."""
    patched: dict[str, BackPatch] = {}
    for form, side in sides.items():
        patched[form] = back_patch(
            model, side.everything, windows=how.windows, batch_size=how.batch_size, progress=progress
        )
        study.add("backpatch", patched[form].to_polars(), task=task, form=form)
    text_right = patched["textual"].baseline
    for form, found in patched.items():
        choice = found.choose(seed=how.seed)
        gap = gap_closed(choice.correct, choice.baseline_correct, text_right, seed=how.seed)
        row = {
            **choice.setting._asdict(), "accuracy": choice.accuracy, "baseline": choice.baseline,
            "gain": choice.gain.value, "gain_low": choice.gain.low, "gain_high": choice.gain.high, "p": choice.p,
            "gap_closed": gap.value, "gap_low": gap.low, "gap_high": gap.high, "n": len(choice.correct),
        }  # fmt: skip
        study.add("repair", pl.DataFrame(row), task=task, form=form)


def shared_more_in_generation(tables: Mapping[str, pl.DataFrame]) -> pl.DataFrame:
    """Mean nIoU per group over tasks, and whether generation shares more than data."""
    if "overlap" not in tables:
        raise ShapeError("overlap: expected a task in both forms, found none")
    means = (
        tables["overlap"]
        .filter(pl.col("kind") == "mean")
        .group_by("group")
        .agg(
            pl.col("niou").filter(pl.col("niou").is_not_nan()).mean(),
            pl.col("iou").mean(),
            pl.len().alias("n_tasks"),
        )
    )
    of = dict(zip(means["group"], means["niou"], strict=True))
    more = of.get("generation") is not None and of.get("data") is not None and of["generation"] > of["data"]
    return means.sort("group").with_columns(pl.lit(more).alias("generation_above_data"))


def tasks_of(pairs: Sequence[Any]) -> dict[str, dict[str, list[Any]]]:
    """Pairs by task and form, as their clean prompts say."""
    out: dict[str, dict[str, list[Any]]] = {}
    for pair in pairs:
        task = pair.clean.task or "task"
        out.setdefault(task, {}).setdefault(pair.clean.form, []).append(pair)
    return out
