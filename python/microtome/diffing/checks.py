"""What two stores of a diffing study must have in common, asked before any work."""

from __future__ import annotations

from typing import Any

import polars as pl

from microtome.errors import ShapeError
from microtome.store import ActivationStore

__all__ = ["check_neutral", "common_hooks", "fitting_stores"]


def common_hooks(base: ActivationStore, vlm: ActivationStore) -> list[str]:
    """Hooks of both stores, in the VLM's order.

    Raises:
        ShapeError: none in common, or one of two widths.
    """
    hooks = [hook for hook in vlm.hooks if hook in base.hooks]
    if not hooks:
        raise ShapeError(
            f"base, vlm: expected hooks in common, found {', '.join(base.hooks)} and {', '.join(vlm.hooks)}"
        )
    for hook in hooks:
        _same_width("base, vlm", base, vlm, hook)
    return hooks


def fitting_stores(base: ActivationStore, vlm: ActivationStore) -> None:
    """Refuse stores that were exchanged, or whose decoders differ.

    Raises:
        ShapeError: image tokens in the base store, none in the VLM's, or decoders of other sizes.
    """
    if "image" in _kinds(base):
        raise ShapeError(
            f"base: expected rows of a language model, text alone, found image tokens in {base.path}"
        )
    if "image" not in (found := _kinds(vlm)):
        raise ShapeError(f"vlm: expected image tokens, found {', '.join(found)} alone in {vlm.path}")
    for name in ("n_layers", "d_model"):
        a, b = (_model(store).get(name) for store in (base, vlm))
        if a is not None and b is not None and a != b:
            raise ShapeError(
                f"base, vlm: expected one decoder, found {name} = {a} in {base.path} and {b} in {vlm.path}"
            )


def check_neutral(neutral: ActivationStore, vlm: ActivationStore, hooks: list[str]) -> None:
    """Refuse a neutral run that lacks a hook, or is of another model.

    Raises:
        ShapeError: names both sides.
    """
    if missing := [hook for hook in hooks if hook not in neutral.hooks]:
        raise ShapeError(f"neutral: expected the hook {missing[0]}, found {', '.join(neutral.hooks)}")
    for hook in hooks:
        _same_width("neutral, vlm", neutral, vlm, hook)
    for name in ("class", "n_layers", "d_model"):
        a, b = (_model(store).get(name) for store in (neutral, vlm))
        if a != b:
            raise ShapeError(
                f"neutral: expected a run of the VLM ({name} = {b}), found {name} = {a} in {neutral.path}"
            )


def _same_width(names: str, a: ActivationStore, b: ActivationStore, hook: str) -> None:
    if a[hook].width != b[hook].width:
        raise ShapeError(f"{names}: expected one width at {hook}, found {a[hook].width} and {b[hook].width}")


def _kinds(store: ActivationStore) -> list[str]:
    kinds = store.rows.select(pl.col("kind").cast(pl.String).unique()).collect().to_series()
    return sorted(kinds.drop_nulls().to_list())


def _model(store: ActivationStore) -> dict[str, Any]:
    found = store.facts.get("model")
    return found if isinstance(found, dict) else {}
