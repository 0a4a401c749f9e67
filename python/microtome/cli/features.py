"""``microtome encode | stats``."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from microtome.cli.app import Config, Progress, StorePath, app, open_store, say, write

if TYPE_CHECKING:
    from microtome.metrics import FeatureStats
    from microtome.store import ActivationStore, StoredCodes, StoredRaggedCodes


@app.command()
def encode(
    store: StorePath,
    sae: Annotated[Path, typer.Option(help="Dictionary in any known format, told by its keys.")],
    hook: Annotated[str, typer.Option(help="Hook whose rows are encoded.")],
    name: Annotated[
        str | None, typer.Option(help="Name of the codes in the store.", show_default="the hook")
    ] = None,
    block_rows: Annotated[int, typer.Option(help="Rows in memory at a time.")] = 65_536,
    progress: Progress = True,
    config: Config = None,
) -> None:
    """Encode a hook's rows into sparse codes, kept beside the activations.

    Example: `microtome encode runs/llava --sae saes/layer12 --hook blocks.12.hook_resid_post`
    """
    from microtome.dictionary import SAE
    from microtome.dictionary.checks import check_rows
    from microtome.progress import bar

    opened, dictionary = open_store(store), SAE.load_from_disk(sae)
    acts, target = opened[hook], name or hook
    check_rows(acts, dictionary.recipe, dictionary.d_in)
    writer = opened.write_codes(
        target, acts, k=dictionary.slots, d_sae=dictionary.d_sae, dictionary=dictionary.fingerprint()
    )
    with writer as codes, bar(f"encoding {hook}", len(acts), progress) as done:
        for block in acts.take(slice(codes.n_rows, None)).blocks(block_rows):
            codes.append(dictionary.encode(block))
            done(codes.n_rows)
    per_row = f"{dictionary.slots} per row"
    if dictionary.slots is None:
        per_row = f"{len(opened.codes(target).indices) / max(len(acts), 1):.1f} per row on average"
    say(f"{len(acts):,} rows in {dictionary.d_sae} features, {per_row}: {store}/codes/{target}")


@app.command()
def stats(
    store: StorePath,
    codes: Annotated[str, typer.Option(help="Name of the codes in the store.")],
    by: Annotated[
        str | None, typer.Option(help="Row or sample column to group by, e.g. kind.", show_default=False)
    ] = None,
    out: Annotated[Path, typer.Option(help="Table to write.")] = Path("stats.parquet"),
    config: Config = None,
) -> None:
    """Count firings, sums and maxima of every feature, grouped by a column.

    Example: `microtome stats runs/llava --codes blocks.12.hook_resid_post --by kind --out stats.parquet`
    """
    import polars as pl

    from microtome.record import Record

    opened = open_store(store)
    found = opened.codes(codes)
    groups = _stats_by_group(opened, found, by)
    table = pl.concat([group.to_polars().with_columns(group=pl.lit(name)) for name, group in groups.items()])
    made = Record("stats", {str(store): opened.fingerprint, codes: found.fingerprint}, {"by": by}, len(found))
    write(table, out, made)


def _stats_by_group(
    store: ActivationStore, codes: StoredCodes | StoredRaggedCodes, by: str | None
) -> dict[str, FeatureStats]:
    """Statistics of each group, a block of rows in memory at a time."""
    import polars as pl

    import microtome as mt
    from microtome.store.tables import ordered_join

    if by is None:
        return {"all": mt.feature_stats(codes, progress=False)}
    rows = ordered_join(store[codes.hook].take(codes.row_numbers).rows, store.samples, "sample")
    if by not in (columns := rows.collect_schema().names()):
        raise typer.BadParameter(f"--by {by!r} is none of: {', '.join(columns)}")
    labels = rows.select(pl.col(by).cast(pl.String)).collect().to_series()
    return mt.feature_stats(codes, by=labels, progress=False)
