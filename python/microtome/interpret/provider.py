"""A language model behind an OpenAI-compatible interface: JSON mode, schema-checked, retried."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping, Sequence
from typing import Any

from microtome.errors import Error, first_line
from microtome.interpret.evidence import Evidence
from microtome.interpret.labels import EXAMPLE, PROMPT, render
from microtome.tensors import extra

__all__ = ["ChatProvider", "ProviderError", "estimate"]


class ProviderError(Error):
    """The language model gave no usable answer."""


class ChatProvider:
    """Chat completions of one model at one address.

    Works with any server that speaks the OpenAI protocol: the hosted service, vLLM, llama.cpp, ``transformers serve``.

    Args:
        model: name of the model at the server.
        base_url: address of the server; None for the hosted service.
        api_key: key; read from ``OPENAI_API_KEY`` when None.
        retries: further attempts after a failed or malformed answer.
        json_mode: ask for JSON by ``response_format``; switched off for servers that refuse it.
        timeout: seconds per request.
        max_tokens: length of an answer, at most; one that is cut short counts as malformed.
    """

    def __init__(
        self,
        model: str = "gpt-4o-mini",
        *,
        base_url: str | None = None,
        api_key: str | None = None,
        retries: int = 3,
        json_mode: bool = True,
        timeout: float = 60.0,
        max_tokens: int = 400,
        client: Any = None,
    ) -> None:
        self.model, self.retries, self.json_mode, self.max_tokens = model, retries, json_mode, max_tokens
        self._client = client or extra("openai", "interpret").OpenAI(
            base_url=base_url, api_key=api_key, timeout=timeout, max_retries=0
        )

    def complete(self, system: str, user: str) -> dict[str, object]:
        """The model's answer, checked against the schema of a label.

        Raises:
            ProviderError: no well-formed answer after all attempts; says what the last one lacked.
        """
        last, messages = "", _messages(system, user)
        for attempt in range(self.retries + 1):
            if attempt:
                time.sleep(min(8.0, 0.25 * 2**attempt))
            try:
                text = self._request(messages)
            except Exception as error:  # the client's own errors: rate limits, time-outs, refused connections
                last = f"{type(error).__name__}: {error}".splitlines()[0]
                if self.json_mode and "response_format" in last:
                    self.json_mode = False
                continue
            try:
                return checked(text)
            except (
                ProviderError
            ) as error:  # the same words would get the same answer: say what was wrong with it
                last = str(error)
                messages = _messages(system, user, text, last)
        raise ProviderError(
            f"labelling by {self.model}: expected a JSON label, found {last}, {self.retries + 1} attempts"
        )

    def _request(self, messages: list[dict[str, str]]) -> str:
        options: dict[str, Any] = {"response_format": {"type": "json_object"}} if self.json_mode else {}
        answer = self._client.chat.completions.create(
            model=self.model, messages=messages, temperature=0.0, max_tokens=self.max_tokens, **options
        )
        return answer.choices[0].message.content or ""


def _messages(system: str, user: str, answer: str = "", wrong: str = "") -> list[dict[str, str]]:
    """The conversation of a request; after a malformed answer, with that answer and what was wrong with it."""
    said = [{"role": "system", "content": system}, {"role": "user", "content": user}]
    if not wrong:
        return said
    again = f"{wrong}. Answer with one JSON object and nothing else, such as {EXAMPLE}"
    return [*said, {"role": "assistant", "content": answer[:400]}, {"role": "user", "content": again}]


def checked(text: str) -> dict[str, object]:
    """The label in ``text``: a JSON object, perhaps within a code fence, of the right fields and types.

    Raises:
        ProviderError: names the first thing that is wrong.
    """
    start, end = text.find("{"), text.rfind("}")
    if start < 0 or end < start:
        raise ProviderError(f"answer: expected a JSON object, found {text[:60]!r}")
    try:
        answer = json.loads(text[start : end + 1])
        json.dumps(answer, ensure_ascii=False).encode()
    except UnicodeEncodeError as error:
        raise ProviderError(
            f"answer: expected text, found half of a surrogate pair ({error.reason})"
        ) from error
    except (ValueError, RecursionError) as error:
        # numbers of too many digits, and brackets without end, among them
        raise ProviderError(f"answer: expected JSON, found {first_line(error):.120}") from error
    confidence, description = answer.get("confidence"), answer.get("description")
    patterns, cues = answer.get("common_patterns", []), answer.get("cue_counts", {})
    if isinstance(confidence, bool) or not isinstance(confidence, int | float) or not 0 <= confidence <= 1:
        raise ProviderError(f"confidence: expected a number from 0 to 1, found {confidence!r}")
    if not isinstance(description, str) or not description.strip():
        raise ProviderError(f"description: expected a sentence, found {description!r}")
    if description.strip() == json.loads(EXAMPLE)["description"]:  # small models parrot the prompt
        raise ProviderError("description: expected one of this feature, found the example's")
    if not isinstance(patterns, list) or not all(isinstance(p, str) for p in patterns):
        raise ProviderError(f"common_patterns: expected a list of strings, found {patterns!r}")
    if not isinstance(cues, dict) or not all(
        isinstance(v, int) and not isinstance(v, bool) for v in cues.values()
    ):
        raise ProviderError(f"cue_counts: expected counts by word, found {cues!r}")
    return {
        "confidence": float(confidence),
        "description": description,
        "common_patterns": patterns,
        "cue_counts": cues,
    }


def estimate(
    evidence: Mapping[Any, Sequence[Evidence]], *, per_million_in: float = 0.15, per_million_out: float = 0.6
) -> dict[str, float]:
    """What labelling will cost, before it is begun: requests, tokens (four characters each, 200 back), price.

    Args:
        evidence: {feature: top samples}.
        per_million_in: price of a million prompt tokens.
        per_million_out: price of a million answer tokens.
    """
    tokens_in = sum((len(PROMPT) + len(render(items))) / 4 for items in evidence.values())
    tokens_out = 200.0 * len(evidence)
    price = (tokens_in * per_million_in + tokens_out * per_million_out) / 1e6
    return {
        "requests": float(len(evidence)),
        "tokens_in": tokens_in,
        "tokens_out": tokens_out,
        "price": price,
    }
