"""``microtome encode | stats``."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from microtome.cli.app import Config, Progress, StorePath, app, open_store, say, write

if TYPE_CHECKING:
    from microtome.metrics import FeatureStats
    from microtome.store import ActivationStore, StoredCodes

_BLOCK_ROWS = 1 << 20


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
    from microtome.metrics import SparseCodes
    from microtome.progress import bar

    opened, dictionary = open_store(store), SAE.load_from_disk(sae)
    if dictionary.k is None:
        raise typer.BadParameter(
            f"--sae {sae}: expected a dictionary with k features per row, found {dictionary}"
        )
    acts, target = opened[hook], name or hook
    writer = opened.write_codes(
        target, acts, k=dictionary.k, d_sae=dictionary.d_sae, dictionary=dictionary.fingerprint()
    )
    with writer as codes, bar(f"encoding {hook}", len(acts), progress) as done:
        for block in acts.take(slice(codes.n_rows, None)).blocks(block_rows):
            found = dictionary.encode(block)
            if not isinstance(found, SparseCodes):
                raise typer.BadParameter(f"--sae {sae}: expected k features in every row, found {dictionary}")
            codes.append(found)
            done(codes.n_rows)
    say(f"{len(acts):,} rows in {dictionary.d_sae} features, {dictionary.k} per row: {store}/codes/{target}")


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
    groups = _stats_by_block(opened, found, by)
    table = pl.concat([group.to_polars().with_columns(group=pl.lit(name)) for name, group in groups.items()])
    made = Record("stats", {str(store): opened.fingerprint, codes: found.fingerprint}, {"by": by}, len(found))
    write(table, out, made)


def _stats_by_block(store: ActivationStore, codes: StoredCodes, by: str | None) -> dict[str, FeatureStats]:
    """Statistics of each group, a block of rows in memory at a time."""
    import polars as pl

    import microtome as mt
    from microtome.store.tables import ordered_join

    rows = store[codes.hook].take(codes.row_numbers).rows
    rows = ordered_join(rows, store.samples, "sample")
    if by is not None and by not in (columns := rows.collect_schema().names()):
        raise typer.BadParameter(f"--by {by!r} is none of: {', '.join(columns)}")
    labels = None if by is None else rows.select(pl.col(by).cast(pl.String)).collect().to_series()
    total: dict[str, FeatureStats] = {}
    for start, block in zip(range(0, len(codes), _BLOCK_ROWS), codes.blocks(_BLOCK_ROWS), strict=True):
        part = None if labels is None else labels[start : start + len(block.indices)]
        result = mt.feature_stats(block, by=part, progress=False)
        for name, stats in (result if isinstance(result, dict) else {"all": result}).items():
            total[name] = total[name].merge(stats) if name in total else stats
    return total
