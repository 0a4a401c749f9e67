"""Scores of nodes and edges by gradients, and by patching them one at a time.

``nodes`` heads and neurons, ``edges`` between them, ``features`` the heads that drive one · ``exact`` patching · ``audit``
how far scores can be trusted · ``blocks`` of pairs, for intervals. What runs ``nodes``: ``settings``, the ``plan`` within a
memory budget, its ``passes`` over batches, the ``path`` of embeddings, ``gradients`` on it, ``streaming`` to disk.
"""

from microtome.circuits.attribution.nodes import attribute
from microtome.circuits.attribution.settings import METHODS

__all__ = ["METHODS", "attribute"]
