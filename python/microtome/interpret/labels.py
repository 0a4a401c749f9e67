"""A label per feature: what it seems to stand for, how sure one may be, and by what evidence.

Two labellers give the same record: counting words, which needs nothing and never errs about what it counted, and a language
model behind an OpenAI-compatible interface. Records are appended to a JSON-lines file as they are made, so an interrupted
run continues where it stopped and an unchanged prompt is never paid for twice.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Protocol

import polars as pl

from microtome.errors import Error
from microtome.interpret.cues import SPATIAL_CUES, cue_counts, function_words, ngram_lift
from microtome.interpret.evidence import Evidence
from microtome.progress import bar

__all__ = ["Label", "Provider", "label_features", "label_offline"]

EXAMPLE = (
    '{"confidence": 0.8, "description": "Questions about what lies behind a thing.", '
    '"common_patterns": ["behind the"], "cue_counts": {"behind": 4}}'
)
"""A well-formed answer: shown in the prompt, for small models that do not follow a description of one."""

PROMPT = f"""You are shown the inputs on which one feature of a sparse autoencoder is most active. Say what they have in common.
Brackets mark the token on which the activation peaks; (image) means that it peaks on a patch of the picture.
Answer with one JSON object and nothing else. Its confidence is a number from 0 to 1. For example:
{EXAMPLE}"""


@dataclass(frozen=True)
class Label:
    """What a feature seems to stand for."""

    layer: int
    feature: int
    description: str
    confidence: float
    common_patterns: list[str] = field(default_factory=list)
    cue_counts: dict[str, int] = field(default_factory=dict)
    labeller: str = "offline"
    prompt_hash: str = ""
    n_evidence: int = 0
    reason: str = ""
    """Why the language model gave no label; empty where it did."""


class Provider(Protocol):
    """Something that completes a prompt with a JSON object."""

    model: str

    def complete(self, system: str, user: str) -> dict[str, object]:
        """The parsed and schema-checked answer."""


def label_offline(
    layer: int,
    feature: int,
    evidence: Sequence[Evidence],
    background: Sequence[str],
    cues: Sequence[str] = SPATIAL_CUES,
) -> Label:
    """Label a feature by counting: the cues in its samples, and the n-grams more frequent there than elsewhere.

    The confidence is the share of samples that contain the leading n-gram, times how far that share is above the
    background's; 0 when nothing stands out. An n-gram stands out when at least three samples and a quarter of them have
    it, it is half as frequent again as elsewhere with a lower bound above 1, and one of its words is no
    :func:`function word <microtome.interpret.function_words>`; the one of the largest lower bound leads.

    Args:
        layer: layer of the feature.
        feature: its index.
        evidence: its top samples.
        background: texts to compare with, e.g. all questions.
        cues: words to count.

    Example:
        >>> from microtome.interpret import Evidence
        >>> seen = [Evidence("vqa", str(i), 0, 1.0, f"is it left of {i}") for i in range(4)]
        >>> label_offline(3, 7, seen, ["what colour is it"] * 20).cue_counts
        {'left': 4}
    """
    texts = [item.text for item in evidence]
    counts = cue_counts(texts, cues)
    leading = _leading(texts, background, cues)
    if not leading.height:
        return Label(layer, feature, "no word stands out", 0.0, [], counts, n_evidence=len(texts))
    grams = leading["ngram"].to_list()
    share, elsewhere = float(leading["share"][0]), float(leading["background_share"][0])
    where = sum(item.on_image for item in evidence)
    place = f"; peaks on the picture in {where} of {len(texts)}" if where else ""
    description = f"texts with '{grams[0]}' ({share:.0%} of its samples, {elsewhere:.0%} elsewhere){place}"
    return Label(layer, feature, description, share * (1 - elsewhere), grams, counts, n_evidence=len(texts))


def _leading(texts: Sequence[str], background: Sequence[str], cues: Sequence[str]) -> pl.DataFrame:
    """The n-grams that stand out, the surest first; a cue that is made of function words stays one."""
    if not texts or not background:
        return pl.DataFrame()
    lift = ngram_lift(texts, background, min_count=max(3, -(-len(texts) // 4)), top=1000)
    empty = [g not in cues and function_words().issuperset(g.split()) for g in lift["ngram"]]
    sure = lift.filter(~pl.Series(empty, dtype=pl.Boolean), pl.col("lift") > 1.5, pl.col("lift_low") > 1)
    return sure.sort("lift_low", "ngram", descending=[True, False]).head(5)


def label_features(
    layer: int,
    evidence: Mapping[int, Sequence[Evidence]],
    provider: Provider,
    *,
    cache: str | Path,
    progress: bool = True,
) -> list[Label]:
    """Label features by a language model.

    Args:
        layer: layer of the features.
        evidence: {feature: top samples}.
        provider: where prompts go, e.g. :class:`microtome.interpret.ChatProvider`.
        cache: JSON-lines file of labels; what it holds for the same model and prompt is not asked again.
        progress: whether to draw a bar.

    Returns:
        One label per feature, in the order of ``evidence``. A feature that the model could not label after its retries is
        called unlabelled, with confidence 0 and the reason; it is asked again on the next run.
    """
    path = Path(cache)
    path.parent.mkdir(parents=True, exist_ok=True)
    known = {(label.labeller, label.prompt_hash): label for label in _read(path)}
    labels = []
    with (
        path.open("a", encoding="utf-8") as file,
        bar("labelling", len(evidence), progress, "features") as done,
    ):
        if _ends_within_a_line(path):
            file.write("\n")
        for count, (feature, items) in enumerate(evidence.items(), 1):
            user = render(items)
            key = (provider.model, prompt_hash(provider.model, layer, feature, user))
            if key not in known:
                known[key] = _ask(provider, layer, feature, user, key[1], len(items))
                if not known[key].reason:
                    file.write(json.dumps(asdict(known[key])) + "\n")
                    file.flush()
            labels.append(known[key])
            done(count)
    return labels


def render(evidence: Sequence[Evidence]) -> str:
    """The samples as the language model sees them."""
    lines = []
    for item in evidence:
        shown = f"(image) {item.text}" if item.on_image else item.window or item.text
        lines.append(f"- [{item.dataset}] activation {item.activation:.3g}: {shown}")
    return "\n".join(lines)


def prompt_hash(model: str, layer: int, feature: int, user: str) -> str:
    """Name of a request: the model, the feature and every word of the prompt."""
    text = json.dumps([model, layer, feature, PROMPT, user])
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def _ask(provider: Provider, layer: int, feature: int, user: str, key: str, n: int) -> Label:
    try:
        answer = provider.complete(PROMPT, user)
    except Error as error:
        facts = {"labeller": provider.model, "prompt_hash": key, "n_evidence": n, "reason": str(error)}
        return Label(layer, feature, "unlabelled", 0.0, **facts)  # type: ignore[arg-type]
    return Label(
        layer,
        feature,
        description=str(answer["description"]),
        confidence=float(answer["confidence"]),  # type: ignore[arg-type]
        common_patterns=list(answer["common_patterns"]),  # type: ignore[call-overload]
        cue_counts=dict(answer["cue_counts"]),  # type: ignore[call-overload]
        labeller=provider.model,
        prompt_hash=key,
        n_evidence=n,
    )


def _ends_within_a_line(path: Path) -> bool:
    """Whether an interruption cut the last line short; what is appended would be part of it."""
    with path.open("rb") as file:
        if file.seek(0, 2) == 0:
            return False
        file.seek(-1, 2)
        return file.read(1) != b"\n"


def _read(path: Path) -> list[Label]:
    """Labels of an earlier run; a line cut short by an interruption is passed over."""
    if not path.exists():
        return []
    labels = []
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            labels.append(Label(**json.loads(line)))
        except (json.JSONDecodeError, TypeError):
            continue
    return labels
