"""Types of the compiled core. Private: the public names are those of :mod:`microtome`."""

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

FAILPOINTS: bool

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

@final
class CodesWriter:
    def __new__(cls, path: str, *, hook: str, k: int | None, facts: str) -> CodesWriter: ...
    @property
    def n_rows(self) -> int: ...
    def append(
        self,
        rows: npt.NDArray[np.uint64],
        indices: npt.NDArray[np.uint32],
        values: npt.NDArray[np.float32],
    ) -> None: ...
    def append_ragged(
        self,
        rows: npt.NDArray[np.uint64],
        fires: npt.NDArray[np.uint32],
        indices: npt.NDArray[np.uint32],
        values: npt.NDArray[np.float32],
    ) -> None: ...
    def commit(self) -> None: ...
    def close(self) -> None: ...

@final
class StoreReader:
    def __new__(cls, path: str, verify: str = "first", backend: str = "mmap") -> StoreReader: ...
    @property
    def path(self) -> str: ...
    @property
    def backend(self) -> str: ...
    @property
    def fingerprint(self) -> str: ...
    @property
    def facts(self) -> str: ...
    @property
    def hooks(self) -> list[tuple[str, str, list[tuple[str, str, int | None]]]]: ...
    @property
    def spaces(self) -> list[tuple[str, str, list[tuple[str, str, int | None]]]]: ...
    @property
    def steps(self) -> list[dict[str, int]]: ...
    @property
    def n_files(self) -> int: ...
    def hook(self, name: str, column: str = "x") -> Selection: ...
    def row_column(self, space: str, column: str) -> Selection: ...
    def samples(self, step: int) -> bytes: ...
    def verify(self, progress: Callable[[int], object] | None = None) -> list[str]: ...

@final
class Selection:
    def __len__(self) -> int: ...
    @property
    def width(self) -> int | None: ...
    @property
    def dtype(self) -> str: ...
    @property
    def is_all(self) -> bool: ...
    def indices(self) -> npt.NDArray[np.uint64]: ...
    def slice(self, start: int, stop: int) -> Selection: ...
    def take(self, places: npt.NDArray[np.uint64]) -> Selection: ...
    def damaged_rows(self) -> list[tuple[int, int]]: ...
    def will_need(self, start: int, stop: int) -> None: ...
    def read(self, start: int, stop: int) -> npt.NDArray[Any] | Block: ...

@final
class Block:
    @property
    def __array_interface__(self) -> dict[str, Any]: ...

def word_sum(x: Any, progress: Callable[[int], object] | None = None) -> int: ...

# --- provoke.rs -----------------------------------------------------------------------------------------------------

def provoke_panic(place: str) -> None: ...

# --- encode.rs ------------------------------------------------------------------------------------------------------

@final
class Encoder:
    def __new__(
        cls,
        w_enc: CoreInput,
        b_enc: npt.NDArray[np.float32] | None,
        b_dec: npt.NDArray[np.float32] | None,
        norms: npt.NDArray[np.float32] | None,
        threshold: npt.NDArray[np.float32] | None,
        activation: str,
        k: int,
        certificate: str,
    ) -> Encoder: ...
    @property
    def d_in(self) -> int: ...
    @property
    def d_sae(self) -> int: ...
    @property
    def path(self) -> tuple[str, str]: ...
    def encode(
        self, x: Any, progress: Callable[[int], object] | None
    ) -> tuple[tuple[npt.NDArray[Any], ...], tuple[int, int, int, int], tuple[float, float, float]]: ...

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
_Progress: TypeAlias = Callable[[int], None] | None

FVU_BLOCK_ROWS: int

@final
class FiringState:
    def __new__(cls, d_sae: int, n_groups: int, n_rows: int) -> FiringState: ...
    def update(
        self, codes: _Codes, groups: npt.NDArray[np.uint32] | None = None, progress: _Progress = None
    ) -> None: ...
    def finish(
        self,
    ) -> tuple[
        npt.NDArray[np.uint64], npt.NDArray[np.float64], npt.NDArray[np.float64], npt.NDArray[np.float32]
    ]: ...

@final
class TopState:
    def __new__(
        cls,
        d_sae: int,
        n_groups: int,
        n: int,
        per_sample: bool,
        features: npt.NDArray[np.uint32] | None = None,
    ) -> TopState: ...
    def update(
        self,
        codes: _Codes,
        samples: npt.NDArray[np.uint64],
        positions: npt.NDArray[np.uint32],
        groups: npt.NDArray[np.uint32] | None = None,
        progress: _Progress = None,
    ) -> None: ...
    def finish(
        self,
    ) -> tuple[
        npt.NDArray[np.uint32],
        npt.NDArray[np.uint32],
        npt.NDArray[np.uint32],
        npt.NDArray[np.uint64],
        npt.NDArray[np.uint32],
        npt.NDArray[np.float32],
    ]: ...

@final
class FvuState:
    def __new__(cls) -> FvuState: ...
    def update(self, x: Any, x_hat: Any, progress: _Progress = None) -> None: ...
    def update_codes(
        self,
        x: Any,
        codes: _Codes,
        w_dec: CoreInput,
        b_dec: npt.NDArray[np.float32] | None = None,
        progress: _Progress = None,
    ) -> None: ...
    def finish(self) -> tuple[float, float]: ...

def frequency_gap(
    spatial: _Codes,
    spatial_clusters: tuple[npt.NDArray[np.uint32], int],
    base: _Codes,
    base_clusters: tuple[npt.NDArray[np.uint32], int],
    replicates: int,
    level: float,
    seed: int,
    shared: bool,
) -> tuple[
    npt.NDArray[np.float64], npt.NDArray[np.float64], npt.NDArray[np.float64], npt.NDArray[np.float64]
]: ...
def sample_fires(
    codes: _Codes, order: npt.NDArray[np.uint64], starts: npt.NDArray[np.uint64]
) -> npt.NDArray[np.uint64]: ...

# --- cka.rs ---------------------------------------------------------------------------------------------------------

def cka_matrix(
    xs: list[tuple[str, Any]],
    ys: list[tuple[str, Any]] | None,
    debiased: bool,
    memory_budget: int,
    progress: Callable[[int], None] | None,
) -> tuple[npt.NDArray[np.float64], list[int]]: ...
def minibatch_cka(
    xs: list[tuple[str, Any]],
    ys: list[tuple[str, Any]] | None,
    batch: int,
    memory_budget: int,
    progress: Callable[[int], None] | None,
) -> tuple[npt.NDArray[np.float64], list[int]]: ...
def rbf_cka(
    x: tuple[str, Any], y: tuple[str, Any], fraction: float, debiased: bool, memory_budget: int
) -> tuple[npt.NDArray[np.float64], list[int]]: ...
def cka_halves(
    x: tuple[str, Any],
    y: tuple[str, Any],
    n_resamples: int,
    seed: int,
    groups: npt.NDArray[np.uint32] | None,
    memory_budget: int,
) -> tuple[float, npt.NDArray[np.float64], float]: ...

# --- similarity.rs --------------------------------------------------------------------------------------------------

def row_cosines(a: CoreInput, b: CoreInput, names: tuple[str, str]) -> npt.NDArray[np.float64]: ...
def match_rows(
    a: CoreInput, b: CoreInput, k: int, names: tuple[str, str], memory_budget: int
) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.float64], list[int], list[int]]: ...

# --- circuit.rs -----------------------------------------------------------------------------------------------------

def bitset_size(words: npt.NDArray[np.uint64]) -> int: ...
def bitset_overlap(a: npt.NDArray[np.uint64], b: npt.NDArray[np.uint64]) -> tuple[int, int]: ...
def bitset_from_indices(indices: npt.NDArray[np.int64], n: int) -> npt.NDArray[np.uint64]: ...
def bitset_to_indices(words: npt.NDArray[np.uint64]) -> npt.NDArray[np.int64]: ...
def top_n(scores: npt.NDArray[np.float32], n: int) -> npt.NDArray[np.int64]: ...
def iou_chance(
    strata: list[tuple[int, int, int]], intersection: int | None
) -> tuple[float, float, float]: ...
def inclusion_rate(n: int, size: int, positions: int) -> float: ...
