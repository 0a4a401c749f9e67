"""The dictionaries of a study: one on the base model, one per regime on the VLM, and how well and how alike they are."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np
import polars as pl

from microtome.dictionary import SAE, train_layers
from microtome.dictionary.train.data import RowSource
from microtome.diffing.config import REGIMES, DiffConfig
from microtome.errors import ShapeError
from microtome.metrics import analyse, decoder_cosine
from microtome.store import Activations, ActivationStore

__all__ = ["Stages", "cosine_quantiles", "reconstruction", "train_stages"]

Stages = dict[str, dict[str, SAE]]
"""Dictionaries by stage ("base" and each regime) and hook."""

_EVAL_ROWS = 20_000


def train_stages(
    base: ActivationStore,
    vlm: ActivationStore,
    hooks: list[str],
    folder: Path,
    config: DiffConfig,
    given: Mapping[str, SAE] | None,
    progress: bool,
) -> tuple[Stages, pl.DataFrame]:
    """Dictionaries of every stage, and their curves; what ``folder`` holds is not trained again."""
    curves = []
    if given is None:
        trained = train_layers(
            base, config.train.replace(regime="base"), hooks=hooks, out=folder / "base", progress=progress
        )
        given, curves = trained.saes, [trained.curves]
    stages: Stages = {"base": {hook: given[hook] for hook in hooks}}
    for regime in config.regimes:
        told = config.train.replace(
            regime=regime, loss_where=REGIMES[regime], steps=config.adapt_steps or config.train.steps
        )
        if regime == "random":  # other first weights than the base's, or their cosine would say nothing
            told = told.replace(seed=told.seed + 1)
        start = None if regime == "random" else stages["base"]
        adapted = train_layers(
            vlm, told, hooks=hooks, base=start, lr=config.lr, out=folder / regime, progress=progress
        )
        stages[regime] = adapted.saes
        curves.append(adapted.curves)
    return stages, pl.concat(curves)


def check_dictionaries(given: Mapping[str, SAE], vlm: ActivationStore, hooks: list[str]) -> None:
    """Refuse dictionaries of other hooks or widths.

    Raises:
        ShapeError: names the hook and both sides.
    """
    if missing := [hook for hook in hooks if hook not in given]:
        raise ShapeError(f"dictionaries: expected one for {missing[0]}, found {', '.join(given) or 'none'}")
    for hook in hooks:
        if given[hook].d_in != vlm[hook].width:
            raise ShapeError(
                f"dictionaries: expected d_in = {vlm[hook].width} at {hook}, found {given[hook].d_in}"
            )


def reconstruction(
    vlm: ActivationStore, stages: Mapping[str, Mapping[str, SAE]], config: DiffConfig, progress: bool
) -> pl.DataFrame:
    """FVU and L0 of every dictionary on held-out VLM rows, by the kind of token they are asked to reconstruct.

    The curves of a regime are measured on its own tokens; this table sets them side by side on the same kinds. Rows are
    those of samples held out from the training of the dictionary (of the base regime's split for ``base``).
    """
    rows = []
    for stage, saes in stages.items():
        seed = config.train.seed + (stage == "random")
        for layer, (hook, sae) in enumerate(saes.items()):
            held_out = _held_out(vlm[hook], config.train.eval_fraction, seed)
            for kind in ("all", "text", "image"):
                part = held_out if kind == "all" else held_out.where(pl.col("kind") == kind)
                if len(part) == 0:
                    continue
                found = analyse(part, sae, top=0, progress=progress)
                rows.append(
                    {"stage": stage, "tokens": kind, "layer": layer, "hook": hook}
                    | {"fvu": found.fvu, "l0": found.l0, "rows": found.n_rows}
                )
    return pl.DataFrame(rows)


def cosine_quantiles(stages: Mapping[str, Mapping[str, SAE]], hooks: list[str]) -> pl.DataFrame:
    """Mean and quantiles of the decoder cosine with the base dictionary, per layer and regime; undefined ones counted."""
    rows = []
    for regime in (name for name in stages if name != "base"):
        for layer, hook in enumerate(hooks):
            cosine = np.asarray(decoder_cosine(stages["base"][hook].W_dec, stages[regime][hook].W_dec))
            low, middle, high = np.nanquantile(cosine, [0.1, 0.5, 0.9])
            rows.append(
                {"regime": regime, "layer": layer, "hook": hook, "cosine": float(np.nanmean(cosine))}
                | {"q10": float(low), "median": float(middle), "q90": float(high)}
                | {"undefined": int(np.isnan(cosine).sum())}
            )
    return pl.DataFrame(rows)


def _held_out(acts: Activations, fraction: float, seed: int) -> Activations:
    """Rows of the samples that a training with this seed never saw, the first of them."""
    rows = RowSource(acts).split(fraction, seed)[1]
    return acts.take(rows[:_EVAL_ROWS])
