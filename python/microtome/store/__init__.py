"""Reading what a capture wrote: stores, activations, row and sample tables, sparse codes.

What is committed never changes: readers and one writer work side by side. Files are opened when first
touched, and checked block by block. Every shard is a safetensors file. ``rust/core/store/FORMAT.md`` has the
format.
"""

from microtome.store.activations import Activations
from microtome.store.codes import StoredCodes, StoredRaggedCodes
from microtome.store.codes_writer import CodesWriter
from microtome.store.reading import ActivationStore

__all__ = ["ActivationStore", "Activations", "CodesWriter", "StoredCodes", "StoredRaggedCodes"]
