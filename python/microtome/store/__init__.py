"""Reading what a capture wrote: stores, activations, row and sample tables, sparse codes.

A store is read-only and immutable where it is committed: readers and one writer work side by side. Files are opened when
first touched and checked block by block. The format is described in ``rust/core/store/FORMAT.md``; every shard is a
safetensors file.
"""

from microtome.store.activations import Activations
from microtome.store.codes import CodesWriter, StoredCodes
from microtome.store.reading import ActivationStore

__all__ = ["ActivationStore", "Activations", "CodesWriter", "StoredCodes"]
