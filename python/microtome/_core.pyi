"""Types of the compiled core. Private: the public names are those of :mod:`microtome`."""

import numpy as np
import numpy.typing as npt

from microtome.tensors import CoreInput

__version__: str
BUILD_PROFILE: str

# --- run.rs ---------------------------------------------------------------------------------------------------------

def set_num_threads(n: int) -> None: ...
def num_threads() -> int: ...

# --- store.rs -------------------------------------------------------------------------------------------------------

# --- encode.rs ------------------------------------------------------------------------------------------------------

def decode(
    indptr: npt.NDArray[np.int64],
    indices: npt.NDArray[np.uint32],
    values: npt.NDArray[np.float32],
    w_dec: CoreInput,
    b_dec: npt.NDArray[np.float32] | None,
) -> npt.NDArray[np.float32]: ...

# --- features.rs ----------------------------------------------------------------------------------------------------

# --- cka.rs ---------------------------------------------------------------------------------------------------------

# --- similarity.rs --------------------------------------------------------------------------------------------------

# --- circuit.rs -----------------------------------------------------------------------------------------------------
