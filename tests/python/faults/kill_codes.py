"""The kill harness on ragged codes: rows and entries are two spaces of one step, and must never be out of step."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path

import numpy as np

import stored
from microtome import ActivationStore
from microtome.metrics import RaggedCodes
from microtome.store.codes import open_codes

STEPS = 12
ROWS = [70, 1, 29]  # rows of the appends of one step; some appends have no entry
D_SAE = 50


def prepare(folder: Path) -> Path:
    """A store of activations in ``folder``; where its codes lie."""
    stored.write(folder / "run", steps=(STEPS * sum(ROWS),))
    return folder / "run" / "codes"


def codes_from(start: int, n: int) -> RaggedCodes:
    """Codes that say which rows they belong to; every other hundred of rows is empty."""
    number = np.arange(start, start + n)
    counts = np.where(number // 100 % 2 == 0, number % 4, 0)
    flat = np.repeat(number, counts)
    indptr = np.append(0, np.cumsum(counts))
    slot = np.arange(len(flat)) - np.repeat(indptr[:-1], counts)
    return RaggedCodes(
        indptr, ((flat + slot) % D_SAE).astype(np.uint32), (flat + 1).astype(np.float32), D_SAE
    )


def write(path: Path, report: Callable[[int], None], *, early: bool = False) -> None:
    """Append the steps that are missing. ``early`` is a planted bug: it reports before it commits."""
    store = ActivationStore(path.parents[1])
    with store.write_codes(path.name, stored.HOOK, d_sae=D_SAE, dictionary="d") as out:
        report(out.n_rows // sum(ROWS))
        while out.n_rows < STEPS * sum(ROWS):
            for n in ROWS:
                out.append(codes_from(out.n_rows, n))
            if early:
                report(out.n_rows // sum(ROWS))
                time.sleep(0.02)
            out.commit()
            report(out.n_rows // sum(ROWS))


def broken_promise(path: Path, reported: int) -> str | None:
    """What a reader finds wrong after a kill, if anything."""
    found = open_codes(path, "always")
    n = len(found)
    if n < reported * sum(ROWS) or n % sum(ROWS):
        return f"{reported} steps were reported, {n} rows are there"
    if problems := found.verify():
        return problems[0]
    expected = codes_from(0, n)
    if any(
        not np.array_equal(getattr(found[:], f), getattr(expected, f))
        for f in ("indptr", "indices", "values")
    ):
        return f"the codes are not those of the rows 0..{n}"
    if not np.array_equal(found.row_numbers, np.arange(n)):
        return "the row table does not hold the rows once"
    return None
