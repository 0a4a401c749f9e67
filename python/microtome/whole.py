"""Files that readers find whole: the old one or the new one, never a part, whenever the writer ends."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

__all__ = ["write_whole"]


def write_whole(path: Path, write: Callable[[Path], Any]) -> Path:
    """Have ``write`` make a file beside ``path``, bring it to disk, and rename it; folders are made where they lack.

    Returns:
        ``path``.

    Example:
        >>> import tempfile
        >>> path = Path(tempfile.mkdtemp()) / "runs" / "facts.json"
        >>> write_whole(path, lambda beside: beside.write_text("{}")).read_text()
        '{}'
        >>> [file.name for file in path.parent.iterdir()]
        ['facts.json']
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_name(f".{path.name}.tmp-{os.getpid()}")
    try:
        write(beside)
        with beside.open("rb+") as file:
            os.fsync(file.fileno())
        beside.replace(path)
    finally:
        beside.unlink(missing_ok=True)
    return path
