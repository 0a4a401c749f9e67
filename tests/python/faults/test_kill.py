"""P11: kill -9 at any moment loses nothing committed and duplicates nothing."""

from __future__ import annotations

import pytest

from faults import kill
from microtome import _core


def test_kill_at_any_moment_loses_and_duplicates_nothing(tmp_path):
    done, broken = kill.kill_until(20, tmp_path, seed=11)
    assert done >= 20
    assert broken == []


@pytest.mark.full
def test_two_hundred_kills_lose_and_duplicate_nothing(tmp_path):
    done, broken = kill.kill_until(200, tmp_path, seed=12)
    assert done >= 200
    assert broken == []


def test_harness_catches_a_step_that_is_reported_before_it_is_committed(tmp_path):
    _, broken = kill.kill_until(20, tmp_path, seed=13, early=True)
    assert any("were reported" in problem for problem in broken)


POINTS = [
    "appended",
    "header-written",
    "sealed",
    "synced",
    "renamed",
    "step-in-place",
    "manifest-written",
    "committed",
]


@pytest.mark.skipif(not _core.FAILPOINTS, reason="built without the feature failpoints")
@pytest.mark.parametrize("point", POINTS)
def test_kill_at_a_named_point_loses_and_duplicates_nothing(tmp_path, point):
    kill.run_and_kill(tmp_path / "whole", None)
    whole = kill.files(tmp_path / "whole")
    for count in (1, 2, 5):
        path = tmp_path / f"{count}"
        reported, finished = kill.run_and_kill(path, None, fail_at=f"{point}:{count}")
        assert not finished, "the fail point was not reached"
        if (path / "manifest.json").exists():
            assert kill.broken_promise(path, reported) is None
        assert kill.run_and_kill(path, None)[1]
        assert kill.files(path) == whole
