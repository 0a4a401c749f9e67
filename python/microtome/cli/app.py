"""The application, and what its verbs share: options, opening a store, writing a table."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
import yaml

from microtome.errors import first_line

if TYPE_CHECKING:
    import polars as pl

    from microtome.record import Record
    from microtome.store import ActivationStore

app = typer.Typer(
    name="microtome",
    help="Activation analytics of vision-language models: capture, store, encode, count, compare, show.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode="markdown",
)


def _read_config(context: typer.Context, path: Path | None) -> Path | None:
    """Take the file's values as defaults; the command line has the last word."""
    if path is None:
        return None
    try:
        values = yaml.safe_load(path.read_text())
    except (OSError, yaml.YAMLError) as error:
        raise typer.BadParameter(first_line(error)) from error
    if not isinstance(values, dict):
        raise typer.BadParameter(
            f"expected a mapping of option names to values, found {type(values).__name__}"
        )
    known = {parameter.name for parameter in context.command.params}
    values = {str(name).replace("-", "_"): value for name, value in values.items()}
    if unknown := sorted(set(values) - known):
        raise typer.BadParameter(
            f"unknown option {unknown[0]!r}; this verb has: {', '.join(sorted(filter(None, known)))}"
        )
    context.default_map = {**(context.default_map or {}), **values}
    return path


Config = Annotated[
    Path | None,
    typer.Option(
        "--config",
        callback=_read_config,
        is_eager=True,
        help="YAML file of option values.",
        show_default=False,
    ),
]
StorePath = Annotated[Path, typer.Argument(help="Folder of a store.", show_default=False)]
Where = Annotated[
    str | None,
    typer.Option(
        help="Rows to take, as SQL over the row and sample columns, e.g. \"kind = 'image'\".",
        show_default=False,
    ),
]
Progress = Annotated[bool, typer.Option("--progress/--no-progress", help="Draw progress bars on a terminal.")]


def say(text: str) -> None:
    """Print a line."""
    typer.echo(text)


def open_store(path: Path) -> ActivationStore:
    """The store in ``path``."""
    from microtome.store import ActivationStore

    return ActivationStore(path)


def expression(name: str, text: str | None) -> pl.Expr | None:
    """A polars expression from SQL."""
    import polars as pl

    try:
        return None if text is None else pl.sql_expr(text)
    except pl.exceptions.PolarsError as error:
        raise typer.BadParameter(
            f"--{name}: expected SQL over columns, found {text!r}: {first_line(error)}"
        ) from error


def write(table: pl.DataFrame, out: Path, record: Record) -> None:
    """Write a table with the record of what made it, and say where."""
    from microtome.record import write_table

    write_table(table, out, record)
    say(f"{table.height:,} rows: {out}")
