"""P11 for ragged codes: rows and entries are committed as one, at whatever moment the writer dies."""

from __future__ import annotations

import functools

import pytest

from faults import kill, kill_codes
from faults.test_kill import POINTS
from microtome import _core

kill_until = functools.partial(
    kill.kill_until, write=kill_codes.write, broken_promise=kill_codes.broken_promise
)
run_and_kill = functools.partial(kill.run_and_kill, write=kill_codes.write)


def test_kill_at_any_moment_leaves_rows_and_entries_in_step(tmp_path):
    done, broken = kill_until(10, kill_codes.prepare(tmp_path), seed=21)
    assert done >= 10
    assert broken == []


@pytest.mark.full
def test_a_hundred_kills_leave_rows_and_entries_in_step(tmp_path):
    done, broken = kill_until(100, kill_codes.prepare(tmp_path), seed=22)
    assert done >= 100
    assert broken == []


@pytest.mark.skipif(not _core.FAILPOINTS, reason="built without the feature failpoints")
@pytest.mark.parametrize("point", POINTS)
def test_kill_at_a_named_point_leaves_rows_and_entries_in_step(tmp_path, point):
    folder = kill_codes.prepare(tmp_path)
    run_and_kill(folder / "whole", None)
    whole = kill.files(folder / "whole")
    for count in range(1, 7):  # an append passes the point once per file, a commit once per file or once
        path = folder / f"{count}"
        reported, finished = run_and_kill(path, None, fail_at=f"{point}:{count}")
        assert not finished, "the fail point was not reached"
        if (path / "manifest.json").exists():
            assert kill_codes.broken_promise(path, reported) is None
        assert run_and_kill(path, None)[1]
        assert kill.files(path) == whole


def test_harness_catches_rows_that_are_reported_before_they_are_committed(tmp_path):
    _, broken = kill_until(10, kill_codes.prepare(tmp_path), seed=23, early=True)
    assert any("were reported" in problem for problem in broken)
