"""What capture costs: all residual streams of an eight-layer Llama with d = 1024, against its plain forward.

Plain and captured forwards alternate in one process. Wall time is what a user waits, the last commit
included; CPU time of all threads holds on a busy machine too. Sizes come from the environment:
MICROTOME_BENCH_TOKENS, MICROTOME_BENCH_REPEATS.

    python benches/python/bench_capture.py
"""

import os
import shutil
import statistics
import tempfile
import time

import torch
from transformers import LlamaConfig, LlamaForCausalLM

import microtome as mt

TOKENS = int(os.environ.get("MICROTOME_BENCH_TOKENS", "512"))
REPEATS = int(os.environ.get("MICROTOME_BENCH_REPEATS", "7"))
HOOKS = {
    "residual streams": ["blocks.0.hook_resid_pre", "blocks.*.hook_resid_post"],
    "mean-pooled residual streams": ["blocks.*.hook_resid_*"],
}


def model():
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=512, hidden_size=1024, intermediate_size=2816, num_hidden_layers=8, num_attention_heads=16
    )
    return LlamaForCausalLM(config).eval()


def timed(work):
    """(wall, CPU) seconds of a call."""
    wall, cpu = time.perf_counter(), time.process_time()
    work()
    return time.perf_counter() - wall, time.process_time() - cpu


def rows() -> list[dict]:
    """One row per set of hooks: medians of the ratio captured / plain, and its spread."""
    llama = model()
    batch = torch.randint(0, 512, (4, TOKENS // 4))
    found = []
    for name, hooks in HOOKS.items():
        pool = "mean" if name.startswith("mean") else None
        folder = tempfile.mkdtemp()

        def captured(folder=folder, hooks=hooks, pool=pool):
            with mt.capture(llama, f"{folder}/{time.monotonic_ns()}", hooks, pool=pool) as recorder:
                for i in range(2):
                    recorder.samples(ids=range(4 * i, 4 * i + 4))
                    llama(batch, use_cache=False)

        def plain():
            for _ in range(2):
                llama(batch, use_cache=False)

        with torch.no_grad():
            captured(), plain()
            times = [(timed(plain), timed(captured)) for _ in range(REPEATS)]
        shutil.rmtree(folder)
        wall, cpu = ([with_[i] / without[i] for without, with_ in times] for i in range(2))
        found.append(
            {
                "name": f"capture, {name}",
                "shape": f"8 layers, d 1024, {2 * TOKENS} tokens",
                "peer": "plain forward (cost)",
                "ratio": statistics.median(wall),
                "spread": (min(wall), max(wall)),
                "cpu_ratio": statistics.median(cpu),
                "bar": 1.15,
            }
        )
    return found


if __name__ == "__main__":
    for row in rows():
        print(row)
