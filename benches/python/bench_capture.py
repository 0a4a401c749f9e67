"""What capture costs: all residual streams of an eight-layer Llama with d = 1024, against its plain forward.

Plain and captured forwards alternate in one process. Wall time is what a user waits, the last commit
included; CPU time of all threads holds on a busy machine too. Sizes come from the environment:
MICROTOME_BENCH_TOKENS, MICROTOME_BENCH_REPEATS.

    python benches/python/bench_capture.py
"""

import os
import shutil
import tempfile
import time

import timing
import torch
from transformers import LlamaConfig, LlamaForCausalLM

import microtome as mt

TOKENS = int(os.environ.get("MICROTOME_BENCH_TOKENS", "512"))
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
            seconds = timing.alternate({"plain": plain, "captured": captured})
        shutil.rmtree(folder)
        found.append(
            timing.line(
                f"capture, {name}",
                f"8 layers, d 1024, {2 * TOKENS} tokens",
                "plain forward (cost)",
                seconds["captured"],
                seconds["plain"],
                threads=torch.get_num_threads(),
                bar=1.15,
                cost=True,
            )
        )
    return found


if __name__ == "__main__":
    timing.show(rows())
