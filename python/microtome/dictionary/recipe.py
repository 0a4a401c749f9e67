"""The recipe of a dictionary: all that an encoder does beside its weights.

The same weights give a mean L0 of 29, 42 or 1089 by how they are read: with a threshold, with a norm-aware
Top-K, with neither. So every choice is a field here, is saved with the weights, and is never guessed on load.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from microtome.dictionary.fields import Bounds, check_flags, check_numbers, check_whole, check_words
from microtome.errors import CheckpointError, ShapeError

__all__ = ["Activation", "Normalize", "Recipe"]

Activation = Literal["topk", "batch_topk", "jumprelu", "relu", "gated"]
Normalize = Literal["none", "layer_norm", "constant_norm_rescale"]
ReluPlace = Literal["before_topk", "after_topk"]


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """How rows become codes and codes become rows.

    With ``x (n, d_in)``, norms ``r_f = ‖W_dec,f‖₂`` and the switches below::

        u   = input_scale · normalize(x) − apply_b_dec_to_input · b_dec
        pre = u W_enc + b_enc                       score = pre · r   if norm_aware, else pre
        f   = relu(pre) · selected(score)           f = f · r         if rescale_acts_by_decoder_norm
        x̂   = output_scale · (f W_dec + b_dec + (input_scale · x) W_skipᵀ), with f / r where f was rescaled

    ``selected`` is: ``topk`` the k largest positive scores, ``batch_topk`` and ``jumprelu`` ``score >
    threshold``, ``relu`` all, ``gated`` ``u W_enc + b_gate > 0`` with magnitudes ``relu(exp(r_mag) · u W_enc
    + b_mag)``. A ``batch_topk`` dictionary whose threshold was never set is read with a Top-K per row.
    """

    activation: Activation
    """What turns pre-activations into codes."""
    k: int | None = None
    """Features kept per row (``topk``), or on average (``batch_topk``)."""
    relu: ReluPlace = "before_topk"
    """Where the ReLU stands. Both orders give the same positive codes; it is kept for the record."""
    apply_b_dec_to_input: bool = False
    """Whether ``b_dec`` is subtracted from the input."""
    norm_aware: bool = False
    """Whether features are selected by ``pre · ‖W_dec,f‖`` (``sparsity_include_decoder_norm``)."""
    rescale_acts_by_decoder_norm: bool = False
    """Whether codes carry the decoder norm, as with unit decoder rows (SAELens). Implies ``norm_aware``."""
    input_scale: float = 1.0
    """Factor on the input, ``sqrt(d_in) / average norm`` for a dataset-wise normalisation."""
    output_scale: float = 1.0
    """Factor on the reconstruction, ``average norm / sqrt(d_out)`` for a dataset-wise normalisation."""
    normalize: Normalize = "none"
    """Normalisation of every single row, undone on the way out."""
    hook_name: str | None = None
    """Where the rows come from, in TransformerLens' spelling."""
    hook_name_out: str | None = None
    """What a transcoder writes, where that is another place."""
    model_name: str | None = None
    """The model that the rows come from."""
    source: str = "microtome"
    """The format this dictionary was read from."""
    metadata: Mapping[str, Any] = field(default_factory=dict)
    """Whatever else the source file said (context size, BOS, data set); carried along, never read."""

    def __post_init__(self) -> None:
        check_words(
            self, {"activation": Activation, "normalize": Normalize, "relu": ReluPlace}, CheckpointError
        )
        check_whole(self, ["k"])
        check_numbers(self, dict.fromkeys(("input_scale", "output_scale"), Bounds(0)))
        check_flags(self, ["apply_b_dec_to_input", "norm_aware", "rescale_acts_by_decoder_norm"])
        for name in ("hook_name", "hook_name_out", "model_name"):
            if not isinstance(value := getattr(self, name), str | None):
                raise CheckpointError(f"{name}: expected a name or None, found {value!r}")
        if self.activation == "topk" and self.k is None:
            raise ShapeError("k: expected the number of features kept per row, found None. Pass k=")
        if self.rescale_acts_by_decoder_norm and not self.norm_aware:
            object.__setattr__(self, "norm_aware", True)

    @property
    def scaled(self) -> bool:
        """Whether a dataset-wise scale stands between rows and weights."""
        return self.input_scale != 1.0 or self.output_scale != 1.0

    def replace(self, **changes: Any) -> Recipe:
        """A recipe with some fields changed."""
        return dataclasses.replace(self, **changes)

    def to_dict(self) -> dict[str, Any]:
        """The fields as plain values, ready for JSON."""
        return {**dataclasses.asdict(self), "metadata": dict(self.metadata)}

    @classmethod
    def from_dict(cls, fields: Mapping[str, Any]) -> Recipe:
        """The recipe of :meth:`to_dict`.

        Raises:
            CheckpointError: a field that this version does not know, so that no part of a recipe is dropped
                in silence.
        """
        known = {f.name for f in dataclasses.fields(cls)}
        unknown = sorted(set(fields) - known)
        if unknown or "activation" not in fields:
            raise CheckpointError(
                f"recipe: expected fields {', '.join(sorted(known))} with an activation, "
                f"found unknown {', '.join(unknown) or 'none'}. Update microtome to read this dictionary"
            )
        return cls(**fields)

    def deciding(self) -> dict[str, Any]:
        """The fields that decide codes and reconstructions, for :meth:`SAE.fingerprint`."""
        prose = ("relu", "hook_name", "hook_name_out", "model_name", "source", "metadata")
        return {name: value for name, value in self.to_dict().items() if name not in prose}
