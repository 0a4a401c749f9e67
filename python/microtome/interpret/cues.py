"""Words that tell what a question is about: spatial cues, and the n-grams that are more frequent than they should be.

The first four cues are the paper's (2602.08713, section 6: "left/right/above/behind"); the others extend them. "right" in the
sense of correct and "left" in the sense of remaining are no cues.
"""

from __future__ import annotations

import functools
import math
import re
from collections import Counter
from collections.abc import Iterable, Sequence
from importlib import resources

import polars as pl

from microtome.errors import ShapeError

__all__ = ["SPATIAL_CUES", "cue_counts", "cues_in", "function_words", "ngram_lift"]

SPATIAL_CUES: tuple[str, ...] = (
    *("left", "right", "above", "behind"),
    *(
        "below",
        "under",
        "beneath",
        "in front of",
        "next to",
        "beside",
        "near",
        "between",
        "on top of",
        "inside",
    ),
    *("across from", "facing", "toward", "towards", "away from", "at the edge of", "on the side of"),
    *("on the other side", "opposite", "around", "over"),
)

_NOT_SPATIAL = re.compile(
    r"\b(all right|right (?:now|away|answer|choice|word)|(?:is|are) (?:that|this|it) right"
    r"|(?:how many|anything|any) .{0,20}\bleft\b(?! of)|over (?:there|\d+)|left over|leftover)\b"
)


def cues_in(text: str, cues: Sequence[str] = SPATIAL_CUES) -> list[str]:
    """The cues that occur in ``text`` as whole words, each once, in the order of ``cues``.

    Example:
        >>> cues_in("Is the cup to the left of the plate, on top of the table?")
        ['left', 'on top of']
        >>> cues_in("Is that right?")
        []
    """
    cleaned = _NOT_SPATIAL.sub(" ", " ".join(text.lower().split()))
    return [cue for cue in cues if re.search(rf"\b{re.escape(cue)}\b", cleaned)]


def cue_counts(texts: Iterable[str], cues: Sequence[str] = SPATIAL_CUES) -> dict[str, int]:
    """In how many of the texts each cue occurs, most frequent first; cues that never occur are left out."""
    counts = Counter(cue for text in texts for cue in cues_in(text, cues))
    return dict(sorted(counts.items(), key=lambda item: (-item[1], item[0])))


def ngram_lift(
    texts: Sequence[str],
    background: Sequence[str],
    *,
    n: Sequence[int] = (1, 2, 3),
    min_count: int = 3,
    top: int = 20,
) -> pl.DataFrame:
    """N-grams that occur in a larger share of ``texts`` than of ``background``.

    ``lift = ((a + 0.5) / (A + 1)) / ((b + 0.5) / (B + 1))``, where a of A texts and b of B background texts contain it.

    Its 95 % lower bound ``lift exp(-1.96 se)``, ``se^2 = 1/(a + 0.5) - 1/(A + 1) + 1/(b + 0.5) - 1/(B + 1)``, is that of a
    risk ratio (Katz et al. 1978): few texts give a large lift easily, a large lower bound seldom.

    Returns:
        Columns ngram, count, share, background_share, lift, lift_low; largest lift first, then count, then the n-gram.

    Raises:
        ShapeError: no text or no background.
    """
    if not texts or not background:
        raise ShapeError(
            f"texts, background: expected at least one each, found {len(texts)} and {len(background)}"
        )
    here, there = _document_counts(texts, n), _document_counts(background, n)
    rows = [
        {
            "ngram": gram,
            "count": count,
            "share": count / len(texts),
            "background_share": there[gram] / len(background),
            **_lift(count, len(texts), there[gram], len(background)),
        }
        for gram, count in here.items()
        if count >= min_count
    ]
    schema = {
        "ngram": pl.String,
        "count": pl.Int64,
        "share": pl.Float64,
        "background_share": pl.Float64,
        "lift": pl.Float64,
        "lift_low": pl.Float64,
    }
    return (
        pl.DataFrame(rows, schema=schema)
        .sort("lift", "count", "ngram", descending=[True, True, False])
        .head(top)
    )


def _lift(a: int, n: int, b: int, m: int) -> dict[str, float]:
    """Lift of an n-gram in a of n texts and b of m background texts, and its lower bound."""
    lift = ((a + 0.5) / (n + 1)) / ((b + 0.5) / (m + 1))
    error = math.sqrt(1 / (a + 0.5) - 1 / (n + 1) + 1 / (b + 0.5) - 1 / (m + 1))
    return {"lift": lift, "lift_low": lift * math.exp(-1.96 * error)}


@functools.cache
def function_words() -> frozenset[str]:
    """English words that hold a sentence together and tell nothing of its subject; no word of a spatial cue's own is one.

    Example:
        >>> "is" in function_words(), "behind" in function_words()
        (True, False)
    """
    return frozenset(resources.files(__package__).joinpath("function_words.txt").read_text("utf-8").split())


def _document_counts(texts: Iterable[str], sizes: Sequence[int]) -> Counter[str]:
    counts: Counter[str] = Counter()
    for text in texts:
        words = re.findall(r"[\w']+", text.lower())
        counts.update({" ".join(words[i : i + n]) for n in sizes for i in range(len(words) - n + 1)})
    return counts
