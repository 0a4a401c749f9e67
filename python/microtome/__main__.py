"""``python -m microtome`` and ``microtome`` are the command line."""

import sys

from microtome.errors import Error
from microtome.tensors import extra

__all__ = ["main"]


def main() -> None:
    """Run the command line, or say which extra brings it."""
    try:
        extra("typer", "cli")
        extra("yaml", "cli")
    except Error as error:
        sys.stderr.write(f"microtome: {error}\n")
        sys.exit(2)
    from microtome.cli import main as run

    run()


if __name__ == "__main__":
    main()
