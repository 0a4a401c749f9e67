"""Hook points: one named value of a model each, where it is read and how it is replaced.

A point knows its module and the side (``"input"`` or ``"output"``) on which the value passes. Reading returns
the value itself, never a copy; values with heads come as ``(..., heads, d_head)``.
"""

from __future__ import annotations

import copy
import dataclasses
import difflib
import fnmatch
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Literal

import torch

from microtome.errors import ShapeError

__all__ = ["HookPoint", "Side", "Space", "select"]

Side = Literal["input", "output"]
"""Where a module passes a value."""

Space = Literal["tokens", "vision_encoder", "vision_projector", "samples"]
"""What one row of a value stands for."""


@dataclasses.dataclass(frozen=True, eq=False)
class HookPoint:
    """One named value of a model.

    Example:
        >>> from transformers import LlamaConfig, LlamaForCausalLM
        >>> from microtome.capture import adapt
        >>> config = LlamaConfig(vocab_size=9, hidden_size=8, intermediate_size=8, num_hidden_layers=1,
        ...                      num_attention_heads=2)
        >>> model = LlamaForCausalLM(config)
        >>> point = adapt(model).hook_points()["blocks.0.attn.hook_z"]
        >>> seen = []
        >>> with torch.no_grad(), point.observe(seen.append):
        ...     _ = model(torch.tensor([[1, 2, 3]]))
        >>> seen[0].shape                                        # (batch, position, heads, d_head)
        torch.Size([1, 3, 2, 4])
    """

    name: str
    """Canonical name, or the module path where the model's own path was asked for."""
    path: str
    """Path of the module in the model."""
    module: Any
    side: Side
    space: Space
    width: int | None
    """Values in one row; None where only a forward tells."""
    heads: int = 0
    """Heads of the value, 0 where it has none."""
    columns: tuple[int, int] | None = None
    """Start and stop of the value inside the output of a fused projection."""
    item: int = 0
    """Place of the value in a tuple output."""

    def read(self, args: tuple[Any, ...], kwargs: Mapping[str, Any], output: Any = None) -> torch.Tensor:
        """The value, as a view: ``(..., width)`` or ``(..., heads, d_head)``.

        Raises:
            ShapeError: the module passes no tensor there.
        """
        value = self._raw(args, kwargs, output)
        if self.columns is not None:
            value = value[..., self.columns[0] : self.columns[1]]
        return value.unflatten(-1, (self.heads, -1)) if self.heads else value

    def write(
        self, args: tuple[Any, ...], kwargs: Mapping[str, Any], output: Any, value: torch.Tensor
    ) -> Any:
        """What a hook returns to put ``value`` in place: ``(args, kwargs)``, or the output for an output.

        Gradients flow through; nothing is changed in place. ``value`` has the shape that :meth:`read` gives,
        or is flat over heads.
        """
        old = self._raw(args, kwargs, output)
        if self.heads and value.ndim == old.ndim + 1:
            value = value.flatten(-2)
        if self.columns is not None:
            start, stop = self.columns
            value = torch.cat([old[..., :start], value, old[..., stop:]], -1)
        if self.side == "output":
            return _with_tensor(output, self.item, value)
        if args and isinstance(args[0], torch.Tensor):
            return (value, *args[1:]), dict(kwargs)
        return args, {**kwargs, _input_key(kwargs): value}

    def observe(self, see: Callable[[torch.Tensor], object]) -> Any:
        """Call ``see(value)`` at each forward, ignoring what it returns; gives a context manager."""

        def hook(args: tuple[Any, ...], kwargs: Mapping[str, Any], output: Any) -> None:
            see(self.read(args, kwargs, output))  # a hook that returned anything would replace the value

        return self._register(hook)

    def replace(self, new: Callable[[torch.Tensor], torch.Tensor | None]) -> Any:
        """Put ``new(value)`` in the value's place at each forward; None keeps it.

        The handle is a context manager.
        """

        def hook(args: tuple[Any, ...], kwargs: Mapping[str, Any], output: Any) -> Any:
            value = new(self.read(args, kwargs, output))
            return None if value is None else self.write(args, kwargs, output, value)

        return self._register(hook)

    def _register(self, hook: Callable[[tuple[Any, ...], Mapping[str, Any], Any], Any]) -> Any:
        if self.side == "input":
            before = lambda _, args, kwargs: hook(args, kwargs, None)  # noqa: E731
            return self.module.register_forward_pre_hook(before, with_kwargs=True)
        after = lambda _, args, kwargs, output: hook(args, kwargs, output)  # noqa: E731
        return self.module.register_forward_hook(after, with_kwargs=True)

    def _raw(self, args: tuple[Any, ...], kwargs: Mapping[str, Any], output: Any) -> torch.Tensor:
        if self.side == "output":
            value = _tensor_of(output, self.item)
        else:
            value = args[0] if args and isinstance(args[0], torch.Tensor) else kwargs.get(_input_key(kwargs))
        if not isinstance(value, torch.Tensor):
            found = type(output).__name__ if self.side == "output" else "no tensor argument"
            raise ShapeError(
                f"hook {self.name} at {self.path} ({self.side}): expected a tensor, found {found}"
            )
        return value


def _input_key(kwargs: Mapping[str, Any]) -> str:
    if "hidden_states" in kwargs:
        return "hidden_states"
    return next((key for key, value in kwargs.items() if isinstance(value, torch.Tensor)), "")


def _fields(output: Any) -> list[str]:
    return [field.name for field in dataclasses.fields(output)]


def _tensor_of(output: Any, item: int) -> Any:
    """The tensor at place ``item`` of a module's output: a tensor, tuple, list, mapping or dataclass."""
    if isinstance(output, torch.Tensor):
        return output if item == 0 else None
    if isinstance(output, Mapping):
        values: Sequence[Any] = list(output.values())
    elif dataclasses.is_dataclass(output):
        values = [getattr(output, name) for name in _fields(output)]
    else:
        values = output if isinstance(output, (tuple, list)) else []
    return values[item] if item < len(values) else None


def _with_tensor(output: Any, item: int, value: torch.Tensor) -> Any:
    if isinstance(output, torch.Tensor):
        return value
    if isinstance(output, tuple):
        parts = (*output[:item], value, *output[item + 1 :])
        return type(output)(*parts) if hasattr(output, "_fields") else parts
    changed = copy.copy(output)
    if isinstance(output, Mapping):
        changed[list(output)[item]] = value
    elif isinstance(output, list):
        changed[item] = value
    else:
        setattr(changed, _fields(output)[item], value)
    return changed


_SYNONYMS = [
    (re.compile(r"^layers_output\[(\d+|\*)\]$"), r"blocks.\1.hook_resid_post"),
    (re.compile(r"^attentions_output\[(\d+|\*)\]$"), r"blocks.\1.hook_attn_out"),
    (re.compile(r"^mlps_output\[(\d+|\*)\]$"), r"blocks.\1.hook_mlp_out"),
    (re.compile(r"\.attn\.o\.hook_in$"), ".attn.hook_z"),
    (re.compile(r"\.attn\.hook_out$"), ".hook_attn_out"),
    (re.compile(r"\.mlp\.hook_out$"), ".hook_mlp_out"),
    (re.compile(r"^(blocks\.[^.]+)\.hook_in$"), r"\1.hook_resid_pre"),
    (re.compile(r"^((?:vision_encoder\.)?blocks\.[^.]+)\.hook_out$"), r"\1.hook_resid_post"),
    (re.compile(r"^embed\.hook_out$"), "hook_embed"),
]


def _canonical(pattern: str) -> str:
    for spelling, name in _SYNONYMS:
        pattern = spelling.sub(name, pattern)
    return pattern


def select(
    patterns: Iterable[str],
    points: Mapping[str, HookPoint],
    native: Callable[[str], HookPoint],
    paths: Iterable[str],
) -> list[HookPoint]:
    """The points that the patterns name, each once, in the order of the patterns.

    Args:
        patterns: canonical names, synonyms of other tools or module paths, with ``fnmatch`` wildcards.
        points: the canonical points.
        native: makes the point of a module path.
        paths: every module path of the model.

    Raises:
        ShapeError: no pattern given, or one that names nothing.
    """
    if isinstance(patterns, str):
        patterns = [patterns]
    chosen: dict[str, HookPoint] = {}
    paths = [path for path in paths if path]
    for pattern in patterns:
        names = fnmatch.filter(points, _canonical(pattern))
        # Patterns need a mode of the model and much room: only a wildcard that names them takes them.
        found = [points[name] for name in names if "pattern" in pattern or not name.endswith("hook_pattern")]
        found = found or [native(path) for path in fnmatch.filter(paths, pattern)]
        if not found:
            close = difflib.get_close_matches(pattern, [*points, *paths], 3, 0.5) or list(points)[:3]
            raise ShapeError(
                f"hooks: expected a hook name or module path, found {pattern!r}, "
                f"which names nothing in this model. Close: {', '.join(close)}"
            )
        chosen.update((point.name, point) for point in found)
    if not chosen:
        raise ShapeError(
            "hooks: expected at least one name, found none. For example hooks=['blocks.*.hook_resid_post']"
        )
    return list(chosen.values())
