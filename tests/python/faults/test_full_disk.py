"""P14: a full disk is an error with a name, loses nothing committed, and is survived once there is room."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from faults.full_disk import DISK

PROGRAM = Path(__file__).with_name("full_disk.py")
LEVELS = [0, 900_000, 2_500_000]
MORE = [1 << 12, 300_000, 3_999_999, *(DISK * i // 20 for i in range(1, 16))]


def on_small_disk(folder: Path, *words: object) -> subprocess.CompletedProcess[str]:
    """Run a program in a mount namespace with a disk of 8 MiB at ``folder``."""
    mount = f'mount -t tmpfs -o size={DISK} tmpfs "$1" && shift && exec "$@"'
    command = ["unshare", "-m", "sh", "-c", mount, "sh", folder, *words]
    path = os.pathsep.join(sys.path)
    return subprocess.run(
        [str(word) for word in command], capture_output=True, text=True, env=os.environ | {"PYTHONPATH": path}
    )


@pytest.fixture(scope="module")
def small_disks(tmp_path_factory):
    tried = on_small_disk(tmp_path_factory.mktemp("probe"), "true")
    if tried.returncode:
        pytest.skip(f"a small disk needs the right to mount one: {tried.stderr.strip()}")


@pytest.mark.parametrize("free", [*LEVELS, *(pytest.param(free, marks=pytest.mark.full) for free in MORE)])
def test_full_disk_is_named_and_survived(small_disks, tmp_path, free):
    done = on_small_disk(tmp_path, sys.executable, PROGRAM, tmp_path, free)
    assert (done.returncode, done.stderr) == (0, "")
