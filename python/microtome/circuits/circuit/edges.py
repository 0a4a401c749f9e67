"""Graphs of edges between heads, MLPs, input and logits: selection, and the JSON of EAP-IG and MIB.

Sources are ``input``, ``a{layer}.h{head}`` and ``m{layer}``; destinations ``a{layer}.h{head}<q>`` (k, v),
``m{layer}`` and ``logits``.
"""

from __future__ import annotations

import heapq
import json
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import polars as pl

from microtome.arguments import require_one_of
from microtome.errors import ShapeError

__all__ = ["EdgeGraph"]

Mask = npt.NDArray[np.bool_]


@dataclass(frozen=True, eq=False)
class EdgeGraph:
    """Scores of all edges of a model, and a selection of them.

    Example:
        >>> graph = EdgeGraph(1, 2, 8, np.ones((4, 8), np.float32))
        >>> graph.sources, graph.n_edges
        (['input', 'a0.h0', 'a0.h1', 'm0'], 13)
    """

    n_layers: int
    n_heads: int
    d_model: int
    scores: npt.NDArray[np.float32]
    """Signed mean scores ``(1 + L (H + 1), L (3 H + 1) + 1)``; 0 where there is no edge."""
    in_graph: Mask | None = None
    """Selected edges, of the same shape; all edges when None."""
    facts: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        wanted = len(self.sources), len(self.destinations)
        if self.scores.shape != wanted:
            raise ShapeError(f"edges: expected scores {wanted}, found {self.scores.shape}")

    @cached_property
    def sources(self) -> list[str]:
        """Names of the rows."""
        names = ["input"]
        for layer in range(self.n_layers):
            names += [f"a{layer}.h{head}" for head in range(self.n_heads)] + [f"m{layer}"]
        return names

    @cached_property
    def destinations(self) -> list[str]:
        """Names of the columns."""
        names = []
        for layer in range(self.n_layers):
            names += [f"a{layer}.h{head}<{letter}>" for letter in "qkv" for head in range(self.n_heads)]
            names.append(f"m{layer}")
        return [*names, "logits"]

    @cached_property
    def real(self) -> Mask:
        """Which edges exist: a source reaches what comes after it."""
        h, mask = self.n_heads, np.zeros((len(self.sources), len(self.destinations)), bool)
        for layer in range(self.n_layers):
            before, column = 1 + layer * (h + 1), layer * (3 * h + 1)
            mask[:before, column : column + 3 * h] = True
            mask[: before + h, column + 3 * h] = True
        mask[:, -1] = True
        return mask

    @cached_property
    def _source_of(self) -> npt.NDArray[np.int64]:
        """Row of the node that each column feeds; the number of rows for the logits."""
        place = {name: i for i, name in enumerate(self.sources)}
        return np.array([place.get(name.partition("<")[0], len(place)) for name in self.destinations])

    @property
    def n_edges(self) -> int:
        """Edges that exist."""
        return int(self.real.sum())

    @property
    def selected(self) -> Mask:
        """Edges in the graph."""
        return self.real if self.in_graph is None else self.in_graph & self.real

    def top(self, n: int, *, by: Literal["absolute", "signed"] = "absolute", prune: bool = True) -> EdgeGraph:
        """The ``n`` edges that score highest, ties by row and column; pruned to what connects input and logits.

        Raises:
            ShapeError: more edges than there are.
        """
        self._check(n)
        values = np.where(self.real, self._rank(by), -np.inf).reshape(-1)
        chosen = np.zeros(values.size, bool)
        chosen[np.argsort(-values, kind="stable")[:n]] = True
        found = replace(self, in_graph=chosen.reshape(self.scores.shape))
        return found.pruned() if prune else found

    def greedy(
        self, n: int, *, by: Literal["absolute", "signed"] = "absolute", prune: bool = True
    ) -> EdgeGraph:
        """``n`` edges, each the best that leads into a node already reached, from the logits up.

        Raises:
            ShapeError: more edges than there are.
        """
        self._check(n)
        values = self._rank(by)
        chosen = np.zeros(self.scores.shape, bool)
        reached = {len(self.sources)}
        queue: list[tuple[float, int, int]] = []

        def add(node: int) -> None:
            for column in np.flatnonzero(self._source_of == node):
                for row in np.flatnonzero(self.real[:, column]):
                    heapq.heappush(queue, (-float(values[row, column]), int(row), int(column)))

        add(len(self.sources))
        while queue and chosen.sum() < n:
            _, row, column = heapq.heappop(queue)
            chosen[row, column] = True
            if row not in reached:
                reached.add(row)
                add(row)
        found = replace(self, in_graph=chosen)
        return found.pruned() if prune else found

    def pruned(self) -> EdgeGraph:
        """Without the edges of nodes that nothing enters or that nothing leaves, again and again."""
        chosen = self.selected.copy()
        while True:
            leaves = chosen.any(1)
            enters = np.zeros(len(self.sources) + 1, bool)
            np.logical_or.at(enters, self._source_of, chosen.any(0))
            enters[0] = True
            nodes = leaves & enters[:-1]
            keep = chosen & nodes[:, None] & np.append(nodes, True)[self._source_of][None, :]
            if np.array_equal(keep, chosen):
                return replace(self, in_graph=chosen)
            chosen = keep

    def nodes(self) -> Mask:
        """Which sources have a selected edge that leaves them."""
        return np.asarray(self.selected.any(1))

    def _check(self, n: int) -> None:
        if not isinstance(n, int | np.integer) or not 0 <= n <= self.n_edges:
            raise ShapeError(f"n: expected 0 to {self.n_edges} edges, found {n}")

    def _rank(self, by: str) -> npt.NDArray[np.float32]:
        require_one_of("by", by, ("absolute", "signed"))
        return np.abs(self.scores) if by == "absolute" else self.scores

    def iou(self, other: EdgeGraph) -> float:
        """Intersection over union of the selected edges; 1 for two empty graphs.

        Raises:
            ShapeError: graphs of different models.
        """
        if self.scores.shape != other.scores.shape:
            raise ShapeError(f"edges: expected one model, found {self.scores.shape} and {other.scores.shape}")
        union = int((self.selected | other.selected).sum())
        return int((self.selected & other.selected).sum()) / union if union else 1.0

    def to_polars(self) -> pl.DataFrame:
        """One row per edge: source, destination, score, in_graph."""
        rows, columns = np.nonzero(self.real)
        return pl.DataFrame(
            {
                "source": [self.sources[i] for i in rows],
                "destination": [self.destinations[i] for i in columns],
                "score": self.scores[rows, columns],
                "in_graph": self.selected[rows, columns],
            }
        )

    def to_json(self, path: str | Path) -> None:
        """Write the JSON that EAP-IG's ``Graph.from_json`` and MIB read."""
        table = self.to_polars()
        names = {n: _edge_name(*n) for n in zip(table["source"], table["destination"], strict=True)}
        live = dict(zip(self.sources, self.nodes().tolist(), strict=True)) | {"logits": True}
        cfg = {
            "n_layers": self.n_layers, "n_heads": self.n_heads, "parallel_attn_mlp": False, "d_model": self.d_model,
        }  # fmt: skip
        content = {
            "cfg": cfg,
            "nodes": {name: {"in_graph": inside} for name, inside in live.items()},
            "edges": {
                names[source, destination]: {"score": score, "in_graph": inside}
                for source, destination, score, inside in table.iter_rows()
            },
        }
        Path(path).write_text(json.dumps(content))

    @classmethod
    def from_json(cls, path: str | Path) -> EdgeGraph:
        """Read what EAP-IG, MIB or :meth:`to_json` wrote.

        Raises:
            ShapeError: a key is missing, or an edge is not one of the model's.
        """
        content = json.loads(Path(path).read_text())
        missing = {"cfg", "nodes", "edges"} - set(content)
        if missing:
            raise ShapeError(
                f"edges: {path}: expected keys cfg, nodes and edges, found no {sorted(missing)[0]}"
            )
        cfg = content["cfg"]
        if cfg.get("parallel_attn_mlp"):
            raise ShapeError(f"edges: {path}: expected attention before MLP, found parallel_attn_mlp")
        layers, heads = cfg["n_layers"], cfg["n_heads"]
        shape = (1 + layers * (heads + 1), layers * (3 * heads + 1) + 1)
        graph = cls(layers, heads, cfg["d_model"], np.zeros(shape, np.float32), np.zeros(shape, bool))
        table = graph.to_polars().select("source", "destination")
        place = {
            _edge_name(s, d): (graph.sources.index(s), graph.destinations.index(d))
            for s, d in table.iter_rows()
        }
        for name, edge in content["edges"].items():
            if name not in place:
                raise ShapeError(
                    f"edges: {path}: expected edges of {layers} layers and {heads} heads, found {name!r}"
                )
            graph.scores[place[name]] = edge["score"]
            graph.selected_mask[place[name]] = edge["in_graph"]
        return graph

    @property
    def selected_mask(self) -> Mask:
        """The mask of selected edges itself.

        Raises:
            ShapeError: nothing was selected.
        """
        if self.in_graph is None:
            raise ShapeError("in_graph: expected a selection, found none")
        return self.in_graph


def _edge_name(source: str, destination: str) -> str:
    """``a0.h1->a2.h3<q>``, as EAP-IG names edges."""
    return f"{source}->{destination}"
