"""Which steps of a study are done: each leaves its tables in the study's folder, and is not done again.

``study.json`` says what the study is of: weights, options, pairs. Tasks can be added to it, nothing else can
change. A step's tables are ``steps/<step>.<table>.parquet``; they count from the moment ``steps/<step>.json`` names
them, which is written last, by rename.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any
from urllib.parse import quote

import polars as pl

from microtome.errors import StoreError
from microtome.whole import write_whole

__all__ = ["Ledger", "Tables", "file_name"]

Tables = dict[str, pl.DataFrame]


def file_name(*parts: str) -> str:
    """Names of tasks and forms as one file name; what no file name may hold is percent-encoded.

    Example:
        >>> file_name("a/b", "visual")
        'a%2Fb-visual'
    """
    return "-".join(quote(part, safe=" ") for part in parts)


class Ledger:
    """The finished steps of one study."""

    def __init__(self, folder: Path, identity: Mapping[str, Any]) -> None:
        self._steps = folder / "steps"
        self._steps.mkdir(parents=True, exist_ok=True)
        told = json.loads(json.dumps(identity))
        path = folder / "study.json"
        if path.exists():
            known = json.loads(path.read_text())
            changed = next((key for key in told if key in known and known[key] != told[key]), None)
            if changed is not None:
                raise StoreError(
                    f"study: {folder}: expected {changed} {known[changed]!r} as in the study there, found "
                    f"{told[changed]!r}. Choose another folder"
                )
            told = known | told
        write_whole(path, lambda beside: beside.write_text(json.dumps(told, indent=1)))

    def __contains__(self, step: str) -> bool:
        return (self._steps / f"{step}.json").exists()

    def tables(self, step: str, make: Callable[[], Tables]) -> Tables:
        """The tables of a step: read when it is done, else made and kept."""
        done = self._steps / f"{step}.json"
        if step in self:
            return {name: pl.read_parquet(self._path(step, name)) for name in json.loads(done.read_text())}
        made = make()
        for name, table in made.items():
            table.write_parquet(self._path(step, name))
        write_whole(done, lambda beside: beside.write_text(json.dumps(list(made))))
        return made

    def _path(self, step: str, name: str) -> Path:
        return self._steps / f"{step}.{name}.parquet"
