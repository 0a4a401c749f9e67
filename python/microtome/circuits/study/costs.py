"""What a study will take, before it runs: forwards of one prompt for every step, and seconds from timed ones."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import polars as pl

from microtome.circuits.attribution.plan import estimate, seconds_per_prompt
from microtome.circuits.backpatch.choice import all_settings
from microtome.circuits.study.options import N_AUDITED, N_ITERATIONS, Options
from microtome.circuits.study.sides import Side

__all__ = ["step_costs"]

N_CHECKED = 2
"""Forwards of the check that the replay fits the model."""


def step_costs(model: Any, sides: Mapping[tuple[str, str], Side], how: Options) -> pl.DataFrame:
    """One row per task, form and step: task, form, step, forwards, seconds.

    Forwards are of one prompt. A backward counts as two.
    """
    rows = []
    for (task, form), side in sides.items():
        seconds = seconds_per_prompt(model, side.everything, how.batch_size)
        for step, forwards in _forwards(model, side, how).items():
            if forwards:
                row = {"task": task, "form": form, "step": step, "forwards": forwards}
                rows.append(row | {"seconds": forwards * seconds})
    return pl.DataFrame(rows)


def _forwards(model: Any, side: Side, how: Options) -> dict[str, int]:
    from microtome.capture.models import adapt

    adapter = adapt(model)
    n, n_found, n_tested = len(side.everything), len(side.discovery), len(side.evaluation)
    budget: dict[str, Any] = {"batch_size": how.batch_size, "memory_budget": how.memory_budget}
    one = estimate(model, side.discovery, how.method, how.steps, **budget)
    per_pair = (one.forwards + 2 * one.backwards) / n_found
    few = min(N_AUDITED, n_tested)
    nodes = 2 * how.n_exact
    settings = len(all_settings(adapter.n_layers, how.windows))
    repaired = settings and side.has_other and "back-patching" not in side.left_out
    heads = min(how.n_heads, adapter.n_layers * adapter.n_heads // 2)
    return {
        "attribution": round(per_pair * n_found) + 2 * min(how.n_blocks, n_found),
        "faithfulness": n_tested * (len(how.sizes) + 4) + N_CHECKED,
        "audit": round(few * (per_pair + 2 + nodes)) if how.n_exact else 0,
        "heads": n_found + n * (2 + how.n_controls) if heads else 0,
        "interchange": n_tested * (5 + 3 * (1 + how.n_random)) if how.n_random and side.has_other else 0,
        "alignment": 0 if "alignment" in side.left_out else 2 * side.n_matched,
        "back-patching": n * (settings + 1) + (n - n // 2) * (N_ITERATIONS + 1) + 2 * N_CHECKED if repaired else 0,
    }  # fmt: skip
