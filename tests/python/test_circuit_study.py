"""The study end to end on the model organism, and what the organism's circuits are like."""

import gc
import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import polars as pl
import pytest
import torch

import microtome as mt
from microtome import circuits, organism
from microtome.circuits import (
    Blocks,
    Circuit,
    NodeScores,
    alignment,
    back_patch,
    faithfulness_curve,
    prepare,
    rank_correlation,
    weights_fingerprint,
)
from microtome.circuits.study import Options, Study, run, shared_more_in_generation
from microtome.errors import ShapeError, StoreError

SIZES = (0.0, 0.05, 0.1, 0.2, 0.5, 0.9)


@pytest.fixture(scope="module")
def shipped():
    return organism.load_model(), organism.load_processor()


def pairs_of(shipped, task, form, n):
    kind = organism.QUESTION_KINDS[task][0]
    return prepare(*shipped, organism.pairs(task, form, n, kind=kind), correct_only=True)


@pytest.mark.parametrize("form", ["visual", "textual"])
def test_integrated_gradients_rank_the_top_heads_as_exact_patching_does(shipped, form):
    """Rank correlation above 0.9, on the 30 heads that score highest and on all."""
    pairs = pairs_of(shipped, "counting", form, 13)
    scores = mt.attribute(shipped[0], pairs)
    nodes = Circuit.of_masks(np.ones_like(scores.heads, bool), np.zeros_like(scores.neurons, bool))
    exact = mt.attribute(shipped[0], pairs, "exact", nodes=nodes, batch_size=16)
    order = np.argsort(-scores.heads, axis=None)
    for n in (30, scores.heads.size):
        assert rank_correlation(scores.heads.flat[order[:n]], exact.heads.flat[order[:n]]) > 0.9


def test_a_fifth_of_the_nodes_is_faithful(shipped):
    found, held_out = pairs_of(shipped, "counting", "textual", 24).split()
    curve = faithfulness_curve(shipped[0], held_out, mt.attribute(shipped[0], found), (0.05, 0.1, 0.2))
    assert curve.smallest(0.8) is not None, curve.values


OPTIONS = Options(
    steps=1, sizes=SIZES, n_random=2, n_exact=3, n_blocks=3, n_splits=2, n_heads=2, n_controls=2, windows=(1,)
)
TABLES = [
    "ablation",
    "accuracy",
    "agreement",
    "alignment",
    "backpatch",
    "controls",
    "cost",
    "curves",
    "effects",
    "interchange",
    "iterated",
    "noise",
    "overlap",
    "repair",
    "sizes",
]


def words_twice(shipped, n=10):
    """One task whose two forms are the same prompts in words."""
    pairs = prepare(*shipped, organism.pairs("counting", "textual", n))
    return {"counting": {"visual": pairs, "textual": pairs}}


def test_study_writes_its_tables_figures_and_report(shipped, tmp_path):
    from microtome.report.circuit_page import write_report

    lines = []
    found = run(shipped[0], words_twice(shipped), tmp_path / "out", OPTIONS, say=lines.append)
    assert sorted(found.tables) == TABLES
    for name in TABLES:
        assert pl.read_parquet(tmp_path / "out" / f"{name}.parquet").height == found.tables[name].height > 0
    assert np.allclose(found.tables["alignment"]["cosine"], 1), "the two forms are the same prompts here"
    assert found.tables["overlap"].filter(pl.col("group") == "all")["iou"].min() == 1
    assert "generation" in shared_more_in_generation(found.tables)["group"]
    first = [i for i, line in enumerate(lines) if line.startswith("[1]")]
    assert "in all" in lines[first[0] - 1], "what it will take is said before it begins"
    assert "to go" in lines[first[0]]
    page, figures = write_report(tmp_path / "out")
    assert {p.stem for p in figures} == {
        "ablation", "alignment", "backpatch-counting", "controls", "effects-counting", "faithfulness",
        "interchange", "overlap", "repair",
    }  # fmt: skip
    for path in figures:
        assert path.stat().st_size > 5000
        assert pl.read_csv(path.with_suffix(".csv")).height > 0
    text = page.read_text()
    assert text.count("<svg") == len(figures)
    assert "Back-patching" in text
    circuit = mt.Circuit.load(tmp_path / "out" / "circuit-counting-visual.parquet")
    assert circuit == found.circuits["counting", "visual"]
    assert circuit.facts["weights"] == weights_fingerprint(shipped[0])


def test_interrupted_study_goes_on_where_it_was(shipped, tmp_path, monkeypatch):
    from microtome.circuits.study import steps

    tasks = words_twice(shipped)
    whole = run(shipped[0], tasks, tmp_path / "whole", OPTIONS)
    asked = []
    for name in ("curve", "audit", "heads", "swaps", "repair"):
        real = getattr(steps, name)
        monkeypatch.setattr(steps, name, lambda *a, name=name, real=real: (asked.append(name), real(*a))[1])
    real = steps.swaps

    def interrupted(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(steps, "swaps", interrupted)
    with pytest.raises(KeyboardInterrupt):
        run(shipped[0], tasks, tmp_path / "again", OPTIONS)
    assert asked == ["curve", "audit", "heads"] * 2
    monkeypatch.setattr(steps, "swaps", real)
    asked.clear()
    found = run(shipped[0], tasks, tmp_path / "again", OPTIONS)
    assert asked == ["swaps", "repair"]
    for name in TABLES:
        if name != "cost":
            assert found.tables[name].equals(whole.tables[name]), name


def test_tasks_are_added_to_a_study_and_nothing_else_changes(shipped, tmp_path):
    tasks = words_twice(shipped, 8)
    options = replace(OPTIONS, n_exact=0, n_heads=0, n_random=0, windows=(), sizes=(0.1, 0.5))
    run(shipped[0], tasks, tmp_path, options)
    more = {"again": {"textual": tasks["counting"]["textual"]}}
    assert set(run(shipped[0], tasks | more, tmp_path, options).tables["sizes"]["task"]) == {
        "counting",
        "again",
    }
    with pytest.raises(StoreError, match="option seed 42 as in the study there, found 1"):
        run(shipped[0], tasks, tmp_path, replace(options, seed=1))
    with pytest.raises(StoreError, match="pairs counting, visual"):
        run(shipped[0], words_twice(shipped, 9), tmp_path, options)


def test_nothing_of_a_task_is_held_once_it_is_done(shipped, tmp_path):
    """Neither scores nor tensors: the second task begins with what the first began with."""
    pairs = words_twice(shipped, 8)["counting"]
    tasks = {name: {"textual": pairs["textual"]} for name in ("first", "second", "third")}
    options = replace(OPTIONS, n_exact=2, n_random=0, windows=())
    held = []

    def count(line):
        if line.endswith(" to go") and ": attribution" in line:
            gc.collect()
            alive = [type(x) for x in gc.get_objects()]
            held.append([alive.count(kind) for kind in (torch.Tensor, NodeScores, Blocks, np.memmap)])

    run(shipped[0], tasks, tmp_path, options, say=count)
    assert len(held) == 3
    assert held[0] == held[1] == held[2]


def test_estimate_runs_nothing(shipped, tmp_path):
    """The forwards foreseen are those that run."""
    tasks = words_twice(shipped, 8)
    found = run(shipped[0], tasks, tmp_path, OPTIONS, estimate_only=True)
    assert list(found.tables) == ["cost"]
    assert not list(tmp_path.glob("*.parquet"))
    told = found.tables["cost"].group_by("step").agg(pl.col("forwards").sum())
    foreseen = dict(zip(told["step"], told["forwards"], strict=True))
    n = []
    layer = shipped[0].get_decoder().layers[0]
    handle = layer.register_forward_pre_hook(lambda _, a: n.append(len(a[0])))
    back_patch(shipped[0], tasks["counting"]["visual"], windows=(1,))
    patched = sum(n)
    n.clear()
    alignment(shipped[0], tasks["counting"]["visual"], tasks["counting"]["textual"])
    handle.remove()
    assert sum(n) == foreseen["alignment"]
    assert foreseen["back-patching"] == 2 * (patched + 4 * 11 + 2), (
        "the iterations of the judged half besides, and their check"
    )


def test_study_refuses_what_it_cannot_do(shipped, tmp_path):
    from microtome.report.circuit_page import write_report

    with pytest.raises(ShapeError, match="tasks: expected tasks"):
        run(None, {}, tmp_path)
    with pytest.raises(ShapeError, match="tasks: expected tasks"):
        run(None, {"colour": {"spoken": None}}, tmp_path)
    with pytest.raises(ShapeError, match="expected the tables of a circuit study"):
        write_report(tmp_path)
    with pytest.raises(ShapeError, match="both forms"):
        shared_more_in_generation(Study().tables)
    pairs = words_twice(shipped, 6)["counting"]["textual"]
    wrong = replace(
        pairs, pairs=tuple(replace(p, answer=p.corrupted_answer, corrupted_answer=p.answer) for p in pairs)
    )
    with pytest.raises(ShapeError, match=r"counting, textual: expected at least 4 pairs .* found 0 of 6"):
        run(shipped[0], {"counting": {"textual": wrong}}, tmp_path)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["organism", "--tasks", "colours"], "tasks: expected some of colour"),
        (["organism", "--pairs", "2"], "pairs: expected 6 or more"),
        (["organism", "--sizes", "0.1,7"], "sizes: expected rising shares from 0 to 1"),
        (["organism", "--sizes", "0.2,0.1"], "sizes: expected rising shares"),
        (["organism", "--sizes", "a"], "sizes: expected numbers"),
        (["organism", "--windows", "2"], "windows: expected odd widths, found 2"),
        (["organism", "--windows", "x"], "windows: expected whole numbers"),
        (["organism", "--steps", "0"], "steps: expected 1 or more"),
        (["organism", "--method", "magic"], "method: expected one of ig"),
        (["organism", "--memory", "much"], "memory_budget: expected bytes"),
        (["organism", "--align", "left"], "align: expected absolute or spans"),
        (["organism", "--random", "-1"], "n_random: expected 0 or more"),
        (["organism", "--batch-size", "0"], "batch_size: expected 1 or more"),
        (["nowhere"], "tasks: expected files of pairs"),
        (["nowhere", "--tasks", "missing.jsonl"], "missing.jsonl"),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(arguments, message, tmp_path, monkeypatch, capsys):
    from microtome.cli import main

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.argv", ["microtome", "circuit", *arguments, "--out", "out"])
    with pytest.raises(SystemExit) as ended:
        main()
    assert ended.value.code == 2
    said = capsys.readouterr().err.strip().splitlines()
    assert len(said) == 1, said
    assert message in said[0]
    assert not list(tmp_path.iterdir()), "nothing was begun"


def pairs_file(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"prompt": "what ?", "answer": "red", "task": "t", "form": "textual"}, "found none"),
        ({"clean": {"prompt": "a"}, "answer": "red"}, "pairs.jsonl:1: clean: expected an object"),
        ({"clean": 3}, "pairs.jsonl:1: clean: expected"),
    ],
)
def test_files_that_hold_no_pair_are_one_line_and_exit_code_2(row, message, tmp_path, monkeypatch, capsys):
    """Prompts of one answer have no counterfactual; lines that are no pair are named."""
    from microtome.cli import main

    path = pairs_file(tmp_path / "pairs.jsonl", [row] * 3)
    monkeypatch.setattr(
        "sys.argv",
        [
            "microtome",
            "circuit",
            str(organism.path("vlm")),
            "--tasks",
            str(path),
            "--out",
            str(tmp_path / "o"),
        ],
    )
    with pytest.raises(SystemExit) as ended:
        main()
    assert ended.value.code == 2
    said = [x for x in capsys.readouterr().err.strip().splitlines() if "Loading" not in x]
    assert len(said) == 1, said
    assert said[0].startswith("microtome: ")
    assert message in said[0]


ROOMS = Path(circuits.__file__).parent
EXAMPLES = [p.relative_to(ROOMS) for p in sorted(ROOMS.rglob("*.py")) if ">>> " in p.read_text()]


@pytest.mark.parametrize("path", EXAMPLES, ids=str)
def test_examples_in_docstrings_say_what_is_printed(path):
    import doctest
    from importlib import import_module

    name = ".".join(("microtome", "circuits", *path.with_suffix("").parts))
    found = doctest.testmod(import_module(name), optionflags=doctest.NORMALIZE_WHITESPACE)
    assert found.attempted
    assert found.failed == 0


def test_command_line_runs_the_study_on_files_of_pairs(tmp_path):
    from typer.testing import CliRunner

    from microtome.cli import app
    from microtome.evaluation.tasks import Prompt, PromptPair, save_pairs

    def prompt(item):
        path = tmp_path / f"{item.id}.png"
        if item.image is not None:
            item.image.save(path)
        return Prompt(
            item.prompt, item.answer, str(path) if item.image else None, item.id, item.task, item.form
        )

    for form in ("visual", "textual"):
        pairs = organism.pairs("arithmetic", form, 8)
        rows = [
            PromptPair(
                prompt(p.clean),
                prompt(p.corrupted),
                p.answer,
                p.corrupted_answer,
                {"data": list(p.spans["data"])},
            )
            for p in pairs
        ]
        save_pairs(rows, tmp_path / f"{form}.jsonl")
    arguments = [
        "circuit",
        str(organism.path("vlm")),
        "--out",
        str(tmp_path / "out"),
        "--sizes",
        "0.1,0.5",
        "--steps",
        "2",
    ]
    for form in ("visual", "textual"):
        arguments += ["--tasks", str(tmp_path / f"{form}.jsonl")]
    found = CliRunner().invoke(
        app, [*arguments, "--random", "2", "--windows", "", "--exact", "0", "--heads", "0", "--no-progress"]
    )
    assert found.exit_code == 0, found.output
    assert "arithmetic" in found.output
    assert pl.read_parquet(tmp_path / "out" / "shared.parquet")["generation_above_data"].len() > 0
    assert (tmp_path / "out" / "figures" / "overlap.png").exists()
