"""Whether rows belong to a dictionary: their width, and the hook they were captured at."""

from __future__ import annotations

import re
from typing import Any

from microtome.dictionary.recipe import Recipe
from microtome.errors import HookError, ShapeError

__all__ = ["check_hook", "check_rows"]

_PLACE = re.compile(
    r"blocks\.(\d+)\.(hook_resid_pre|hook_resid_post|hook_attn_out|hook_mlp_out|mlp\.hook_post|attn\.hook_[qkvz])"
)


def check_rows(x: Any, recipe: Recipe, d_in: int) -> None:
    """Refuse what is no matrix of rows of width ``d_in``, or comes from another place of the model.

    Raises:
        ShapeError: another shape; the message names both.
        HookError: activations of another hook than the dictionary's.
    """
    shape = tuple(x.shape)
    if len(shape) != 2 or shape[1] != d_in:
        hook = f" for {recipe.hook_name}" if recipe.hook_name else ""
        raise ShapeError(f"x: expected rows (n, {d_in}) as in this dictionary{hook}, found shape {shape}")
    check_hook(x, recipe, "x")


def check_hook(acts: Any, recipe: Recipe, name: str) -> None:
    """Refuse activations of a store whose hook is known to be another place than the dictionary's.

    ``blocks.{i}.hook_resid_post`` and ``blocks.{i+1}.hook_resid_pre`` are one place. A name in another spelling says
    nothing, and tensors have no hook.

    Raises:
        HookError: both places are known and differ; the message names both.
    """
    found = getattr(acts, "hook", None)
    here, there = _place(found), _place(recipe.hook_name)
    if here is not None and there is not None and here != there:
        raise HookError(
            f"{name}: expected activations of {recipe.hook_name}, which this dictionary is for, found {found}. "
            "If that is meant, change the recipe: sae.with_tensors(sae.tensors, sae.recipe.replace(hook_name=...))"
        )


def _place(hook: str | None) -> tuple[str, int] | None:
    """What a hook name stands for, and at which layer; the residual stream is counted by its boundaries."""
    match = _PLACE.fullmatch(hook or "")
    if match is None:
        return None
    layer, value = int(match[1]), match[2]
    if value.startswith("hook_resid"):
        return "residual", layer + value.endswith("post")
    return value, layer
