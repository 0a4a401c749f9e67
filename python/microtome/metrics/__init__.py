"""One function per metric: thin, typed entrances to the compiled core. The arithmetic is in Rust."""

from microtome.metrics.cka import cka_matrix, linear_cka
from microtome.metrics.codes import RaggedCodes, SparseCodes

__all__ = ["RaggedCodes", "SparseCodes", "cka_matrix", "linear_cka"]
