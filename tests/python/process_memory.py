"""What the system says of the memory of this process. Scripts of tests find it beside them, by :data:`FROM_HERE`."""

from __future__ import annotations

from pathlib import Path

import pytest

STATUS = Path("/proc/self/status")

needs_procfs = pytest.mark.skipif(not STATUS.exists(), reason="reads /proc")

FROM_HERE = f"import sys; sys.path.append({str(Path(__file__).parent)!r})\n"
"""First line of a script in a process of its own that imports from here."""


def anonymous_bytes() -> int:
    """Memory that no file stands behind."""
    return _bytes("RssAnon")


def peak_bytes() -> int:
    """The most memory since the process began; that of ``getrusage`` may be its parent's."""
    return _bytes("VmHWM")


def _bytes(field: str) -> int:
    return int(STATUS.read_text().split(f"{field}:")[1].split()[0]) * 1024
