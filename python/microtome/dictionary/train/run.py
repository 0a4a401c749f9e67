"""The training loop: rows in, a dictionary and its curves out."""

from __future__ import annotations

import time
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import polars as pl
import torch
from torch import Tensor

from microtome.dictionary import forward
from microtome.dictionary.checks import check_hook
from microtome.dictionary.sae import SAE
from microtome.dictionary.train import checkpoint
from microtome.dictionary.train.config import TrainConfig
from microtome.dictionary.train.data import BatchReader, RowSource, Shuffle
from microtome.dictionary.train.objective import decoder_norms, objective
from microtome.dictionary.train.start import Start, start
from microtome.errors import NonFiniteError
from microtome.progress import bar

if TYPE_CHECKING:
    from microtome.dictionary.recipe import Recipe

__all__ = ["TrainResult", "train_sae"]

_ADAM = {"betas": (0.9, 0.999), "eps": 6.25e-10}  # Gao et al., arXiv 2406.04093
_EVAL_ENTRIES = 1 << 25


@dataclass(frozen=True)
class TrainResult:
    """A trained dictionary and how it came about."""

    sae: SAE
    """The dictionary."""
    curves: pl.DataFrame
    """``hook, regime, step, tokens, fvu, l0, dead_share, loss, lr, k, seconds``.

    FVU and L0 are those of held-out rows. ``dead_share`` is the share of features that fired on none of the
    last ``dead_after`` training rows.
    """
    config: TrainConfig
    """What the run was told."""
    steps: int
    """Steps taken."""
    tokens: int
    """Rows seen."""
    seconds: float
    """Time of the steps, of this process."""
    data_wait_share: float
    """Share of that time in which the optimiser waited for rows."""

    @property
    def fvu(self) -> float:
        """Fraction of variance unexplained on the held-out rows, at the end."""
        return float(self.curves["fvu"][-1])


def train_sae(
    acts: Any,
    config: TrainConfig | None = None,
    *,
    base: SAE | None = None,
    checkpoint_dir: str | Path | None = None,
    resume: bool = True,
    on_step: Callable[[int, float], None] | None = None,
    progress: bool = True,
) -> TrainResult:
    """Train a dictionary on rows of a store, or of memory.

    Args:
        acts: rows ``(n, d)``: :class:`microtome.Activations`, a tensor or an array; bf16, f16 or f32.
        config: what to train; the defaults of :class:`TrainConfig` when left out.
        base: a dictionary to start from. Its features keep their index, its recipe is kept up to activation
            and ``k``.
        checkpoint_dir: folder for checkpoints. A run that finds one there continues it, and ends with the
            same weights, bit for bit on one CPU and number of threads, as a run that never stopped.
        resume: whether to continue from ``checkpoint_dir``; with False the run starts anew there, and its first
            checkpoint replaces those that it finds.
        on_step: called with step and loss after every step.
        progress: draw a bar on a terminal.

    Returns:
        The dictionary, its curves on held-out samples, and timings.

    Raises:
        ShapeError: no rows, rows that are no matrix, a base of another width, an expression over an array.
        HookError: a base of another hook than the activations'.
        NonFiniteError: NaN or infinity among the rows, or a loss that became so.
        CheckpointError: a checkpoint of another configuration or other rows.

    Example:
        >>> import torch
        >>> rows = torch.randn(2000, 16, generator=torch.Generator().manual_seed(0))
        >>> result = train_sae(rows, TrainConfig(d_sae=32, k=4, steps=20, batch_size=256))
        >>> result.sae, result.tokens
        (SAE(topk, d_in=16, d_sae=32, k=4), 5120)
    """
    return train_rows(acts, config or TrainConfig(), base, checkpoint_dir, resume, on_step, progress)


def train_rows(
    acts: Any,
    config: TrainConfig,
    base: SAE | None = None,
    checkpoint_dir: str | Path | None = None,
    resume: bool = True,
    on_step: Callable[[int, float], None] | None = None,
    progress: bool = True,
    parts: int = 1,
) -> TrainResult:
    """See :func:`train_sae`; ``parts`` is the number of models that a row is put together from."""
    if base is not None:
        check_hook(acts, base.recipe, "base")
    source = RowSource(acts, config.loss_where)
    config.check_k(base.d_sae if base is not None else config.features(source.d))
    training, held_out = source.split(config.eval_fraction, config.seed)
    total = config.total_steps(len(training))
    folder = None if checkpoint_dir is None else Path(checkpoint_dir)
    begun = start(source, training, config, base, _origin(acts, config), parts)
    run = _Run(begun, config, total, _held_out_rows(source, held_out, config), parts)
    facts = {"config": config.to_dict(), "data": _data_facts(source, training, base)}
    if folder is not None and resume:
        run.restore(folder, facts)
    order = Shuffle(training, config.seed, config.shuffle_block_rows, config.shuffle_pool_rows)
    return _loop(run, source, order, folder, facts, on_step, progress)


def _loop(
    run: _Run,
    source: RowSource,
    order: Shuffle,
    folder: Path | None,
    facts: dict[str, Any],
    on_step: Callable[[int, float], None] | None,
    progress: bool,
) -> TrainResult:
    config, total = run.config, run.total
    eval_every = config.eval_every or max(1, total // 20)
    save_every = config.checkpoint_every or max(1, total // 10)
    anew = run.step == 0
    began, label = time.perf_counter(), f"train {run.hook or 'SAE'}"
    with (
        BatchReader(source, order, config.batch_size, run.step, total, config.device) as batches,
        bar(label, total, progress, "steps") as done,
    ):
        for step, batch in batches:
            loss = run.update(step, batch)
            last = step + 1 == total
            if (step + 1) % eval_every == 0 or last:
                run.measure(time.perf_counter() - began)
            if folder is not None and ((step + 1) % save_every == 0 or last):
                checkpoint.save(folder, step + 1, run.tensors(), {**facts, **run.record()}, anew)
                anew = False
            if on_step is not None:
                on_step(step, float(loss))
            done(step + 1)
    seconds = time.perf_counter() - began
    return TrainResult(
        sae=run.dictionary(),
        curves=run.table(),
        config=config,
        steps=total,
        tokens=total * config.batch_size,
        seconds=seconds,
        data_wait_share=batches.seconds_waited / seconds if seconds else 0.0,
    )


class _Run:
    """Weights, optimiser and counts of a run; all of it in a checkpoint."""

    def __init__(self, begun: Start, config: TrainConfig, total: int, held_out: Tensor, parts: int) -> None:
        self.config, self.total, self.recipe = config, total, begun.recipe
        self.parts = parts
        self.variance, self.largest_norm = begun.variance, begun.largest_norm
        self.hook = begun.recipe.hook_name
        self.weights = {
            name: torch.nn.Parameter(tensor.to(config.device))
            for name, tensor in sorted(begun.weights.items())
        }
        self.optimizer = torch.optim.Adam(self.weights.values(), **_ADAM, fused=True)
        self.d_sae = len(self.weights["encoder"])
        self.silent = torch.zeros(
            self.d_sae, dtype=torch.long, device=config.device
        )  # rows since a feature fired
        self.threshold = torch.full((), -1.0, device=config.device)  # below zero: not measured yet
        self.held_out = held_out
        self.spread = float((held_out.double() - held_out.double().mean(0)).square().sum())
        self.step, self.losses, self.points = 0, torch.zeros(2, dtype=torch.double), list[dict[str, Any]]()
        self.dead_after = config.dead_after(total * config.batch_size)
        self.peak = config.learning_rate(self.d_sae)

    def update(self, step: int, batch: Tensor) -> Tensor:
        """One step of Adam on a batch of rows; its loss."""
        config = self.config
        x = batch * self.recipe.input_scale
        if config.max_norm_multiple is not None:
            x = x[x.norm(dim=1) <= self.largest_norm]
        dead = self.silent >= self.dead_after if config.auxk_alpha > 0 else None
        k = config.k_at(step, self.total, self.d_sae)
        found = objective(self.weights, x, self.recipe, config, k, dead, self.variance, self.parts)
        loss = found.loss.detach()
        if not bool(torch.isfinite(loss)):
            raise NonFiniteError(
                f"loss: expected a finite number, found {float(loss)} at step {step}. Lower lr"
            )
        self.optimizer.zero_grad(set_to_none=True)
        found.loss.backward()
        self._descend(config.rate_at(step, self.total) * self.peak)
        self._count(step, found.fired, found.floor, len(x))
        self.losses += torch.tensor([float(loss), 1.0])
        self.step = step + 1
        return loss

    def _descend(self, rate: float) -> None:
        W_dec = self.weights["W_dec"]
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        with torch.no_grad():
            if self.config.decoder_norm == "unit" and W_dec.grad is not None:
                along = (W_dec.grad * W_dec).sum(1, keepdim=True)
                W_dec.grad.addcmul_(W_dec, along, value=-1)
            self.optimizer.step()
            if self.config.decoder_norm == "unit":
                W_dec.div_(W_dec.norm(dim=1, keepdim=True).clamp(min=1e-12))

    def _count(self, step: int, fired: Tensor, floor: Tensor | None, rows: int) -> None:
        self.silent += rows
        self.silent[fired] = 0
        if floor is not None:
            settled = step >= min(1000, self.total // 2)  # before, the floor moves too fast to be averaged
            beta = self.config.threshold_beta if settled else 0.0
            self.threshold = beta * self.threshold + (1 - beta) * floor

    # --- what comes out ---------------------------------------------------------------------------------

    def _as_dictionary(self) -> dict[str, Tensor]:
        tensors = {
            name: t.detach() for name, t in self.weights.items() if name not in ("encoder", "log_threshold")
        }
        tensors["W_enc"] = self.weights["encoder"].detach().T
        if self.recipe.activation == "jumprelu":
            tensors["threshold"] = self.weights["log_threshold"].detach().exp()
        if self.recipe.activation == "batch_topk" and self.threshold >= 0:
            tensors["threshold"] = self.threshold.expand(self.d_sae)
            if self.parts > 1:
                norms = decoder_norms(tensors["W_dec"], self.parts)
                tensors["threshold"] = tensors["threshold"] / norms.clamp(min=1e-12)
        return tensors

    def dictionary(self) -> SAE:
        """The dictionary as it stands, with its own memory and some held-out rows as a probe."""
        tensors = {name: t.clone() for name, t in self._as_dictionary().items()}
        made = SAE(tensors.pop("W_enc"), tensors.pop("W_dec"), recipe=self.reading, tensors=tensors)
        return made.with_probe(self.held_out[:256])

    @property
    def reading(self) -> Recipe:
        """The recipe the dictionary is read by; norms of several models are inside the threshold."""
        return self.recipe if self.parts == 1 else self.recipe.replace(norm_aware=False)

    def measure(self, seconds: float) -> None:
        """A point of the curves: FVU and L0 of held-out rows, by the recipe the dictionary will have."""
        tensors, error, active = self._as_dictionary(), 0.0, 0
        with torch.no_grad():
            for x in self.held_out.split(max(1, _EVAL_ENTRIES // self.d_sae)):
                x = x.to(self.config.device)
                x_hat, fired = self._reconstruction(x, tensors)
                error += float((x - x_hat).double().square().sum())
                active += fired
        mean_loss = float(self.losses[0] / self.losses[1])
        self.losses.zero_()
        self.points.append(
            {
                "hook": self.hook,
                "regime": self.config.regime,
                "step": self.step,
                "tokens": self.step * self.config.batch_size,
                "fvu": error / self.spread if self.spread else float("nan"),
                "l0": active / len(self.held_out),
                "dead_share": float((self.silent >= self.dead_after).double().mean()),
                "loss": mean_loss,
                "lr": self.config.rate_at(self.step - 1, self.total) * self.peak,
                "k": self.config.k_at(self.step - 1, self.total, self.d_sae),
                "seconds": seconds,
            }
        )

    def _reconstruction(self, x: Tensor, tensors: dict[str, Tensor]) -> tuple[Tensor, int]:
        """Reconstruction of rows and the number of codes; Top-K codes are never written out dense."""
        if "threshold" in tensors or self.reading.activation not in ("topk", "batch_topk"):
            codes = forward.encode_dense(x, tensors, self.reading)
            return forward.decode_dense(codes, tensors, self.reading), int((codes > 0).sum())
        score = forward.scores(forward.preactivations(x, tensors, self.reading), tensors, self.reading)
        top = torch.topk(score, self.config.k, dim=1, sorted=False)
        values = top.values
        if self.reading.norm_aware:
            values = values / tensors["W_dec"].norm(dim=1).clamp(min=1e-12)[top.indices]
        starts = torch.arange(0, (len(x) + 1) * self.config.k, self.config.k, device=x.device)
        codes = values.relu().flatten()
        x_hat = forward.decode_ragged(starts, top.indices.flatten(), codes, tensors, self.reading)
        return x_hat, int((codes > 0).sum())

    def table(self) -> pl.DataFrame:
        """The curves."""
        return pl.DataFrame(self.points, schema_overrides={"hook": pl.String}, infer_schema_length=None)

    # --- checkpoints ------------------------------------------------------------------------------------

    def tensors(self) -> dict[str, Tensor]:
        """The state as tensors by name."""
        state: dict[str, Tensor] = {"silent": self.silent, "threshold": self.threshold, "losses": self.losses}
        for name, weight in self.weights.items():
            state[f"weight.{name}"] = weight.detach()
            for key, moment in self.optimizer.state[weight].items():
                state[f"adam.{name}.{key}"] = moment
        return state

    def record(self) -> dict[str, Any]:
        """The state that is no tensor."""
        return {"points": self.points}

    def restore(self, folder: Path, facts: dict[str, Any]) -> None:
        """Continue from the last checkpoint of ``folder``, where there is one."""
        file = checkpoint.latest(folder)
        if file is None:
            return
        state, record = checkpoint.load(file, facts)
        device = self.config.device
        with torch.no_grad():
            for name, weight in self.weights.items():
                weight.copy_(state[f"weight.{name}"])
                moments = {key: state[f"adam.{name}.{key}"] for key in ("step", "exp_avg", "exp_avg_sq")}
                self.optimizer.state[weight] = {key: moment.to(device) for key, moment in moments.items()}
        self.silent, self.threshold = state["silent"].to(device), state["threshold"].to(device)
        self.losses, self.points, self.step = state["losses"], record["points"], int(record["step"])


def _origin(acts: Any, config: TrainConfig) -> dict[str, Any]:
    """Where the rows come from, for the recipe: hook, model, store and regime."""
    store = getattr(acts, "store", None)
    model = store.facts.get("model", {}) if store is not None else {}
    told = {
        "store": store.fingerprint if store is not None else None,
        "regime": config.regime,
        "loss_where": None if config.loss_where is None else str(config.loss_where),
    }
    return {
        "hook_name": getattr(acts, "hook", None),
        "model_name": model.get("name") or model.get("class"),
        "metadata": {name: value for name, value in told.items() if value is not None},
    }


def _held_out_rows(source: RowSource, numbers: np.ndarray, config: TrainConfig) -> Tensor:
    rng = np.random.default_rng([config.seed, 2 << 32])
    chosen = rng.choice(numbers, min(config.eval_rows, len(numbers)), replace=False)
    return source.read(np.sort(chosen))


def _data_facts(source: RowSource, training: np.ndarray, base: SAE | None) -> dict[str, Any]:
    """What tells one set of rows from another without reading them all."""
    some = training[np.linspace(0, len(training) - 1, min(64, len(training))).astype(int)]
    return {
        "rows": len(training),
        "width": source.d,
        "numbers_crc32": zlib.crc32(training.tobytes()),
        "sample_crc32": zlib.crc32(source.read(some).numpy().tobytes()),
        "base": None if base is None else base.fingerprint(),
    }
