"""A store of activations, open for reading."""

from __future__ import annotations

import difflib
import json
import os
import warnings
from collections.abc import Callable
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from microtome import _core
from microtome.errors import HookError, ShapeError, StoreError, UnsafeCheckpointError
from microtome.progress import bar
from microtome.store.activations import Activations, without_damage
from microtome.store.codes import CODES, StoredCodes, StoredRaggedCodes, codes_folder, open_codes
from microtome.store.codes_writer import CodesWriter
from microtome.store.tables import ROW, row_frame, sample_frame

if TYPE_CHECKING:
    import polars as pl

__all__ = ["ActivationStore"]


class ActivationStore:
    """What a capture had committed at the moment of opening. Read-only; a running capture is not disturbed.

    Args:
        path: folder of the store.
        verify: when the CRC32C of a block is computed: at its ``"first"`` touch, ``"always"``, ``"never"``.
        backend: ``"mmap"`` for local disks; ``"pread"`` for network disks, where a map makes a lost connection a
            signal; ``"direct"`` past the page cache, for a store that exceeds memory and is read once. Where the
            file system has no direct I/O, that is ``"pread"`` with a warning. Results are the same bit for bit.
        on_corrupt: what becomes of rows under damage: ``"error"`` at their first touch, or ``"skip"``: a hook is
            checked as a whole when it is first used, and its damaged rows are left out, listed in
            :attr:`Activations.skipped` and counted by a warning.

    Raises:
        ShapeError: an argument that is none of these.
        StoreError: ``path`` is not a store.
        ManifestError: the manifest is damaged. A damaged shard is a CorruptShardError at its first touch.
        VersionError: written by a format that this build does not read.
        UnsafeCheckpointError: ``path`` is a pickle or an archive.

    Example:
        >>> store = mt.ActivationStore("runs/llava")                     # doctest: +SKIP
        >>> store["blocks.12.hook_resid_post"][:4].shape                 # doctest: +SKIP
        torch.Size([4, 4096])
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        verify: str = "first",
        backend: str = "mmap",
        on_corrupt: str = "error",
    ) -> None:
        if on_corrupt not in ("error", "skip"):
            raise ShapeError(f"on_corrupt: expected 'error' or 'skip', found {on_corrupt!r}")
        self._reader = _core.StoreReader(os.fspath(path), verify, backend)
        self._verify, self._skips = verify, on_corrupt == "skip"
        if backend != self.backend:
            warnings.warn(
                f"backend: expected direct I/O on the file system of {self.path}, found none. "
                "Reading through the page cache",
                stacklevel=2,
            )
        self._tables = {name: space for name, space, _ in self._reader.hooks}
        self._spaces = [name for name, _, _ in self._reader.spaces]

    @property
    def path(self) -> Path:
        """Folder of the store."""
        return Path(self._reader.path)

    @property
    def backend(self) -> str:
        """How bytes are reached: ``"mmap"``, ``"pread"`` or ``"direct"``."""
        return self._reader.backend

    @property
    def hooks(self) -> list[str]:
        """Hook names, in the order of the capture."""
        return list(self._tables)

    @cached_property
    def facts(self) -> dict[str, Any]:
        """Facts of the run: model, revision, processor and the like."""
        facts: dict[str, Any] = json.loads(self._reader.facts)
        return facts

    @property
    def fingerprint(self) -> str:
        """Checksum over the manifest, which holds the checksums of all files: equal for equal stores."""
        return self._reader.fingerprint

    @property
    def spaces(self) -> list[str]:
        """Row spaces: ``"tokens"`` for the decoder; other towers have rows of their own."""
        return list(self._spaces)

    @property
    def n_rows(self) -> int:
        """Committed rows of the decoder's tokens, or of the first row space of a store without."""
        return self.n_rows_of(self._main_space)

    @property
    def _main_space(self) -> str:
        return "tokens" if "tokens" in self._spaces else self._spaces[0]

    def n_rows_of(self, space: str) -> int:
        """Committed rows of a row space."""
        return sum(step[space] for step in self._reader.steps)

    @property
    def rows(self) -> pl.LazyFrame:
        """Row table of the tokens: ``sample``, ``position``, ``token_id``, ``kind``, ``special``."""
        return self.rows_of(self._main_space)

    def rows_of(self, space: str) -> pl.LazyFrame:
        """Row table of a row space, in the order of the rows of its hooks."""
        return self._row_frame(space).drop(ROW)

    def _row_frame(self, space: str) -> pl.LazyFrame:
        return row_frame(self._reader, space)

    @cached_property
    def samples(self) -> pl.LazyFrame:
        """Sample table: ``sample`` (its number in the store), ``id``, and the columns given at capture."""
        return sample_frame(self._reader)

    def __contains__(self, hook: object) -> bool:
        return isinstance(hook, str) and self._canonical(hook) is not None

    def _canonical(self, hook: str) -> str | None:
        if hook in self._tables:
            return hook
        modules: dict[str, str] = self.facts.get("modules", {})
        return next((name for name, path in modules.items() if path == hook and name in self._tables), None)

    def __getitem__(self, hook: str) -> Activations:
        """All rows of a hook, by its name or by the path of its module in the model.

        Raises:
            HookError: no such hook; the message lists the nearest names.

        With ``on_corrupt="skip"`` every block of the hook is checked here.
        """
        name = self._canonical(hook)
        if name is None:
            near = difflib.get_close_matches(hook, self._tables, n=3, cutoff=0.3) or self.hooks[:3]
            raise HookError(
                f"no hook {hook!r}: {self.path}: expected e.g. {', '.join(near)}. See store.hooks"
            )
        selection, skipped = self._reader.hook(name), None
        if self._skips:
            selection, skipped = without_damage(selection)
            if len(skipped):
                warnings.warn(
                    f"on_corrupt: {len(skipped)} rows of {name} lie under damage and are skipped. "
                    "See Activations.skipped",
                    stacklevel=2,
                )
        return Activations(self, name, self._tables[name], selection, skipped=skipped)

    def __repr__(self) -> str:
        return f"ActivationStore({str(self.path)!r}, {len(self.hooks)} hooks, {self.n_rows} rows)"

    def verify(self, progress: bool | Callable[[int], object] = True) -> list[str]:
        """Check every byte of every file, in parallel.

        Args:
            progress: whether a terminal shows a bar; or what is called about ten times a second with the number of
                files done, of :attr:`n_files`.

        Returns:
            One line per problem, with the rows affected; empty when the store is sound.
        """
        with bar("verify", self.n_files, progress is True, unit="files") as shown:
            problems = self._reader.verify(progress if callable(progress) else shown)
        for name in self.code_names:
            problems += [f"codes {name}: {problem}" for problem in self._problems_of(name)]
        return problems

    def _problems_of(self, name: str) -> list[str]:
        """Problems of the codes called ``name``; what cannot be opened is one of them and hides no other."""
        try:
            return self.codes(name).verify()
        except (StoreError, UnsafeCheckpointError) as error:
            return [str(error)]

    @property
    def n_files(self) -> int:
        """Files that :meth:`verify` checks."""
        return self._reader.n_files

    @property
    def code_names(self) -> list[str]:
        """Names of the sparse codes stored beside the activations."""
        folder = self.path / CODES
        if not folder.is_dir():
            return []
        # A name that begins with a point is no name of codes: other programs leave such folders behind.
        return sorted(p.name for p in folder.iterdir() if p.is_dir() and not p.name.startswith("."))

    def codes(self, name: str) -> StoredCodes | StoredRaggedCodes:
        """Sparse codes stored under ``name``: with ``k`` slots per row, or ragged, as they were written.

        They are reached and checked as this store is; damage is an error at its first touch, and never skipped.

        Raises:
            StoreError: no codes of that name.
        """
        return open_codes(codes_folder(self.path, name), self._verify, self.backend)

    def write_codes(
        self,
        name: str,
        hook: str | Activations,
        *,
        k: int | None = None,
        d_sae: int,
        dictionary: str,
        step_rows: int = 65_536,
    ) -> CodesWriter:
        """Write sparse codes of a hook, or of a selection of its rows, beside the activations.

        Args:
            name: folder name of the codes: letters, digits and ``._-``.
            hook: hook name, or the selection that is encoded.
            k: slots per row; None for ragged codes, as many entries per row as fire (JumpReLU, ReLU, Batch Top-K).
                :attr:`microtome.SAE.slots` says which a dictionary gives.
            d_sae: width of the dictionary.
            dictionary: fingerprint of the dictionary.
            step_rows: rows per commit; what is not committed is lost when the process dies.

        Raises:
            StoreError: codes of that name are of another dictionary, hook or ``k``, or of other rows.
            LockedError: another writer is at them.

        Example:
            >>> facts = {"k": sae.slots, "d_sae": sae.d_sae, "dictionary": sae.fingerprint()}  # doctest: +SKIP
            >>> with store.write_codes("mine", acts, **facts) as out:               # doctest: +SKIP
            ...     for block in acts.take(slice(out.n_rows, None)).blocks():       # goes on where it stopped
            ...         out.append(sae.encode(block))                               # doctest: +SKIP
        """
        acts = self[hook] if isinstance(hook, str) else hook
        folder = codes_folder(self.path, name)
        return CodesWriter(folder, acts, k=k, d_sae=d_sae, dictionary=dictionary, step_rows=step_rows)
