"""Tensors and arrays on their way to the core and back, without a copy where memory allows.

bf16 has no NumPy type: it crosses as ``("bfloat16", uint16 array)``, the same words under another name.
"""

from __future__ import annotations

import importlib
import sys
import warnings
from collections.abc import Iterable
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt

from microtome.errors import DtypeError, MissingExtraError, ShapeError

__all__ = [
    "CoreInput",
    "array",
    "core_matrix",
    "core_source",
    "core_vector",
    "extra",
    "is_tensor",
    "memory",
    "refuse_shifted_rows",
    "source_rows",
    "to_tensor",
]

CoreInput: TypeAlias = npt.NDArray[Any] | tuple[str, npt.NDArray[np.uint16]]
"""A matrix as the core takes it: float32 or float16, or bf16 words with their tag."""

_FLOATS = "float32, float16 or bfloat16"


def extra(package: str, name: str) -> Any:
    """Import ``package``, or say that it comes with the extra called ``name``."""
    try:
        return importlib.import_module(package)
    except ImportError as error:
        raise MissingExtraError(
            f"{package} is not installed. Install it with: pip install 'microtome[{name}]'"
        ) from error


def is_tensor(x: object) -> bool:
    """Whether ``x`` is a torch tensor, without importing torch."""
    torch = sys.modules.get("torch")
    return torch is not None and isinstance(x, torch.Tensor)


def core_matrix(x: Any, name: str) -> CoreInput:
    """``x`` as a C-contiguous matrix for the core; no copy when it is one already.

    Args:
        x: array or tensor (any device) of float32, float16 or bfloat16, two-dimensional.
        name: the argument's name in messages.

    Raises:
        DtypeError: another element type.
        ShapeError: not two-dimensional.
    """
    words = array(x, name)
    shape = memory(words).shape
    if len(shape) != 2:
        raise ShapeError(f"{name}: expected a matrix (n, d), found shape {shape}")
    return words


def memory(words: Any) -> Any:
    """The array of a :data:`CoreInput`, for its shape: numbers, or words of bf16. What is no such pair is itself."""
    return words[1] if isinstance(words, tuple) else words


def core_source(x: Any, name: str) -> Any:
    """``x`` as something the core can scan: activations of a store as they are, all else as :func:`core_matrix`."""
    return x if hasattr(x, "_selection") else core_matrix(x, name)


def refuse_shifted_rows(sources: Iterable[tuple[str, Any]]) -> None:
    """Hold hooks of one store to the same rows, each given with its argument's name.

    Where other rows of each are skipped for damage, row ``i`` of one no longer belongs to row ``i`` of the other.

    Raises:
        ShapeError: two hooks that skip other rows and do not have the same ones.
    """
    firsts: dict[tuple[str, str], tuple[str, Any]] = {}
    for name, x in sources:
        if not hasattr(x, "skipped"):
            continue
        first_name, first = firsts.setdefault((x.store.fingerprint, x.space), (name, x))
        if np.array_equal(x.skipped, first.skipped) or np.array_equal(x.row_numbers, first.row_numbers):
            continue
        raise ShapeError(
            f"{name}: expected the rows of {first_name}, found others: {len(first.skipped)} rows of {first.hook} and "
            f"{len(x.skipped)} of {x.hook} are skipped. Give the rows that both have, from either as "
            "x.take(np.isin(x.row_numbers, y.row_numbers))"
        )


def source_rows(x: Any, span: slice) -> Any:
    """The rows ``span`` of ``x``; those of a store as :data:`CoreInput` unless torch is loaded already.

    Importing torch takes seconds and half a gigabyte, and the core does without.
    """
    if not hasattr(x, "_selection") or "torch" in sys.modules:
        return x[span]
    selection = x._selection
    words = np.asarray(selection.read(span.start, span.stop))
    return ("bfloat16", words) if selection.dtype == "bfloat16" else words


def core_vector(x: Any, name: str, length: int | None = None) -> npt.NDArray[np.float32]:
    """``x`` as a contiguous float32 vector, of ``length`` where one is given."""
    words = array(x, name)
    if isinstance(words, tuple):
        values = (words[1].astype(np.uint32) << 16).view(np.float32)
    else:
        values = np.ascontiguousarray(words, np.float32)
    if values.ndim != 1 or (length is not None and len(values) != length):
        wanted = "a vector" if length is None else f"shape ({length},)"
        raise ShapeError(f"{name}: expected {wanted}, found shape {values.shape}")
    return values


def array(x: Any, name: str) -> CoreInput:
    """``x`` as contiguous float32 or float16 memory, or as tagged bf16 words, of any rank."""
    if is_tensor(x):
        return _tensor_words(x, name)
    if isinstance(x, tuple) and len(x) == 2 and isinstance(x[0], str):
        if x[0] != "bfloat16" or x[1].dtype != np.uint16:
            raise DtypeError(f"{name}: expected ('bfloat16', uint16 words), found {x[0]!r} with {x[1].dtype}")
        return "bfloat16", np.ascontiguousarray(x[1])
    values = np.asarray(x)
    if values.dtype.name == "bfloat16":  # ml_dtypes
        return "bfloat16", np.ascontiguousarray(values).view(np.uint16)
    if values.dtype not in (np.float32, np.float16):
        raise DtypeError(
            f"{name}: expected {_FLOATS}, found {values.dtype}. Cast it, e.g. .astype('float32')"
        )
    return np.ascontiguousarray(values)


def _tensor_words(x: Any, name: str) -> CoreInput:
    import torch

    if x.dtype not in (torch.float32, torch.float16, torch.bfloat16):
        raise DtypeError(f"{name}: expected {_FLOATS}, found {x.dtype}. Cast it, e.g. .float()")
    values = x.detach().cpu().contiguous()
    if x.dtype == torch.bfloat16:
        return "bfloat16", values.view(torch.uint16).numpy()
    return values.numpy()  # type: ignore[no-any-return]


def to_tensor(values: npt.NDArray[Any], dtype: str) -> Any:
    """Memory of the core as a torch tensor of ``dtype``, without a copy; NumPy itself when torch is missing.

    Memory of a store is private, a copy or a map that is copied where somebody writes: writing changes the tensor alone.
    """
    try:
        import torch
    except ImportError:
        return values
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # torch has no read-only tensors and says so once
        tensor = torch.from_numpy(values)
    return tensor.view(torch.bfloat16) if dtype == "bfloat16" else tensor
