"""The border between Python and the core: Ctrl-C is answered, a forked child gets an answer, threads do not change bits."""

import os
import signal
import subprocess
import sys
import time

import numpy as np
import pytest

import microtome as mt
from microtome import _core, errors

LONG_SCAN = """
import sys, time
import numpy as np
import microtome as mt
mt.set_num_threads(2)
rng = np.random.default_rng(0)
layers = [rng.standard_normal((20_000, 256), dtype=np.float32) for _ in range(4)]
print("ready", flush=True)
try:
    while True:
        mt.cka_matrix(layers * 8)
except KeyboardInterrupt:
    print("interrupted", mt.linear_cka(layers[0][:100], layers[0][:100]) > 0.99, flush=True)
"""


@pytest.mark.parametrize("delay", [0.05, 0.3, 0.8])
def test_ctrl_c_is_answered_within_a_second_and_the_pool_lives_on(delay):
    child = subprocess.Popen([sys.executable, "-c", LONG_SCAN], stdout=subprocess.PIPE, text=True)
    assert child.stdout.readline().strip() == "ready"
    time.sleep(delay)
    sent = time.monotonic()
    child.send_signal(signal.SIGINT)
    assert child.stdout.readline().strip() == "interrupted True"
    answered = time.monotonic() - sent
    assert child.wait(timeout=10) == 0
    assert answered < 5.0  # a second on an idle machine; tests share theirs


def test_forked_child_gets_an_answer():
    x = np.random.default_rng(0).standard_normal((300, 8), dtype=np.float32)
    here = mt.linear_cka(x, x[:, :4])
    read, write = os.pipe()
    child = os.fork()
    if child == 0:
        os.write(write, repr(mt.linear_cka(x, x[:, :4])).encode())
        os._exit(0)
    os.close(write)
    deadline = time.monotonic() + 20
    while os.waitpid(child, os.WNOHANG) == (0, 0):
        if time.monotonic() > deadline:
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)
            pytest.fail("the forked child hangs")
        time.sleep(0.01)
    assert float(os.read(read, 100)) == here


def test_a_caller_that_takes_small_numbers_for_zero_does_not_show_in_results():
    script = (
        "import numpy as np, torch, microtome as mt\n"
        "x, W = np.full((1, 1), 1e-40, np.float32), np.ones((1, 1), np.float32)\n"
        "assert torch.set_flush_denormal(True)\n"
        "print(mt.topk_encode(x, W, k=1).values.view(np.uint32)[0, 0])"
    )
    found = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True).stdout
    assert int(found) == np.float32(1e-40).view(np.uint32)


def test_a_state_that_two_threads_update_at_once_is_refused_and_never_waited_for():
    script = (
        "import os, threading, numpy as np, microtome as mt\n"
        "from microtome import _core, errors\n"
        "from microtome.metrics.features import core_codes\n"
        "mt.set_num_threads(2)\n"
        "r = np.random.default_rng(0)\n"
        "indices = np.stack([r.permutation(500)[:8] for _ in range(2000)]).repeat(50, 0).astype(np.uint32)\n"
        "codes = core_codes(mt.SparseCodes(indices, r.random(indices.shape, np.float32), 500))\n"
        "state = _core.FiringState(500, 1, 10**5)\n"
        "def update():\n"
        "    for _ in range(40):\n"
        "        try: state.update(codes)\n"
        "        except errors.ShapeError as error: assert 'in use' in str(error)\n"
        "threads = [threading.Thread(target=update, daemon=True) for _ in range(2)]\n"
        "for thread in threads: thread.start()\n"
        "for thread in threads: thread.join(60)\n"
        "print(any(thread.is_alive() for thread in threads), flush=True)\n"
        "os._exit(0)"
    )
    run = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert run.stdout.strip() == "False", run.stderr


def test_number_of_threads_is_set_and_said():
    before = mt.num_threads()
    try:
        mt.set_num_threads(3)
        assert mt.num_threads() == 3
    finally:
        mt.set_num_threads(before)


def test_environment_sets_the_number_of_threads():
    code = "import microtome as mt; print(mt.num_threads())"
    env = os.environ | {"MICROTOME_NUM_THREADS": "5"}
    out = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, check=True)
    assert out.stdout.strip() == "5"


@pytest.mark.parametrize(
    ("bad", "error", "says"),
    [
        (np.ones((9, 3)), errors.DtypeError, "x: expected float32, float16 or bfloat16, found float64"),
        (np.ones((9, 3), np.int16), errors.DtypeError, "found int16"),
        (np.ones((9, 3), object), errors.DtypeError, "found object"),
        ([["a", "b"]], errors.DtypeError, "x: expected float32"),
        (np.ones(9, np.float32), errors.ShapeError, r"x: expected a matrix \(n, d\), found shape \(9,\)"),
        (np.ones((3, 3, 3), np.float32), errors.ShapeError, "x: expected a matrix"),
        (np.ones((9, 0), np.float32), errors.ShapeError, "x: expected"),
        (np.ones((0, 3), np.float32), errors.ShapeError, "x"),
        (("float8", np.ones((9, 3), np.uint8)), errors.DtypeError, "x"),
    ],
    ids=["f64", "i16", "object", "strings", "vector", "rank 3", "no columns", "no rows", "unknown tag"],
)
def test_bad_matrices_are_refused_with_name_expectation_and_finding(bad, error, says):
    with pytest.raises(error, match=says) as caught:
        mt.linear_cka(bad, np.ones((9, 3), np.float32))
    assert "\n" not in str(caught.value)


def test_strided_and_fortran_arrays_give_the_numbers_of_their_values():
    x = np.random.default_rng(0).standard_normal((40, 8), dtype=np.float32)
    assert mt.linear_cka(x[::2], x[::2]) == mt.linear_cka(x[::2].copy(), x[::2].copy())
    assert mt.linear_cka(np.asfortranarray(x), x) == mt.linear_cka(x, x)


@pytest.mark.parametrize("place", ["worker", "fold", "reader", "detached"])
def test_a_panic_becomes_an_error_and_the_pool_lives_on(place):
    x = np.random.default_rng(0).standard_normal((300, 8), dtype=np.float32)
    before = mt.linear_cka(x, x[:, :4])
    with pytest.raises(errors.Error, match="internal error in provoked, please report"):
        _core.provoke_panic(place)
    assert mt.linear_cka(x, x[:, :4]) == before
