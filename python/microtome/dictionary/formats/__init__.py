"""Every format a dictionary comes in: told by keys, read with its own recipe, written back.

One file per source. Each has a ``NAME``, says by :func:`matches` whether a checkpoint is its own, makes a
dictionary of it (:func:`read`) and writes one (:func:`write`). What a source leaves unsaid is asked for,
never guessed.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Protocol, cast

from microtome.dictionary.formats import (
    circuit_tracer,
    dictionary_learning,
    gemma_scope,
    gemma_scope_2,
    goodfire,
    llama_scope,
    llamascopium,
    own,
    qwen_scope,
    saelens,
    sparsify,
)
from microtome.dictionary.formats.files import PROBE_FILE, Checkpoint, checkpoints, write_safetensors
from microtome.dictionary.parameters import Parameters
from microtome.errors import CheckpointError, Error, UnsafeCheckpointError, first_line

__all__ = ["FORMATS", "detect", "load", "save"]


class Format(Protocol):
    """One source's way to keep a dictionary."""

    NAME: str

    def matches(self, checkpoint: Checkpoint) -> bool:
        """Whether keys and shapes are this source's."""

    def read(self, checkpoint: Checkpoint, k: int | None) -> Parameters:
        """The dictionary in this checkpoint."""

    def write(self, sae: Parameters, path: Path) -> Path:
        """Write ``sae`` into the folder ``path``; the weights file."""


FORMATS: dict[str, Format] = {
    module.NAME: cast("Format", module)
    for module in (
        own,
        saelens,
        sparsify,
        dictionary_learning,
        llama_scope,
        llamascopium,
        gemma_scope,
        gemma_scope_2,
        qwen_scope,
        goodfire,
        circuit_tracer,
    )
}


def detect(checkpoint: Checkpoint) -> str | None:
    """The name of the format whose keys these are, or None.

    Raises:
        CheckpointError: the keys fit two formats.
    """
    fitting = [name for name, form in FORMATS.items() if form.matches(checkpoint)]
    if len(fitting) > 1:
        raise CheckpointError(
            f"ambiguous dictionary: {checkpoint.path}: expected the keys of one format, found those of "
            f"{' and '.join(fitting)}. Pass format="
        )
    return fitting[0] if fitting else None


def load(path: Path, format_name: str | None, k: int | None) -> Parameters:
    """See :meth:`microtome.SAE.load_from_disk`."""
    if format_name is not None and format_name not in FORMATS:
        raise CheckpointError(f"format: expected one of {', '.join(FORMATS)}, found {format_name!r}")
    found = list(checkpoints(path))
    told = _told(found)
    fitting = [(c, name) for c, name in told if name is not None and format_name in (None, name)]
    if len(fitting) > 1:
        raise CheckpointError(
            f"several dictionaries: {path}: expected one, found "
            f"{', '.join(c.path.name for c, _ in fitting)}. "
            "Pass the path of one file"
        )
    if fitting:
        checkpoint, name = fitting[0]
    elif format_name is not None and len(found) == 1 and told[0][1] is None:
        checkpoint, name = found[0], format_name
    else:
        raise CheckpointError(_unknown(path, told, format_name))
    with _readable(checkpoint.path, name):
        sae = FORMATS[name].read(checkpoint, k)
        _attach_probe(sae, checkpoint.path.parent / PROBE_FILE)
    return sae


def _told(found: list[Checkpoint]) -> list[tuple[Checkpoint, str | None]]:
    """The format of each file, or None; of several files one is held at a time.

    Another tool's pickle beside a dictionary is passed over.

    Raises:
        UnsafeCheckpointError: a pickle, and no dictionary beside it.
    """
    told, refused = list[tuple[Checkpoint, str | None]](), None
    for checkpoint in found:
        try:
            with _readable(checkpoint.path, "a dictionary"):
                told.append((checkpoint, detect(checkpoint)))
        except UnsafeCheckpointError as error:
            refused = refused or error
        if len(found) > 1:
            checkpoint.release()
    if refused is not None and not any(name for _, name in told):
        raise refused
    return told


@contextmanager
def _readable(path: Path, name: str) -> Iterator[None]:
    """What a reader stumbles over in a file of other contents, as one line that names the file."""
    try:
        yield
    except Error:
        raise
    except (LookupError, TypeError, ValueError, AttributeError, ArithmeticError, RuntimeError) as error:
        raise CheckpointError(
            f"contents: {path}: expected those of {name}, found {type(error).__name__}: {first_line(error):.120}"
        ) from error


def save(sae: Parameters, path: Path, format_name: str) -> Path:
    """See :meth:`microtome.SAE.save_to_disk`."""
    if format_name not in FORMATS:
        raise CheckpointError(f"format: expected one of {', '.join(FORMATS)}, found {format_name!r}")
    if path.is_file():
        raise CheckpointError(f"save_to_disk: {path}: expected a folder, found a file")
    written = FORMATS[format_name].write(sae, path)
    probe = written.parent / PROBE_FILE
    if sae.probe is not None and format_name != own.NAME:
        write_safetensors(probe, {"probe": sae.probe}, {"targets": json.dumps(sae.probe_targets)})
    else:
        probe.unlink(missing_ok=True)
    return written


def _attach_probe(sae: Parameters, file: Path) -> None:
    if sae.probe is None and file.is_file():
        (content, metadata) = Checkpoint(file, {}).contents
        sae.probe = content["probe"].float()
        sae.probe_targets = {name: float(value) for name, value in json.loads(metadata["targets"]).items()}


def _unknown(path: Path, told: list[tuple[Checkpoint, str | None]], wanted: str | None) -> str:
    checkpoint, name = told[0]
    if wanted is not None and name is not None:
        return f"format: {checkpoint.path}: expected {wanted}, found {name}"
    keys = ", ".join(sorted(checkpoint.contents[0])[:12]) or "none"
    configs = ", ".join(checkpoint.configs) or "no configuration"
    return (
        f"unknown dictionary format: {path}: expected the keys of one of {', '.join(FORMATS)}, found "
        f"{keys} beside {configs}. "
        "Pass format= or build mt.SAE(...) with the recipe stated"
    )
