"""Reading what a capture wrote: stores, activations, row and sample tables, sparse codes.

What is committed never changes: readers and one writer work side by side. Files are opened when first
touched, and checked block by block. ``rust/core/store/FORMAT.md`` is the format; every shard is a safetensors file.
"""

from microtome.store.activations import Activations
from microtome.store.codes import CodesWriter, StoredCodes
from microtome.store.reading import ActivationStore

__all__ = ["ActivationStore", "Activations", "CodesWriter", "StoredCodes"]
