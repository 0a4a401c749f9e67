"""A run on disk: one safetensors file per checkpoint, from which it goes on as if it had never stopped.

Kept: weights, both moments of Adam, what the features did, and the curves. The order of rows and every other
draw are functions of the seed and the step, so there is no generator to keep.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from microtome.dictionary.formats.files import Checkpoint, write_safetensors
from microtome.errors import CheckpointError

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["latest", "load", "save"]

_KEPT = 2
_FORMAT = "microtome.training.1"


def save(
    folder: Path, step: int, tensors: Mapping[str, Tensor], record: Mapping[str, Any], anew: bool
) -> Path:
    """Write the state after ``step`` steps, and drop all but the last two; with ``anew`` all others.

    Checkpoints of an earlier run in the folder may be of later steps.
    """
    meta = {"format": _FORMAT, "record": json.dumps({**record, "step": step})}
    file = write_safetensors(folder / f"step-{step:09d}.safetensors", dict(tensors), meta)
    held = sorted(folder.glob("step-*.safetensors"))
    for old in [path for path in held if path != file] if anew else held[:-_KEPT]:
        old.unlink()
    return file


def latest(folder: Path) -> Path | None:
    """The last checkpoint of a folder, or None."""
    return max(folder.glob("step-*.safetensors"), default=None)


def load(file: Path, expected: Mapping[str, Any]) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Tensors and record of a checkpoint.

    Args:
        file: the checkpoint.
        expected: what configuration and data must be, for the run to be the same run.

    Raises:
        CheckpointError: not a checkpoint, or one of another run; the message names the first difference.
    """
    opened = Checkpoint(file, {})
    if opened.metadata.get("format") != _FORMAT:
        raise CheckpointError(f"resume: {file}: expected {_FORMAT}, found {opened.metadata.get('format')}")
    record: dict[str, Any] = json.loads(opened.metadata["record"])
    for part, fields in expected.items():
        for name, value in fields.items():
            if record[part].get(name) != json.loads(json.dumps(value)):
                raise CheckpointError(
                    f"resume: {file}: expected {part} {name} = {record[part].get(name)!r}, found {value!r}. "
                    "Continue with the same configuration and rows, or train into another folder"
                )
    return opened.tensors, record
