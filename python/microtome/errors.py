"""The exceptions of microtome, by what the user can do about them.

Operating-system failures stay :class:`OSError` with ``errno`` and ``filename``. A message is one line and has the form
``<what failed>: <argument or path>: expected X, found Y. <what to do>``.
"""

__all__ = [
    "CheckpointError",
    "CorruptShardError",
    "DtypeError",
    "Error",
    "ForkedError",
    "HookError",
    "LockedError",
    "ManifestError",
    "MissingExtraError",
    "NonFiniteError",
    "ShapeError",
    "StoreError",
    "UndefinedWarning",
    "UnsafeCheckpointError",
    "VersionError",
    "first_line",
]


class Error(Exception):
    """Base of all exceptions of microtome."""


class StoreError(Error):
    """A store cannot do what was asked."""


class CorruptShardError(StoreError):
    """A file of a store is damaged; ``microtome verify`` lists what is affected."""


class ManifestError(StoreError):
    """The manifest of a store is damaged or names what it must not."""


class VersionError(StoreError):
    """A store was written by a format that this build does not read."""


class LockedError(StoreError):
    """Another writer holds the store."""


class HookError(StoreError, KeyError):
    """A hook or module path that is not there; the message lists near names."""

    __str__ = Exception.__str__  # KeyError would quote the message


class ShapeError(Error, ValueError):
    """An argument has the wrong shape, size or range."""


class DtypeError(Error, TypeError):
    """An argument has the wrong element type."""


class NonFiniteError(Error, ValueError):
    """NaN or infinity where numbers are needed."""


class ForkedError(Error, RuntimeError):
    """An object was used in a forked child of the process that made it."""


class CheckpointError(Error, ValueError):
    """A dictionary or checkpoint file cannot be read, or does not say what it needs to say."""


class UnsafeCheckpointError(Error):
    """A file could run code when loaded and is refused."""


class UndefinedWarning(UserWarning):
    """Some of the numbers asked for do not exist (a variance of zero, say): they are NaN, and listed in the message."""


class MissingExtraError(Error, ImportError):
    """A package that comes with an extra is not installed."""


def first_line(error: BaseException) -> str:
    r"""What another library's error says, for a message of one line; its type where it says nothing.

    Example:
        >>> first_line(ValueError("no number\n  in row 3")), first_line(ValueError())
        ('no number', 'ValueError')
    """
    return (str(error).splitlines() or [type(error).__name__])[0]
