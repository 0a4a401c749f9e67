"""Writes the golden ragged codes of format 1. It is never run again: the files beside it are what it wrote."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from microtome import _core

HERE = Path(__file__).parent / "ragged"


def main() -> None:
    """Seven rows in two steps: two entries, none, three; then three empty rows and one of one entry."""
    writer = _core.CodesWriter(
        str(HERE), hook="blocks.0.hook_resid_post", k=None, facts='{"d_sae": 8, "dictionary": "none"}'
    )
    rows = np.arange(0, 14, 2, dtype=np.uint64)
    fires = np.array([2, 0, 3, 0, 0, 0, 1], np.uint32)
    indices = np.array([3, 1, 0, 1, 2, 7], np.uint32)
    values = np.array([2, 0.5, 4, 3, 1, 0.25], np.float32)
    for of_rows, of_entries in ((slice(0, 3), slice(0, 5)), (slice(3, 7), slice(5, 6))):
        writer.append_ragged(rows[of_rows], fires[of_rows], indices[of_entries], values[of_entries])
        writer.commit()
    writer.close()


if __name__ == "__main__":
    main()
