"""The study end to end on the model organism, and what the organism's circuits are like."""

import numpy as np
import polars as pl
import pytest

import microtome as mt
from microtome import organism
from microtome.circuits import Circuit, faithfulness_curve, prepare, rank_correlation
from microtome.circuits.study import Options, Study, run, shared_more_in_generation
from microtome.errors import ShapeError

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


def test_study_writes_its_tables_and_figures(shipped, tmp_path):
    from microtome.report.circuits import write_figures

    model, processor = shipped
    tasks = {"counting": {
        form: prepare(model, processor, organism.pairs("counting", "textual", 12)) for form in ("visual", "textual")
    }}  # fmt: skip
    options = Options(steps=2, sizes=SIZES, n_random=2, n_exact=5, n_splits=1, windows=(1,))
    found = run(model, tasks, tmp_path / "out", options)
    expected = (
        "accuracy agreement alignment backpatch cost curves effects interchange noise overlap repair sizes"
    )
    assert sorted(found.tables) == expected.split()
    for name in expected.split():
        assert pl.read_parquet(tmp_path / "out" / f"{name}.parquet").height == found.tables[name].height > 0
    assert np.allclose(found.tables["alignment"]["cosine"], 1), "the two forms are the same prompts here"
    assert found.tables["overlap"].filter(pl.col("group") == "all")["iou"].min() == 1
    assert "generation" in shared_more_in_generation(found.tables)["group"]
    figures = write_figures(tmp_path / "out")
    assert {p.stem for p in figures} == {
        "faithfulness", "overlap", "interchange", "alignment", "effects-counting", "backpatch-counting",
    }  # fmt: skip
    assert all(p.stat().st_size > 5000 for p in figures)
    circuit = mt.Circuit.load(tmp_path / "out" / "circuit-counting-visual.parquet")
    assert circuit == found.circuits["counting", "visual"]


def test_study_refuses_what_it_cannot_do(tmp_path):
    from microtome.report.circuits import write_figures

    with pytest.raises(ShapeError, match="tasks: expected tasks"):
        run(None, {}, tmp_path)
    with pytest.raises(ShapeError, match="tasks: expected tasks"):
        run(None, {"colour": {"spoken": None}}, tmp_path)
    with pytest.raises(ShapeError, match="expected the tables of a circuit study"):
        write_figures(tmp_path)
    with pytest.raises(ShapeError, match="both forms"):
        shared_more_in_generation(Study().tables)


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
        app, [*arguments, "--random", "2", "--windows", "", "--exact", "0", "--no-progress"]
    )
    assert found.exit_code == 0, found.output
    assert "arithmetic" in found.output
    assert pl.read_parquet(tmp_path / "out" / "shared.parquet")["generation_above_data"].len() > 0
    assert (tmp_path / "out" / "figures" / "overlap.png").exists()
