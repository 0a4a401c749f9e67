"""Whether a recorder may be used: by the process that made it, and as long as every step could be built."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager

from microtome.errors import Error, ForkedError, first_line

__all__ = ["Guard"]


class Guard:
    """Stands before every use of a recorder."""

    def __init__(self) -> None:
        self._pid = os.getpid()
        self._failure: BaseException | None = None

    @property
    def is_forked(self) -> bool:
        """Whether this is a forked child of the process that made the recorder."""
        return self._pid != os.getpid()

    def same_process(self) -> None:
        """Refuse a forked child."""
        if self.is_forked:
            raise ForkedError(
                "capture: expected the process that made the recorder, found a forked child of it"
            )

    def usable(self) -> None:
        """Refuse a forked child, and any use after a failure."""
        self.same_process()
        if self._failure is not None:
            raise Error(
                f"capture: expected a recorder without errors, found one that failed: {first_line(self._failure)}. "
                "Open mt.capture on this path again: it goes on after the last committed step"
            ) from self._failure

    @contextmanager
    def building(self) -> Iterator[None]:
        """What raises in here ends the recorder: samples may have ordinals by then, and never get rows."""
        try:
            yield
        except BaseException as error:
            self._failure = error
            raise
