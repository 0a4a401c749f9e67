"""``microtome cka``."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from microtome.cli.app import Config, Where, app, expression, open_store, say, write

if TYPE_CHECKING:
    from microtome.store import Activations, ActivationStore


@app.command()
def cka(
    a: Annotated[Path, typer.Argument(help="Folder of a store.", show_default=False)],
    b: Annotated[
        Path | None, typer.Argument(help="Another store with the same rows.", show_default=False)
    ] = None,
    hooks: Annotated[
        str, typer.Option(help="Hooks to compare, with wildcards.")
    ] = "blocks.*.hook_resid_post",
    where: Where = None,
    biased: Annotated[
        bool, typer.Option(help="The biased estimator, for comparison with older numbers.")
    ] = False,
    out: Annotated[Path, typer.Option(help="Table to write.")] = Path("cka.parquet"),
    config: Config = None,
) -> None:
    """Compare layers by linear CKA, debiased and centred.

    Example: `microtome cka runs/lm runs/vlm --where "form = 'textual'" --out cka.parquet`
    """
    import polars as pl

    import microtome as mt
    from microtome.record import Record

    stores = {str(path): open_store(path) for path in (a, b or a)}
    first, second = (_selected(stores[str(path)], hooks, where) for path in (a, b or a))
    values = mt.cka_matrix(list(first.values()), list(second.values()), debiased=not biased)
    rows = [(x, y, float(values[i, j])) for i, x in enumerate(first) for j, y in enumerate(second)]
    table = pl.DataFrame(rows, schema=["hook_a", "hook_b", "cka"], orient="row")
    for x, line in zip(first, values, strict=True):
        say(f"{x:<40} " + " ".join(f"{v:6.3f}" for v in line))
    inputs = {name: store.fingerprint for name, store in stores.items()}
    told = {"hooks": hooks, "where": where, "debiased": not biased}
    write(table, out, Record("cka", inputs, told, rows=len(next(iter(first.values())))))


def _selected(store: ActivationStore, hooks: str, where: str | None) -> dict[str, Activations]:
    """The hooks that match, each with the rows that match."""
    from fnmatch import fnmatchcase

    names = [hook for hook in store.hooks if fnmatchcase(hook, hooks)]
    if not names:
        raise typer.BadParameter(f"--hooks {hooks!r} matches none of: {', '.join(store.hooks)}")
    wanted = expression("where", where)
    return {name: store[name] if wanted is None else store[name].where(wanted) for name in names}
