"""P9, P15, P16 and P21: several processes at one store."""

from __future__ import annotations

import os
import signal
import time

import numpy as np
import pytest

import microtome as mt
import stored
from faults import kill
from microtome import _core, errors
from stored import HOOK, HOOKS


def in_child(work) -> int:
    """Exit code of a forked child that runs ``work``; 0 when it returns True."""
    child = os.fork()
    if child == 0:
        status = 1
        try:
            status = 0 if work() else 2
        finally:
            os._exit(status)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def open_writer(path):
    return _core.StoreWriter(str(path), hooks=HOOKS, dtype="float32", facts="{}")


def is_locked(path) -> bool:
    try:
        open_writer(path).close()
    except errors.LockedError as error:
        return "is being written by pid" in str(error)
    return False


def test_second_writer_is_refused_at_once(tmp_path):
    with open_writer(tmp_path):
        assert is_locked(tmp_path), "a second object in the same process"
        assert in_child(lambda: is_locked(tmp_path)) == 0, "a second process"
        with pytest.raises(errors.LockedError, match=f"is being written by pid {os.getpid()}"):
            open_writer(tmp_path)
    assert not is_locked(tmp_path)


def test_lock_is_free_after_kill(tmp_path):
    read_end, write_end = os.pipe()
    child = os.fork()
    if child == 0:
        writer = open_writer(tmp_path)
        os.write(write_end, b"x")
        time.sleep(60)
        writer.close()
        os._exit(0)
    os.read(read_end, 1)
    assert is_locked(tmp_path)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    assert not is_locked(tmp_path)


def race(path, racers: int) -> int:
    """The largest number of racers that hold the lock at the same time."""
    read_end, write_end = os.pipe()
    go_read, go_write = os.pipe()
    children = []
    for _ in range(racers):
        child = os.fork()
        if child == 0:
            os.close(go_write)
            os.read(go_read, 1)  # all start when the parent closes its end
            try:
                writer = open_writer(path)
            except errors.LockedError:
                os._exit(0)
            os.write(write_end, b"+")
            time.sleep(0.05)
            os.write(write_end, b"-")
            writer.close()
            os._exit(0)
        children.append(child)
    os.close(write_end)
    os.close(go_read)
    os.close(go_write)
    events = b""
    while chunk := os.read(read_end, 100):
        events += chunk
    os.close(read_end)
    for child in children:
        os.waitpid(child, 0)
    holding = most = 0
    for event in events.decode():
        holding += 1 if event == "+" else -1
        most = max(most, holding)
    return most


@pytest.mark.parametrize("rounds", [5, pytest.param(200, marks=pytest.mark.full)])
def test_of_racing_writers_one_wins(tmp_path, rounds):
    assert [race(tmp_path / str(i), 8) for i in range(rounds)] == [1] * rounds


def test_writer_refuses_a_forked_child_and_survives_it(tmp_path):
    writer = open_writer(tmp_path)
    writer.append("tokens", stored.rows(4), {HOOK: np.ones((4, 64), np.float32)})

    def all_refused() -> bool:
        refused = 0
        calls = [
            lambda: writer.append("tokens", stored.rows(4), {HOOK: np.ones((4, 64), np.float32)}),
            lambda: writer.commit(b""),
            writer.discard,
            writer.close,
        ]
        for call in calls:
            try:
                call()
            except errors.ForkedError:
                refused += 1
        return refused == len(calls)

    assert in_child(all_refused) == 0
    writer.commit(b"")
    writer.close()
    assert mt.ActivationStore(tmp_path)[HOOK].shape == (4, 64)


def test_a_child_forked_inside_the_block_holds_no_lock(tmp_path):
    read_end, write_end = os.pipe()
    with open_writer(tmp_path):
        child = os.fork()
        if child == 0:
            os.read(read_end, 1)
            os._exit(0)
    try:
        assert (tmp_path / "LOCK").read_bytes() == b""
        assert not is_locked(tmp_path)
    finally:
        os.write(write_end, b"x")
        os.waitpid(child, 0)


def test_store_is_read_in_a_forked_child(tmp_path):
    x = stored.write(tmp_path / "run")
    acts = mt.ActivationStore(tmp_path / "run")[HOOK]
    assert np.array_equal(acts[:700].numpy(), x[:700])
    assert in_child(lambda: np.array_equal(acts[:1000].numpy(), x)) == 0


@pytest.mark.parametrize("seconds", [2, pytest.param(60, marks=pytest.mark.full)])
def test_readers_see_committed_steps_only_while_a_writer_runs(tmp_path, seconds):
    open_writer(tmp_path / "run").close()
    parent = os.getpid()
    writing = os.fork()
    if writing == 0:
        x = np.repeat(np.arange(40, dtype=np.float32)[:, None], 64, axis=1)
        with open_writer(tmp_path / "run") as writer:
            while os.getppid() == parent:
                writer.append("tokens", stored.rows(40), {HOOK: x + 40 * writer.steps})
                writer.commit(b"")  # polars does not run in a forked child
                time.sleep(0.005)
    try:
        opens, steps, end = 0, 0, time.monotonic() + seconds
        while time.monotonic() < end:
            store = mt.ActivationStore(tmp_path / "run", verify="always")
            found = len(store._reader.steps)
            assert found >= steps, "the number of steps went down"
            column = store[HOOK].numpy()[:, 0]
            assert np.array_equal(column, np.arange(40 * found))
            opens, steps = opens + 1, found
    finally:
        os.kill(writing, signal.SIGKILL)
        os.waitpid(writing, 0)
    assert steps > 5
    assert opens > 10 * seconds
    assert mt.ActivationStore(tmp_path / "run").verify() == []


@pytest.mark.full
@pytest.mark.parametrize("change", ["replaced", "deleted", "overwritten", "truncated"])
def test_file_changed_under_a_scan_never_gives_wrong_numbers(tmp_path, change):
    """0: right sums; 3: an error; -7: SIGBUS after a lost race, which FORMAT.md admits for truncation."""
    outcomes = []
    for round_ in range(40):
        path = tmp_path / f"{round_}"
        x = stored.write(path, steps=(20_000,), seed=round_)
        shard = path / "000000" / f"{HOOK}.safetensors"
        expected = x.sum(dtype=np.float64)
        read_end, write_end = os.pipe()
        child = os.fork()
        if child == 0:
            status = 1
            try:
                acts = mt.ActivationStore(path, verify="always")[HOOK]
                acts[:1]
                os.write(write_end, b"x")
                total = sum(float(block.numpy().sum(dtype=np.float64)) for block in acts.blocks(100))
                status = 0 if total == expected else 2
            except errors.StoreError:
                status = 3
            finally:
                os._exit(status)
        os.read(read_end, 1)
        os.close(read_end)
        os.close(write_end)
        time.sleep(0.0005 * (round_ % 10))
        if change == "replaced":
            other = tmp_path / "other"
            other.write_bytes(np.random.default_rng(0).bytes(shard.stat().st_size))
            other.rename(shard)
        elif change == "deleted":
            shard.unlink()
        else:
            shard.chmod(0o644)
            with shard.open("r+b") as file:
                if change == "truncated":
                    file.truncate(1 << 20)
                else:
                    file.seek(4096)
                    file.write(b"\1" * (5 << 20))
        outcomes.append(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
    allowed = {"replaced": {0}, "deleted": {0}, "overwritten": {0, 3}, "truncated": {0, 3, -signal.SIGBUS}}[
        change
    ]
    assert set(outcomes) <= allowed, outcomes


def test_kill_harness_runs_on_codes_too(tmp_path):
    """The writer of sparse codes is the same writer; one kill inside an open step shows it."""
    kill.run_and_kill(tmp_path / "run", None)
    store = mt.ActivationStore(tmp_path / "run")
    hook = store.hooks[0]
    n = store.n_rows
    codes = mt.SparseCodes(np.zeros((n, 2), np.uint32), np.ones((n, 2), np.float32), 10)
    child = os.fork()
    if child == 0:
        out = store.write_codes("c", hook, k=2, d_sae=10, dictionary="d", step_rows=1000)
        for start in range(0, 2500, 500):
            out.append(codes[start : start + 500])
        os.kill(os.getpid(), signal.SIGKILL)
    os.waitpid(child, 0)
    with store.write_codes("c", hook, k=2, d_sae=10, dictionary="d", step_rows=1000) as out:
        assert out.n_rows == 2000
        out.append(codes[out.n_rows :])
    assert len(store.codes("c")) == n
    assert store.verify() == []
    assert not list((tmp_path / "run").rglob("*.tmp-*"))
