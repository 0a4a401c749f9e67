"""A dictionary as a torch module, for whoever trains it or puts it into a model."""

from __future__ import annotations

import torch
from torch import Tensor

from microtome.dictionary import forward as formulas
from microtome.dictionary.parameters import Parameters

__all__ = ["SAEModule"]


class SAEModule(torch.nn.Module):  # type: ignore[misc]  # torch is untyped here
    """A dictionary as a torch module; its parameters are the dictionary's own tensors."""

    def __init__(self, sae: Parameters) -> None:
        super().__init__()
        self.recipe = sae.recipe
        self.tensors = torch.nn.ParameterDict(
            {name: torch.nn.Parameter(tensor) for name, tensor in sae.tensors.items()}
        )

    def encode(self, x: Tensor) -> Tensor:
        """Dense codes ``(n, d_sae)`` of rows ``(n, d_in)``."""
        return formulas.encode_dense(x, dict(self.tensors.items()), self.recipe)

    def decode(self, codes: Tensor, x: Tensor | None = None) -> Tensor:
        """Reconstruction ``(n, d_out)`` of dense codes."""
        return formulas.decode_dense(codes, dict(self.tensors.items()), self.recipe, x)

    def forward(self, x: Tensor) -> Tensor:
        """Reconstruction ``(n, d_out)`` of rows ``(n, d_in)``."""
        return self.decode(self.encode(x), x)
