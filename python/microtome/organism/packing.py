"""Training batches: many questions a scene, and a mask under which each question stands alone.

A question sees the scene and itself, at the positions it would have if it were the only one. So the model
trains on exactly the prompts it is asked later, while the scene is read once for all its questions.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np
import torch

from microtome.organism.kinds import WORDS, ask
from microtome.organism.render import render
from microtome.organism.scenes import CELLS, MAX_THINGS, MIN_THINGS, Scene, draw_digits, draw_shapes

if TYPE_CHECKING:
    from numpy.typing import NDArray

ID = {word: i for i, word in enumerate(WORDS)}
_BOS, _EOS, _IMAGE = ID["<bos>"], ID["<eos>"], ID["<image>"]
_DESCRIPTION_WEIGHT = 0.02  # of a description's tokens in the loss; an answer's token has 1


@dataclass
class Batch:
    """A packed batch of ``b`` rows of ``t`` tokens."""

    ids: torch.Tensor  # (b, t) int64
    positions: torch.Tensor  # (b, t) int64
    mask: torch.Tensor  # (b, 1, t, t) bool: which tokens a token sees
    weights: torch.Tensor  # (b, t): of predicting this token
    pixels: torch.Tensor | None  # (images, 3, 32, 32)
    asked: list[tuple[int, int, str]]  # row, place of the answer, kind


@dataclass
class _Row:
    ids: list[int] = field(default_factory=list)
    positions: list[int] = field(default_factory=list)
    scene: list[int] = field(default_factory=list)  # number of the scene within the row
    question: list[int] = field(
        default_factory=list
    )  # number of the question within the row, 0 for a scene's own tokens
    weights: list[float] = field(default_factory=list)
    asked: list[tuple[int, str]] = field(default_factory=list)
    images: list[Scene] = field(default_factory=list)

    def add(self, ids: list[int], start: int, scene: int, question: int, weights: list[float]) -> None:
        """Append tokens at the positions from ``start``."""
        self.ids += ids
        self.positions += range(start, start + len(ids))
        self.scene += [scene] * len(ids)
        self.question += [question] * len(ids)
        self.weights += weights


@dataclass(frozen=True)
class Mix:
    """What a batch is made of."""

    kinds: dict[str, float]  # share of each kind of question about shape scenes
    digits: float  # share of the rows that hold digit scenes
    images: float  # share of the rows that show their scenes


def _append_scene(row: _Row, scene: Scene, visual: bool, number: int) -> int:
    if visual:
        ids = [_BOS, *[_IMAGE] * CELLS]
        row.images.append(scene)
    else:
        ids = [_BOS, *(ID[word] for word in scene.words())]
    row.add(ids, 0, number, 0, [0.0] + [0.0 if visual else _DESCRIPTION_WEIGHT] * (len(ids) - 1))
    return len(ids)


def _append_question(
    row: _Row, scene: Scene, kind: str, rng: np.random.Generator, start: int, number: int
) -> None:
    question = ask(kind, scene, rng)
    answer = question.solve(scene) if question else None
    if question is None or answer is None:  # nothing of this kind to ask about this scene
        return
    words = question.words()
    row.asked.append((len(row.ids) + len(words), question.kind))
    ids = [*(ID[word] for word in words + answer.split()), _EOS]
    weights = [0.0] * len(words) + [1.0] * len(answer.split()) + [_DESCRIPTION_WEIGHT]
    row.add(ids, start, number, len(row.asked), weights)


def _row(mix: Mix, rng: np.random.Generator, length: int) -> _Row:
    row, visual = _Row(), bool(rng.random() < mix.images)
    if rng.random() < mix.digits:
        scenes = 0
        while len(row.ids) + 1 + max(CELLS, 15) + 7 + 4 <= length:
            scene = draw_digits(rng, "train")
            start = _append_scene(row, scene, visual, scenes)
            _append_question(row, scene, "arithmetic", rng, start, scenes)
            _append_question(row, scene, "name", rng, start, scenes)
            scenes += 1
        return row
    scene = draw_shapes(rng, int(rng.integers(MIN_THINGS, MAX_THINGS + 1)), "train")
    start = _append_scene(row, scene, visual, 0)
    kinds = list(mix.kinds)
    drawn = rng.choice(len(kinds), 32, p=np.array(list(mix.kinds.values())) / sum(mix.kinds.values()))
    for kind in drawn:
        if len(row.ids) + 12 > length:
            break
        _append_question(row, scene, kinds[kind], rng, start, 0)
    return row


def batch(mix: Mix, rows: int, length: int, rng: np.random.Generator) -> Batch:
    """A batch of ``rows`` rows of ``length`` tokens, drawn from ``mix``."""
    drawn = [_row(mix, rng, length) for _ in range(rows)]

    def padded(name: str, fill: int) -> NDArray[np.int64]:
        out = np.full((rows, length), fill, np.int64)
        for i, row in enumerate(drawn):
            values = getattr(row, name)
            out[i, : len(values)] = values
        return out

    weights = np.zeros((rows, length), np.float32)
    for i, row in enumerate(drawn):
        weights[i, : len(row.weights)] = row.weights
    scene, question = padded("scene", -1), padded("question", 0)
    sees = scene[:, :, None] == scene[:, None, :]
    sees &= (question[:, None, :] == 0) | (question[:, :, None] == question[:, None, :])
    sees &= np.tri(length, dtype=bool)
    images = [scene for row in drawn for scene in row.images]
    return Batch(
        ids=torch.from_numpy(padded("ids", 0)),
        positions=torch.from_numpy(padded("positions", 0)),
        mask=torch.from_numpy(sees[:, None]),
        weights=torch.from_numpy(weights),
        pixels=pixel_values(render(images, rng)) if images else None,
        asked=[(i, place, kind) for i, row in enumerate(drawn) for place, kind in row.asked],
    )


def pixel_values(images: NDArray[np.uint8]) -> torch.Tensor:
    """Images (n, 32, 32, 3) as the image processor gives them: (n, 3, 32, 32), mean 0.5, deviation 0.25."""
    scaled = (images.astype(np.float32) / 255 - 0.5) / 0.25
    return torch.from_numpy(np.ascontiguousarray(scaled.transpose(0, 3, 1, 2)))
