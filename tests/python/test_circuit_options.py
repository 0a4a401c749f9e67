"""A misspelt option, a size out of range, another layout: refused by name, never taken as something else."""

import numpy as np
import pytest

import microtome as mt
from circuit_cases import pairs_of, tiny
from microtome.circuits import (
    Circuit,
    CircuitShape,
    EdgeGraph,
    ablate_heads,
    alignment,
    back_patch,
    back_patch_iterated,
    circuit_iou,
    circuit_niou,
    completeness,
    faithfulness,
    head_means,
    outcome,
    patching_map,
)
from microtome.errors import ShapeError

SHAPE = CircuitShape(3, 7, 4, 128)


def few():
    return Circuit.random(SHAPE, 5, 50)


def graph():
    zeros = np.zeros((1 + 3 * 5, 3 * 13 + 1), np.float32)
    return EdgeGraph(3, 4, 64, zeros)


def signed():
    zeros = [np.zeros(SHAPE.of(kind), np.float32) for kind in ("heads", "neurons")]
    return mt.NodeScores(*zeros, 1, signed=True)


def enter(change):
    with change:
        pass


@pytest.mark.parametrize(("call", "message"), [
    (lambda: circuit_niou(few(), few(), chance="exat"), "chance: expected one of exact, draws, found 'exat'"),
    (lambda: circuit_niou(few(), few(), compat="x"), "compat: expected one of None, notebook, found 'x'"),
    (lambda: circuit_niou(few(), few(), chance="draws", n_draws=0), "n_draws: expected 1 or more, found 0"),
    (lambda: circuit_iou(few(), few(), kind="head"), "kind: expected one of heads, neurons, found 'head'"),
    (lambda: few().mask("head"), "kind: expected one of heads, neurons, found 'head'"),
    (lambda: ("heads", 0, 0, 0) in few(), "kind: expected one of head, neuron, found 'heads'"),
    (lambda: signed().circuit(0.1, by="sgined"), "by: expected one of absolute, signed, found 'sgined'"),
    (lambda: graph().top(3.5), "n: expected 0 to .* edges, found 3.5"),
])  # fmt: skip
def test_options_of_circuits_are_refused(call, message):
    with pytest.raises(ShapeError, match=message):
        call()


def test_nodes_outside_the_model_are_in_no_circuit():
    whole = Circuit.full(SHAPE)
    assert ("neuron", 2, 6, 127) in whole
    assert not [
        node for node in (("neuron", 99, 0, 0), ("head", 0, 0, 4), ("head", -1, 0, 0)) if node in whole
    ]


@pytest.mark.parametrize(("call", "message"), [
    (lambda m, p: enter(ablate_heads(m, [(0, 0)], head_means(m, p), "txt")), "positions: expected one of text, image, all"),
    (lambda m, p: completeness(m, p, 0), "steps: expected 1 or more, found 0"),
    (lambda m, p: alignment(m, p, p, top=-1), "top: expected a share above 0 and up to 1, found -1"),
    (lambda m, p: alignment(m, p, p, top=5.0), "top: expected a share above 0 and up to 1, found 5.0"),
    (lambda m, p: back_patch(m, p, []), "settings: expected at least one, found none"),
    (lambda m, p: back_patch(m, p, windows=()), "settings: expected at least one, found none"),
    (lambda m, p: back_patch(m, p, [(1, 0)]), r"settings: expected \(src, dst, window\), found \(1, 0\)"),
    (lambda m, p: back_patch_iterated(m, p, (1, 0, 1), labels=[20, 21, 40, 9999]), "labels: expected a token id from 0 to 63"),
    (lambda m, p: back_patch(m, p, [(1, 0, 1)], labels=[20, 21, -1]), "labels: expected a token id from 0 to 63, found -1"),
    (lambda m, p: outcome(m, p, [(20, 40), (21, 9999)]), "groups: expected a token id from 0 to 63, found 9999"),
    (lambda m, p: patching_map(m, [1]), "pairs: expected a PairSet, found list"),
    (lambda m, p: faithfulness(m, p, Circuit.full(SHAPE._replace(n_slots=p.n_slots)), "mean", reference=[1]),
     "pairs: expected a PairSet, found list"),
])  # fmt: skip
def test_options_of_runs_are_refused(call, message):
    built = tiny("llava")
    pairs = pairs_of(built)
    with pytest.raises(ShapeError, match=message):
        call(built.model, pairs)


@pytest.mark.parametrize("words", [4, 9])
def test_means_over_positions_are_of_the_layout_of_the_pairs(words):
    built = tiny("llava")
    pairs, other = pairs_of(built), pairs_of(built, words=words)
    whole = Circuit.full(SHAPE._replace(n_slots=pairs.n_slots))
    with pytest.raises(ShapeError, match=r"reference: expected the .* positions and the groups of the pairs"):
        faithfulness(built.model, pairs, whole, "mean_positional", reference=other)
    assert faithfulness(built.model, pairs, whole, "mean", reference=other).value == pytest.approx(1)
