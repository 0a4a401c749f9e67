"""Train the model organism: text-only language model, vision tower, VLM. Resumes where it stopped.

    python -m microtome.organism.train OUT

What makes spatial relations learnable for a model this small: locating is taught first, as a continuation of
the description; comparing two places is taught beside it; the composed question comes only when both are
solved; and the learning rate is held until then.
"""

from __future__ import annotations

import argparse
import json
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.nn import functional
from transformers import CLIPVisionModel, LlamaForCausalLM

from microtome.organism import parallel
from microtome.organism.answering import accuracy
from microtome.organism.architecture import assemble, text_config, vision_config
from microtome.organism.curriculum import Curriculum
from microtome.organism.kinds import WORDS
from microtome.organism.packing import Batch, batch
from microtome.organism.tasks import FORMS, TASKS, questions
from microtome.organism.vision import train_vision
from microtome.organism.vocabulary import build_processor, build_tokenizer

LENGTH = 128  # tokens a row
LOG_EVERY, SAVE_EVERY = 50, 200


@dataclass(frozen=True)
class Schedule:
    """Learning rate: warm-up, held until everything is solved or time is up, then down to zero."""

    rate: float
    warm_up: int
    most: int  # steps before the decay begins at the latest
    decay: int

    def at(self, step: int, decays_from: int | None) -> float:
        """The rate at ``step``."""
        rate = self.rate * min(1.0, (step + 1) / self.warm_up)
        return rate if decays_from is None else rate * max(0.0, 1 - (step - decays_from) / self.decay)


@dataclass(frozen=True)
class Stage:
    """One stage of question answering."""

    name: str
    seed: int
    rows: int  # of a batch
    images: float  # share of rows that show their scene instead of describing it
    schedule: Schedule


LANGUAGE = Stage("base_lm", 1, 40, 0.0, Schedule(1e-3, 100, 3000, 600))
MULTIMODAL = Stage("vlm", 2, 24, 0.75, Schedule(1e-3, 100, 3200, 800))


def logits_of(model: nn.Module, packed: Batch) -> torch.Tensor:
    """Logits (b, t, vocabulary), computed in bfloat16."""
    images = {} if packed.pixels is None else {"pixel_values": packed.pixels}
    with torch.autocast("cpu", torch.bfloat16):
        out = model(
            input_ids=packed.ids,
            position_ids=packed.positions,
            attention_mask=packed.mask,
            use_cache=False,
            **images,
        )
    logits: torch.Tensor = out.logits.float()
    return logits


def loss_of(logits: torch.Tensor, packed: Batch) -> torch.Tensor:
    """Weighted cross-entropy of the next token."""
    flat = functional.cross_entropy(
        logits[:, :-1].flatten(0, 1), packed.ids[:, 1:].flatten(), reduction="none"
    )
    weights = packed.weights[:, 1:].flatten()
    return (flat * weights).sum() / weights.sum()


def hits_of(logits: torch.Tensor, packed: Batch) -> dict[tuple[str, bool], list[bool]]:
    """Right or wrong for each question, by kind and by whether its scene was shown."""
    rows, places = (
        torch.tensor(x) for x in zip(*((row, place) for row, place, _ in packed.asked), strict=True)
    )
    right = (logits[rows, places - 1].argmax(-1) == packed.ids[rows, places]).tolist()
    shown = (packed.ids[:, 1] == WORDS.index("<image>")).tolist()
    hits: dict[tuple[str, bool], list[bool]] = {}
    for (row, _, kind), hit in zip(packed.asked, right, strict=True):
        hits.setdefault((kind, shown[row]), []).append(hit)
    return hits


@dataclass
class Progress:
    """Where a run stands, apart from tensors."""

    curriculum: Curriculum
    step: int = 0
    decays_from: int | None = None
    seconds: float = 0.0


class Run:
    """A stage under way. A step's randomness follows from its number: resumed is as good as never stopped."""

    def __init__(self, stage: Stage, model: nn.Module, out: Path) -> None:
        self.stage, self.model, self.out = stage, model, out
        self.optimizer = torch.optim.AdamW(
            model.parameters(), betas=(0.9, 0.98), weight_decay=0.01, fused=True
        )
        self.progress = Progress(Curriculum())
        self._checkpoint = out / f"{stage.name}.checkpoint"
        if self._checkpoint.exists():
            self._restore()

    def _restore(self) -> None:
        state = torch.load(self._checkpoint, weights_only=True)
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        curriculum = Curriculum(**state["curriculum"])
        self.progress = Progress(curriculum, state["step"], state["decays_from"], state["seconds"])

    def save(self) -> None:
        """Write the checkpoint, whole or not at all."""
        state = {
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "curriculum": self.progress.curriculum.state(),
            "step": self.progress.step,
            "decays_from": self.progress.decays_from,
            "seconds": self.progress.seconds,
        }
        part = self._checkpoint.with_suffix(".part")
        torch.save(state, part)
        part.replace(self._checkpoint)

    def finished(self) -> bool:
        """Whether the decay has run its course."""
        start = self.progress.decays_from
        return start is not None and self.progress.step >= start + self.stage.schedule.decay

    def advance(self) -> dict[str, float]:
        """One step; returns its loss and rate."""
        started = time.monotonic()
        progress, schedule = self.progress, self.stage.schedule
        if progress.decays_from is None and (progress.curriculum.solved() or progress.step >= schedule.most):
            progress.decays_from = progress.step
        rate = schedule.at(progress.step, progress.decays_from)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        rng = np.random.default_rng((self.stage.seed, progress.step, parallel.rank()))
        mix = progress.curriculum.mix(self.stage.images)
        packed = batch(mix, self.stage.rows // parallel.processes(), LENGTH, rng)
        logits = logits_of(self.model, packed)
        loss = loss_of(logits, packed)
        self.optimizer.zero_grad()
        loss.backward()
        parallel.average_gradients(self.model)
        nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        hits = parallel.gather_hits(hits_of(logits.detach(), packed))
        visual = self.stage.images > 0
        progress.curriculum.update({kind: hit for (kind, shown), hit in hits.items() if shown == visual})
        progress.step += 1
        progress.seconds += time.monotonic() - started
        return {"loss": round(loss.item(), 4), "rate": round(rate, 7)}

    def finish(self) -> None:
        """Run to the end, logging and saving on the way."""
        while not self.finished():
            figures = self.advance()
            progress = self.progress
            if progress.step % LOG_EVERY == 0 or self.finished():
                running = {kind: round(value, 3) for kind, value in progress.curriculum.accuracy.items()}
                where = {"stage": self.stage.name, "step": progress.step, "seconds": round(progress.seconds)}
                write_log(self.out, where | figures | {"training_accuracy": running})
            if parallel.rank() == 0 and (progress.step % SAVE_EVERY == 0 or self.finished()):
                self.save()


def write_log(out: Path, line: dict[str, Any]) -> None:
    """Append a line to the log and show it; the first process does."""
    if parallel.rank():
        return
    text = json.dumps(line)
    with (out / "log.jsonl").open("a") as log:
        log.write(text + "\n")
    print(text, flush=True)


def language_model(out: Path, seed: int) -> LlamaForCausalLM:
    """The base language model, from text alone."""
    torch.manual_seed(seed)
    model = LlamaForCausalLM(text_config())
    Run(replace(LANGUAGE, seed=seed + LANGUAGE.seed), model, out).finish()
    return model


def vision_tower(out: Path, seed: int) -> CLIPVisionModel:
    """The vision tower, from labelled patches."""
    kept = out / "vision.checkpoint"
    if kept.exists():
        tower = CLIPVisionModel(vision_config())
        tower.load_state_dict(torch.load(kept, weights_only=True))
        return tower
    tower, scores = train_vision(seed, steps=700, rows=96, rate=2e-3)
    write_log(out, {"stage": "vision", "accuracy": {part: round(score, 4) for part, score in scores.items()}})
    if parallel.rank() == 0:
        torch.save(tower.state_dict(), kept)
    return tower


def export(model: Any, folder: Path) -> None:
    """Write a model in bfloat16 with its tokenizer, and its processor where it sees."""
    folder.mkdir(parents=True, exist_ok=True)
    words = {
        name: value.to(torch.bfloat16)
        for name, value in model.state_dict().items()
        if value.is_floating_point()
    }
    model.load_state_dict(words, strict=False)  # rounded in place: what is scored is what is written
    model.to(torch.bfloat16).save_pretrained(folder)
    model.float()
    if folder.name == "vlm":
        build_processor().save_pretrained(folder)
    else:
        build_tokenizer().save_pretrained(folder)


def score(model: Any, out: Path, name: str, forms: tuple[str, ...], n: int = 2048) -> None:
    """Log the accuracy on unseen scenes, by task and form."""
    model.eval()
    processor = build_processor()
    for form in forms:
        row = {task: round(accuracy(model, processor, questions(task, form, n)), 4) for task in TASKS}
        write_log(out, {"stage": name, "form": form, "questions": n, "test_accuracy": row})


def train(out: Path, seed: int = 0) -> None:
    """Train whatever is not trained yet, and export both models to ``out``."""
    first = parallel.rank() == 0
    out.mkdir(parents=True, exist_ok=True)
    language = language_model(out, seed)
    vision = vision_tower(out, seed)
    torch.manual_seed(seed)
    vlm = assemble(language, vision)
    if first and not (out / "base_lm").exists():
        export(language, out / "base_lm")
        score(language, out, "base_lm", ("textual",))
    Run(replace(MULTIMODAL, seed=seed + MULTIMODAL.seed), vlm, out).finish()
    if first:
        export(vlm, out / "vlm")
        score(vlm, out, "vlm", FORMS)


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description="Train the model organism; run again to resume.")
    parser.add_argument("out", type=Path, help="folder for checkpoints, log and weights")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--processes", type=int, default=2, help="processes of one thread each; a batch is split"
    )
    arguments = parser.parse_args()
    parallel.run(train, arguments.processes, arguments.out, arguments.seed)


if __name__ == "__main__":
    main()
