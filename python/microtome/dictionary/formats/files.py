"""Weights and configurations as they lie on disk. Nothing here runs code from a file."""

from __future__ import annotations

import json
import tokenize
import zipfile
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from microtome.errors import CheckpointError, UnsafeCheckpointError, first_line
from microtome.whole import write_whole

__all__ = ["Checkpoint", "checkpoints", "write_json", "write_npz", "write_pickle", "write_safetensors"]

PROBE_FILE = "probe.safetensors"

_WEIGHTS = (".safetensors", ".npz", ".pt", ".pth", ".bin", ".pkl")
_LARGEST_CONFIG = 16 << 20
_LARGEST_RATIO = 100
_NPZ_ERRORS = (  # of NumPy's header, of a compressed stream, of an archive with a password or another method
    ValueError,
    TypeError,
    SyntaxError,
    KeyError,
    EOFError,
    OSError,
    MemoryError,
    OverflowError,
    RuntimeError,
    zipfile.BadZipFile,
    zlib.error,
    tokenize.TokenError,
)


@dataclass(frozen=True)
class Checkpoint:
    """One weights file and the configurations beside it."""

    path: Path
    configs: dict[str, dict[str, Any]]
    """JSON objects of the same folder and the one above, by file name."""

    @cached_property
    def contents(self) -> tuple[dict[str, Any], dict[str, str]]:
        """What the file holds by name, and the metadata of a safetensors header."""
        head = _head(self.path)
        if _opens_safetensors(head):  # before pickles: the length of a header may begin with their first byte
            return _safetensors(self.path)
        if head[:2] == b"PK" and _is_npz(self.path):
            return _npz(self.path), {}
        if head[:2] == b"PK" or head[:1] == b"\x80":
            return _torch_file(self.path), {}
        return _safetensors(self.path)

    def release(self) -> None:
        """Let go of the contents; they are read again when they are asked for."""
        self.__dict__.pop("contents", None)

    @property
    def tensors(self) -> dict[str, Tensor]:
        """The tensors by name."""
        return {name: value for name, value in self.contents[0].items() if isinstance(value, Tensor)}

    @property
    def metadata(self) -> dict[str, str]:
        """The ``__metadata__`` of a safetensors file."""
        return self.contents[1]

    def config(self, *keys: str) -> dict[str, Any] | None:
        """The nearest configuration that has all of ``keys``; None when there is none."""
        return next((c for c in self.configs.values() if all(key in c for key in keys)), None)

    def tensor(self, *names: str) -> Tensor:
        """The first tensor there is of ``names``.

        Raises:
            CheckpointError: none of them; the message lists what is there.
        """
        for name in names:
            if name in self.tensors:
                return self.tensors[name]
        raise CheckpointError(
            f"missing tensor: {self.path}: expected {' or '.join(names)}, "
            f"found {', '.join(sorted(self.tensors)) or 'none'}"
        )

    def has(self, *names: str) -> bool:
        """Whether all of ``names`` are among the tensors."""
        return all(name in self.tensors for name in names)


def checkpoints(path: Path) -> Iterator[Checkpoint]:
    """The weights files of a folder (or its ``checkpoints/``), or the one file that ``path`` is.

    Raises:
        FileNotFoundError: nothing at ``path``.
        CheckpointError: a folder without weights.
    """
    if not path.exists():
        raise FileNotFoundError(2, "no dictionary here", str(path))
    if path.is_file():
        yield Checkpoint(path, _configs(path.parent))
        return
    for folder in (path, path / "checkpoints"):
        files = sorted(
            p for p in folder.glob("*") if p.suffix in _WEIGHTS and p.is_file() and p.name != PROBE_FILE
        )
        for file in files:
            yield Checkpoint(file, _configs(folder))
        if files:
            return
    inside = sorted(folder.name for folder in path.iterdir() if folder.is_dir())
    found = f"the folders {', '.join(inside[:8])}. Pass one of them" if inside else "none"
    raise CheckpointError(
        f"no weights in {path}: expected a file ending in {', '.join(_WEIGHTS)}, found {found}"
    )


def _configs(folder: Path) -> dict[str, dict[str, Any]]:
    found: dict[str, dict[str, Any]] = {}
    for place in (folder, folder.parent):
        for file in sorted(place.glob("*.json")):
            if file.name in found or not file.is_file() or file.stat().st_size > _LARGEST_CONFIG:
                continue
            try:
                content = json.loads(file.read_text(encoding="utf-8"))
            except (ValueError, RecursionError):
                continue  # another tool's file; a format that needs its configuration says that it is missing
            if isinstance(content, dict):
                found[file.name] = content
    return found


def _opens_safetensors(head: bytes) -> bool:
    """Whether a file begins with the length of a header (at most 100 MB) and the header's brace."""
    return head[8:9] == b"{" and int.from_bytes(head[:8], "little") <= 100_000_000


def _head(path: Path) -> bytes:
    with path.open("rb") as file:
        return file.read(9)


def _is_npz(path: Path) -> bool:
    try:
        with zipfile.ZipFile(path) as archive:
            return all(name.endswith(".npy") for name in archive.namelist())
    except zipfile.BadZipFile:
        return False


def _npz(path: Path) -> dict[str, Any]:
    _refuse_bomb(path)
    try:
        with np.load(path, allow_pickle=False) as arrays:
            return {name: torch.from_numpy(np.ascontiguousarray(arrays[name])) for name in arrays.files}
    except _NPZ_ERRORS as error:
        raise UnsafeCheckpointError(
            f"{path}: expected arrays of numbers, found a pickle or damage ({first_line(error):.160}). "
            "Convert it to safetensors"
        ) from error


def _refuse_bomb(path: Path) -> None:
    """Weights hardly compress; an archive that declares far more than it holds would fill memory when it is read."""
    with zipfile.ZipFile(path) as archive:
        declared = sum(entry.file_size for entry in archive.infolist())
    held = path.stat().st_size
    if declared > _LARGEST_RATIO * held + _LARGEST_CONFIG:
        raise UnsafeCheckpointError(
            f"{path}: expected weights, found an archive of {held} bytes that unpacks to {declared}"
        )


def _torch_file(path: Path) -> dict[str, Any]:
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch raises an unpickling error, which has no other name here
        raise UnsafeCheckpointError(
            f"{path} is a pickle: expected tensors alone, found {first_line(error):.160}. Convert it to safetensors"
        ) from error
    if not isinstance(content, dict):
        raise CheckpointError(f"{path}: expected tensors by name, found {type(content).__name__}")
    return content


def _safetensors(path: Path) -> tuple[dict[str, Any], dict[str, str]]:
    try:
        with safe_open(path, framework="pt", device="cpu") as file:
            names = file.keys()
            return {name: file.get_tensor(name) for name in names}, dict(file.metadata() or {})
    except (SafetensorError, ValueError) as error:
        raise CheckpointError(
            f"damaged or unknown weights: {path}: expected safetensors, npz or a torch file, "
            f"found {first_line(error):.160}"
        ) from error


def write_safetensors(path: Path, tensors: dict[str, Tensor], metadata: dict[str, str] | None = None) -> Path:
    """Write tensors with their own memory each, in one rename."""
    owned = {name: tensor.detach().cpu().contiguous().clone() for name, tensor in tensors.items()}
    return write_whole(path, lambda beside: save_file(owned, beside, metadata))


def write_pickle(path: Path, content: dict[str, Any]) -> Path:
    """Write a torch file of tensors and plain values, as the weights-only loader accepts it."""
    owned = {
        k: v.detach().cpu().clone(memory_format=torch.contiguous_format) if isinstance(v, Tensor) else v
        for k, v in content.items()
    }
    return write_whole(path, lambda beside: torch.save(owned, beside))


def write_npz(path: Path, tensors: dict[str, Tensor]) -> Path:
    """Write tensors as a NumPy archive."""

    def write(beside: Path) -> None:
        with beside.open("wb") as file:
            np.savez(file, **{name: tensor.detach().cpu().numpy() for name, tensor in tensors.items()})

    return write_whole(path, write)


def write_json(path: Path, content: dict[str, Any]) -> Path:
    """Write a configuration, indented, in one rename."""
    return write_whole(
        path, lambda beside: beside.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    )
