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
