"""Task files: prompts with answers, and clean / counterfactual pairs, from local files in their published formats.

    >>> rows = [{"prompt": "2 + 3 =", "answer": "5"}, {"prompt": "4 + 4 =", "answer": "8"}]
    >>> pairs = counterfactual_pairs([Prompt(**row) for row in rows])
    >>> pairs[0].answer, pairs[0].corrupted_answer
    ('5', '8')

Loaders read what the data sets publish: JSON and JSON lines beside a folder of images. Nothing is downloaded,
and an image is opened when it is first asked for.
"""

from __future__ import annotations

import json
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from microtome.errors import Error, ShapeError, first_line
from microtome.tensors import extra

__all__ = [
    "MAX_PIXELS",
    "Prompt",
    "PromptPair",
    "counterfactual_pairs",
    "load_pairs",
    "load_prompts",
    "save_pairs",
    "split",
]

MAX_PIXELS = 100_000_000
"""Pictures with more pixels are refused: a small file may unpack to more than memory holds."""


@dataclass(frozen=True)
class Prompt:
    """One prompt with its answer."""

    prompt: str
    answer: str
    image_path: str | None = None
    id: str = ""
    task: str = ""
    form: str = ""
    """``"visual"`` or ``"textual"``; told by the image when empty."""
    template: str = ""
    """Prompts of one template pair with each other when any do."""
    data: str | None = None
    """The part of a textual prompt that describes what a picture would show."""
    facts: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not self.form:
            object.__setattr__(self, "form", "visual" if self.image_path else "textual")

    @cached_property
    def image(self) -> Any:
        """The picture in RGB, or None.

        Raises:
            ShapeError: more than ``MAX_PIXELS`` pixels.
        """
        if self.image_path is None:
            return None
        picture = extra("PIL.Image", "models").open(self.image_path)
        if picture.width * picture.height > MAX_PIXELS:
            raise ShapeError(
                f"image: {self.image_path}: expected at most {MAX_PIXELS} pixels, found {picture.width} x {picture.height}"
            )
        return picture.convert("RGB")


@dataclass(frozen=True)
class PromptPair:
    """A prompt and its counterfactual, as :func:`microtome.circuits.prepare` takes them."""

    clean: Prompt
    corrupted: Prompt
    answer: str
    corrupted_answer: str
    spans: Mapping[str, Sequence[int]] | None = None
    """Token positions of data, query and generation; found from the prompt when None."""


def counterfactual_pairs(prompts: Sequence[Prompt], seed: int = 42) -> list[PromptPair]:
    """For each prompt a random one of its task and form with another answer, of its template if there is one.

    Raises:
        ShapeError: a prompt has no other answer beside it.
    """
    rng = np.random.default_rng(seed)
    groups: dict[tuple[str, str], list[int]] = defaultdict(list)
    for i, prompt in enumerate(prompts):
        groups[prompt.task, prompt.form].append(i)
    pairs = []
    for prompt in prompts:
        others = [i for i in groups[prompt.task, prompt.form] if prompts[i].answer != prompt.answer]
        others = [i for i in others if prompts[i].template == prompt.template] or others
        if not others:
            raise ShapeError(
                f"counterfactual: prompt {prompt.id or prompt.prompt!r}: expected another prompt of task {prompt.task!r} with "
                f"another answer than {prompt.answer!r}, found none"
            )
        other = prompts[others[int(rng.integers(len(others)))]]
        pairs.append(PromptPair(prompt, other, prompt.answer, other.answer))
    return pairs


def split(
    prompts: Sequence[Prompt], fraction: float = 0.75, seed: int = 42
) -> tuple[list[Prompt], list[Prompt]]:
    """A discovery and an evaluation part, drawn without replacement; each keeps its order.

    Pair after splitting: a counterfactual then comes from its prompt's own part.

    Raises:
        ShapeError: a part would be empty.
    """
    discovery, evaluation = split_numbers(len(prompts), fraction, seed, "prompts")
    return [prompts[i] for i in discovery], [prompts[i] for i in evaluation]


def split_numbers(n: int, fraction: float, seed: int, what: str) -> tuple[npt.NDArray[Any], npt.NDArray[Any]]:
    """The numbers below ``n`` in two parts, drawn without replacement, each rising.

    Raises:
        ShapeError: a part would be empty; ``what`` is split.
    """
    first = round(fraction * n)
    if not 0 < first < n:
        raise ShapeError(f"split: fraction: expected two non-empty parts of {n} {what}, found {fraction}")
    order = np.random.default_rng(seed).permutation(n)
    return np.sort(order[:first]), np.sort(order[first:])


def save_pairs(pairs: Sequence[PromptPair], path: str | Path) -> None:
    """Write JSON lines, one pair a line."""
    lines = [json.dumps(asdict(pair), ensure_ascii=False) for pair in pairs]
    Path(path).write_text("\n".join(lines) + "\n", encoding="utf-8")


def load_pairs(path: str | Path, images: str | Path | None = None) -> list[PromptPair]:
    """Read JSON lines of pairs: ``clean`` and ``corrupted`` with ``prompt``, ``answer`` and perhaps ``image_path``.

    Args:
        path: the file.
        images: folder that relative image paths start from; the file's own when None.

    Raises:
        ShapeError: a line is not a pair; the message says which.
    """
    folder = Path(images) if images is not None else Path(path).parent
    with _named(path, "pairs"):
        return list(_pairs(path, folder))


def _pairs(path: str | Path, folder: Path) -> Iterator[PromptPair]:
    for number, row in _json_lines(path):
        sides = {
            side: _prompt(row.get(side), folder, f"{path}:{number}: {side}")
            for side in ("clean", "corrupted")
        }
        clean, corrupted = sides["clean"], sides["corrupted"]
        answers = str(row.get("answer", clean.answer)), str(row.get("corrupted_answer", corrupted.answer))
        if not isinstance(spans := row.get("spans"), Mapping | None):
            raise ShapeError(f"{path}:{number}: spans: expected positions by group, found {spans!r:.60}")
        yield PromptPair(clean, corrupted, *answers, spans)


def load_prompts(
    path: str | Path,
    images: str | Path | None = None,
    format: str | None = None,  # noqa: A002  the word users know
    **options: Any,
) -> list[Prompt]:
    """Read prompts of a local data set.

    Args:
        path: annotation file. For VQAv2 the questions file, with ``annotations=`` the other one.
        images: folder of pictures.
        format: ``"jsonl"`` (prompt, answer, image_path), ``"vqav2"``, ``"vsr"``, ``"clevr"`` or ``"coco"``;
            told by the file's keys when None.
        **options: ``template=`` with ``{question}`` for the prompt's words; ``yes_no=True`` keeps VQAv2's yes/no
            questions; ``annotations=`` for VQAv2; ``question=`` for COCO, whose captions become textual data.

    Raises:
        ShapeError: a format or an option that is not known, a file that is no JSON, or a row without its keys.
    """
    if unknown := sorted(set(options) - _OPTIONS):
        raise ShapeError(f"options: expected some of {', '.join(sorted(_OPTIONS))}, found {unknown[0]}")
    folder = Path(images) if images is not None else Path(path).parent
    with _named(path, "prompts"):
        name = format or _format_of(path)
    if name not in _LOADERS:
        raise ShapeError(f"format: expected one of {', '.join(_LOADERS)}, found {name!r}")
    with _named(path, name):
        return list(_LOADERS[name](Path(path), folder, options))


@contextmanager
def _named(path: str | Path, what: str) -> Iterator[None]:
    """A missing key, or a value of another type, as one line that names the file."""
    try:
        yield
    except Error:
        raise
    except KeyError as error:
        raise ShapeError(f"{path}: expected the key {error} of {what}, found a row without it") from None
    except (TypeError, ValueError, AttributeError, LookupError, RecursionError) as error:
        raise ShapeError(f"{path}: expected {what}, found {first_line(error):.120}") from error


def _content(path: str | Path) -> dict[str, Any]:
    try:
        content = json.loads(Path(path).read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        raise ShapeError(f"{path}: expected JSON, found {error.msg} in line {error.lineno}") from None
    if not isinstance(content, dict):
        raise ShapeError(f"{path}: expected an object, found {type(content).__name__}")
    return content


def _format_of(path: str | Path) -> str:
    if Path(path).suffix == ".jsonl":
        first = next(_json_lines(path), (0, {}))[1]
        return "vsr" if {"caption", "relation", "label"} <= set(first) else "jsonl"
    content = _content(path)
    if "questions" in content:
        first = content["questions"][0] if content["questions"] else {}
        return "clevr" if "image_filename" in first else "vqav2"
    if "annotations" in content and "images" in content:
        return "coco"
    raise ShapeError(
        f"format: {path}: expected VQAv2, CLEVR or COCO keys, found {sorted(content)[:4]}. Give format"
    )


def _json_lines(path: str | Path) -> Iterator[tuple[int, dict[str, Any]]]:
    with Path(path).open(encoding="utf-8") as file:
        for number, line in enumerate(file, 1):
            if not line.strip():
                continue
            try:
                row = json.loads(line)
            except json.JSONDecodeError as error:
                raise ShapeError(f"{path}:{number}: expected a line of JSON, found {error.msg}") from None
            if not isinstance(row, dict):
                raise ShapeError(f"{path}:{number}: expected an object, found {type(row).__name__}")
            yield number, row


def _prompt(row: Any, folder: Path, where: str) -> Prompt:
    if not isinstance(row, dict) or "prompt" not in row or "answer" not in row:
        raise ShapeError(f"{where}: expected an object with prompt and answer, found {row!r:.60}")
    known = {k: row[k] for k in ("id", "task", "form", "template", "data", "facts") if row.get(k) is not None}
    if not isinstance(known.get("facts", {}), Mapping):
        raise ShapeError(f"{where}: facts: expected an object, found {known['facts']!r:.60}")
    known |= {name: str(value) for name, value in known.items() if name != "facts"}
    image = row.get("image_path") or row.get("image")
    path = str(folder / image) if image else None
    return Prompt(str(row["prompt"]), str(row["answer"]), path, **known)


def _jsonl(path: Path, folder: Path, _options: Mapping[str, Any]) -> Iterator[Prompt]:
    for number, row in _json_lines(path):
        yield _prompt(row, folder, f"{path}:{number}")


def _worded(question: str, options: Mapping[str, Any]) -> str:
    template = str(options.get("template", "{question}"))
    try:
        return template.format(question=question)
    except (LookupError, ValueError) as error:
        raise ShapeError(
            f"template: expected words with {{question}} alone, found {template!r} ({error})"
        ) from None


def _vqav2(path: Path, folder: Path, options: Mapping[str, Any]) -> Iterator[Prompt]:
    """Questions and annotations of VQAv2; the answer is the most common of ten; pictures are COCO's."""
    if "annotations" not in options:
        raise ShapeError(f"annotations: {path}: expected the path of VQAv2's annotations, found none")
    notes_path = options["annotations"]
    with _named(notes_path, "VQAv2's annotations"):
        answers = {note["question_id"]: note for note in _content(notes_path)["annotations"]}
    content = _content(path)
    subtype = content.get("data_subtype", "val2014")
    for question in content["questions"]:
        note = answers.get(question["question_id"])
        if note is None:
            raise ShapeError(
                f"{path}: expected an annotation of question {question['question_id']}, found none"
            )
        if options.get("yes_no") and note.get("answer_type") != "yes/no":
            continue
        found = note.get("multiple_choice_answer")
        answer = found or Counter(a["answer"] for a in note["answers"]).most_common(1)[0][0]
        image = folder / f"COCO_{subtype}_{question['image_id']:012d}.jpg"
        yield Prompt(
            _worded(question["question"], options), answer, str(image), str(question["question_id"]), "vqav2",
            template=note.get("question_type", ""), facts={"image_id": question["image_id"]},
        )  # fmt: skip


def _vsr(path: Path, folder: Path, options: Mapping[str, Any]) -> Iterator[Prompt]:
    """Visual Spatial Reasoning: a caption that is true or false of a picture."""
    question = {"template": "Is this statement true of the image: {question} Answer yes or no.", **options}
    for number, row in _json_lines(path):
        missing = {"image", "caption", "label", "relation"} - set(row)
        if missing:
            raise ShapeError(f"{path}:{number}: expected VSR's keys, found no {sorted(missing)[0]}")
        yield Prompt(
            _worded(row["caption"], question), "yes" if int(row["label"]) else "no", str(folder / row["image"]), str(number),
            "vsr", template=row["relation"], facts={"relation": row["relation"], "caption": row["caption"]},
        )  # fmt: skip


def _clevr(path: Path, folder: Path, options: Mapping[str, Any]) -> Iterator[Prompt]:
    """CLEVR's questions; prompts of one question family are of one template."""
    for i, row in enumerate(_content(path)["questions"]):
        if "answer" not in row:
            raise ShapeError(f"{path}: question {i}: expected an answer, found none. The test split has none")
        template = str(row.get("question_family_index", ""))
        folder_of = folder / row["split"] if "split" in row and (folder / row["split"]).is_dir() else folder
        yield Prompt(
            _worded(row["question"], options), str(row["answer"]), str(folder_of / row["image_filename"]),
            str(row.get("question_index", i)), "clevr", template=template, facts={"image_index": row.get("image_index")},
        )  # fmt: skip


def _coco(path: Path, folder: Path, options: Mapping[str, Any]) -> Iterator[Prompt]:
    """COCO captions: one prompt per picture, its first caption the answer and the textual data."""
    content = _content(path)
    names = {image["id"]: image["file_name"] for image in content["images"]}
    captions: dict[int, list[str]] = defaultdict(list)
    for note in content["annotations"]:
        if "caption" not in note:
            raise ShapeError(f"{path}: expected COCO captions, found annotations without one")
        captions[note["image_id"]].append(note["caption"].strip())
    question = _worded(str(options.get("question", "Describe the image.")), options)
    for image_id, found in captions.items():
        if image_id not in names:
            raise ShapeError(f"{path}: expected an image entry of {image_id}, found none")
        yield Prompt(
            question, found[0], str(folder / names[image_id]), str(image_id), "coco", data=found[0],
            facts={"captions": found},
        )  # fmt: skip


_OPTIONS = {"annotations", "question", "template", "yes_no"}
_LOADERS = {"jsonl": _jsonl, "vqav2": _vqav2, "vsr": _vsr, "clevr": _clevr, "coco": _coco}
