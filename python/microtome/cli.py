"""The command line: one verb per job. Every verb reads ``--config file.yaml``, writes a table and says where.

Exit codes: 0 done, 1 a problem was found, 2 bad usage or bad input, 130 interrupted.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
import yaml

from microtome.errors import Error

if TYPE_CHECKING:
    import polars as pl

    from microtome.dictionary import SAE
    from microtome.metrics import FeatureStats
    from microtome.store import Activations, ActivationStore, StoredCodes

_BLOCK_ROWS = 1 << 20

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
        raise typer.BadParameter(str(error).splitlines()[0]) from error
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


@app.command()
def capture(
    model: Annotated[str, typer.Option(help="Folder or hub id of any model that transformers loads.")],
    data: Annotated[
        Path, typer.Option(help="JSONL, parquet, folder of images, or folder of a saved data set.")
    ],
    out: Annotated[Path, typer.Option(help="Folder of the store; an existing one is continued.")],
    hooks: Annotated[
        list[str], typer.Option(help="Hook names or module paths, with wildcards; may be repeated.")
    ] = [  # noqa: B006
        "blocks.*.hook_resid_post"
    ],
    prompt: Annotated[
        str | None, typer.Option(help="Prompt for data without one.", show_default=False)
    ] = None,
    dtype: Annotated[
        str, typer.Option(help="Element type on disk: bfloat16, float16 or float32.")
    ] = "bfloat16",
    pool: Annotated[str | None, typer.Option(help="'mean': one row per sample.", show_default=False)] = None,
    batch_size: Annotated[int, typer.Option(help="Samples per forward pass.")] = 8,
    step_rows: Annotated[int, typer.Option(help="Rows per committed step.")] = 65_536,
    limit: Annotated[
        int | None, typer.Option(help="Take the first samples only.", show_default=False)
    ] = None,
    device: Annotated[str, typer.Option(help="Where the model runs: cpu, cuda, cuda:1.")] = "cpu",
    chat: Annotated[bool, typer.Option(help="Wrap prompts in the model's chat template.")] = False,
    stop_early: Annotated[bool, typer.Option(help="Leave the model after the last wanted layer.")] = True,
    progress: Progress = True,
    config: Config = None,
) -> None:
    """Run a model over data and store its activations.

    Example: `microtome capture --model ./llava --data questions.jsonl --hooks "blocks.*.hook_resid_post" --out runs/llava`
    """
    from microtome.capture.data import capture_dataset, load_model, read_items

    loaded, processor = load_model(model, device=device)
    capture_dataset(
        loaded,
        processor,
        read_items(data, prompt=prompt, limit=limit),
        out,
        hooks=hooks,
        dtype=dtype,
        pool=pool,
        batch_size=batch_size,
        step_rows=step_rows,
        chat=chat,
        stop_early=stop_early,
        progress=progress,
    )
    _show_store(_open(out))


@app.command()
def info(store: StorePath, config: Config = None) -> None:
    """Say what a store holds.

    Example: `microtome info runs/llava`
    """
    _show_store(_open(store))


@app.command()
def verify(store: StorePath, progress: Progress = True, config: Config = None) -> None:
    """Check every byte of a store; exit code 1 when something is damaged.

    Example: `microtome verify runs/llava`
    """
    from microtome.progress import bar

    opened = _open(store)
    with bar("verifying", opened.n_files, progress, "files") as done:
        problems = opened.verify(done)
    for problem in problems:
        _say(str(problem))
    _say(f"{store}: {'sound' if not problems else f'{len(problems)} problems'}")
    if problems:
        raise typer.Exit(1)


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

    opened, dictionary = _open(store), SAE.load_from_disk(sae)
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
    _say(f"{len(acts):,} rows in {dictionary.d_sae} features, {dictionary.k} per row: {store}/codes/{target}")


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

    opened = _open(store)
    groups = _stats_by_block(opened, opened.codes(codes), by)
    table = pl.concat([group.to_polars().with_columns(group=pl.lit(name)) for name, group in groups.items()])
    _write(table, out)


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

    first = _selected(_open(a), hooks, where)
    second = first if b is None else _selected(_open(b), hooks, where)
    values = mt.cka_matrix(list(first.values()), list(second.values()), debiased=not biased)
    rows = [(x, y, float(values[i, j])) for i, x in enumerate(first) for j, y in enumerate(second)]
    table = pl.DataFrame(rows, schema=["hook_a", "hook_b", "cka"], orient="row")
    for x, line in zip(first, values, strict=True):
        _say(f"{x:<40} " + " ".join(f"{v:6.3f}" for v in line))
    _write(table, out)


@app.command()
def diff(
    base: Annotated[Path, typer.Argument(help="Store of the base language model.", show_default=False)],
    vlm: Annotated[Path, typer.Argument(help="Store of the VLM, same hooks.", show_default=False)],
    out: Annotated[Path, typer.Option(help="Folder for dictionaries, tables, figures and pages.")] = Path(
        "diff"
    ),
    spatial: Annotated[
        str | None,
        typer.Option(help="Spatial questions, as SQL over row and sample columns.", show_default=False),
    ] = None,
    neutral: Annotated[
        Path | None, typer.Option(help="Store of the VLM under a neutral prompt.", show_default=False)
    ] = None,
    data: Annotated[
        Path | None,
        typer.Option(
            help="The data set that the VLM was captured on: texts and pictures.", show_default=False
        ),
    ] = None,
    tokenizer: Annotated[
        str | None, typer.Option(help="Folder or hub id.", show_default="the model that the store names")
    ] = None,
    dictionaries: Annotated[
        Path | None,
        typer.Option(help="Base dictionaries, a folder of each hook's name.", show_default="trained here"),
    ] = None,
    d_sae: Annotated[int, typer.Option(help="Features per dictionary.")] = 1024,
    k: Annotated[int, typer.Option(help="Features per token.")] = 16,
    steps: Annotated[int, typer.Option(help="Training steps per dictionary.")] = 1500,
    batch_size: Annotated[int, typer.Option(help="Rows per training step.")] = 1024,
    vision: Annotated[
        str | None, typer.Option(help="VLM rows that stand for vision, as SQL.", show_default="all")
    ] = None,
    text_dictionary: Annotated[
        str, typer.Option(help="What encodes the base model's side of the variance gap: adapted or base.")
    ] = "adapted",
    gap_tokens: Annotated[
        str, typer.Option(help="VLM tokens of the variance gap: all, text or image.")
    ] = "all",
    gap_average: Annotated[str, typer.Option(help="Average of the variance gap: token or sample.")] = "token",
    p_gap: Annotated[float, typer.Option(help="Share kept by variance gap.")] = 0.2,
    p_cos: Annotated[float, typer.Option(help="Share of those kept by decoder cosine.")] = 0.2,
    unit: Annotated[str, typer.Option(help="What firing is counted by: token or sample.")] = "token",
    nested: Annotated[
        bool, typer.Option(help="Compare spatial questions with all, not with the others.")
    ] = False,
    spatial_top: Annotated[float, typer.Option(help="Share of features whose frequency gap is large.")] = 0.2,
    min_gap: Annotated[
        float | None, typer.Option(help="Least frequency gap, instead of a share.", show_default=False)
    ] = None,
    min_odds_ratio: Annotated[float, typer.Option(help="Odds ratios above this.")] = 1.0,
    max_q: Annotated[
        float | None, typer.Option(help="Benjamini-Hochberg q-values up to this.", show_default=False)
    ] = None,
    min_neutral_frequency: Annotated[
        float, typer.Option(help="Share of samples a survivor fires on under the neutral prompt.")
    ] = 0.01,
    min_image_mass: Annotated[
        float, typer.Option(help="Its mass on image tokens is above this share.")
    ] = 0.5,
    cluster: Annotated[str, typer.Option(help="Sample column that names the image.")] = "sample",
    holdout: Annotated[float, typer.Option(help="Share of images that selection does not see.")] = 0.5,
    neighbours: Annotated[int, typer.Option(help="Nearest features a matched control is drawn from.")] = 20,
    draws: Annotated[int, typer.Option(help="Control sets and bootstrap replicates.")] = 1000,
    pages: Annotated[int, typer.Option(help="Features with a page; 0 for none.")] = 60,
    label_model: Annotated[
        str | None, typer.Option(help="Language model that labels them.", show_default="by counting words")
    ] = None,
    label_url: Annotated[
        str | None, typer.Option(help="Its OpenAI-compatible address.", show_default="OpenAI's")
    ] = None,
    label_budget: Annotated[float, typer.Option(help="Largest estimated price that is begun.")] = 1.0,
    seed: Annotated[int, typer.Option(help="Seed of dictionaries, splits and draws.")] = 0,
    progress: Progress = True,
    config: Config = None,
) -> None:
    """Find the features of the base model's dictionaries that fine-tuning on pictures changed.

    Example: `microtome diff runs/lm runs/vlm --spatial "task = 'spatial'" --data questions.jsonl --out runs/diff`
    """
    from microtome.dictionary import TrainConfig
    from microtome.diffing import study
    from microtome.diffing.interpretation import read_samples
    from microtome.report.study import report_study

    told = study.DiffConfig(
        train=TrainConfig(d_sae=d_sae, k=k, steps=steps, batch_size=batch_size, seed=seed),
        spatial=_expression("spatial", spatial),
        vision=_expression("vision", vision),
        text_dictionary=text_dictionary,  # type: ignore[arg-type]
        gap_tokens=gap_tokens,  # type: ignore[arg-type]
        gap_average=gap_average,  # type: ignore[arg-type]
        p_gap=p_gap,
        p_cos=p_cos,
        unit=unit,  # type: ignore[arg-type]
        base_is_complement=not nested,
        spatial_top=spatial_top,
        min_gap=min_gap,
        min_odds_ratio=min_odds_ratio,
        max_q=max_q,
        min_neutral_frequency=min_neutral_frequency,
        min_image_mass=min_image_mass,
        cluster=cluster,
        holdout=holdout,
        neighbours=neighbours,
        draws=draws,
    )
    seen = _open(vlm)
    samples = read_samples(seen, data, tokenizer)
    result = study.run(
        _open(base),
        seen,
        out,
        told,
        dictionaries=None if dictionaries is None else _dictionaries(dictionaries, seen.hooks),
        neutral=None if neutral is None else _open(neutral),
        texts=samples.texts or None,
        progress=progress,
    )
    labeller = None if label_model is None else (label_model, label_url, label_budget)
    facts = {"base": str(base), "VLM": str(vlm), "dictionaries": f"{d_sae} features, k = {k}, {steps} steps"}
    for line in report_study(result, seen, samples, out, facts, pages, labeller, progress):
        _say(line)


@app.command()
def circuit(
    model: Annotated[str, typer.Argument(help="organism, or a folder or hub id that transformers loads.")],
    tasks: Annotated[
        list[str] | None,
        typer.Option(
            help="Task of the organism, or a JSON-lines file of pairs; give it several times.",
            show_default=False,
        ),
    ] = None,
    out: Annotated[
        Path, typer.Option(help="Folder for scores, circuits, tables, figures and report.")
    ] = Path("circuits"),
    pairs: Annotated[int, typer.Option(help="Pairs of each task and form, for the organism.")] = 250,
    method: Annotated[str, typer.Option(help="ig, plain, clean_corrupted or ig_activations.")] = "ig",
    steps: Annotated[int, typer.Option(help="Steps of integrated gradients.")] = 5,
    sizes: Annotated[
        str, typer.Option(help="Circuit sizes, e.g. 0.01,0.05,0.2; the paper's 27 when empty.")
    ] = "",
    random: Annotated[int, typer.Option(help="Random controls of overlap, interchange and heads.")] = 20,
    windows: Annotated[str, typer.Option(help="Windows of back-patching; empty leaves it out.")] = "5,3,1",
    exact: Annotated[int, typer.Option(help="Nodes patched exactly to audit the scores.")] = 100,
    heads: Annotated[int, typer.Option(help="Attributed heads that are mean-ablated.")] = 3,
    memory: Annotated[
        str | None, typer.Option(help="Memory budget of attribution, e.g. 4GiB.", show_default=False)
    ] = None,
    align: Annotated[
        str, typer.Option(help="absolute for one template, spans for natural prompts of any length.")
    ] = "absolute",
    batch_size: Annotated[int, typer.Option(help="Pairs per forward.")] = 16,
    seed: Annotated[int, typer.Option(help="Seed of splits and draws.")] = 42,
    estimate: Annotated[bool, typer.Option("--estimate", help="Say what it will take, and end.")] = False,
    progress: Progress = True,
    config: Config = None,
) -> None:
    """Find the circuits of tasks in two forms, test them, compare them, and draw the figures.

    Example: `microtome circuit organism --tasks colour --tasks counting --out runs/circuits`
    """
    from microtome.circuits.command import numbers, study

    options = {
        "method": method,
        "steps": steps,
        "n_random": random,
        "n_controls": random,
        "n_exact": exact,
        "n_heads": heads,
        "windows": numbers("windows", windows, int),
        "memory_budget": memory,
        "batch_size": batch_size,
        "seed": seed,
    } | ({"sizes": numbers("sizes", sizes, float)} if sizes.strip() else {})
    say = (lambda text: typer.echo(text, err=True)) if progress or estimate else None
    tables = study(
        model, tasks, out, pairs, options, align=align, progress=progress, say=say, estimate_only=estimate
    )
    if estimate:
        return
    from microtome.report.circuit_page import write_report

    for row in tables["sizes"].iter_rows(named=True):
        reached = "" if row["reached"] else "  (threshold not reached)"
        _say(
            f"{row['task']:<12} {row['form']:<8} size {row['size']:6.3f}  faithfulness {row['faithfulness']:5.2f}"
            f" [{row['low']:.2f}, {row['high']:.2f}]{reached}"
        )
    page, figures = write_report(out)
    _say(f"tables: {out}/*.parquet, figures: {out / 'figures'} ({len(figures)})")
    _say(f"open {page.resolve()}")


@app.command()
def demo(
    out: Annotated[Path, typer.Option(help="Folder for stores, tables and the report.")] = Path("demo"),
    questions: Annotated[int, typer.Option(help="Questions put to the models.")] = 2800,
    progress: Progress = True,
    config: Config = None,
) -> None:
    """Run the main job on the shipped model: capture, encode, count, compare, show.

    Example: `microtome demo --out demo`
    """
    from microtome.demo import run

    _say(f"open {run(out, questions=questions, progress=progress).resolve()}")


def _expression(name: str, text: str | None) -> pl.Expr | None:
    """A polars expression from SQL."""
    import polars as pl

    try:
        return None if text is None else pl.sql_expr(text)
    except pl.exceptions.PolarsError as error:
        found = str(error).splitlines()[0]
        raise typer.BadParameter(f"--{name}: expected SQL over columns, found {text!r}: {found}") from error


def _dictionaries(folder: Path, hooks: list[str]) -> dict[str, SAE]:
    """Dictionaries of a folder, in any known format, by the hooks that name their folders."""
    from urllib.parse import quote

    from microtome.dictionary import SAE

    places = {hook: folder / quote(hook, safe=".-_") for hook in hooks}
    found = {hook: SAE.load_from_disk(place) for hook, place in places.items() if place.exists()}
    if not found:
        raise typer.BadParameter(
            f"--dictionaries {folder}: expected folders named {', '.join(hooks)}, found none"
        )
    return found


def _say(text: str) -> None:
    typer.echo(text)


def _open(path: Path) -> ActivationStore:
    from microtome.store import ActivationStore

    return ActivationStore(path)


def _show_store(store: ActivationStore) -> None:
    model = store.facts.get("model", {})
    _say(f"{store.path}: {store.n_rows:,} rows, {len(store.hooks)} hooks, {store[store.hooks[0]].dtype}")
    _say(
        f"  model: {model.get('class', 'unknown')} {model.get('name') or ''} {model.get('revision') or ''}".rstrip()
    )
    _say(f"  samples: {_height(store):,}")
    for hook in store.hooks:
        n, d = store[hook].shape
        _say(f"  {hook:<44} {n:>12,} x {d}")


def _height(store: ActivationStore) -> int:
    import polars as pl

    return int(store.samples.select(pl.len()).collect().item())


def _selected(store: ActivationStore, hooks: str, where: str | None) -> dict[str, Activations]:
    """The hooks that match, each with the rows that match."""
    from fnmatch import fnmatchcase

    import polars as pl

    names = [hook for hook in store.hooks if fnmatchcase(hook, hooks)]
    if not names:
        raise typer.BadParameter(f"--hooks {hooks!r} matches none of: {', '.join(store.hooks)}")
    return {name: store[name] if where is None else store[name].where(pl.sql_expr(where)) for name in names}


def _stats_by_block(store: ActivationStore, codes: StoredCodes, by: str | None) -> dict[str, FeatureStats]:
    """Statistics of each group, a block of rows in memory at a time."""
    import polars as pl

    import microtome as mt

    rows = store[codes.hook].take(codes.row_numbers).rows
    rows = rows.join(store.samples, on="sample", how="left", maintain_order="left")
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


def _write(table: pl.DataFrame, out: Path) -> None:
    out.parent.mkdir(parents=True, exist_ok=True)
    table.write_parquet(out)
    _say(f"{table.height:,} rows: {out}")


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
