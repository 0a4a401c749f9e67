"""Back-patching: late representations of the data, put into early layers, and what that repairs (A14).

1. A clean run keeps resid_post of every layer at the data positions, behind the DeepStack features that some
   models add there: what is kept and overwritten is what the next layer is given, so nothing is added twice.
2. A second run overwrites resid_post[dst + j] there with the kept resid_post[src + j], |j| ≤ w // 2, dst <
   src; the layers after recompute (``repeat_processing``), or are given their clean values again.
3. The answer is the most likely of the task's labels at the last position.

The best (src, dst, window) is chosen on one part of the prompts and judged on the other. In a causal decoder
whose data come first nothing of the question can flow back into the patched positions.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from microtome.circuits.backpatch.choice import WINDOWS, BackPatch, Correct, Setting, all_settings
from microtome.circuits.forward.decoder import last_logits, merge
from microtome.circuits.forward.nodes import on_residuals
from microtome.circuits.forward.restore import left_as_found
from microtome.circuits.pairs.pair_set import PairBatch, PairSet, as_pair_set, check_first
from microtome.circuits.pairs.reading import require_token
from microtome.errors import ShapeError
from microtome.progress import bar

__all__ = ["back_patch", "back_patch_iterated", "check_data_first"]

Share = npt.NDArray[np.float64]


def back_patch(
    model: Any,
    pairs: PairSet,
    settings: Sequence[Setting] | None = None,
    *,
    windows: Sequence[int] = WINDOWS,
    labels: Sequence[int] | None = None,
    group: str = "data",
    repeat_processing: bool = True,
    allow_prefix: bool = False,
    batch_size: int = 16,
    progress: bool = True,
) -> BackPatch:
    """Answers of the clean prompts under every setting, and without patching.

    Args:
        model: a transformers model; left as it was found.
        pairs: prepared pairs; all prompts, not only the ones that the model answers. Their counterfactuals
            are not used. Run it on the textual form as well: that is the control.
        settings: (src, dst, window) triples; all pairs of layers in all ``windows`` when None.
        windows: odd widths.
        labels: token ids among which the answer is chosen; the answers of all pairs when None.
        group: the positions that are patched.
        repeat_processing: layers after the patched ones recompute; else their values at the data stay those
            of the clean run.
        allow_prefix: accept prompts whose words before the data differ: these may carry the question into the
            data.
        batch_size: prompts per forward.
        progress: show a bar.

    Raises:
        ShapeError: no setting, one with dst ≥ src or outside the model, labels that are no tokens of the model, or data
            that do not come first.

    Example:
        >>> from microtome import organism
        >>> from microtome.circuits import prepare
        >>> model, processor = organism.load_model(), organism.load_processor()
        >>> pairs = prepare(model, processor, organism.pairs("colour", "visual", 4))
        >>> found = back_patch(model, pairs, windows=(1,))
        >>> found.correct.shape                       # every pair of 6 layers, 4 prompts
        (15, 4)
        >>> found.choose().setting in found.settings
        True
    """
    from microtome.capture.models import adapt

    pairs = as_pair_set(pairs)
    adapter = adapt(model)
    chosen = tuple(all_settings(adapter.n_layers, windows) if settings is None else map(_setting, settings))
    _check(chosen, adapter.n_layers)
    check_data_first(pairs, group, allow_prefix)
    ids = _labels(model, pairs, labels)
    found = np.zeros((2, len(chosen) + 1, len(pairs)))
    with left_as_found(model), torch.no_grad(), bar("back-patching", len(pairs), progress, "prompts") as done:
        check_first(adapter, pairs)
        for batch in pairs.batches(batch_size, model.device, done):
            found[:, :, list(batch.indices)] = _answers(
                adapter, pairs, batch, chosen, ids, group, repeat_processing
            )
    correct, likely = found[0].astype(bool), found[1]
    return BackPatch(chosen, correct[:-1], correct[-1], likely[:-1], likely[-1])


def _setting(given: Any) -> Setting:
    if len(given) != len(Setting._fields):
        raise ShapeError(f"settings: expected (src, dst, window), found {given!r}")
    return Setting._make(given)


def _check(settings: Sequence[Setting], n_layers: int) -> None:
    if not settings:
        raise ShapeError("settings: expected at least one, found none. Give a window")
    for setting in settings:
        if not 0 <= setting.dst < setting.src < n_layers:
            raise ShapeError(f"settings: expected 0 ≤ dst < src < {n_layers}, found {tuple(setting)}")
        if setting.window < 1 or setting.window % 2 == 0:
            raise ShapeError(f"settings: window: expected an odd width, found {setting.window}")


def check_data_first(pairs: PairSet, group: str, allow_prefix: bool) -> None:
    """Refuse prompts without the positions to patch, or with different words before them.

    Raises:
        ShapeError: as :func:`back_patch`.
    """
    heads = set()
    for i, pair in enumerate(pairs):
        where = np.asarray(pair.spans.get(group, ()), np.int64)
        if not len(where):
            raise ShapeError(f"pair {i}: expected {group} positions to patch, found none")
        heads.add(tuple(pair.clean["input_ids"][0, : int(where[0])].tolist()))
    if len(heads) > 1 and not allow_prefix:
        raise ShapeError(
            f"pairs: expected the same words before the {group} of every prompt, found {len(heads)} beginnings. "
            "A question before the data flows into them; allow_prefix=True runs all the same"
        )


def _labels(model: Any, pairs: PairSet, labels: Sequence[int] | None) -> Tensor:
    found = set(labels) if labels is not None else {i for p in pairs for i in (p.answer, p.corrupted_answer)}
    for label in found:
        require_token(model, "labels", label)
    missing = {p.answer for p in pairs} - found
    if missing:
        raise ShapeError(f"labels: expected every answer among them, found {sorted(missing)} missing")
    return torch.tensor(sorted(found), device=model.device)


def _mask(pairs: PairSet, batch: PairBatch, group: str) -> Tensor:
    mask = torch.zeros(batch.slots.shape, dtype=torch.bool, device=batch.slots.device)
    for row, i in enumerate(batch.indices):
        mask[row, torch.from_numpy(np.asarray(pairs.pairs[i].spans[group]))] = True
    return mask[..., None]  # (b, p, 1)


def _answers(
    adapter: Any,
    pairs: PairSet,
    batch: PairBatch,
    settings: Sequence[Setting],
    ids: Tensor,
    group: str,
    repeat: bool,
) -> Share:
    """Right or wrong, and P(right), under each setting and in the last row under none. Shape ``(2, settings + 1, b)``."""
    merged = merge(adapter, batch.clean)
    mask = _mask(pairs, batch, group)
    kept: dict[int, Tensor] = {}
    with on_residuals(adapter, lambda layer, x: kept.__setitem__(layer, x.clone()), with_deepstack=True):
        rows = [_right(last_logits(adapter, merged), ids, batch)]
    for setting in settings:
        put = _values(setting, kept, adapter.n_layers, repeat)
        visit = partial(_overwrite, mask, put)
        with on_residuals(adapter, visit, sorted(put), with_deepstack=True):
            rows.append(_right(last_logits(adapter, merged), ids, batch))
    return np.stack([*rows[1:], rows[0]], 1)


def _overwrite(mask: Tensor, put: dict[int, Tensor], layer: int, x: Tensor) -> Tensor:
    return torch.where(mask, put[layer], x)


def _values(setting: Setting, kept: dict[int, Tensor], n_layers: int, repeat: bool) -> dict[int, Tensor]:
    """What is put into which layer."""
    layers = setting.layers(n_layers)
    put = {d: kept[s] for d, s in layers.items()}
    if not repeat:
        put |= {layer: kept[layer] for layer in range(max(layers) + 1, n_layers)}
    return put


def _right(logits: Tensor, ids: Tensor, batch: PairBatch) -> Share:
    """Whether the answer is the most likely label, and its probability among the labels. Shape ``(2, b)``."""
    shares = logits[:, ids].double().softmax(-1)
    right = ids[shares.argmax(-1)] == batch.answers
    p = shares[torch.searchsorted(ids, batch.answers)[:, None] == torch.arange(len(ids), device=ids.device)]
    return torch.stack([right.double(), p]).cpu().numpy()  # type: ignore[no-any-return]


def back_patch_iterated(
    model: Any,
    pairs: PairSet,
    setting: Setting,
    iterations: int = 10,
    *,
    labels: Sequence[int] | None = None,
    group: str = "data",
    allow_prefix: bool = False,
    batch_size: int = 16,
) -> Correct:
    """Answers after patching again and again, each time with the values of the patched run before.

    Args:
        model: a transformers model; left as it was found.
        pairs: prepared pairs; clean sides are used.
        setting: (src, dst, window), for example of :meth:`BackPatch.choose`.
        iterations: how often.
        labels: as in :func:`back_patch`.
        group: as in :func:`back_patch`.
        allow_prefix: as in :func:`back_patch`.
        batch_size: prompts per forward.

    Returns:
        Shape ``(iterations + 1, n)``; row 0 is the unpatched model.

    Raises:
        ShapeError: as :func:`back_patch`; or no iteration is asked for.
    """
    from microtome.capture.models import adapt

    pairs = as_pair_set(pairs)
    adapter = adapt(model)
    setting = _setting(setting)
    if iterations < 1:
        raise ShapeError(f"iterations: expected 1 or more, found {iterations}")
    _check([setting], adapter.n_layers)
    check_data_first(pairs, group, allow_prefix)
    ids = _labels(model, pairs, labels)
    correct = np.zeros((iterations + 1, len(pairs)), bool)
    with left_as_found(model), torch.no_grad():
        check_first(adapter, pairs)
        for batch in pairs.batches(batch_size, model.device):
            merged, mask = merge(adapter, batch.clean), _mask(pairs, batch, group)
            put: dict[int, Tensor] = {}
            for i in range(iterations + 1):
                kept: dict[int, Tensor] = {}

                def visit(
                    layer: int, x: Tensor, put: dict[int, Tensor] = put, kept: dict[int, Tensor] = kept
                ) -> Any:
                    x = torch.where(mask, put[layer], x) if layer in put else x  # noqa: B023  called in this round
                    kept[layer] = x.clone()
                    return x

                with on_residuals(adapter, visit, with_deepstack=True):
                    correct[i, list(batch.indices)] = _right(last_logits(adapter, merged), ids, batch)[0]
                put = {d: kept[s] for d, s in setting.layers(adapter.n_layers).items()}
    return correct
