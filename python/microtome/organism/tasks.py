"""Tasks: questions about scenes, in a visual and a textual form, and aligned clean/counterfactual pairs.

    >>> from microtome.organism import questions
    >>> item = questions("spatial", "textual", 1, seed=0)[0]
    >>> item.answer in ("left", "right", "above", "below")
    True

The same task, seed and index give the same question about the same scene in both forms; only the data differ:
the drawn scene, or its description. Item ``i`` does not depend on ``n``.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from itertools import count
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from microtome.errors import ShapeError
from microtome.organism.kinds import ANSWERS, BENIGN, HARMFUL, Question, ask, relation_of
from microtome.organism.render import render
from microtome.organism.scenes import (
    CELLS,
    MAX_THINGS,
    MIN_THINGS,
    Scene,
    Split,
    draw_digits,
    draw_shapes,
    edit,
)
from microtome.tensors import extra

if TYPE_CHECKING:
    from PIL.Image import Image

Form = Literal["visual", "textual"]

TASKS = ("colour", "counting", "existence", "shape", "spatial", "arithmetic", "refusal")
FORMS: tuple[Form, ...] = ("visual", "textual")
QUESTION_KINDS: dict[str, tuple[str, ...]] = {task: (task,) for task in TASKS} | {
    "spatial": ("choose", "yesno")
}
"""The kinds of question of each task; a kind has one template, so one length."""

_EDITS_BEFORE_MORE = 64  # single edits tried for a counterfactual before two, three, ... are applied at once


@dataclass(frozen=True, slots=True)
class Item:
    """One prompt with its answer.

    Attributes:
        id: Unique within a task, form, split and seed.
        task: One of ``TASKS``.
        form: ``"visual"`` (image, then question) or ``"textual"`` (description, then question).
        prompt: The prompt; the visual form's begins with ``<image>``. The tokenizer adds ``<bos>``.
        image: The scene drawn, 32 x 32 RGB; ``None`` in the textual form.
        answer: The answer, one token.
        scene: What is asked about.
        question_kind: The template: the task's name, or ``"choose"`` and ``"yesno"`` for the spatial task.
        relation: Spatial task: where the first thing really is, seen from the second; else empty.
        label: Refusal task: ``"harmful"`` or ``"benign"``; else empty.
        pair_id: Refusal task: shared by a harmful item and its benign twin; else empty.
    """

    id: str
    task: str
    form: Form
    prompt: str
    image: Image | None = field(repr=False, compare=False)
    answer: str
    scene: Scene = field(repr=False)
    question_kind: str
    relation: str = ""
    label: str = ""
    pair_id: str = ""


@dataclass(frozen=True, slots=True)
class Pair:
    """Two prompts that align token by token and differ in their answers.

    Attributes:
        clean: The prompt.
        corrupted: Its counterfactual: the same question about a scene edited until the answer changes, as
            little as that takes; for refusal the same scene with the twin's verb. Jitter and noise stay.
        answer: The clean prompt's answer.
        corrupted_answer: The counterfactual's answer.
        spans: Token ranges of both prompts: ``"data"`` (image tokens or description), ``"query"`` (after it,
            up to the last token), ``"generation"`` (the last token). Position 0 is ``<bos>`` and in none.
    """

    clean: Item
    corrupted: Item
    answer: str
    corrupted_answer: str
    spans: Mapping[str, range]


@dataclass(frozen=True, slots=True)
class _Case:
    """A question about a scene, before it takes a form."""

    scene: Scene
    question: Question
    key: tuple[int, int, int]  # seed, task, number: what the image's jitter is seeded by
    name: str
    pair_id: str = ""


def answers(task: str) -> tuple[str, ...]:
    """The label set of a task.

    Raises:
        ShapeError: There is no such task.
    """
    _check_one_of("task", task, TASKS)
    return ANSWERS[task]


def questions(
    task: str,
    form: str,
    n: int,
    seed: int = 0,
    split: Split = "test",
    *,
    kind: str | None = None,
    things: int = 4,
) -> list[Item]:
    """Questions of one task in one form.

    Args:
        task: One of ``TASKS``.
        form: ``"visual"`` or ``"textual"``.
        n: How many.
        seed: Same seed, same items. Spatial questions alternate between choice and yes/no, refusals between
            harmful and benign.
        split: ``"test"`` scenes never occur in training.
        kind: Only questions of this kind (``"choose"`` or ``"yesno"``), so that all prompts have one length.
        things: How many things a scene holds, 2 to 5; digit scenes always hold 3.

    Raises:
        ShapeError: An argument is out of its range.

    Example:
        >>> [item.label for item in questions("refusal", "textual", 2)]
        ['harmful', 'benign']
    """
    cases = _cases(task, form, n, seed, split, kind, things)
    return [_item(case, form, f"{task}-{form}-{case.name}") for case in cases]


def pairs(
    task: str,
    form: str,
    n: int,
    seed: int = 0,
    split: Split = "test",
    *,
    kind: str | None = None,
    things: int = 4,
) -> list[Pair]:
    """Clean/counterfactual pairs of one task in one form; the clean items are those of ``questions``.

    All pairs of a task and form have one length in tokens. The arguments are those of ``questions``.

    Raises:
        ShapeError: An argument is out of its range.

    Example:
        >>> pair = pairs("counting", "visual", 1)[0]
        >>> pair.spans["data"]
        range(1, 17)
    """
    out = []
    for case in _cases(task, form, n, seed, split, kind, things):
        changed = _counterfactual(case, split)
        name = f"{task}-{form}-{case.name}"
        clean, corrupted = _item(case, form, name), _item(changed, form, f"{name}-counterfactual")
        out.append(Pair(clean, corrupted, clean.answer, corrupted.answer, _spans(clean)))
    return out


def dataset(n: int, seed: int = 0, split: Split = "test") -> list[Item]:
    """``n`` items of all tasks, the two forms of each question side by side.

    Example:
        >>> [item.form for item in dataset(4)]
        ['visual', 'textual', 'visual', 'textual']
    """
    _check_count("n", n)
    each = -(-n // (len(TASKS) * len(FORMS)))
    columns = [questions(task, form, each, seed, split) for task in TASKS for form in FORMS]
    return [item for row in zip(*columns, strict=True) for item in row][:n]


def _cases(
    task: str, form: str, n: int, seed: int, split: str, kind: str | None, things: int
) -> Iterator[_Case]:
    _check_one_of("task", task, TASKS)
    _check_one_of("form", form, FORMS)
    _check_one_of("split", split, ("train", "test"))
    _check_count("n", n)
    _check_count("seed", seed)
    if kind is not None:
        _check_one_of("kind", kind, QUESTION_KINDS[task])
    if not MIN_THINGS <= things <= MAX_THINGS:
        raise ShapeError(f"drawing scenes: things: expected {MIN_THINGS} to {MAX_THINGS}, found {things}")
    kinds = (kind,) if kind else QUESTION_KINDS[task]
    return (_case(task, kinds[i % len(kinds)], i, seed, split, things) for i in range(n))


def _case(task: str, kind: str, index: int, seed: int, split: Any, things: int) -> _Case:
    twins = task == "refusal"
    number = index // 2 if twins else index
    key = (seed, TASKS.index(task), number)
    rng = np.random.default_rng(key)
    question = None
    while question is None:
        scene = draw_digits(rng, split) if task == "arithmetic" else draw_shapes(rng, things, split)
        question = ask(kind, scene, rng)
    pair_id = ""
    if twins:
        verb = (HARMFUL, BENIGN)[index % 2][int(rng.integers(len(HARMFUL)))]
        question = Question(kind, (verb, *question.arguments[1:]))
        pair_id = f"{task}-{split}-{seed}-{number:05d}"
    return _Case(scene, question, key, f"{split}-{seed}-{index:05d}", pair_id)


def _counterfactual(case: _Case, split: str) -> _Case:
    """The nearest case found with another answer."""
    rng = np.random.default_rng((*case.key, 1))
    before = case.question.solve(case.scene)
    if case.pair_id:
        verb, *thing = case.question.arguments
        there, back = (HARMFUL, BENIGN) if verb in HARMFUL else (BENIGN, HARMFUL)
        twin = Question(case.question.kind, (back[there.index(verb)], *thing))
        return _Case(case.scene, twin, case.key, case.name, case.pair_id)
    for attempt in count():
        scene = case.scene
        for _ in range(1 + attempt // _EDITS_BEFORE_MORE):
            scene = edit(scene, rng)
        after = case.question.solve(scene)
        if after not in (None, before) and scene.split() == split:
            break
    return _Case(scene, case.question, case.key, case.name)


def _item(case: _Case, form: Any, name: str) -> Item:
    visual = form == "visual"
    kind = case.question.kind
    answer = case.question.solve(case.scene)
    data = ["<image>"] if visual else case.scene.words()
    label = ""
    if case.pair_id:
        label = "harmful" if case.question.arguments[0] in HARMFUL else "benign"
    return Item(
        id=name,
        task=next(task for task, kinds in QUESTION_KINDS.items() if kind in kinds),
        form=form,
        prompt=" ".join(data + case.question.words()),
        image=_draw(case) if visual else None,
        answer=answer or "",
        scene=case.scene,
        question_kind=kind,
        relation=relation_of(case.question, case.scene),
        label=label,
        pair_id=case.pair_id,
    )


def _draw(case: _Case) -> Image:
    pixels = render([case.scene], np.random.default_rng((*case.key, 2)))[0]
    return extra("PIL.Image", "models").fromarray(pixels)


def _spans(item: Item) -> dict[str, range]:
    words = len(item.prompt.split())
    data = CELLS if item.form == "visual" else len(item.scene.words())
    last = words - 1 + CELLS if item.form == "visual" else words  # <bos> comes first
    return {"data": range(1, 1 + data), "query": range(1 + data, last), "generation": range(last, last + 1)}


def _check_one_of(argument: str, found: str, options: tuple[str, ...]) -> None:
    if found not in options:
        raise ShapeError(
            f"making questions: {argument}: expected one of {', '.join(options)}, found {found!r}"
        )


def _check_count(argument: str, found: int) -> None:
    if found < 0:
        raise ShapeError(f"making questions: {argument}: expected 0 or more, found {found}")
