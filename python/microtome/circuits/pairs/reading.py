"""From one pair as a person writes it to tensors: tokens, answer ids, spans, and which position pairs with which."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from microtome.arguments import require_one_of
from microtome.circuits.pairs.pair_set import GROUPS, Align, Inputs, Positions, PreparedPair
from microtome.errors import ShapeError

__all__ = ["answer_id", "read_pair", "require_token", "tokenise"]


def read_pair(model: Any, processor: Any, pair: Any, align: Align) -> PreparedPair:
    """One pair, checked; messages leave out which pair it is.

    Raises:
        ShapeError: the pair cannot be used; see :func:`microtome.circuits.prepare`.
    """
    from microtome.capture.models import adapt

    adapter = adapt(model)
    sides = {side: _inputs(model, processor, _part(pair, side), side) for side in ("clean", "corrupted")}
    answer, corrupted_answer = (
        require_token(model, name, answer_id(processor, _part(pair, name)))
        for name in ("answer", "corrupted_answer")
    )
    if answer == corrupted_answer:
        raise ShapeError(f"answers: expected two different tokens, found {_part(pair, 'answer')!r} twice")
    kinds = {side: _kinds(adapter, x["input_ids"]) for side, x in sides.items()}
    given = _part(pair, "spans", None)
    runs = {} if given is None else _runs(given, len(kinds["clean"]))
    spans = {side: _spans(processor, _part(pair, side), kinds[side], runs) for side in sides}
    _require_spans(spans["clean"], runs)
    if kinds["clean"] == kinds["corrupted"]:
        partner: Positions = np.arange(len(kinds["clean"]))
    elif align == "absolute":
        raise ShapeError(
            f"counterfactual: expected the layout of the clean prompt ({len(kinds['clean'])} tokens), found "
            f"{len(kinds['corrupted'])} tokens or images elsewhere. Use one template, or align='spans'"
        )
    else:
        partner = _partners(spans, kinds)
    facts = {
        name: _part(_part(pair, "clean"), name, None) for name in ("id", "task", "form", "prompt", "image")
    }
    return PreparedPair(
        sides["clean"],
        sides["corrupted"],
        answer,
        corrupted_answer,
        spans["clean"],
        partner,
        kinds["clean"],
        {name: value for name, value in facts.items() if value is not None},
    )


_MISSING: Any = object()
_KIND_NAMES = ("text", "image", "video")


def _part(source: Any, name: str, default: Any = _MISSING) -> Any:
    value = source.get(name, default) if isinstance(source, Mapping) else getattr(source, name, default)
    if value is _MISSING:
        raise ShapeError(f"{name}: expected a field of this name, found none")
    return value


def tokenise(model: Any, processor: Any, prompt: str, image: Any = None) -> Inputs:
    """A prompt as arguments of the model's forward, batch size 1, on the model's device."""
    if image is None:
        made = _tokenizer(processor)(prompt, return_tensors="pt")
    else:
        made = processor(images=image, text=prompt, return_tensors="pt")
    takes = inspect.signature(model.forward).parameters
    optional = {
        "token_type_ids",
        "mm_token_type_ids",
    }  # tokenizers make these up for models that do not take them
    made = {
        k: torch.as_tensor(v) for k, v in made.items() if k != "labels" and (k in takes or k not in optional)
    }
    return {k: v.to(model.device, model.dtype if v.is_floating_point() else None) for k, v in made.items()}


def _inputs(model: Any, processor: Any, side: Any, name: str) -> Inputs:
    if isinstance(side, Mapping) and "input_ids" in side:
        inputs = {k: v for k, v in side.items() if torch.is_tensor(v)}
    else:
        inputs = tokenise(model, processor, _part(side, "prompt"), _part(side, "image", None))
    ids, mask = inputs["input_ids"], inputs.get("attention_mask")
    if ids.ndim != 2 or ids.shape[0] != 1 or ids.shape[1] < 1:
        raise ShapeError(f"{name}: input_ids: expected shape (1, p), found {tuple(ids.shape)}")
    if mask is not None and not bool(mask.bool().all()):
        raise ShapeError(f"{name}: attention_mask: expected a prompt without padding, found padded positions")
    return inputs


def _tokenizer(processor: Any) -> Any:
    return getattr(processor, "tokenizer", None) or getattr(processor, "tok", None) or processor


def answer_id(processor: Any, answer: str | int) -> int:
    """The token id of an answer: as written, else with a space before it.

    Raises:
        ShapeError: the answer is several tokens either way, or neither text nor a number.
    """
    if isinstance(answer, int | np.integer) and not isinstance(answer, bool):
        return int(answer)
    if not isinstance(answer, str):
        raise ShapeError(f"answer: expected text or a token id, found {answer!r}")
    tokenizer = _tokenizer(processor)
    if tokenizer is None:
        raise ShapeError(f"processor: expected a tokenizer for the answer {answer!r}, found none")
    for text in (answer, f" {answer}"):
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
        if len(ids) == 1 and ids[0] != tokenizer.unk_token_id:
            return int(ids[0])
    raise ShapeError(f"answer: expected one token, found {len(ids)} for {answer!r}")


def require_token(model: Any, name: str, token: int) -> int:
    """``token`` when the model has it.

    Raises:
        ShapeError: it does not.
    """
    n = model.config.get_text_config().vocab_size
    if not 0 <= token < n:
        raise ShapeError(f"{name}: expected a token id from 0 to {n - 1}, found {token}")
    return token


def _kinds(adapter: Any, input_ids: torch.Tensor) -> tuple[str, ...]:
    return tuple(_KIND_NAMES[int(kind)] for kind in adapter.row_kinds(input_ids).reshape(-1))


def _runs(given: Any, length: int) -> dict[str, Positions]:
    """Spans as a person writes them, each a run of positions."""
    if not isinstance(given, Mapping):
        raise ShapeError(f"spans: expected positions by group, found {type(given).__name__}")
    runs = {}
    for group, positions in given.items():
        require_one_of("spans", group, GROUPS)
        found = np.asarray(positions)
        if found.ndim != 1 or (found.size and found.dtype.kind not in "iu"):
            raise ShapeError(f"spans: {group}: expected a list of whole numbers, found {positions!r}")
        run = np.sort(found.astype(np.int64))
        if group != "generation":
            _require_before(group, run, length - 1, length)
        if (np.diff(run) != 1).any():
            raise ShapeError(
                f"spans: {group}: expected positions without a gap, each once, found {run.tolist()}"
            )
        runs[group] = run
    return runs


def _require_before(group: str, run: Positions, end: int, length: int) -> None:
    if len(run) and not (run[0] >= 0 and run[-1] < end):
        raise ShapeError(
            f"spans: {group}: expected positions before the last of {length} tokens, found "
            f"{run[0] if run[0] < 0 else run[-1]}"
        )


def _require_spans(spans: Mapping[str, Positions], runs: Mapping[str, Positions]) -> None:
    """That the groups lie where they were said to lie."""
    for group, run in runs.items():
        if not np.array_equal(spans[group], run):
            raise ShapeError(
                f"spans: {group}: expected {_told(spans[group])}, so that {', '.join(GROUPS)} follow each other, found "
                f"{_told(run)}"
            )


def _told(run: Positions) -> str:
    return f"positions {run[0]} to {run[-1]}" if len(run) else "no position"


def _spans(
    processor: Any, side: Any, kinds: tuple[str, ...], runs: Mapping[str, Positions]
) -> dict[str, Positions]:
    """Positions of the four groups; together they hold every position once."""
    length = len(kinds)
    first = length - max(1, len(runs.get("generation", ())))
    if "data" in runs:
        data = runs["data"]
    elif any(kind != "text" for kind in kinds):
        shown = np.flatnonzero(np.array(kinds) != "text")
        data = np.arange(shown[0], shown[-1] + 1)  # row breaks inside an image belong to it
    else:
        data = _text_span(processor, side, length)
    _require_before("data", data, first, length)
    start, stop = (int(data[0]), int(data[-1]) + 1) if len(data) else (0, 0)
    spans = {"prefix": np.arange(start), "data": np.arange(start, stop), "query": np.arange(stop, first)}
    return {**spans, "generation": np.arange(first, length)}


def _text_span(processor: Any, side: Any, length: int) -> Positions:
    text = _part(side, "data", None)
    if text is None:
        return np.empty(0, np.int64)
    prompt = _part(side, "prompt")
    begin = prompt.find(text)
    if begin < 0:
        raise ShapeError(f"spans: data: expected a part of the prompt, found {text!r}")
    offsets = _tokenizer(processor)(prompt, return_offsets_mapping=True)["offset_mapping"]
    inside = [i for i, (a, b) in enumerate(offsets) if a < begin + len(text) and b > begin and b > a]
    return np.asarray(inside, np.int64)


def _partners(
    spans: Mapping[str, Mapping[str, Positions]], kinds: Mapping[str, tuple[str, ...]]
) -> Positions:
    """Group by group in proportion: position i of n pairs with position round(i (m - 1) / (n - 1)) of m."""
    partner: npt.NDArray[np.int64] = np.zeros(len(kinds["clean"]), np.int64)
    for group in GROUPS:
        ours, theirs = spans["clean"][group], spans["corrupted"][group]
        if len(ours) and not len(theirs):
            raise ShapeError(
                f"spans: {group}: expected positions in both prompts, found none in the counterfactual"
            )
        if len(ours):
            places = np.rint(np.linspace(0, len(theirs) - 1, len(ours))).astype(np.int64)
            partner[ours] = theirs[places]
    return partner
