"""Data-parallel training on one machine: processes of one thread each, which meet once a step.

On busy cores that is far faster than threads within an operator, which meet thousands of times a step.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import distributed, multiprocessing, nn

Hits = dict[tuple[str, bool], list[bool]]


def rank() -> int:
    """The number of this process; the first one writes files."""
    return distributed.get_rank() if distributed.is_initialized() else 0


def processes() -> int:
    """How many processes share a batch."""
    return distributed.get_world_size() if distributed.is_initialized() else 1


def average_gradients(model: nn.Module) -> None:
    """Replace each gradient by its mean over the processes."""
    if processes() == 1:
        return
    gradients = [p.grad for p in model.parameters() if p.grad is not None]
    flat = torch.cat([gradient.flatten() for gradient in gradients])
    distributed.all_reduce(flat)
    flat /= processes()
    for gradient, mean in zip(gradients, flat.split([g.numel() for g in gradients]), strict=True):
        gradient.copy_(mean.view_as(gradient))


def gather_hits(hits: Hits) -> Hits:
    """The hits of all processes together, the same in each of them."""
    if processes() == 1:
        return hits
    everyone: list[Any] = [None] * processes()
    distributed.all_gather_object(everyone, hits)
    together: Hits = {}
    for theirs in everyone:
        for key, right in theirs.items():
            together.setdefault(key, []).extend(right)
    return together


def run(work: Callable[..., None], count: int, *arguments: Any) -> None:
    """Call ``work(*arguments)`` in ``count`` processes of one thread each."""
    if count == 1:
        torch.set_num_threads(1)
        work(*arguments)
        return
    with tempfile.TemporaryDirectory() as folder:
        meeting = Path(folder, "meeting").as_uri()
        multiprocessing.spawn(_enter, args=(work, count, meeting, arguments), nprocs=count)


def _enter(
    number: int, work: Callable[..., None], count: int, meeting: str, arguments: tuple[Any, ...]
) -> None:
    torch.set_num_threads(1)
    distributed.init_process_group("gloo", init_method=meeting, rank=number, world_size=count)
    try:
        work(*arguments)
        distributed.barrier()
    finally:
        distributed.destroy_process_group()
