"""What a dictionary is made of: its tensors, and the recipe that says how they are used. Files hold this."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from typing import Any, Self

import torch
from torch import Tensor

from microtome.dictionary import folds, weights
from microtome.dictionary.recipe import Recipe
from microtome.errors import ShapeError

__all__ = ["Parameters"]


class Parameters:
    """Tensors and recipe of a dictionary, checked against each other; see :class:`microtome.SAE`, which uses them."""

    def __init__(
        self,
        W_enc: Any,
        W_dec: Any,
        b_enc: Any = None,
        b_dec: Any = None,
        *,
        recipe: Recipe | None = None,
        tensors: Mapping[str, Any] | None = None,
        **fields: Any,
    ) -> None:
        if recipe is not None and fields:
            raise ShapeError(f"recipe: expected a recipe or its fields, found both ({', '.join(fields)})")
        self.recipe = recipe or Recipe(**fields)
        given = {"W_enc": W_enc, "W_dec": W_dec, "b_enc": b_enc, "b_dec": b_dec, **(tensors or {})}
        held = {name: weights.as_tensor(value, name) for name, value in given.items() if value is not None}
        self.tensors = weights.completed(held, self.recipe)
        self.probe: Tensor | None = None
        """A few rows kept in the file, for :meth:`self_check`; shape ``(n, d_in)``."""
        self.probe_targets: dict[str, float] = {}

    # --- what it is -----------------------------------------------------------------------------------------

    @property
    def W_enc(self) -> Tensor:  # noqa: N802
        """Encoder weights, ``(d_in, d_sae)``."""
        return self.tensors["W_enc"]

    @property
    def W_dec(self) -> Tensor:  # noqa: N802
        """Decoder weights, ``(d_sae, d_out)``."""
        return self.tensors["W_dec"]

    @property
    def b_enc(self) -> Tensor:
        """Encoder bias, ``(d_sae,)``; the gate's bias for a gated dictionary."""
        return self.tensors["b_gate" if self.recipe.activation == "gated" else "b_enc"]

    @property
    def b_dec(self) -> Tensor:
        """Decoder bias, ``(d_out,)``."""
        return self.tensors["b_dec"]

    @property
    def threshold(self) -> Tensor | None:
        """What scores are compared with, ``(d_sae,)``, where the recipe has a threshold."""
        return self.tensors.get("threshold")

    @property
    def others(self) -> dict[str, Tensor]:
        """All tensors but the two matrices, by name."""
        return _others(self.tensors)

    @property
    def d_in(self) -> int:
        """Width of the rows."""
        return int(self.W_enc.shape[0])

    @property
    def d_sae(self) -> int:
        """Number of features."""
        return int(self.W_enc.shape[1])

    @property
    def d_out(self) -> int:
        """Width of the reconstruction; ``d_in`` except for transcoders."""
        return int(self.W_dec.shape[1])

    @property
    def k(self) -> int | None:
        """Features kept per row, where the recipe says so."""
        return self.recipe.k

    @property
    def slots(self) -> int | None:
        """Slots per row of its codes: ``k`` of a Top-K; None where codes are ragged.

        A BatchTopK that has its threshold is ragged; one whose threshold was never set is read as a Top-K per row.
        """
        topk = self.recipe.activation in ("topk", "batch_topk") and self.threshold is None
        return self.k if topk else None

    @property
    def device(self) -> torch.device:
        """Where the tensors are."""
        return self.W_enc.device

    def to(self, device: str | torch.device) -> Self:
        """The same dictionary on another device."""
        return self.with_tensors({name: tensor.to(device) for name, tensor in self.tensors.items()})

    def with_tensors(self, tensors: Mapping[str, Tensor], recipe: Recipe | None = None) -> Self:
        """A dictionary with other tensors, the probe rows kept."""
        made = type(self)(
            tensors["W_enc"],
            tensors["W_dec"],
            recipe=recipe or self.recipe,
            tensors=_others(tensors),
        )
        made.probe, made.probe_targets = self.probe, dict(self.probe_targets)
        return made

    def __repr__(self) -> str:
        k = f", k={self.k}" if self.k else ""
        hook = f", {self.recipe.hook_name}" if self.recipe.hook_name else ""
        return (
            f"{type(self).__name__}({self.recipe.activation}, d_in={self.d_in}, d_sae={self.d_sae}{k}{hook})"
        )

    def fingerprint(self) -> str:
        """SHA-256 of the tensors and the recipe's deciding fields: equal when codes are made alike."""
        digest = hashlib.sha256(json.dumps(self.recipe.deciding(), sort_keys=True).encode())
        for name in sorted(self.tensors):
            tensor = self.tensors[name].detach().cpu().contiguous()
            digest.update(f"{name}{tuple(tensor.shape)}".encode())
            digest.update(tensor.numpy().tobytes())
        return digest.hexdigest()

    # --- folds ----------------------------------------------------------------------------------------------

    def fold_W_dec_norm(self) -> Self:  # noqa: N802
        """This dictionary with unit decoder rows; reconstructions unchanged, codes times the old norms.

        Raises:
            CheckpointError: a Top-K that does not rank by ``pre · ‖W_dec,f‖`` would choose other features.
        """
        return self.with_tensors(*folds.fold_W_dec_norm(self.tensors, self.recipe))

    def fold_scale(self) -> Self:
        """This dictionary with both scales inside its weights: codes and reconstructions unchanged."""
        return self.with_tensors(*folds.fold_scale(self.tensors, self.recipe))


def _others(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor for name, tensor in tensors.items() if name not in ("W_enc", "W_dec")}
