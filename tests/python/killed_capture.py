"""A capture to be killed: 48 samples in steps of about 100 tokens, ready to run once imported."""

import random
import time

import torch

import microtome as mt
import tiny_models

TINY = tiny_models.build("pixtral")
HOOKS = ["blocks.*.hook_resid_post", "vision_projector.hook_out"]


def batches():
    rng = random.Random(0)
    shapes = [[rng.randint(2, 9) for _ in range(3)] for _ in range(16)]
    return [TINY.batch(lengths, images=[True, False, True], seed=i) for i, lengths in enumerate(shapes)]


BATCHES = batches()


def capture_all(path, stop_after=None, skip_done=True, pause=0.0):
    """Capture what the store does not hold; end with a KeyboardInterrupt after batch ``stop_after``."""
    torch.set_num_threads(1)
    with mt.capture(TINY.model, path, HOOKS, step_rows=100, stop_early=True) as recorder, torch.no_grad():
        for i, batch in enumerate(BATCHES):
            ids = [f"{i}-{j}" for j in range(3)]
            if skip_done and all(id_ in recorder.done for id_ in ids):
                continue
            recorder.samples(ids=ids, batch=[i] * 3)
            TINY.model(**batch)
            time.sleep(pause)
            if stop_after is not None and i >= stop_after:
                raise KeyboardInterrupt
