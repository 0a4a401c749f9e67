"""Directions of the residual stream as people hold them: arrays, parameters, tensors of any dtype and device."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from microtome.errors import NonFiniteError

__all__ = ["finite_direction"]


def finite_direction(name: str, values: Any) -> Tensor:
    """``values`` in float64 on the CPU, cut off from any graph.

    Raises:
        NonFiniteError: one of them is NaN or infinite.
    """
    if isinstance(values, list | tuple) and any(torch.is_tensor(x) for x in values):
        values = torch.stack([torch.as_tensor(x) for x in values])
    found = values if torch.is_tensor(values) else torch.as_tensor(np.asarray(values))
    found = found.detach().to("cpu", torch.float64)
    bad = int((~torch.isfinite(found)).sum())
    if bad:
        raise NonFiniteError(f"{name}: expected finite numbers, found {bad} of {found.numel()} that are not")
    return found
