"""Scores of a run on their way to memory or, resumable, to a folder.

A folder holds ``heads.npy`` and ``neurons.npy``, written tile by tile, ``run.json`` with the finished tiles,
``partial.npz`` with the sums of the tile in progress, and in the end ``scores.json``. Files that say what is
finished are replaced by rename, after the arrays are flushed. Scores do not depend on how a run is cut, so a
run may go on with other batches or another budget: what is finished and still has its place counts.
"""

from __future__ import annotations

import hashlib
import json
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from microtome._core import __version__
from microtome.circuits.attribution.passes import Accumulator
from microtome.circuits.attribution.plan import Plan, Tile
from microtome.circuits.attribution.settings import Settings
from microtome.circuits.circuit.scores import NodeScores
from microtome.circuits.pairs.fingerprints import pairs_fingerprint, weights_fingerprint
from microtome.circuits.pairs.pair_set import PairSet
from microtome.errors import StoreError
from microtome.whole import write_whole

__all__ = ["Stream", "another_run", "provenance"]

CHECKPOINT_SECONDS = 60.0
"""Least time between two saves of the sums in progress."""


def another_run(folder: Path) -> StoreError:
    """The refusal of a folder that holds scores of something else."""
    return StoreError(
        f"attribution: {folder}: expected a run of these pairs, settings and weights, found another one. "
        "Choose another folder"
    )


def provenance(adapter: Any, pairs: PairSet, settings: Settings, *more: Any) -> dict[str, Any]:
    """What makes scores; ``identity`` is a digest of weights, pairs, settings and ``more``."""
    model = adapter.model
    made_of = {"weights": weights_fingerprint(model), "pairs": pairs_fingerprint(pairs)}
    told = repr((settings, made_of, *more))
    return {
        **asdict(settings),
        "model": type(model).__name__,
        "dtype": str(model.dtype).removeprefix("torch."),
        "version": __version__,
        **made_of,
        "identity": hashlib.blake2b(told.encode(), digest_size=16).hexdigest(),
        "align": pairs.align,
    }


class Stream:
    """Where the tiles of one run end up."""

    def __init__(
        self, adapter: Any, pairs: PairSet, settings: Settings, plan: Plan, out: str | Path | None
    ) -> None:
        self._adapter, self._pairs, self._settings = adapter, pairs, settings
        self._folder = None if out is None else Path(out)
        self._finished: dict[int, tuple[int, int]] = {}
        self._is_whole = False
        self._saved_at = time.monotonic()
        layers, slots = adapter.n_layers, pairs.n_slots
        shapes = {"heads": (layers, slots, adapter.n_heads), "neurons": (layers, slots, adapter.d_mlp)}
        self._plan = {"tiles": repr(plan.tiles), "n_tiles": len(plan.tiles), "batch_size": plan.batch_size}
        self._facts = provenance(adapter, pairs, settings)
        self._identity = self._facts["identity"]
        if self._folder is None:
            self._arrays: dict[str, npt.NDArray[np.float32]] = {
                k: np.zeros(s, np.float32) for k, s in shapes.items()
            }
        else:
            self._arrays = self._open(self._folder, shapes)

    def _open(
        self, folder: Path, shapes: dict[str, tuple[int, int, int]]
    ) -> dict[str, npt.NDArray[np.float32]]:
        record = folder / "run.json"
        if not record.exists() and (folder / "scores.json").exists():
            raise another_run(folder)
        if record.exists():
            known = json.loads(record.read_text())
            if known["identity"] != self._identity:
                raise another_run(folder)
            self._take_up(folder, known)
            return {k: np.lib.format.open_memmap(folder / f"{k}.npy", mode="r+") for k in shapes}
        folder.mkdir(parents=True, exist_ok=True)
        arrays: dict[str, npt.NDArray[np.float32]] = {
            k: np.lib.format.open_memmap(folder / f"{k}.npy", mode="w+", dtype=np.float32, shape=s)
            for k, s in shapes.items()
        }
        self._write_record()
        return arrays

    def _take_up(self, folder: Path, known: dict[str, Any]) -> None:
        """What counts of an earlier run: all of a whole one, the finished tiles of an equal cut, sums of equal batches."""
        finished = {int(k): tuple(v) for k, v in known["finished"].items()}
        if len(finished) == known["n_tiles"]:
            self._plan |= {name: known[name] for name in self._plan}
            self._is_whole = True
        if known["tiles"] == self._plan["tiles"]:
            self._finished = finished
        if any(known[name] != value for name, value in self._plan.items()):
            (folder / "partial.npz").unlink(
                missing_ok=True
            )  # before the record says whose sums they would be
            self._write_record()

    def _write_record(self) -> None:
        if self._folder is not None:
            record = json.dumps({"identity": self._identity, **self._plan, "finished": self._finished})
            write_whole(self._folder / "run.json", lambda beside: beside.write_text(record))

    def is_finished(self, number: int) -> bool:
        """Whether a tile is done already."""
        return self._is_whole or number in self._finished

    def begin(self, tile: Tile) -> Accumulator:
        """Sums of a tile: those of its last checkpoint, else zeros."""
        adapter, device = self._adapter, self._adapter.model.device
        slots = self._pairs.n_slots
        zeros = (
            torch.zeros(len(tile.layers), slots, w, device=device) for w in (adapter.n_heads, adapter.d_mlp)
        )
        total = Accumulator(*zeros)
        path = None if self._folder is None else self._folder / "partial.npz"
        if path is None or not path.exists():
            return total
        with np.load(path) as saved:
            if int(saved["tile"]) == len(self._finished):
                total.heads, total.neurons = (
                    torch.from_numpy(saved[k]).to(device) for k in ("heads", "neurons")
                )
                total.n_pairs, total.n_skipped, total.batches_done = (int(x) for x in saved["counts"])
        return total

    def checkpoint(self, number: int, total: Accumulator) -> None:
        """Save the sums so far, when the last save is long ago."""
        if self._folder is None or time.monotonic() - self._saved_at < CHECKPOINT_SECONDS:
            return
        sums = {
            "tile": number,
            "heads": total.heads.cpu().numpy(),
            "neurons": total.neurons.cpu().numpy(),
            "counts": [total.n_pairs, total.n_skipped, total.batches_done],
        }

        def save(beside: Path) -> None:
            with beside.open("wb") as file:  # NumPy would give a path another ending
                np.savez(file, **sums)

        write_whole(self._folder / "partial.npz", save)
        self._saved_at = time.monotonic()

    def finish(self, number: int, tile: Tile, total: Accumulator) -> None:
        """Divide by the number of pairs and put a tile in its place."""
        n_slots = self._pairs.n_slots
        columns = tile.positions if tile.positions != slice(None) else slice(0, n_slots)
        for name, sums in (("heads", total.heads), ("neurons", total.neurons)):
            for layer, row in zip(tile.layers, sums, strict=True):  # layer by layer: no copy of a whole tile
                mean = (
                    row[columns] / total.n_pairs
                    if total.n_pairs
                    else torch.full_like(row[columns], torch.nan)
                )
                self._arrays[name][layer, columns] = mean.cpu().numpy()
            if isinstance(self._arrays[name], np.memmap):
                self._arrays[name].flush()  # type: ignore[attr-defined]
        self._finished[number] = total.n_pairs, total.n_skipped
        self._write_record()
        if self._folder is not None:
            (self._folder / "partial.npz").unlink(missing_ok=True)

    def scores(self) -> NodeScores:
        """All tiles together."""
        n_pairs, n_skipped = next(iter(self._finished.values()))
        scores = NodeScores(
            self._arrays["heads"],
            self._arrays["neurons"],
            n_pairs,
            n_skipped,
            self._settings.signed,
            self._pairs.groups,
            self._facts,
        )
        if self._folder is not None:
            scores.save(self._folder)
        return scores
