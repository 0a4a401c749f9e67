"""Types of the compiled core. Private: the public names are those of :mod:`microtome`."""

from collections.abc import Callable, Sequence
from collections.abc import Callable, Sequence
from typing import Any, TypeAlias, final

import numpy as np
import numpy.typing as npt

from microtome.tensors import CoreInput

__version__: str
BUILD_PROFILE: str

# --- run.rs ---------------------------------------------------------------------------------------------------------

def set_num_threads(n: int) -> None: ...
def num_threads() -> int: ...

# --- store.rs -------------------------------------------------------------------------------------------------------

@final
class StoreWriter:
    def __new__(
        cls,
        path: str,
        *,
        hooks: Sequence[tuple[str, int, str]],
        dtype: str,
        facts: str,
        nonfinite: str = "error",
    ) -> StoreWriter: ...
    @property
    def path(self) -> str: ...
    @property
    def steps(self) -> int: ...
    @property
    def n_rows(self) -> dict[str, int]: ...
    def append(self, space: str, rows: dict[str, npt.NDArray[Any]], arrays: dict[str, CoreInput]) -> None: ...
    def commit(self, samples_parquet: bytes) -> None: ...
    def discard(self) -> None: ...
    def close(self) -> None: ...
    def __enter__(self) -> StoreWriter: ...
    def __exit__(self, *_exception: object) -> None: ...

# --- encode.rs ------------------------------------------------------------------------------------------------------

def decode(
    indptr: npt.NDArray[np.int64],
    indices: npt.NDArray[np.uint32],
    values: npt.NDArray[np.float32],
    w_dec: CoreInput,
    b_dec: npt.NDArray[np.float32] | None,
) -> npt.NDArray[np.float32]: ...

# --- features.rs ----------------------------------------------------------------------------------------------------

# (slots per row or row pointers, indices, values, d_sae)
_Codes: TypeAlias = tuple[int | npt.NDArray[np.uint64], npt.NDArray[np.uint32], npt.NDArray[np.float32], int]
_Groups: TypeAlias = tuple[npt.NDArray[np.uint32], int] | None
_Progress: TypeAlias = Callable[[int], None] | None

def feature_moments(
    codes: _Codes, by: _Groups = None, progress: _Progress = None
) -> tuple[npt.NDArray[np.uint64], npt.NDArray[np.float64], npt.NDArray[np.float64], npt.NDArray[np.float32]]: ...
def sample_fires(
    codes: _Codes, order: npt.NDArray[np.uint64], starts: npt.NDArray[np.uint64]
) -> npt.NDArray[np.uint64]: ...
def top_samples(
    codes: _Codes,
    samples: npt.NDArray[np.uint64],
    positions: npt.NDArray[np.uint32],
    n: int,
    per_sample: bool,
    features: npt.NDArray[np.uint32] | None = None,
    by: _Groups = None,
    progress: _Progress = None,
) -> tuple[
    npt.NDArray[np.uint32],
    npt.NDArray[np.uint32],
    npt.NDArray[np.uint32],
    npt.NDArray[np.uint64],
    npt.NDArray[np.uint32],
    npt.NDArray[np.float32],
]: ...
def fvu(x: Any, x_hat: Any, progress: _Progress = None) -> tuple[float, float]: ...
def fvu_codes(
    x: Any, codes: _Codes, w_dec: Any, b_dec: npt.NDArray[np.float32] | None = None, progress: _Progress = None
) -> tuple[float, float]: ...

# --- cka.rs ---------------------------------------------------------------------------------------------------------

def cka_matrix(
    xs: list[tuple[str, Any]],
    ys: list[tuple[str, Any]] | None,
    debiased: bool,
    memory_budget: int,
    progress: Callable[[int], None] | None,
) -> tuple[npt.NDArray[np.float64], list[int]]: ...

# --- similarity.rs --------------------------------------------------------------------------------------------------

# --- circuit.rs -----------------------------------------------------------------------------------------------------
