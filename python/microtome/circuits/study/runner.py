"""The whole study of same-task-different-circuits on one model: tables in a folder, from which the figures are drawn.

For every task and form: the pairs that the model answers, split into discovery and evaluation; scores, block by
block; faithfulness over sizes; the smallest circuit above the threshold; the audit; mean-ablation of the heads.
For every task in two forms: overlap, interchange, alignment, back-patching. Each step leaves its tables behind, so
an interrupted study goes on where it was.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import polars as pl

from microtome._core import __version__
from microtome.circuits.attribution.blocks import attribute_blocks
from microtome.circuits.backpatch.alignment import alignment
from microtome.circuits.circuit.nodes import Circuit
from microtome.circuits.pairs.fingerprints import pairs_fingerprint, weights_fingerprint
from microtome.circuits.pairs.pair_set import PairSet
from microtome.circuits.study import steps
from microtome.circuits.study.clock import Clock
from microtome.circuits.study.costs import step_costs
from microtome.circuits.study.ledger import Ledger, Tables, file_name
from microtome.circuits.study.options import FORMS, Options
from microtome.circuits.study.sides import Side, matched
from microtome.errors import ShapeError

__all__ = ["Study", "run"]

Say = Callable[[str], None]


@dataclass(eq=False)
class Study:
    """Tables of a study by name, and the circuits by task and form."""

    tables: Tables = field(default_factory=dict)
    circuits: dict[tuple[str, str], Circuit] = field(default_factory=dict)

    def add(self, tables: Mapping[str, pl.DataFrame], **columns: Any) -> None:
        """Append rows to tables, with constant columns in front."""
        for name, table in tables.items():
            rows = table.select(*(pl.lit(value).alias(key) for key, value in columns.items()), pl.all())
            before = self.tables.get(name)
            self.tables[name] = rows if before is None else pl.concat([before, rows], how="diagonal_relaxed")

    def save(self, folder: Path) -> None:
        """Write every table and circuit as parquet."""
        folder.mkdir(parents=True, exist_ok=True)
        for name, table in self.tables.items():
            table.write_parquet(folder / f"{name}.parquet")
        for (task, form), circuit in self.circuits.items():
            circuit.save(folder / f"circuit-{file_name(task, form)}.parquet")


def run(
    model: Any,
    tasks: Mapping[str, Mapping[str, PairSet]],
    out: str | Path,
    options: Options | None = None,
    *,
    progress: bool = True,
    say: Say | None = None,
    estimate_only: bool = False,
) -> Study:
    """Do the study, and write its tables to ``out``.

    Args:
        model: a transformers model; left as it was found.
        tasks: task -> form (``"visual"``, ``"textual"``) -> prepared pairs, all prompts, not only the ones
            answered.
        out: folder; steps that are done in it are not done again.
        options: see :class:`Options`.
        progress: show bars.
        say: is told what is being done, and how long it will take.
        estimate_only: end after the estimate, with the table ``cost`` alone.

    Returns:
        The tables. By task and form ``accuracy``, ``cost``, ``curves``, ``sizes``, ``effects``, ``agreement``, ``noise``,
        ``ablation``, ``attention``; by task ``overlap``, ``interchange``, ``controls``, ``alignment``,
        ``backpatch``, ``repair``, ``iterated``; ``left_out`` names the steps that a task's prompts do not allow, and why.

    Raises:
        ShapeError: no task, a form that is not known, an option out of range, or too few prompts that the model
            answers.
        StoreError: ``out`` holds another study.
    """
    how = options or Options()
    how.check()
    _check(tasks)
    folder = Path(out)
    told = {f"option {k}": v for k, v in asdict(how).items() if k not in ("batch_size", "memory_budget")}
    names = {
        f"pairs {task}, {form}": pairs_fingerprint(p) for task, v in tasks.items() for form, p in v.items()
    }
    made_of = {"version": __version__, "weights": weights_fingerprint(model)}
    ledger = Ledger(folder, made_of | told | names)
    sides = {(t, f): Side.of(model, t, f, forms, how) for t, forms in tasks.items() for f in forms}
    study = Study()
    costs = step_costs(model, sides, how)
    clock = Clock(costs, say or (lambda _: None))
    for task, forms in tasks.items():
        for step, reason in sides[task, next(iter(forms))].left_out.items():
            if say is not None:
                say(f"{task}: {step} is left out: {reason}")
    clock.announce()
    study.add({"cost": costs})
    if estimate_only:
        return study
    runner = _Runner(model, study, how, ledger, clock, folder, progress)
    for task, forms in tasks.items():
        _one_task(runner, task, {form: sides.pop((task, form)) for form in forms})  # its scores go with it
        study.save(folder)
    return study


def _one_task(runner: _Runner, task: str, sides: Mapping[str, Side]) -> None:
    for form, side in sides.items():
        runner.one_form(task, form, side)
    if set(sides) == set(FORMS):
        runner.both_forms(task, sides)


def _check(tasks: Mapping[str, Mapping[str, PairSet]]) -> None:
    if not tasks or any(not forms or set(forms) - set(FORMS) for forms in tasks.values()):
        found = {task: list(forms) for task, forms in tasks.items()}
        raise ShapeError(
            f"tasks: expected tasks with pairs of {' and '.join(FORMS)}, found {found or 'none'}"
        )
    for task, forms in tasks.items():
        if set(forms) == set(FORMS):
            matched(task, forms)


@dataclass(eq=False)
class _Runner:
    """Steps in their order, each once."""

    model: Any
    study: Study
    how: Options
    ledger: Ledger
    clock: Clock
    folder: Path
    progress: bool

    def step(self, make: Callable[[], Tables], name: str, task: str, form: str | None = None) -> None:
        """Do a step, or read what it left behind, and append its rows."""
        key = file_name(*filter(None, (task, form)), name)
        with self.clock.step(name, task, form, key in self.ledger):
            tables = self.ledger.tables(key, make)
        self.study.add(tables, task=task, **({"form": form} if form else {}))

    def one_form(self, task: str, form: str, side: Side) -> None:
        """Circuit of one form, and how far it can be trusted."""
        model, how, progress = self.model, self.how, self.progress
        n = {"n": len(side.everything), "both_right": float(side.right.mean()), "n_discovery": len(side.discovery),
             "n_evaluation": len(side.evaluation)}  # fmt: skip
        self.study.add({"accuracy": pl.DataFrame(n)}, task=task, form=form)
        with self.clock.step("attribution", task, form):
            side.blocks = attribute_blocks(
                model, side.discovery, how.n_blocks, method=how.method, steps=how.steps, progress=progress,
                out=self.folder / "scores" / file_name(task, form), batch_size=how.batch_size,
                memory_budget=how.memory_budget,
            )  # fmt: skip
        scores = side.blocks.scores()
        self.step(lambda: steps.curve(model, side, scores, how, progress), "faithfulness", task, form)
        sizes = self.study.tables["sizes"].filter((pl.col("task") == task) & (pl.col("form") == form))
        side.size = float(sizes["size"][0])
        side.circuit = self.study.circuits[task, form] = scores.circuit(side.size)
        self.study.add({"effects": steps.effects(scores)}, task=task, form=form)
        if how.n_splits and len(side.blocks) > 1:
            self.study.add(
                {"noise": side.blocks.split_half(side.size, how.n_splits, how.seed)}, task=task, form=form
            )
        if how.n_exact:
            self.step(lambda: steps.audit(model, side, how, progress), "audit", task, form)
        if how.n_heads:
            self.step(lambda: steps.heads(model, side, scores, how, progress), "heads", task, form)

    def both_forms(self, task: str, sides: Mapping[str, Side]) -> None:
        """What the two forms of a task share, and whether the one repairs the other."""
        model, how, progress = self.model, self.how, self.progress
        self.step(lambda: steps.overlap(sides, how), "overlap", task)
        if how.n_random:
            self.step(lambda: steps.swaps(model, sides, how, progress), "interchange", task)
        seen, told = matched(task, {form: side.everything for form, side in sides.items()})
        skipped = sides[FORMS[0]].left_out
        if skipped:
            rows = {"step": list(skipped), "reason": list(skipped.values())}
            self.study.add({"left_out": pl.DataFrame(rows)}, task=task)
        if "alignment" not in skipped:
            self.step(lambda: {"alignment": alignment(model, seen, told, seed=how.seed)}, "alignment", task)
        if how.windows and "back-patching" not in skipped:
            self.step(lambda: steps.repair(model, sides, how, progress), "back-patching", task)
