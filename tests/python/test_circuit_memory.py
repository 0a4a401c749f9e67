"""What an attribution run holds, measured in a process of its own."""

import json
import os
import subprocess
import sys

import pytest

import microtome as mt
from circuit_cases import pairs_of, tiny
from microtome.circuits import estimate
from microtome.errors import ShapeError

MIB = 2**20
ALLOWANCE = 2 * MIB
"""For what Python itself allocates on the way."""
RETURNING = {"MALLOC_ARENA_MAX": "1", "MALLOC_MMAP_THRESHOLD_": "65536"}
"""The allocator gives freed blocks back at once, so that growth is what was held, not what lay around."""

CHILD = """
import ctypes, gc, json, sys, threading, time
import torch
torch.set_num_threads(1)
import tiny_models as tm
tm.D_MODEL, tm.N_LAYERS, tm.D_MLP = 64, int(sys.argv[2]), 1024
import microtome as mt
from microtome.circuits import estimate, prepare
from process_memory import anonymous_bytes as anonymous

built = tm.build("qwen2_vl")
built.image_processor.size = {"shortest_edge": 3136, "longest_edge": 10**8}
model = built.model.eval()

def pairs_at(side):
    sides = [built.batch((6,), True, seed=i, size=(side, side)) for i in range(2)]
    return prepare(model, None, [{"clean": sides[0], "corrupted": sides[1], "answer": 20, "corrupted_answer": 40}])

pairs, found = pairs_at(int(sys.argv[3])), []
arguments = {"steps": 2, "batch_size": 1}
for budget in (None, 8 * 2**20):  # loads what a first run loads
    mt.attribute(model, pairs_at(56), memory_budget=budget, progress=False, **arguments)
for budget in map(int, sys.argv[4:]):
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    before, peak, stop = anonymous(), [0], threading.Event()

    def watch():
        while not stop.is_set():
            peak[0] = max(peak[0], anonymous())
            time.sleep(0.001)

    thread = threading.Thread(target=watch, daemon=True)
    thread.start()
    cost = estimate(model, pairs, memory_budget=budget, **arguments)
    out = f"{sys.argv[1]}/{budget}"
    mt.attribute(model, pairs, memory_budget=budget, out=out, progress=False, **arguments)
    stop.set()
    thread.join()
    found.append({"budget": budget, "planned": cost.bytes_memory, "grown": peak[0] - before, "tiles": cost.tiles})
print(json.dumps(found))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize(
    ("layers", "side", "budgets"),
    [
        pytest.param(8, 336, (30, 60), id="144 image tokens"),
        pytest.param(28, 896, (150, 400), id="1024 image tokens", marks=pytest.mark.full),
    ],
)
def test_growth_of_the_process_stays_within_its_budget_with_scores_on_disk(tmp_path, layers, side, budgets):
    budgets = [mib * MIB for mib in budgets]
    command = [sys.executable, "-c", CHILD, str(tmp_path), *map(str, (layers, side, *budgets))]
    around = os.environ | RETURNING | {"PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=around)
    assert done.returncode == 0, done.stderr
    runs = json.loads(done.stdout.splitlines()[-1])
    assert [run["budget"] for run in runs] == budgets
    for run in runs:
        assert run["planned"] <= run["budget"]
        assert run["grown"] <= run["budget"] + ALLOWANCE, runs


@pytest.mark.parametrize("method", ["ig", "ig_activations"])
def test_a_budget_too_small_is_refused_with_the_least_that_is_enough(method):
    built = tiny("qwen2_vl")
    pairs = pairs_of(built)
    with pytest.raises(ShapeError, match=r"memory_budget: expected at least \d+ bytes") as refused:
        mt.attribute(built.model, pairs, method, memory_budget=1000)
    least = int(str(refused.value).split("at least ")[1].split()[0])
    assert estimate(built.model, pairs, method, memory_budget=least).bytes_memory == least
    with pytest.raises(ShapeError, match=f"at least {least} bytes"):
        estimate(built.model, pairs, method, memory_budget=least - 1)
