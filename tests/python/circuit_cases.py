"""Pairs on tiny models, and a model that is linear in its nodes."""

from contextlib import contextmanager
from functools import cache

import torch
from torch import nn

import tiny_models
from microtome.circuits import PairSet, prepare


@cache
def tiny(name, seed=0):
    built = tiny_models.build(name, seed)
    with torch.no_grad():
        for parameter in built.model.parameters():
            if not parameter.any() and parameter.ndim == 2:
                parameter.normal_(0, 0.1)  # Gemma's projector starts at zero: it would show no image
        built.model(**built.batch())  # some classes put permanent hooks of their own on at the first forward
    return built


def pairs_of(built, n=2, seed=0, words=6, image=True) -> PairSet:
    """Pairs of one template: other image, and one other word."""
    raw = []
    for i in range(n):
        clean = built.batch((words,), image, seed=seed + 2 * i)
        corrupted = built.batch((words,), image, seed=seed + 2 * i + 1)
        ids = clean["input_ids"].clone()
        ids[0, -3] = corrupted["input_ids"][0, -3]
        corrupted["input_ids"] = ids
        raw.append({"clean": clean, "corrupted": corrupted, "answer": 20 + i, "corrupted_answer": 40 + i})
    return prepare(built.model, None, raw)


class PlainNorm(nn.Module):
    """No norm at all, under a name that looks like one."""

    def forward(self, x):
        return x


def linear_model():
    """One layer and no final norm: logits are linear in the neurons, and in what the heads write."""
    built = tiny_models.build("llama")
    model = built.model.eval()
    decoder = model.get_decoder()
    del decoder.layers[1:]
    model.config.num_hidden_layers = 1
    decoder.norm = PlainNorm()
    return built


@contextmanager
def failing_at(model, number, error):
    """The decoder's last layer raises in its forward ``number`` (0 is the first)."""
    seen = []

    def fail(*_):
        seen.append(1)
        if len(seen) > number:
            raise error

    handle = model.get_decoder().layers[-1].register_forward_hook(fail)
    before = len(model.get_decoder().layers[-1]._forward_hooks)
    try:
        yield
    finally:
        assert len(model.get_decoder().layers[-1]._forward_hooks) == before
        handle.remove()


def state(model):
    """Everything that an experiment must leave as it was."""
    hooks = [
        (len(m._forward_hooks), len(m._forward_pre_hooks), len(m._backward_hooks), m.training)
        for m in model.modules()
    ]
    weights = [(p.detach().clone(), p.requires_grad, p.grad) for p in model.parameters()]
    return hooks, weights, torch.get_rng_state(), model.config.get_text_config()._attn_implementation


def assert_same_state(before, after):
    assert before[0] == after[0]
    assert before[3] == after[3]
    assert torch.equal(before[2], after[2])
    for (w, needs, grad), (v, needs_after, grad_after) in zip(before[1], after[1], strict=True):
        assert torch.equal(w, v)
        assert needs == needs_after
        assert grad is grad_after
