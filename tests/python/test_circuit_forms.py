"""Two forms of the same prompts: matched by their numbers in the source, whatever was dropped from either."""

from dataclasses import replace

import numpy as np
import pytest

from circuit_cases import tiny
from microtome import organism
from microtome.circuits import alignment, prepare
from microtome.circuits.study import Options, run
from microtome.errors import ShapeError

OPTIONS = Options(
    method="plain", sizes=(0.1, 0.5), n_random=0, n_exact=0, n_heads=0, n_splits=0, n_blocks=1, windows=()
)


@pytest.fixture(scope="module")
def shipped():
    return organism.load_model(), organism.load_processor()


def forms_of(shipped, n=12):
    return {form: prepare(*shipped, organism.pairs("colour", form, n)) for form in ("visual", "textual")}


def test_a_pair_dropped_from_one_form_is_left_out_of_the_other(shipped, tmp_path):
    forms = forms_of(shipped)
    dropped = forms | {"visual": forms["visual"][1:]}
    found = run(shipped[0], {"colour": dropped}, tmp_path, OPTIONS, progress=False).tables["alignment"]
    expected = alignment(shipped[0], forms["visual"][1:], forms["textual"][1:], seed=OPTIONS.seed)
    np.testing.assert_array_equal(found["centred"], expected["centred"])


def test_forms_that_cannot_be_matched_are_refused_before_any_work(shipped, tmp_path):
    forms = forms_of(shipped)
    other = replace(forms["textual"], pairs=tuple(replace(p, number=None) for p in forms["textual"][1:]))
    with pytest.raises(ShapeError, match="colour: expected pairs numbered by their source"):
        run(shipped[0], {"colour": forms | {"textual": other}}, tmp_path, OPTIONS)
    with pytest.raises(ShapeError, match="colour: expected visual and textual pairs of the same source"):
        run(
            shipped[0],
            {"colour": {"visual": forms["visual"][:6], "textual": forms["textual"][6:]}},
            tmp_path,
            OPTIONS,
        )
    assert not list(tmp_path.iterdir())


def test_dropped_pairs_are_numbered_as_in_the_source():
    built = tiny("llama")
    raw = []
    for i in range(4):
        clean, corrupted = built.batch((6,), seed=2 * i), built.batch((6 + (i == 1),), seed=2 * i + 1)
        best = [int(built.model(**side).logits[0, -1].argmax()) for side in (clean, corrupted)]
        best[1] = (best[1] + 1) % 64 if best[0] == best[1] else best[1]
        raw.append({"clean": clean, "corrupted": corrupted, "answer": best[0], "corrupted_answer": best[1]})
    raw[2]["answer"] = next(i for i in range(64) if i not in (raw[2]["answer"], raw[2]["corrupted_answer"]))
    found = prepare(built.model, None, raw, on_invalid="drop", correct_only=True)
    numbers = [i for i, _ in found.dropped]
    assert numbers == sorted({*numbers})
    assert {1, 2} <= {*numbers}
    assert sorted([*numbers, *(p.number for p in found)]) == [0, 1, 2, 3]


def beginnings(forms, where):
    """Both forms, with data that begin elsewhere in every prompt of the textual one, or that are nowhere."""
    changed = []
    for i, pair in enumerate(forms["textual"]):
        data = pair.spans["data"]
        start = int(data[0]) + (i % 2) if where == "elsewhere" else int(data[-1]) + 1
        cut = {"prefix": np.arange(start), "data": np.arange(start, int(data[-1]) + 1)}
        changed.append(replace(pair, spans={**pair.spans, **cut}))
    return forms | {"textual": replace(forms["textual"], pairs=tuple(changed), align="spans")}


@pytest.mark.parametrize(("where", "left"), [
    ("nowhere", {"alignment": "textual: pair 0: expected data positions", "back-patching": "textual: pair 0: expected data"}),
    ("elsewhere", {"back-patching": "textual: pairs: expected the same words before the data"}),
])  # fmt: skip
def test_steps_that_the_prompts_do_not_allow_are_left_out_and_named(shipped, tmp_path, where, left):
    tasks = {"colour": beginnings(forms_of(shipped), where)}
    said = []
    how = replace(OPTIONS, windows=(1,))
    found = run(shipped[0], tasks, tmp_path, how, progress=False, say=said.append)
    rows = dict(found.tables["left_out"].select("step", "reason").iter_rows())
    assert list(rows) == list(left)
    for step, reason in left.items():
        assert rows[step].startswith(reason)
        assert any(f"colour: {step} is left out: {reason}" in line for line in said[:-1])
        assert step not in found.tables["cost"]["step"].to_list()
    assert ("alignment" in found.tables) == ("alignment" not in left)
    assert "backpatch" not in found.tables
    if where == "elsewhere":
        found = run(shipped[0], tasks, tmp_path / "allowed", replace(how, allow_prefix=True), progress=False)
        assert "left_out" not in found.tables
        assert "backpatch" in found.tables
