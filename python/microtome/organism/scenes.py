"""Scenes: a few coloured things, each in its own cell of a 4 x 4 grid.

Two kinds of scene exist. A *shape scene* holds 2 to 5 shapes whose colours all differ. A *digit scene* holds
a digit, an operator and a digit in reading order, and spells a sum or a difference that is again one digit.

Whether a scene belongs to the train or the test split is a function of its content alone, so none is in both.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from typing import Literal

import numpy as np

Split = Literal["train", "test"]

GRID = 4
CELLS = GRID * GRID
COLOURS = ("red", "green", "blue", "yellow", "purple", "cyan")
SHAPES = ("circle", "square", "triangle", "cross")
DIGITS = tuple("0123456789")
OPERATORS = ("+", "-")
GLYPHS = SHAPES + DIGITS + OPERATORS
MIN_THINGS, MAX_THINGS = 2, 5

_TEST_SHARE = 8  # one scene in eight is a test scene


@dataclass(frozen=True, slots=True)
class Thing:
    """One coloured glyph in one cell; cells count row by row from the top left."""

    glyph: str
    colour: str
    cell: int

    @property
    def row(self) -> int:
        """Row of the cell, 0 at the top."""
        return self.cell // GRID

    @property
    def column(self) -> int:
        """Column of the cell, 0 at the left."""
        return self.cell % GRID

    def words(self) -> tuple[str, str, str, str]:
        """The thing in words: glyph, colour, column, row."""
        return self.glyph, self.colour, f"c{self.column}", f"r{self.row}"


@dataclass(frozen=True, slots=True)
class Scene:
    """An ordered set of things; the order is that of the description and does not show in the image."""

    things: tuple[Thing, ...]

    def words(self) -> list[str]:
        """The description of the scene, five words a thing: ``circle red c1 r2 ,``."""
        return [word for thing in self.things for word in (*thing.words(), ",")]

    def split(self) -> Split:
        """``"train"`` or ``"test"``, the same for every order of the things."""
        content = ";".join(sorted(f"{t.glyph} {t.colour} {t.cell}" for t in self.things))
        first = hashlib.blake2b(content.encode(), digest_size=1).digest()[0]
        return "test" if first % _TEST_SHARE == 0 else "train"

    def replace(self, index: int, thing: Thing) -> Scene:
        """The scene with the thing at ``index`` exchanged."""
        return Scene((*self.things[:index], thing, *self.things[index + 1 :]))

    def is_digits(self) -> bool:
        """Whether this is a digit scene."""
        return self.things[0].glyph in DIGITS


def draw_shapes(rng: np.random.Generator, things: int, split: Split) -> Scene:
    """A shape scene of ``things`` things: colours differ, shapes repeat often enough to be counted."""
    while True:
        palette = rng.permutation(len(SHAPES))[: rng.integers(2, len(SHAPES) + 1)]
        shapes = palette[rng.integers(len(palette), size=things)]
        colours = rng.permutation(len(COLOURS))
        cells = rng.permutation(CELLS)
        scene = Scene(
            tuple(
                Thing(SHAPES[s], COLOURS[c], int(p)) for s, c, p in zip(shapes, colours, cells, strict=False)
            )
        )
        if scene.split() == split:
            return scene


def draw_digits(rng: np.random.Generator, split: Split) -> Scene:
    """A digit scene from ``split``: ``a + b`` with a sum below ten, or ``a - b`` with ``a >= b``."""
    while True:
        high, low = sorted((int(rng.integers(10)), int(rng.integers(10))), reverse=True)
        if rng.integers(2):
            glyphs = (str(high), "-", str(low))
        elif high + low < 10:
            glyphs = (str(high), "+", str(low)) if rng.integers(2) else (str(low), "+", str(high))
        else:
            continue
        cells = np.sort(rng.permutation(CELLS)[:3])
        colours = rng.integers(len(COLOURS), size=3)
        scene = Scene(
            tuple(Thing(g, COLOURS[c], int(p)) for g, c, p in zip(glyphs, colours, cells, strict=True))
        )
        if scene.split() == split:
            return scene


def edit(scene: Scene, rng: np.random.Generator) -> Scene:
    """The scene after one small random change: a move, a swap of places, another glyph or another colour."""
    index = int(rng.integers(len(scene.things)))
    thing = scene.things[index]
    if scene.is_digits():
        alphabet = OPERATORS if thing.glyph in OPERATORS else DIGITS
        return scene.replace(index, Thing(alphabet[rng.integers(len(alphabet))], thing.colour, thing.cell))
    change = rng.integers(4)
    if change == 0:
        return scene.replace(index, Thing(SHAPES[rng.integers(len(SHAPES))], thing.colour, thing.cell))
    if change == 1:
        free = [c for c in COLOURS if all(t.colour != c for t in scene.things)]
        return scene.replace(index, Thing(thing.glyph, free[rng.integers(len(free))], thing.cell))
    if change == 2:
        empty = [c for c in range(CELLS) if all(t.cell != c for t in scene.things)]
        return scene.replace(index, Thing(thing.glyph, thing.colour, empty[rng.integers(len(empty))]))
    other = int(rng.integers(len(scene.things)))
    swapped = scene.replace(index, Thing(thing.glyph, thing.colour, scene.things[other].cell))
    partner = scene.things[other]
    return (
        swapped
        if other == index
        else swapped.replace(other, Thing(partner.glyph, partner.colour, thing.cell))
    )
