"""The steps of a study, each from what was found before to named tables."""

from __future__ import annotations

import io
from collections.abc import Mapping
from typing import Any

import numpy as np
import polars as pl

from microtome.circuits.ablation.attention_maps import attention_maps
from microtome.circuits.ablation.causal import causal_test
from microtome.circuits.ablation.controls import attributed_heads, random_heads
from microtome.circuits.ablation.interventions import ablate_heads, head_means
from microtome.circuits.attribution.audit import exact_agreement
from microtome.circuits.attribution.blocks import overlap_intervals
from microtome.circuits.attribution.nodes import attribute
from microtome.circuits.backpatch.choice import BackPatch, gap_closed
from microtome.circuits.backpatch.patching import back_patch, back_patch_iterated
from microtome.circuits.circuit.overlap import compare_circuits
from microtome.circuits.circuit.scores import NodeScores
from microtome.circuits.faithfulness.nodes import faithfulness_curve
from microtome.circuits.interchange import interchange, interchange_controls, interchange_table
from microtome.circuits.statistics import rank_correlation
from microtome.circuits.study.ledger import Tables
from microtome.circuits.study.options import FORMS, N_AUDITED, N_ITERATIONS, Options
from microtome.circuits.study.sides import Side
from microtome.errors import ShapeError

__all__ = ["audit", "curve", "effects", "heads", "overlap", "repair", "swaps"]

N_SHOWN = 4
"""Prompts whose attention maps are kept."""


def curve(model: Any, side: Side, scores: NodeScores, how: Options, progress: bool) -> Tables:
    """Faithfulness over sizes, and the smallest circuit above the threshold."""
    found = faithfulness_curve(
        model, side.evaluation, scores, how.sizes, batch_size=how.batch_size, progress=progress
    )
    reached = found.smallest(how.threshold)
    values = np.nan_to_num(found.values, nan=-np.inf)
    at = int(values.argmax() if reached is None else np.flatnonzero(found.sizes == reached)[0])
    low_high = found.points[at].interval(seed=how.seed)
    circuit = scores.circuit(float(found.sizes[at]))
    row = {
        "size": float(found.sizes[at]), "reached": reached is not None, "faithfulness": low_high.value,
        "low": low_high.low, "high": low_high.high, "n_heads": circuit.size("heads"),
        "n_neurons": circuit.size("neurons"), "n_pairs": len(side.evaluation),
        "n_dropped": found.points[at].n_dropped, "cpr": found.cpr(), "cmd": found.cmd(),
    }  # fmt: skip
    return {"curves": found.to_polars(seed=how.seed), "sizes": pl.DataFrame(row)}


def effects(scores: NodeScores) -> pl.DataFrame:
    """The patching-effect map as rows: layer, position, effect, group."""
    values = scores.effect_map()
    layers, positions = np.indices(values.shape)
    group_of = {p: group for group, where in scores.groups.items() for p in where}
    columns = {"layer": layers.ravel(), "position": positions.ravel(), "effect": values.ravel()}
    groups = [group_of.get(int(p), "") for p in positions.ravel()]
    return pl.DataFrame({**columns, "group": groups})


def audit(model: Any, side: Side, how: Options, progress: bool) -> Tables:
    """Rank correlation of attribution with exact patching, both on the same evaluation pairs."""
    few = side.evaluation[: min(len(side.evaluation), N_AUDITED)]
    own = attribute(model, few, how.method, how.steps, batch_size=how.batch_size, progress=progress)  # type: ignore[arg-type]
    table = exact_agreement(model, few, own, how.n_exact, batch_size=how.batch_size, progress=progress)
    parts = {kind: table.filter(pl.col("kind") == kind) for kind in ("head", "neuron")}
    parts["all"] = table.sort("score", descending=True, maintain_order=True).head(how.n_exact)
    rows = [
        {"kind": kind, "n": part.height, "rank_correlation": rank_correlation(part["score"], part["exact"])}
        for kind, part in parts.items()
    ]
    return {"agreement": pl.DataFrame(rows)}


def heads(model: Any, side: Side, scores: NodeScores, how: Options, progress: bool) -> Tables:
    """Mean-ablation of the attributed heads beside random ones, and what these heads look at."""
    chosen = attributed_heads(scores, how.n_heads)
    means = head_means(model, side.discovery, batch_size=how.batch_size)
    controls = random_heads(model, chosen, how.n_controls, how.seed)
    table = causal_test(
        model, side.everything,
        {"attributed heads": lambda: ablate_heads(model, chosen, means)},
        {"attributed heads": [lambda c=c: ablate_heads(model, c, means) for c in controls]},  # type: ignore[misc]
        batch_size=how.batch_size, seed=how.seed, progress=progress,
    )  # fmt: skip
    named = pl.lit(" ".join(f"L{layer}H{head}" for layer, head in chosen)).alias("heads")
    tables = {"ablation": table.select(named, pl.all())}
    if any(kind != "text" for kind in side.everything.pairs[0].kinds):
        tables["attention"] = _attention(model, side, chosen[: min(3, len(chosen))])
    return tables


def _attention(model: Any, side: Side, chosen: list[tuple[int, int]]) -> pl.DataFrame:
    """Attention of heads over the picture from the last position: one row per prompt and head."""
    rows = []
    for number, pair in enumerate(side.everything.pairs[:N_SHOWN]):
        for one in attention_maps(model, pair, chosen):
            rows.append(
                {
                    "prompt": number, "text": str(pair.facts.get("prompt", "")), "layer": one.layer,
                    "head": one.head, "image_mass": one.image_mass, "entropy": one.entropy,
                    "weights": one.weights[one.image].tolist(), "picture": _png(pair.facts.get("image")),
                }
            )  # fmt: skip
    return pl.DataFrame(rows, schema_overrides={"picture": pl.Binary})


def _png(image: Any) -> bytes | None:
    if not hasattr(image, "save"):
        return None
    buffer = io.BytesIO()
    image.save(buffer, format="PNG")
    return buffer.getvalue()


def overlap(sides: Mapping[str, Side], how: Options) -> Tables:
    """What the circuits of both forms share: chance, intervals, noise floor."""
    visual, textual = (sides[form] for form in FORMS)
    table = compare_circuits(visual.circuit, textual.circuit, n_draws=max(how.n_random, 1), seed=how.seed)
    if min(len(visual.blocks), len(textual.blocks)) > 1:
        intervals = overlap_intervals(visual.blocks, textual.blocks, (visual.size, textual.size))
        kept = intervals.drop("iou", "niou").with_columns(pl.lit("mean").alias("kind"))
        table = table.join(kept, on=["group", "kind"], how="left", maintain_order="left")
    return {"overlap": table}


def swaps(model: Any, sides: Mapping[str, Side], how: Options, progress: bool) -> Tables:
    """Interchange of every group that both forms have."""
    visual, textual = (sides[form] for form in FORMS)
    groups = visual.circuit.groups, textual.circuit.groups
    shared = [g for g in ("data", "query", "generation") if groups[0].get(g) and groups[1].get(g)]
    found = interchange(
        model, (visual.evaluation, textual.evaluation), (visual.circuit, textual.circuit), shared,
        n_random=how.n_random, seed=how.seed, batch_size=how.batch_size, progress=progress,
    )  # fmt: skip
    return {
        "interchange": interchange_table(found, FORMS, how.seed),
        "controls": interchange_controls(found, FORMS, how.seed),
    }


def repair(model: Any, sides: Mapping[str, Side], how: Options, progress: bool) -> Tables:
    """Back-patching of the pictures, and of the text as the control."""
    patched: dict[str, BackPatch] = {}
    for form in FORMS:
        patched[form] = back_patch(
            model,
            sides[form].everything,
            windows=how.windows,
            allow_prefix=how.allow_prefix,
            batch_size=how.batch_size,
            progress=progress,
        )
    text_right = patched["textual"].baseline
    maps, chosen, iterated = [], [], []
    for form, found in patched.items():
        maps.append(found.to_polars().select(pl.lit(form).alias("form"), pl.all()))
        choice = found.choose(seed=how.seed)
        gap = gap_closed(choice.correct, choice.baseline_correct, text_right, seed=how.seed)
        if choice.p_gain is None:
            raise ShapeError("repair: expected probabilities of the answers, found none")
        chosen.append(
            {
                "form": form, **choice.setting._asdict(), "n": len(choice.correct), "baseline": choice.baseline,
                "accuracy": choice.accuracy, "gain": choice.gain.value, "gain_low": choice.gain.low,
                "gain_high": choice.gain.high, "p": choice.p, "p_gain": choice.p_gain.value,
                "p_gain_low": choice.p_gain.low, "p_gain_high": choice.p_gain.high, "gap_closed": gap.value,
                "gap_low": gap.low, "gap_high": gap.high,
            }
        )  # fmt: skip
        again = back_patch_iterated(
            model,
            sides[form].everything[choice.judged],
            choice.setting,
            N_ITERATIONS,
            allow_prefix=how.allow_prefix,
            batch_size=how.batch_size,
        ).mean(1)
        iterated.append(
            pl.DataFrame({"form": form, "iteration": np.arange(N_ITERATIONS + 1), "accuracy": again})
        )
    return {"backpatch": pl.concat(maps), "repair": pl.DataFrame(chosen), "iterated": pl.concat(iterated)}
