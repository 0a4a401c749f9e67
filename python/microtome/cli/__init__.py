"""The command line: one verb per job. Every verb reads ``--config file.yaml``, writes a table and says where.

Exit codes: 0 done, 1 a problem was found, 2 bad usage or bad input, 130 interrupted.
"""

from __future__ import annotations

import sys

import typer

from microtome.cli import capture, circuit, compare, demo, diff, features
from microtome.cli.app import app
from microtome.errors import Error

__all__ = ["app", "main"]

VERBS = (capture, features, compare, diff, circuit, demo)
"""Modules whose verbs the application has, in the order of the help."""


def main() -> None:
    """Run the command line; errors are one line on standard error and exit code 2."""
    try:
        app()
    except (Error, OSError, MemoryError) as error:
        typer.echo(f"microtome: {str(error) or type(error).__name__}", err=True)
        sys.exit(2)
    except KeyboardInterrupt:
        typer.echo(
            "microtome: interrupted; what was committed is kept, run the same command to continue", err=True
        )
        sys.exit(130)
