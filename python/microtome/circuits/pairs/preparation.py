"""From prompts to prepared pairs: every pair is read and checked, and those that the model cannot do may be left out."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any, Literal, get_args

import numpy as np
import numpy.typing as npt
import torch

from microtome.arguments import require_one_of
from microtome.circuits.forward.decoder import last_logits
from microtome.circuits.forward.restore import left_as_found
from microtome.circuits.pairs.pair_set import Align, PairSet, PreparedPair, merge_pair
from microtome.circuits.pairs.reading import read_pair
from microtome.errors import ShapeError

__all__ = ["answers_correctly", "prepare"]


def prepare(
    model: Any,
    processor: Any,
    pairs: Sequence[Any],
    *,
    align: Align = "absolute",
    correct_only: bool = False,
    on_invalid: Literal["raise", "drop"] = "raise",
    batch_size: int = 16,
) -> PairSet:
    """Tokenise, align and check pairs.

    Each prompt is tokenised alone, so there is no padding and the last position is the last token.

    Args:
        model: a transformers model; decides which positions hold image tokens.
        processor: the model's processor, or a tokenizer for text alone.
        pairs: objects with ``clean`` and ``corrupted`` (each with ``prompt`` and ``image``), ``answer``,
            ``corrupted_answer`` and optionally ``spans``; or mappings with the same keys; or mappings whose
            ``clean`` and ``corrupted`` are tensors already and whose answers are token ids. ``spans`` name token
            positions of ``data``, ``query`` and ``generation``, runs that follow each other up to the last token;
            those of ``data`` hold for both prompts, and the generation is as long in both. Without them data are the
            image tokens, or the tokens of the text under the key ``data`` of a prompt; the generation is the last
            token; the query is everything between the two.
        align: ``"absolute"`` for one template (positions compare one by one), ``"spans"`` for natural
            prompts.
        correct_only: keep the pairs whose two prompts the model answers correctly.
        on_invalid: ``"raise"`` at the first pair that cannot be used, or ``"drop"`` it and list it in
            ``dropped``.
        batch_size: prompts per forward when answers are checked.

    Raises:
        ShapeError: an option is not one of those there are, an answer is several tokens or no token of the model, both
            answers are the same, spans are no runs of positions in this order, lengths differ under
            ``align="absolute"``, or nothing is left.
    """
    require_one_of("align", align, get_args(Align))
    require_one_of("on_invalid", on_invalid, ("raise", "drop"))
    prepared: list[PreparedPair] = []
    numbers: list[int] = []
    dropped: list[tuple[int, str]] = []
    for i, pair in enumerate(pairs):
        try:
            prepared.append(replace(read_pair(model, processor, pair, align), number=i))
            numbers.append(i)
        except ShapeError as error:
            if on_invalid == "raise":
                raise ShapeError(f"pairs: pair {i}: {error}") from None
            dropped.append((i, str(error)))
    if not prepared:
        raise ShapeError(f"pairs: expected at least one usable pair, found none of {len(pairs)}")
    found = PairSet(tuple(prepared), align, tuple(dropped))
    if not correct_only:
        return found
    keep = answers_correctly(model, found, batch_size)
    wrong = [(numbers[i], "answered wrongly") for i in np.flatnonzero(~keep)]
    if not keep.any():
        raise ShapeError(
            f"pairs: correct_only: expected prompts that the model answers, found none of {len(found)}"
        )
    return replace(found[np.flatnonzero(keep)], dropped=tuple(sorted(dropped + wrong)))


def answers_correctly(model: Any, pairs: PairSet, batch_size: int = 16) -> npt.NDArray[np.bool_]:
    """Which pairs the model answers correctly on both sides, by the most likely token. Shape ``(n,)``."""
    from microtome.capture.models import adapt

    adapter = adapt(model)
    right = np.zeros(len(pairs), bool)
    with left_as_found(model), torch.no_grad():
        for batch in pairs.batches(batch_size, model.device):
            clean, corrupted = (last_logits(adapter, side) for side in merge_pair(adapter, batch))
            ok = (clean.argmax(-1) == batch.answers) & (corrupted.argmax(-1) == batch.corrupted_answers)
            right[list(batch.indices)] = ok.cpu().numpy()
    return right
