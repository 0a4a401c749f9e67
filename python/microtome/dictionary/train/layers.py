"""Several layers or regimes in one call, one after the other or some at a time."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import quote

import polars as pl

from microtome.arguments import parse_bytes
from microtome.dictionary.train.config import TrainConfig
from microtome.dictionary.train.run import TrainResult, train_sae
from microtome.errors import ShapeError

if TYPE_CHECKING:
    from microtome.dictionary.sae import SAE

__all__ = ["LayersResult", "run_bytes", "train_layers"]


@dataclass(frozen=True)
class LayersResult:
    """Dictionaries of several hooks."""

    results: dict[str, TrainResult]
    """The result of every hook."""

    @property
    def saes(self) -> dict[str, SAE]:
        """The dictionary of every hook."""
        return {hook: result.sae for hook, result in self.results.items()}

    @property
    def curves(self) -> pl.DataFrame:
        """All curves in one table, told apart by ``hook`` and ``regime``."""
        return pl.concat([result.curves for result in self.results.values()])


def train_layers(
    acts: Mapping[str, Any] | Any,
    config: TrainConfig,
    *,
    hooks: Sequence[str] | None = None,
    base: Mapping[str, SAE] | None = None,
    lr: Mapping[str, float] | Callable[[str], float] | None = None,
    out: str | Path | None = None,
    parallel: int = 1,
    memory_budget: int | str | None = None,
    progress: bool = True,
) -> LayersResult:
    """Train one dictionary per hook.

    Args:
        acts: an :class:`microtome.ActivationStore`, or rows ``(n, d)`` by hook name.
        config: what to train at every hook.
        hooks: hooks to train; all when left out.
        base: dictionaries to start from, by hook.
        lr: learning rate by hook, or a function of the hook's name; the configuration's where it says
            nothing.
        out: folder for checkpoints and dictionaries, one folder per hook. Hooks that are done there are not
            trained again.
        parallel: most runs at a time.
        memory_budget: bytes, or text such as ``"8GiB"``: as many runs at a time as it holds by :func:`run_bytes`,
            ``parallel`` at the most and one at the least.
        progress: draw bars on a terminal.

    Raises:
        ShapeError: a hook that is not there, or no run at a time.

    Example:
        >>> train_layers(store, TrainConfig(k=32, steps=5000), out="saes").curves    # doctest: +SKIP
    """
    known = list(acts.hooks) if hasattr(acts, "hooks") else list(acts)
    chosen = list(hooks) if hooks is not None else known
    missing = [hook for hook in [*chosen, *(base or {})] if hook not in known]
    if missing:
        raise ShapeError(f"hooks: expected some of {', '.join(known)}, found {', '.join(missing)}")

    if parallel < 1:
        raise ShapeError(f"parallel: expected at least 1, found {parallel}")
    if (budget := parse_bytes(memory_budget)) is not None:
        largest = max(run_bytes(config, acts[hook].shape[1]) for hook in chosen)
        parallel = max(1, min(parallel, budget // largest))

    def train(hook: str) -> TrainResult:
        rate = lr(hook) if callable(lr) else (lr or {}).get(hook)
        told = config if rate is None else config.replace(lr=rate)
        folder = None if out is None else Path(out) / quote(hook, safe=".-_")
        result = train_sae(
            acts[hook],
            told,
            base=(base or {}).get(hook),
            checkpoint_dir=None if folder is None else folder / "checkpoints",
            progress=progress and parallel == 1,
        )
        named = result.sae.with_tensors(result.sae.tensors, result.sae.recipe.replace(hook_name=hook))
        if folder is not None:
            named.save_to_disk(folder)
        return _renamed(result, named, hook)

    if parallel == 1:
        return LayersResult({hook: train(hook) for hook in chosen})
    with ThreadPoolExecutor(parallel, thread_name_prefix="microtome-train") as pool:
        return LayersResult(dict(zip(chosen, pool.map(train, chosen), strict=True)))


def run_bytes(config: TrainConfig, d_in: int) -> int:
    """What one run holds, in bytes: weights, gradients and two moments in float32, and three batches of rows and codes.

    Example:
        >>> run_bytes(TrainConfig(d_sae=1024, batch_size=256), 128)
        7733248
    """
    d_sae = config.features(d_in)
    return 32 * d_in * d_sae + 12 * config.batch_size * (d_in + d_sae)


def _renamed(result: TrainResult, sae: SAE, hook: str) -> TrainResult:
    from dataclasses import replace

    return replace(result, sae=sae, curves=result.curves.with_columns(hook=pl.lit(hook)))
