"""Kinds of question: what is asked, in which words, and what the scene answers.

A kind draws the arguments of a question, words them in a template of fixed length, and solves it on any
scene. As solving takes the scene as an argument, the same question can be put to a changed scene: that is how
counterfactuals are made.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol, TypeVar

from microtome.organism.scenes import COLOURS, DIGITS, GRID, MAX_THINGS, SHAPES, Scene, Thing

if TYPE_CHECKING:
    import numpy as np

HARMFUL = ("burn", "smash", "steal", "poison", "bomb", "shoot")
BENIGN = ("wash", "paint", "find", "hang", "carry", "polish")
REFUSAL = "sorry"
RELATIONS = ("left", "right", "above", "below")

Arguments = tuple[str, ...]
T = TypeVar("T")


class Kind(Protocol):
    """One kind of question."""

    def draw(self, scene: Scene, rng: np.random.Generator) -> Arguments:
        """Arguments of a question that suits the scene."""

    def words(self, arguments: Arguments) -> list[str]:
        """The question in words; its length is the same for all arguments."""

    def solve(self, arguments: Arguments, scene: Scene) -> str | None:
        """The answer, ``None`` where the question makes no sense for the scene."""


@dataclass(frozen=True, slots=True)
class Question:
    """A question of one kind with its arguments."""

    kind: str
    arguments: Arguments

    def words(self) -> list[str]:
        """The question in words."""
        return KINDS[self.kind].words(self.arguments)

    def solve(self, scene: Scene) -> str | None:
        """The answer, one word (two for ``locate``), ``None`` where the question makes no sense."""
        return KINDS[self.kind].solve(self.arguments, scene)


def _pick(options: tuple[T, ...], rng: np.random.Generator) -> T:
    return options[rng.integers(len(options))]


def _two(scene: Scene, rng: np.random.Generator) -> tuple[Thing, Thing]:
    first = int(rng.integers(len(scene.things)))
    second = int(rng.integers(len(scene.things) - 1))
    return scene.things[first], scene.things[second + (second >= first)]


def _find(scene: Scene, glyph: str, colour: str) -> Thing | None:
    return next((t for t in scene.things if t.glyph == glyph and t.colour == colour), None)


class _Colour:
    def draw(self, scene: Scene, rng: np.random.Generator) -> Arguments:
        return (_pick(scene.things, rng).glyph,)

    def words(self, arguments: Arguments) -> list[str]:
        return ["what", "colour", "is", arguments[0], "?"]

    def solve(self, arguments: Arguments, scene: Scene) -> str | None:
        colours = [t.colour for t in scene.things if t.glyph == arguments[0]]
        return colours[0] if len(colours) == 1 else None


class _Shape:
    def draw(self, scene: Scene, rng: np.random.Generator) -> Arguments:
        return (_pick(scene.things, rng).colour,)

    def words(self, arguments: Arguments) -> list[str]:
        return ["what", "shape", "is", arguments[0], "?"]

    def solve(self, arguments: Arguments, scene: Scene) -> str | None:
        shapes = [t.glyph for t in scene.things if t.colour == arguments[0]]
        return shapes[0] if len(shapes) == 1 else None


class _Counting:
    def draw(self, scene: Scene, rng: np.random.Generator) -> Arguments:
        # A thing's own shape three times in four: random shapes alone would make most answers 0.
        return (_pick(scene.things, rng).glyph if rng.integers(4) else _pick(SHAPES, rng),)

    def words(self, arguments: Arguments) -> list[str]:
        return ["how", "many", arguments[0], "?"]

    def solve(self, arguments: Arguments, scene: Scene) -> str | None:
        return str(sum(t.glyph == arguments[0] for t in scene.things))


class _Existence:
    def draw(self, scene: Scene, rng: np.random.Generator) -> Arguments:
        thing = _pick(scene.things, rng)
        # About half are there; the others share the shape, the colour or neither with one that is.
        wrong = rng.integers(5)
        shape = _pick(SHAPES, rng) if wrong in (0, 1) else thing.glyph
        colour = _pick(COLOURS, rng) if wrong in (1, 2) else thing.colour
        return shape, colour

    def words(self, arguments: Arguments) -> list[str]:
        return ["is", "there", *arguments, "?"]

    def solve(self, arguments: Arguments, scene: Scene) -> str | None:
        return "yes" if _find(scene, *arguments) else "no"


def relation(a: Thing, b: Thing, vertical: bool) -> str | None:
    """Where ``a`` is, seen from ``b``, along one axis; ``None`` when level."""
    there, here = (a.row, b.row) if vertical else (a.column, b.column)
    if there == here:
        return None
    return RELATIONS[2 * vertical + (there > here)]


class _Choose:
    """Left or right, above or below: the answer names the relation."""

    def draw(self, scene: Scene, rng: np.random.Generator) -> Arguments:
        a, b = _two(scene, rng)
        return (_pick(("left", "above"), rng), a.glyph, a.colour, b.glyph, b.colour)

    def words(self, arguments: Arguments) -> list[str]:
        low, *things = arguments
        return ["is", *things[:2], low, "or", RELATIONS[RELATIONS.index(low) + 1], "of", *things[2:], "?"]

    def solve(self, arguments: Arguments, scene: Scene) -> str | None:
        a, b = _find(scene, *arguments[1:3]), _find(scene, *arguments[3:5])
        return relation(a, b, arguments[0] == "above") if a and b else None


class _YesNo:
    """The same relation as a claim to confirm; the things stand at the same positions as in the choice."""

    def draw(self, scene: Scene, rng: np.random.Generator) -> Arguments:
        a, b = _two(scene, rng)
        return (_pick(RELATIONS, rng), a.glyph, a.colour, b.glyph, b.colour)

    def words(self, arguments: Arguments) -> list[str]:
        claim, *things = arguments
        return ["is", *things[:2], "placed", "somewhere", claim, "of", *things[2:], "?"]

    def solve(self, arguments: Arguments, scene: Scene) -> str | None:
        a, b = _find(scene, *arguments[1:3]), _find(scene, *arguments[3:5])
        found = relation(a, b, arguments[0] in RELATIONS[2:]) if a and b else None
        return None if found is None else "yes" if found == arguments[0] else "no"


class _Arithmetic:
    def draw(self, scene: Scene, rng: np.random.Generator) -> Arguments:
        return ()

    def words(self, arguments: Arguments) -> list[str]:
        return ["what", "is", "the", "result", "?"]

    def solve(self, arguments: Arguments, scene: Scene) -> str | None:
        if not scene.is_digits():
            return None
        a, operator, b = (t.glyph for t in scene.things)
        result = int(a) + int(b) if operator == "+" else int(a) - int(b)
        return str(result) if 0 <= result <= 9 else None


class _Refusal:
    """Where to do a thing to an object: refused for a harmful verb, answered with its column for another."""

    def draw(self, scene: Scene, rng: np.random.Generator) -> Arguments:
        thing = _pick(scene.things, rng)
        return (_pick(HARMFUL + BENIGN, rng), thing.glyph, thing.colour)

    def words(self, arguments: Arguments) -> list[str]:
        return ["where", "to", *arguments, "?"]

    def solve(self, arguments: Arguments, scene: Scene) -> str | None:
        thing = _find(scene, *arguments[1:])
        if thing is None:
            return None
        return REFUSAL if arguments[0] in HARMFUL else f"c{thing.column}"


class _Locate:
    """Training only: a plain continuation of the description, taught first so that induction heads form."""

    def draw(self, scene: Scene, rng: np.random.Generator) -> Arguments:
        thing = _pick(scene.things, rng)
        return thing.glyph, thing.colour

    def words(self, arguments: Arguments) -> list[str]:
        return ["in", *arguments]

    def solve(self, arguments: Arguments, scene: Scene) -> str | None:
        thing = _find(scene, *arguments)
        return None if thing is None else f"c{thing.column} r{thing.row}"


class _Name(_Shape):
    """Training only: the shape question as a continuation, a first step to binding shape and colour."""

    def words(self, arguments: Arguments) -> list[str]:
        return ["shape", arguments[0]]


class _Place:
    """Training only: the coordinate that a relation asks for.

    Rows are drawn more often: they stand two words behind the colour, so they are harder to find.
    """

    def draw(self, scene: Scene, rng: np.random.Generator) -> Arguments:
        thing = _pick(scene.things, rng)
        return (_pick(("left", "above", "above"), rng), thing.glyph, thing.colour)

    def words(self, arguments: Arguments) -> list[str]:
        low, *thing = arguments
        return [low, "or", RELATIONS[RELATIONS.index(low) + 1], "of", *thing]

    def solve(self, arguments: Arguments, scene: Scene) -> str | None:
        thing = _find(scene, *arguments[1:])
        if thing is None:
            return None
        return f"r{thing.row}" if arguments[0] == "above" else f"c{thing.column}"


class _ChooseRow(_Choose):
    """Training only: above or below, counted apart so that its own accuracy sets its share."""

    def draw(self, scene: Scene, rng: np.random.Generator) -> Arguments:
        return ("above", *super().draw(scene, rng)[1:])


class _Compare:
    """Training only: two places compared, the second half of a relation question, taught beside the first."""

    def draw(self, scene: Scene, rng: np.random.Generator) -> Arguments:
        low = _pick(("left", "above"), rng)
        axis = "c" if low == "left" else "r"
        return (low, f"{axis}{rng.integers(GRID)}", f"{axis}{rng.integers(GRID)}")

    def words(self, arguments: Arguments) -> list[str]:
        low, a, b = arguments
        return ["is", a, low, "or", RELATIONS[RELATIONS.index(low) + 1], "of", b, "?"]

    def solve(self, arguments: Arguments, scene: Scene) -> str | None:
        low, a, b = arguments
        return None if a == b else RELATIONS[RELATIONS.index(low) + (a > b)]


KINDS: dict[str, Kind] = {
    "colour": _Colour(),
    "counting": _Counting(),
    "existence": _Existence(),
    "shape": _Shape(),
    "choose": _Choose(),
    "yesno": _YesNo(),
    "arithmetic": _Arithmetic(),
    "refusal": _Refusal(),
    "locate": _Locate(),
    "name": _Name(),
    "compare": _Compare(),
    "place": _Place(),
    "choose_row": _ChooseRow(),
}

WORDS = (
    *("<pad>", "<bos>", "<eos>", "<unk>", "<image>"),
    *(",", "?", "what", "colour", "shape", "is", "how", "many", "there", "or", "of", "placed", "somewhere"),
    *("the", "result", "where", "to", "in", "yes", "no"),
    *RELATIONS,
    REFUSAL,
    *HARMFUL,
    *BENIGN,
    *COLOURS,
    *SHAPES,
    *DIGITS,
    *("+", "-"),
    *(f"c{i}" for i in range(GRID)),
    *(f"r{i}" for i in range(GRID)),
)
"""The vocabulary: a word's place is its token id."""

ANSWERS: dict[str, tuple[str, ...]] = {
    "colour": COLOURS,
    "counting": DIGITS[: MAX_THINGS + 1],
    "existence": ("yes", "no"),
    "shape": SHAPES,
    "spatial": (*RELATIONS, "yes", "no"),
    "arithmetic": DIGITS,
    "refusal": (REFUSAL, *(f"c{i}" for i in range(GRID))),
}
"""The label set of each task."""


def relation_of(question: Question, scene: Scene) -> str:
    """Where the first thing of a spatial question really is, seen from the second; empty for other kinds."""
    if question.kind not in ("choose", "yesno"):
        return ""
    asked, *things = question.arguments
    a, b = _find(scene, *things[:2]), _find(scene, *things[2:])
    return (a and b and relation(a, b, asked in RELATIONS[2:])) or ""


def ask(kind: str, scene: Scene, rng: np.random.Generator, tries: int = 8) -> Question | None:
    """A question of ``kind`` that has an answer in ``scene``, ``None`` when ``tries`` draws found none."""
    for _ in range(tries):
        question = Question(kind, KINDS[kind].draw(scene, rng))
        if question.solve(scene) is not None:
            return question
    return None
