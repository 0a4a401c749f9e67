"""What made a result: fingerprints of weights and of pairs, exact and the same on every device and thread count."""

from __future__ import annotations

import hashlib
from typing import Any

import numpy as np
import torch

from microtome.circuits.pairs.pair_set import PairSet

__all__ = ["pairs_fingerprint", "weights_fingerprint"]

_WORDS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def weights_fingerprint(model: Any) -> str:
    """16 hexadecimal digits of every tensor of a state dict: its name, its shape, its bits summed by row and by column.

    Sums of bit patterns as integers do not depend on their order, so one changed element, two exchanged rows or
    another dtype change the fingerprint, and nothing is copied but the sums.

    Example:
        >>> layer = torch.nn.Linear(2, 2)
        >>> before = weights_fingerprint(layer)
        >>> with torch.no_grad():
        ...     _ = layer.weight[1, 1].add_(1)
        >>> weights_fingerprint(layer) == before
        False
    """
    digest = hashlib.blake2b(digest_size=8)
    for name, values in model.state_dict().items():
        if not torch.is_tensor(values):
            continue
        digest.update(f"{name} {values.dtype} {tuple(values.shape)};".encode())
        for sums in _bit_sums(values.detach()):
            digest.update(sums.cpu().numpy().tobytes())
    return digest.hexdigest()


def _bit_sums(values: torch.Tensor) -> tuple[torch.Tensor, ...]:
    if values.dtype == torch.bool:
        values = values.byte()
    bits = values.contiguous().view(_WORDS[values.element_size()])
    table = bits.reshape(len(bits), -1) if bits.ndim > 1 else bits.reshape(1, -1)  # (rows, columns)
    return tuple(table.sum(axis, dtype=torch.int64) for axis in (0, 1))


def pairs_fingerprint(pairs: PairSet) -> str:
    """16 hexadecimal digits of every tensor, answer, span and partner of the pairs, in their order."""
    digest = hashlib.blake2b(pairs.align.encode(), digest_size=8)
    for pair in pairs:
        for side in (pair.clean, pair.corrupted):
            for name, x in sorted(side.items()):
                digest.update(f"{name} {x.dtype} {tuple(x.shape)};".encode())
                digest.update(x.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
        spans = {group: np.asarray(positions).tolist() for group, positions in sorted(pair.spans.items())}
        digest.update(f"{spans} {np.asarray(pair.partner).tolist()} {pair.kinds}".encode())
        digest.update(f"{pair.answer} {pair.corrupted_answer};".encode())
    return digest.hexdigest()
