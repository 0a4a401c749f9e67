"""Do the features found fire more on relation questions than random features of the same layer that fire as often?

The features were chosen for firing more on such questions, so asking again on the rows they were chosen by would prove
nothing: the comparison runs on samples held out from the selection. Controls are drawn many times; images are drawn with
replacement, and each replicate of the images meets a control set of its own, so the interval holds both uncertainties.

Source: 2602.08713, sections 6 and 9 (controls on randomly chosen features); matching by layer and frequency is ours.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt
import polars as pl

from microtome.diffing.counting import by_sample, cluster_fires, labels_of
from microtome.errors import ShapeError
from microtome.store import Activations

__all__ = ["Controls", "Sums", "against_controls", "draw_controls"]

_Floats = npt.NDArray[np.float64]
_KEY = ["layer", "feature"]


@dataclass(frozen=True, eq=False)
class Controls:
    """Chosen features and, for every draw, one control for each; rows of ``features`` are what indices point to."""

    features: pl.DataFrame
    """Columns layer, feature, and the matched frequency; every chosen feature and every possible control."""
    chosen: npt.NDArray[np.int64]
    """Rows of the chosen features, (m,)."""
    draws: npt.NDArray[np.int64]
    """Rows of the controls, (n_draws, m)."""
    match: str
    """The column that was matched."""

    def quality(self) -> tuple[float, float]:
        """Mean matched frequency of the chosen features and of their controls."""
        values = self.features[self.match].to_numpy()
        return float(values[self.chosen].mean()), float(values[self.draws].mean())


def draw_controls(
    table: pl.DataFrame,
    chosen: str = "spatial",
    *,
    match: str = "frequency_vision",
    neighbours: int = 20,
    n_draws: int = 1000,
    seed: int = 0,
) -> Controls:
    """Random features matched to chosen ones: same layer, as near as may be in ``log match``, living, not chosen.

    A control is drawn from the ``neighbours`` nearest features, none twice in one draw while others are left.

    Args:
        table: feature table with ``layer``, ``feature``, ``match``, the boolean ``chosen`` and, if known, ``dead``.
        chosen: column of the features to match.
        match: column of the frequency to match.
        neighbours: candidates per chosen feature.
        n_draws: control sets.
        seed: seed of the draws.

    Raises:
        ShapeError: a missing column, nothing chosen, or a layer with no feature left to draw from.

    Example:
        >>> names = {"layer": [0] * 4, "feature": range(4), "frequency_vision": [0.1, 0.2, 0.1, 0.9]}
        >>> table = pl.DataFrame({**names, "spatial": [True, False, False, False]})
        >>> draw_controls(table, neighbours=1, n_draws=2).draws.tolist()
        [[2], [2]]
    """
    if missing := [c for c in (*_KEY, match, chosen) if c not in table.columns]:
        raise ShapeError(
            f"table: expected the columns layer, feature, {match}, {chosen}, found no {missing[0]}"
        )
    if neighbours < 1 or n_draws < 1:
        raise ShapeError(f"neighbours, n_draws: expected at least 1 each, found {neighbours} and {n_draws}")
    alive = pl.col(match) > 0
    living = table.filter(alive & ~pl.col("dead") if "dead" in table.columns else alive).sort(_KEY)
    flag = living[chosen].to_numpy()
    if not flag.any():
        raise ShapeError(f"table: expected living features with {chosen}, found none")
    layer, log = living["layer"].to_numpy(), np.log(living[match].to_numpy())
    places = np.flatnonzero(flag)
    pools = []
    for place in places:
        others = np.flatnonzero((layer == layer[place]) & ~flag)
        if not len(others):
            raise ShapeError(
                f"table: expected features of layer {layer[place]} to draw from, found all of them chosen"
            )
        pools.append(others[np.argsort(abs(log[others] - log[place]), kind="stable")[:neighbours]])
    rng = np.random.default_rng(seed)
    draws = np.stack([_one_each(pools, rng) for _ in range(n_draws)])
    used = np.unique(np.concatenate([places, draws.ravel()]))
    return Controls(
        living[used].select(*_KEY, match), np.searchsorted(used, places), np.searchsorted(used, draws), match
    )


def _one_each(pools: Sequence[npt.NDArray[np.int64]], rng: np.random.Generator) -> npt.NDArray[np.int64]:
    taken: set[int] = set()
    drawn = np.empty(len(pools), np.int64)
    for i in rng.permutation(len(pools)):
        free = [p for p in pools[i] if p not in taken]
        drawn[i] = rng.choice(free if free else pools[i])
        taken.add(int(drawn[i]))
    return drawn


@dataclass(eq=False)
class Sums:
    """Firings per image, on relation questions (0) and on others (1), summed over a layer's rows as they pass.

    Memory is images times draws, whatever the number of rows and features.
    """

    controls: Controls
    n_clusters: int
    each: npt.NDArray[np.float32] = field(init=False)
    """Of every chosen feature: (2, n_clusters, m)."""
    drawn: npt.NDArray[np.float32] = field(init=False)
    """Of the control sets, mean over the set: (2, n_clusters, n_draws)."""
    units: _Floats = field(init=False)
    """Tokens (or samples) counted: (2, n_clusters)."""

    def __post_init__(self) -> None:
        n_draws, m = self.controls.draws.shape
        self.each = np.zeros((2, self.n_clusters, m), np.float32)
        self.drawn = np.zeros((2, self.n_clusters, n_draws), np.float32)
        self.units = np.zeros((2, self.n_clusters))

    def add_layer(
        self,
        layer: int,
        acts: tuple[Activations, Activations],
        sae: Any,
        clusters: tuple[Any, Any],
        unit: str,
    ) -> None:
        """Count a layer: relation rows and other rows, the cluster of each row, and the layer's dictionary."""
        known = self.controls.features
        rows = np.flatnonzero(known["layer"].to_numpy() == layer)
        if not len(rows):
            return
        m = self.controls.draws.shape[1]
        mine = np.isin(self.controls.chosen, rows)
        at = np.searchsorted(rows, self.controls.chosen[mine])
        members = np.stack([(self.controls.draws == row).sum(1) for row in rows]) / m  # (features, n_draws)
        for i in (0, 1):
            numbers = clusters[i]
            for here, counts in cluster_fires(
                acts[i], sae, numbers, self.n_clusters, known["feature"].to_numpy()[rows], unit=unit
            ):
                self.each[i][np.ix_(here, mine)] += counts[:, at]
                self.drawn[i][here] += counts @ members.astype(np.float32)

    def add_units(self, i: int, clusters: npt.NDArray[np.int64]) -> None:
        """Count the tokens (or samples) of relation rows (``i = 0``) or other rows (``i = 1``), once for all layers."""
        self.units[i] += np.bincount(clusters, minlength=self.n_clusters)


def compare(sums: Sums, *, level: float, seed: int, name: str) -> tuple[pl.DataFrame, pl.DataFrame]:
    """The comparison and the interval of every chosen feature's gap, by a bootstrap over images."""
    n_draws, _ = sums.controls.draws.shape
    rng = np.random.default_rng(seed)
    weights = np.ones((1, sums.n_clusters), np.float32)
    exact, exact_drawn = _statistics(sums, weights, slice(None))
    replicates: list[dict[str, _Floats]] = []
    gaps = np.empty((n_draws, len(sums.controls.chosen)))
    for r in range(n_draws):
        w = np.bincount(rng.integers(sums.n_clusters, size=sums.n_clusters), minlength=sums.n_clusters)
        chosen, drawn = _statistics(sums, w[None].astype(np.float32), slice(r, r + 1))
        replicates.append({s: chosen[s].mean() - drawn[s][0] for s in ("frequency", "gap")})
        gaps[r] = chosen["gap"]
    ends = [(1 - level) / 2, (1 + level) / 2]
    match_chosen, match_drawn = sums.controls.quality()
    seen = (sums.units > 0).sum(1)
    rows = []
    for statistic in ("frequency", "gap"):
        values, controls = exact[statistic].mean(), exact_drawn[statistic]
        low, high = np.nanquantile([replicate[statistic] for replicate in replicates], ends)
        p = (1 + int((controls >= values).sum())) / (1 + n_draws)
        rows.append(
            {"set": name, "statistic": statistic, "n_features": len(sums.controls.chosen)}
            | {
                "chosen": float(values),
                "controls": float(controls.mean()),
                "difference": float(values - controls.mean()),
            }
            | {
                "low": float(low),
                "high": float(high),
                "excludes_zero": bool(low > 0 or high < 0),
                "p_value": p,
            }
            | {
                "matched_chosen": match_chosen,
                "matched_controls": match_drawn,
                "level": level,
                "draws": n_draws,
            }
            | {"images_spatial": int(seen[0]), "images_other": int(seen[1])}
        )
    low_each, high_each = np.nanquantile(gaps, ends, axis=0)
    each = sums.controls.features[sums.controls.chosen].select(_KEY)
    columns = {"held_out_gap": exact["gap"], "held_out_low": low_each, "held_out_high": high_each}
    return pl.DataFrame(rows), each.with_columns(**{k: pl.Series(v) for k, v in columns.items()})


def _statistics(
    sums: Sums, w: npt.NDArray[np.float32], draws: slice
) -> tuple[dict[str, _Floats], dict[str, _Floats]]:
    """Frequency on relation questions, and its gap to the others, of each chosen feature (m,) and each draw (n,)."""
    total = (w @ sums.units.T)[0]  # (2,)
    with np.errstate(invalid="ignore", divide="ignore"):
        each = np.stack([(w @ sums.each[i])[0] / total[i] for i in (0, 1)])
        drawn = np.stack([(w @ sums.drawn[i][:, draws])[0] / total[i] for i in (0, 1)])
    return (
        {"frequency": each[0], "gap": each[0] - each[1]},
        {"frequency": drawn[0], "gap": drawn[0] - drawn[1]},
    )


def against_controls(
    table: pl.DataFrame,
    layers: Sequence[tuple[Activations, Any]] | Callable[[int], tuple[Activations, Any]],
    spatial: pl.Expr,
    *,
    chosen: str = "spatial",
    where: pl.Expr | None = None,
    match: str = "frequency_vision",
    neighbours: int = 20,
    n_draws: int = 1000,
    unit: str = "token",
    cluster: str | pl.Expr = "sample",
    level: float = 0.95,
    seed: int = 0,
) -> tuple[pl.DataFrame, pl.DataFrame]:
    """Compare chosen features with matched random ones on relation questions.

    Two statistics, means over the features of a set: the firing ``frequency`` on relation questions, and its ``gap`` to
    the frequency on other questions. ``difference = chosen - mean over draws``; the interval is that of the percentiles
    over replicates in which images are drawn with replacement (the cluster bootstrap) against one control set each.

    Args:
        table: feature table, see :func:`draw_controls`.
        layers: rows and dictionary of each layer, or a function of the layer's number that gives them.
        spatial: which rows are relation questions, over row and sample columns.
        chosen: boolean column of the features compared.
        where: rows counted at all, e.g. samples held out from the selection, or text tokens.
        match: column of the frequency that controls are matched by.
        neighbours: candidates per chosen feature.
        n_draws: control sets, and replicates.
        unit: ``"token"``: share of tokens; ``"sample"``: share of samples with any firing token.
        cluster: what is drawn as one: the column that names the image of a row.
        level: level of the interval.
        seed: seed of draws and replicates.

    Returns:
        One row per statistic (set, statistic, n_features, chosen, controls, difference, low, high, excludes_zero,
        p_value: share of draws that reach the chosen set, matched frequencies, images); and the gap of every chosen
        feature on these rows with its interval.

    Raises:
        ShapeError: see :func:`draw_controls`; a level outside 0 to 1; no rows on one of the two sides.
    """
    if not 0 < level < 1:
        raise ShapeError(f"level: expected a number between 0 and 1, found {level}")
    if unit not in ("token", "sample"):
        raise ShapeError(f"unit: expected token or sample, found {unit!r}")
    controls = draw_controls(table, chosen, match=match, neighbours=neighbours, n_draws=n_draws, seed=seed)
    layer_of = layers if callable(layers) else layers.__getitem__
    sums: Sums | None = None
    numbers: tuple[Any, Any] | None = None
    for layer in controls.features["layer"].unique().sort():
        acts, sae = layer_of(layer)
        sides = tuple(by_sample(acts.where(*_sides(where, side))) for side in (spatial, ~spatial))
        if numbers is None:
            numbers, n = _clusters(sides, cluster)
            sums = Sums(controls, n)
            for i in (0, 1):
                sums.add_units(i, numbers[i] if unit == "token" else _first_of_sample(sides[i], numbers[i]))
        assert sums is not None  # noqa: S101 - set with numbers
        sums.add_layer(layer, sides, sae, numbers, unit)  # type: ignore[arg-type]
    assert sums is not None  # noqa: S101 - draw_controls refuses an empty set
    return compare(sums, level=level, seed=seed + 1, name=chosen)


def _sides(where: pl.Expr | None, side: pl.Expr) -> list[pl.Expr]:
    return [side] if where is None else [where, side]


def _clusters(sides: Sequence[Activations], cluster: str | pl.Expr) -> tuple[tuple[Any, Any], int]:
    """The number of each row's image, one numbering for both sides."""
    expression = (pl.col(cluster) if isinstance(cluster, str) else cluster).alias("cluster")
    names = [labels_of(side, expression).to_series() for side in sides]
    if not all(map(len, names)):
        raise ShapeError(
            f"spatial: expected rows on both sides, found {len(names[0])} of relation questions, {len(names[1])} others"
        )
    rank = pl.concat(names).rank("dense")
    if rank.null_count():
        raise ShapeError("cluster: expected an image in every row, found null")
    numbers = rank.to_numpy().astype(np.int64) - 1
    return (numbers[: len(names[0])], numbers[len(names[0]) :]), int(numbers.max()) + 1


def _first_of_sample(acts: Activations, clusters: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
    """Cluster of each sample, once per sample."""
    samples = acts.rows.select("sample").collect().to_series().to_numpy().astype(np.int64)
    return clusters[np.flatnonzero(np.diff(samples, prepend=-1))]
