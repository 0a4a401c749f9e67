"""The store from Python: what is written is read back, selected, checked and refused as promised."""

from __future__ import annotations

import json
import pickle
import zipfile

import numpy as np
import polars as pl
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open

import microtome as mt
import stored
from microtome import _core, errors
from stored import FACTS, HOOK, HOOKS, TOWER

torch = pytest.importorskip("torch")


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    path = tmp_path_factory.mktemp("store") / "run"
    x = stored.write(path)
    return mt.ActivationStore(path), x


def truth(n=1000):
    """Rows joined with samples, eagerly."""
    table = pl.concat([pl.DataFrame(stored.rows(600)), pl.DataFrame(stored.rows(400, 30))])
    kinds = pl.Series(["text", "image", "video"], dtype=pl.Enum(["text", "image", "video"]))
    table = table.with_columns(kind=kinds.gather(table["kind"]), special=table["special"].cast(pl.Boolean))
    ids = pl.DataFrame({"sample": np.arange(50, dtype=np.uint64), "id": [f"s{i}" for i in range(50)]})
    ids = ids.with_columns(
        domain=pl.when(pl.col("sample") % 2 == 0).then(pl.lit("vqa")).otherwise(pl.lit("text"))
    )
    return table.join(ids, on="sample", how="left", maintain_order="left").head(n)


# --- what is written is read ---


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
@pytest.mark.parametrize("backend", ["mmap", "pread", "direct"])
def test_activations_are_read_as_written(tmp_path, dtype, backend):
    x = stored.write(tmp_path / "run", dtype=dtype)
    acts = mt.ActivationStore(tmp_path / "run", backend=backend)[HOOK]
    assert acts.shape == (1000, 64)
    assert acts.dtype == getattr(torch, dtype)
    for rows in (
        slice(None),
        slice(10, 20),
        slice(550, 650),
        slice(0, 0),
        slice(None, None, 7),
        slice(None, None, -3),
    ):
        assert np.array_equal(acts[rows].float().numpy(), x[rows]), rows
    assert np.array_equal(acts[-1].float().numpy(), x[-1])
    assert np.array_equal(acts.numpy().astype(np.float32), x)
    assert np.array_equal(torch.cat(list(acts.blocks(300))).float().numpy(), x)


@given(
    rows=st.lists(st.integers(-1000, 999), max_size=60), start=st.integers(0, 1000), stop=st.integers(0, 1000)
)
@settings(max_examples=60, deadline=None)
def test_row_numbers_and_slices_read_like_numpy(written, rows, start, stop):
    store, x = written
    acts = store[HOOK]
    index = np.array(rows, np.int64)
    assert np.array_equal(acts[index].numpy(), x[index])
    part = acts.take(slice(start, stop))
    assert len(part) == len(x[start:stop])
    chosen = index[(index >= 0) & (index < len(part))]
    assert np.array_equal(part[chosen].numpy(), x[start:stop][chosen])
    again = part.take(chosen)
    assert np.array_equal(again.row_numbers, np.arange(1000, dtype=np.uint64)[start:stop][chosen])


def test_mask_selects_its_rows(written):
    store, x = written
    mask = np.arange(1000) % 7 == 3
    assert np.array_equal(store[HOOK][mask].numpy(), x[mask])
    assert np.array_equal(store[HOOK][torch.from_numpy(mask)].numpy(), x[mask])


def test_tensor_is_private_to_whoever_holds_it(written):
    store, x = written
    acts = store[HOOK]
    whole = acts[:600]
    assert whole.untyped_storage().nbytes() >= 600 * 64 * 4
    whole -= 1
    assert np.array_equal(acts[:600].numpy(), x[:600])
    assert np.array_equal(whole.numpy(), x[:600] - 1)
    assert store.verify() == []


def test_tensor_outlives_its_store(tmp_path):
    x = stored.write(tmp_path / "run")
    block = mt.ActivationStore(tmp_path / "run")[HOOK][:600]
    assert np.array_equal(block.numpy(), x[:600])


def test_shards_are_safetensors_files_that_other_tools_read(tmp_path):
    x = stored.write(tmp_path / "run", dtype="bfloat16", steps=(601, 399))
    for path in (tmp_path / "run").glob("*/*.safetensors"):
        assert path.stat().st_mode & 0o777 == 0o444
        with safe_open(path, "pt") as shard:
            assert "block_crc32c" in shard.keys()  # noqa: SIM118
    with safe_open(tmp_path / "run" / "000000" / f"{HOOK}.safetensors", "pt") as shard:
        assert np.array_equal(shard.get_tensor("x").float().numpy(), x[:601])
    assert pl.read_parquet(tmp_path / "run" / "000000" / "samples.parquet")["id"][3] == "s3"


def test_facts_fingerprint_and_spaces_are_told(written):
    store, _ = written
    assert store.hooks == [HOOK, TOWER]
    assert store.facts == FACTS
    assert (store.n_rows, store.n_rows_of("vision_encoder")) == (1000, 10)
    assert store[TOWER].shape == (10, 3)
    assert len(store.fingerprint) == 8
    assert store.rows_of("vision_encoder").collect().height == 10


def test_hook_is_found_by_its_module_path(written):
    store, x = written
    assert np.array_equal(store["model.language_model.layers.0"][:3].numpy(), x[:3])
    assert "model.language_model.layers.0" in store


def test_wrong_hook_lists_near_names(written):
    store, _ = written
    with pytest.raises(KeyError) as error:
        store["blocks.0.hook_resid_pre"]
    assert isinstance(error.value, errors.StoreError)
    assert str(error.value).startswith("no hook 'blocks.0.hook_resid_pre'")
    assert HOOK in str(error.value)


# --- tables and selections ---


def test_rows_and_samples_are_lazy_frames(written):
    store, _ = written
    assert isinstance(store.rows, pl.LazyFrame)
    assert isinstance(store.samples, pl.LazyFrame)
    assert store.rows.collect().equals(truth().drop("id", "domain"))
    assert store.samples.collect().columns == ["sample", "id", "domain"]


EXPRESSIONS = [
    pl.col("kind") == "image",
    pl.col("special"),
    pl.col("token_id") > 500,
    pl.col("domain") == "vqa",
    (pl.col("kind") != "text") & (pl.col("id").is_in(["s3", "s44"])),
    pl.col("position") > pl.col("position").mean(),
    pl.lit(True) & (pl.col("position") > 100),
]


@pytest.mark.parametrize("first", range(len(EXPRESSIONS)))
@pytest.mark.parametrize("second", [None, 0, 3, 5])
def test_where_selects_as_polars_filters(written, first, second):
    store, x = written
    table = truth().with_row_index("row").filter(EXPRESSIONS[first])
    acts = store[HOOK].where(EXPRESSIONS[first])
    if second is not None:
        table, acts = table.filter(EXPRESSIONS[second]), acts.where(EXPRESSIONS[second])
    rows = table["row"].to_numpy()
    assert acts.shape == (len(rows), 64)
    assert np.array_equal(acts.row_numbers, rows)
    assert np.array_equal(acts[:].numpy(), x[rows])
    assert acts.rows.collect().equals(table.select("sample", "position", "token_id", "kind", "special"))
    assert acts.sample_ids.collect()["id"].to_list() == table["id"].to_list()


def test_where_keeps_the_order_of_the_rows_it_filters(written):
    store, x = written
    order = np.random.default_rng(0).permutation(1000)
    acts = store[HOOK].take(order).where(pl.col("kind") == "text")
    expected = order[(truth()["kind"] == "text").to_numpy()[order]]
    assert np.array_equal(acts.row_numbers, expected)
    assert np.array_equal(acts[:].numpy(), x[expected])


def test_rows_keep_their_order_whatever_is_selected_from_them(tmp_path):
    """A ``when`` over a lazily joined table loses the order of the join in polars 2.1."""
    stored.write(tmp_path, steps=(6000, 4000))
    store = mt.ActivationStore(tmp_path)
    order = np.random.default_rng(0).permutation(store.n_rows)
    task = pl.when(pl.col("domain") == "vqa").then(pl.lit("seen")).otherwise(pl.lit("told"))
    kind = pl.when(pl.col("kind") == "image").then(pl.lit("seen")).otherwise(pl.lit("told"))
    sample = store.rows.collect()["sample"].to_numpy()[order]  # samples alternate between the two domains
    taken = store[HOOK].take(order)
    labels = taken.rows.select(kind.alias("label")).collect()["label"].to_list()
    assert labels == taken.rows.collect().select(kind.alias("label"))["label"].to_list()
    seen = taken.where(task == "seen")
    assert seen.rows.collect()["sample"].to_list() == sample[sample % 2 == 0].tolist()
    joined = store.rows.join(store.samples, on="sample", how="left", maintain_order="left")
    indices = np.arange(store.n_rows, dtype=np.uint32)[:, None]
    codes = mt.SparseCodes(indices, np.ones_like(indices, np.float32), d_sae=store.n_rows)
    fires = mt.feature_stats(codes, by=task, rows=joined)["seen"].fires
    expected = (store.rows.collect()["sample"].to_numpy() % 2 == 0).astype(np.uint64)
    assert np.array_equal(fires, expected)


def test_where_reads_nothing_before_it_is_needed(tmp_path):
    stored.write(tmp_path / "run")
    store = mt.ActivationStore(tmp_path / "run")
    acts = store[HOOK].where(pl.col("kind") == "image")
    (tmp_path / "run" / "000000" / "rows.safetensors").unlink()
    assert "not evaluated" in repr(acts)
    with pytest.raises(FileNotFoundError):
        len(acts)


def test_unknown_column_is_named(written):
    with pytest.raises(
        errors.StoreError, match="no column 'knd' in rows or samples: expected one of row, sample"
    ):
        len(written[0][HOOK].where(pl.col("knd") == 1))


def test_core_reads_a_selection_where_it_reads_a_matrix(written):
    acts = written[0][HOOK].where(pl.col("kind") != "text")
    dense = acts.numpy()
    assert mt.linear_cka(acts, acts, debiased=True) == mt.linear_cka(dense, dense, debiased=True)


# --- steps, resume, writers ---


def files(path):
    return {str(p.relative_to(path)): p.read_bytes() for p in sorted(path.rglob("*")) if p.is_file()}


def test_resumed_store_has_the_bytes_of_an_uninterrupted_one(tmp_path):
    stored.write(tmp_path / "whole", steps=(40, 60))
    x = np.random.default_rng(0).integers(-128, 128, (100, 64)).astype(np.float32) / 16
    for part in ((0, 40, 0), (40, 100, 2)):
        start, stop, first = part
        writer = _core.StoreWriter(
            str(tmp_path / "run"), hooks=HOOKS, dtype="float32", facts=json.dumps(FACTS)
        )
        assert writer.n_rows["tokens"] == start
        writer.append("tokens", stored.rows(7), {HOOK: x[:7]})
        writer.discard()
        writer.append("tokens", stored.rows(stop - start, first), {HOOK: x[start:stop]})
        writer.append("vision_encoder", stored.rows(5, first), {TOWER: x[start : start + 5, :3].copy()})
        writer.commit(stored.samples(first, (stop - start) // 20))
        writer.append("tokens", stored.rows(7), {HOOK: x[:7]})
        writer.close()
    assert files(tmp_path / "run") == files(tmp_path / "whole")


def test_appended_arrays_may_be_reused_at_once(tmp_path):
    x = np.ones((50, 64), np.float32)
    with _core.StoreWriter(str(tmp_path / "run"), hooks=HOOKS[:1], dtype="float32", facts="{}") as writer:
        for value in range(4):
            x[:] = value
            writer.append("tokens", stored.rows(50), {HOOK: x})
            x[:] = -1
        writer.commit(stored.samples(0, 1))
    assert np.array_equal(mt.ActivationStore(tmp_path / "run")[HOOK].numpy()[::50, 0], [0, 1, 2, 3])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"facts": '{"model": "other"}'}, 'fact "mod'),
        ({"dtype": "float16"}, 'the store has F32 x of width 64 in space "tokens", this run has F16'),
        ({"hooks": HOOKS[:1]}, "cannot resume: hooks"),
        ({"hooks": [(HOOK, 65, "tokens"), HOOKS[1]]}, "width 64"),
        ({"hooks": [(HOOK, 64, "vision_encoder"), HOOKS[1]]}, "space"),
    ],
)
def test_other_run_cannot_resume_and_both_sides_are_named(tmp_path, change, message):
    stored.write(tmp_path / "run", steps=(20,))
    with pytest.raises(errors.StoreError, match="cannot resume") as error:
        _core.StoreWriter(
            str(tmp_path / "run"),
            **{"hooks": HOOKS, "dtype": "float32", "facts": json.dumps(FACTS), **change},
        )
    assert message in str(error.value)


def test_folder_with_other_files_is_not_taken_for_a_store(tmp_path):
    (tmp_path / "thesis.tex").write_text("years of work")
    with pytest.raises(errors.StoreError, match=r'expected an empty folder, found "thesis\.tex"'):
        _core.StoreWriter(str(tmp_path), hooks=HOOKS, dtype="float32", facts="{}")
    assert [p.name for p in tmp_path.iterdir()] == ["thesis.tex"]


def test_zero_rows_are_a_no_op(tmp_path):
    with _core.StoreWriter(str(tmp_path / "run"), hooks=HOOKS[:1], dtype="float32", facts="{}") as writer:
        writer.append("tokens", stored.rows(0), {HOOK: np.zeros((0, 64), np.float32)})
        writer.commit(b"")
        assert writer.steps == 0
    assert mt.ActivationStore(tmp_path / "run")[HOOK][:].shape == (0, 64)


def bad_appends():
    good, x = stored.rows(4), np.ones((4, 64), np.float32)
    nan, inf = x.copy(), x.copy()
    nan[2, 5], inf[1, 0] = np.nan, -np.inf
    fortran = np.asfortranarray(np.ones((4, 64), np.float32))
    misaligned = np.frombuffer(bytearray(4 * 64 * 4 + 1), np.uint8)[1:].view(np.float32).reshape(4, 64)
    shape, dtype, finite = errors.ShapeError, errors.DtypeError, errors.NonFiniteError
    yield "float64", good, {HOOK: x.astype(np.float64)}, dtype, "found float64"
    yield "int16", good, {HOOK: x.astype(np.int16)}, dtype, "found int16"
    yield "uint16 without a tag", good, {HOOK: x.astype(np.uint16)}, dtype, "found uint16"
    yield "object", good, {HOOK: x.astype(object)}, dtype, "found object"
    yield "list", good, {HOOK: [[1.0] * 64] * 4}, dtype, "found list"
    yield (
        "other dtype than the store",
        good,
        {HOOK: x.astype(np.float16)},
        dtype,
        "expected float32, the type of the store",
    )
    yield "bf16 in a float32 store", good, {HOOK: ("bfloat16", x.astype(np.uint16))}, dtype, "found bfloat16"
    yield "unknown tag", good, {HOOK: ("bf16", x.astype(np.uint16))}, dtype, "found bf16"
    yield "vector", good, {HOOK: x[0]}, shape, "expected a matrix"
    yield "cube", good, {HOOK: x[None]}, shape, "expected a matrix"
    yield "scalar", good, {HOOK: np.float32(1)}, dtype, HOOK
    yield "Fortran order", good, {HOOK: fortran}, shape, "C-contiguous"
    yield "strided", good, {HOOK: np.ones((8, 64), np.float32)[::2]}, shape, "C-contiguous"
    yield "misaligned", good, {HOOK: misaligned}, shape, "aligned"
    yield "other width", good, {HOOK: x[:, :63].copy()}, shape, "expected rows of width 64, found 63"
    yield "no columns", good, {HOOK: x[:, :0].copy()}, shape, "at least one column"
    yield "fewer rows", good, {HOOK: x[:3]}, shape, "expected 4 rows"
    yield "NaN", good, {HOOK: nan}, finite, "1 NaN or infinite, the first at row 2, column 5"
    yield "infinity", good, {HOOK: inf}, finite, "row 1, column 0"
    yield "no hook", good, {}, shape, f'hook "{HOOK}"'
    yield "unknown hook", good, {HOOK: x, "other": x}, shape, '"other"'
    yield "hook of another space", good, {HOOK: x, TOWER: x[:, :3].copy()}, shape, TOWER
    for name in good:
        yield (
            f"no {name}",
            {k: v for k, v in good.items() if k != name},
            {HOOK: x},
            shape,
            f'a column "{name}"',
        )
        yield (
            f"short {name}",
            {**good, name: good[name][:3].copy()},
            {HOOK: x},
            shape,
            "rows" if name == "sample" else "4 values",
        )
        yield (
            f"signed {name}",
            {**good, name: good[name].astype(np.int64)},
            {HOOK: x},
            dtype,
            f'rows["{name}"]',
        )
    yield "unknown row column", {**good, "colour": good["kind"]}, {HOOK: x}, shape, '"colour"'
    yield "matrix as row column", {**good, "kind": good["kind"][None]}, {HOOK: x}, dtype, 'rows["kind"]'
    yield "strided row column", {**good, "kind": np.zeros(8, np.uint8)[::2]}, {HOOK: x}, shape, "contiguous"


@pytest.mark.parametrize(
    ("rows", "arrays", "error", "message"), [pytest.param(*case[1:], id=case[0]) for case in bad_appends()]
)
def test_bad_append_is_refused_before_anything_is_written(tmp_path, rows, arrays, error, message):
    with _core.StoreWriter(str(tmp_path / "run"), hooks=HOOKS, dtype="float32", facts="{}") as writer:
        with pytest.raises(error) as caught:
            writer.append("tokens", rows, arrays)
        assert message in str(caught.value)
        assert "\n" not in str(caught.value)
        assert sorted(p.name for p in (tmp_path / "run").iterdir()) == ["LOCK", "manifest.json"]
        writer.append("tokens", stored.rows(4), {HOOK: np.ones((4, 64), np.float32)})
        writer.commit(b"")
        assert writer.n_rows == {"tokens": 4, "vision_encoder": 0}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"dtype": "float64"}, "dtype: expected"),
        ({"dtype": "BF16"}, "dtype: expected"),
        ({"nonfinite": "drop"}, "nonfinite: expected"),
        ({"facts": "[1]"}, "facts: expected a JSON object"),
        ({"facts": "{"}, "facts: expected a JSON object"),
        ({"hooks": []}, "hooks: expected at least one hook"),
        ({"hooks": [(HOOK, 0, "tokens")]}, "width"),
        ({"hooks": [(HOOK, 1 << 62, "tokens")]}, "width"),
        ({"hooks": [("", 4, "tokens")]}, "not a usable name"),
        ({"hooks": [("rows", 4, "tokens")]}, "not a usable name"),
        ({"hooks": [("h" * 300, 4, "tokens")]}, "not a usable name"),
        ({"hooks": [(HOOK, 4, "tokens"), (HOOK, 4, "tokens")]}, "share the file name"),
        ({"hooks": [(HOOK, 4, "")]}, "row space"),
    ],
)
def test_bad_store_is_refused_before_it_is_made(tmp_path, arguments, message):
    with pytest.raises(errors.Error) as error:
        _core.StoreWriter(
            str(tmp_path / "run"), **{"hooks": HOOKS, "dtype": "float32", "facts": "{}", **arguments}
        )
    assert message in str(error.value)
    assert not (tmp_path / "run").exists()


def test_nonfinite_values_are_kept_when_asked_for(tmp_path):
    x = np.full((4, 64), np.nan, np.float32)
    with _core.StoreWriter(
        str(tmp_path / "r"), hooks=HOOKS[:1], dtype="float32", facts="{}", nonfinite="keep"
    ) as writer:
        writer.append("tokens", stored.rows(4), {HOOK: x})
        writer.commit(b"")
    assert np.isnan(mt.ActivationStore(tmp_path / "r")[HOOK].numpy()).all()


# --- damage ---


def damage(path, offset=4096 + 100):
    path.chmod(0o644)
    with path.open("r+b") as shard:
        shard.seek(offset)
        byte = shard.read(1)
        shard.seek(offset)
        shard.write(bytes([byte[0] ^ 1]))
    path.chmod(0o444)


@pytest.mark.parametrize("backend", ["mmap", "pread", "direct"])
def test_damaged_block_is_found_before_it_is_used(tmp_path, backend):
    x = stored.write(tmp_path / "run")
    damage(tmp_path / "run" / "000001" / f"{HOOK}.safetensors")
    store = mt.ActivationStore(tmp_path / "run", backend=backend)
    acts = store[HOOK]
    assert np.array_equal(acts[:600].numpy(), x[:600])
    for use in (
        lambda: acts[600:],
        lambda: acts[[999]],
        lambda: mt.linear_cka(acts, acts),
        lambda: list(acts.blocks(100)),
    ):
        with pytest.raises(errors.CorruptShardError, match=r"damaged block 0, rows 600\.\.1000: .*crc32c"):
            use()
    (problem,) = store.verify()
    assert f"000001/{HOOK}.safetensors" in problem
    assert "(rows 600..1000)" in problem


def test_every_damaged_file_is_listed_with_its_rows(tmp_path):
    stored.write(tmp_path / "run")
    step = tmp_path / "run" / "000001"
    for path, offset in [
        (step / f"{HOOK}.safetensors", 10),
        (step / "rows.safetensors", 4100),
        (step / "samples.parquet", 9),
    ]:
        damage(path, offset)
    (step / f"{TOWER}.safetensors").unlink()
    problems = mt.ActivationStore(tmp_path / "run").verify()
    assert len(problems) == 4, problems
    assert sum("rows 600..1000" in p for p in problems) == 2
    assert any("rows 5..10" in p for p in problems)
    with pytest.raises(errors.CorruptShardError, match="damaged table"):
        mt.ActivationStore(tmp_path / "run").samples  # noqa: B018


def test_verify_never_reads_what_verify_first_refuses(tmp_path):
    x = stored.write(tmp_path / "run")
    damage(tmp_path / "run" / "000000" / f"{HOOK}.safetensors")
    assert not np.array_equal(mt.ActivationStore(tmp_path / "run", verify="never")[HOOK].numpy(), x)


def test_overwritten_block_is_found_at_every_touch_when_asked_for(tmp_path):
    stored.write(tmp_path / "run")
    for verify, caught in (("always", True), ("first", False)):
        acts = mt.ActivationStore(tmp_path / "run", verify=verify)[HOOK]
        acts[:5]
        damage(tmp_path / "run" / "000000" / f"{HOOK}.safetensors")
        if caught:
            with pytest.raises(errors.CorruptShardError):
                acts[:5]
            damage(tmp_path / "run" / "000000" / f"{HOOK}.safetensors")
        else:
            acts[:5]


@pytest.mark.parametrize("backend", ["mmap", "pread", "direct"])
def test_truncation_while_open_is_an_error_and_not_a_signal(tmp_path, backend):
    stored.write(tmp_path / "run")
    acts = mt.ActivationStore(tmp_path / "run", verify="never", backend=backend)[HOOK]
    acts[:5]
    path = tmp_path / "run" / "000000" / f"{HOOK}.safetensors"
    path.chmod(0o644)
    with path.open("r+b") as shard:
        shard.truncate(8192)
    with pytest.raises(errors.StoreError, match="shard changed while open"):
        acts[500:600]


@pytest.mark.parametrize("change", ["replaced", "deleted"])
def test_open_shard_keeps_its_bytes_when_its_name_goes(tmp_path, change):
    x = stored.write(tmp_path / "run")
    acts = mt.ActivationStore(tmp_path / "run")[HOOK]
    acts[:1]
    path = tmp_path / "run" / "000000" / f"{HOOK}.safetensors"
    if change == "replaced":
        other = tmp_path / "other"
        other.write_bytes(b"\0" * path.stat().st_size)
        other.rename(path)
    else:
        path.unlink()
    assert np.array_equal(acts[:600].numpy(), x[:600])


class Canary:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return (open, (str(self.path), "w"))


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
def test_pickle_given_as_a_store_is_refused_and_never_run(tmp_path, protocol):
    canary = tmp_path / "canary"
    (tmp_path / "run.pt").write_bytes(pickle.dumps(Canary(canary), protocol))
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "manifest.json").write_bytes(pickle.dumps(Canary(canary), protocol))
    for path in (tmp_path / "run.pt", tmp_path / "run"):
        with pytest.raises(errors.UnsafeCheckpointError, match="is a pickle"):
            mt.ActivationStore(path)
    assert not canary.exists()


def test_archives_and_other_files_given_as_a_store_are_refused(tmp_path):
    with zipfile.ZipFile(tmp_path / "run.pt", "w") as archive:
        archive.writestr("data.pkl", b"")
    np.save(tmp_path / "run.npy", np.array([object()]), allow_pickle=True)
    for name in ("run.pt", "run.npy"):
        with pytest.raises(errors.UnsafeCheckpointError):
            mt.ActivationStore(tmp_path / name)
    (tmp_path / "run.txt").write_text("hello")
    with pytest.raises(errors.StoreError, match="expected a folder, found a file"):
        mt.ActivationStore(tmp_path / "run.txt")
    for path in (tmp_path, tmp_path / "nowhere"):
        with pytest.raises(errors.StoreError, match=r"not a store: expected a folder with manifest.json"):
            mt.ActivationStore(path)


@pytest.mark.parametrize(
    ("use", "message"),
    [
        (lambda a: a[1000], "expected numbers below 1000, found 1000"),
        (lambda a: a[-1001], "expected numbers below 1000"),
        (lambda a: a[[0, 5000]], "found 5000"),
        (lambda a: a[np.ones(3, bool)], "a mask of 1000 rows, found 3"),
        (lambda a: a[np.ones((2, 2), int)], "a slice, row numbers or a mask"),
        (lambda a: a[np.ones(2)], "a slice, row numbers or a mask"),
        (lambda a: list(a.blocks(0)), "at least 1 row"),
    ],
)
def test_bad_row_numbers_are_refused(written, use, message):
    with pytest.raises(errors.ShapeError, match=message):
        use(written[0][HOOK])


def test_bad_arguments_of_a_reader_are_refused(written):
    store, _ = written
    for arguments in ({"verify": "sometimes"}, {"backend": "io_uring"}):
        with pytest.raises(errors.ShapeError):
            mt.ActivationStore(store.path, **arguments)
    with pytest.raises(errors.StoreError, match="no row space 'audio'"):
        store.rows_of("audio")
    with pytest.raises(errors.DtypeError):
        store[HOOK].where("kind == image")


# --- sparse codes ---


def some_codes(n, seed=0, d_sae=100):
    rng = np.random.default_rng(seed)
    values = np.sort(rng.random((n, 4)).astype(np.float32))[:, ::-1]
    return mt.SparseCodes(
        rng.integers(0, d_sae, (n, 4)).astype(np.uint32), np.ascontiguousarray(values), d_sae
    )


def test_codes_are_stored_beside_their_activations(tmp_path):
    stored.write(tmp_path / "run")
    store = mt.ActivationStore(tmp_path / "run")
    image = store[HOOK].where(pl.col("kind") == "image")
    codes = some_codes(len(image))
    with store.write_codes("topk", image, k=4, d_sae=100, dictionary="abc", step_rows=100) as out:
        for start in range(0, len(image), 90):
            out.append(codes[start : start + 90])
    assert store.code_names == ["topk"]
    found = store.codes("topk")
    assert (len(found), found.k, found.d_sae, found.hook) == (len(image), 4, 100, HOOK)
    assert found.facts["dictionary"] == "abc"
    assert found.facts["store"] == store.fingerprint
    assert np.array_equal(found.indices[:], codes.indices)
    assert np.array_equal(found.values[5:9], codes.values[5:9])
    assert np.array_equal(found.row_numbers, image.row_numbers)
    assert np.array_equal(found[[3, 1]].to_dense(), codes[np.array([3, 1])].to_dense())
    assert sum(len(block) for block in found.blocks(50)) == len(image)
    assert store.verify() == []
    damage(tmp_path / "run" / "codes" / "topk" / "000000" / f"{HOOK}.safetensors")
    assert store.verify()[0].startswith("codes topk: damaged block 0")


def test_interrupted_codes_go_on_where_they_stopped(tmp_path):
    stored.write(tmp_path / "run")
    store = mt.ActivationStore(tmp_path / "run")
    codes = some_codes(1000)
    for name, stops in (("whole", False), ("parts", True)):
        done = 0
        while done < 1000:
            try:
                with store.write_codes(name, HOOK, k=4, d_sae=100, dictionary="abc", step_rows=200) as out:
                    for start in range(out.n_rows, 1000, 100):
                        out.append(codes[start : start + 100])
                        if stops and start == done + 200:
                            raise InterruptedError
            except InterruptedError:
                pass
            done = len(store.codes(name))
    assert files(tmp_path / "run" / "codes" / "parts") == files(tmp_path / "run" / "codes" / "whole")
    assert np.array_equal(store.codes("parts").indices[:], codes.indices)


def test_bad_codes_are_refused(tmp_path):
    stored.write(tmp_path / "run", steps=(40,))
    store = mt.ActivationStore(tmp_path / "run")
    for name in ("../x", "", ".", "a/b", "x" * 300):
        with pytest.raises(errors.StoreError, match="name: expected"):
            store.write_codes(name, HOOK, k=4, d_sae=100, dictionary="abc")
    with store.write_codes("t", HOOK, k=4, d_sae=100, dictionary="abc") as out:
        with pytest.raises(errors.ShapeError, match="d_sae 100, found 50"):
            out.append(some_codes(10, d_sae=50))
        with pytest.raises(errors.ShapeError, match="40 rows in all, found 41"):
            out.append(some_codes(41))
        with pytest.raises(errors.ShapeError, match="indices"):
            out.append(mt.SparseCodes(np.zeros((2, 3), np.uint32), np.zeros((2, 3), np.float32), 100))
    with pytest.raises(errors.StoreError, match='cannot resume: fact "dictionary"'):
        store.write_codes("t", HOOK, k=4, d_sae=100, dictionary="other")


# --- backends ---


def wide(path, steps=(700, 1, 333), width=1021):
    """A store whose rows straddle checksum blocks and whose shards end in the middle of a page."""
    rng = np.random.default_rng(3)
    x = rng.standard_normal((sum(steps), width), dtype=np.float32)
    with _core.StoreWriter(
        str(path), hooks=[(HOOK, width, "tokens")], dtype="float32", facts=json.dumps({})
    ) as writer:
        start = 0
        for n in steps:
            writer.append("tokens", stored.rows(n), {HOOK: x[start : start + n]})
            writer.commit(stored.samples(start, 1))
            start += n
    return x


def sum_of_words(x):
    """Definition of the word sum: little-endian words of eight bytes, modulo 2^64."""
    whole = np.ascontiguousarray(x).tobytes()
    words = np.frombuffer(whole + bytes(-len(whole) % 8), np.uint64)
    return int(words.sum(dtype=np.uint64))


@pytest.mark.parametrize("verify", ["first", "always", "never"])
def test_every_backend_gives_the_same_bits_at_odd_tails(tmp_path, verify):
    x = wide(tmp_path / "run")
    x_hat = np.roll(x, 1, axis=0)
    expected = mt.fvu(x, x_hat)
    chosen = np.r_[5:9, 690:720, 3, 1033, 1000:1030:3]
    for backend in ("mmap", "pread", "direct"):
        store = mt.ActivationStore(tmp_path / "run", verify=verify, backend=backend)
        assert store.backend == backend
        acts = store[HOOK]
        for _ in range(2):  # the second time blocks have been found sound
            assert np.array_equal(acts.numpy(), x)
            assert np.array_equal(acts[chosen].numpy(), x[chosen])
            assert _core.word_sum(acts) == sum_of_words(x)
            assert _core.word_sum(acts.take(slice(1, 1001))) == sum_of_words(x[1:1001])
            assert mt.fvu(acts, x_hat) == mt.fvu(x, x_hat) == expected


@pytest.mark.parametrize("threads", [1, 3])
def test_reading_ahead_changes_no_bit_for_any_number_of_threads(tmp_path, threads):
    x = wide(tmp_path / "run", steps=(9000, 4097), width=512)
    before = mt.num_threads()
    mt.set_num_threads(threads)
    try:
        acts = mt.ActivationStore(tmp_path / "run", backend="direct")[HOOK]
        even = acts.where(pl.col("position") % 2 == 0)
        rows = even.row_numbers
        assert _core.word_sum(acts) == sum_of_words(x)
        assert mt.fvu(even, x[::-1][rows].copy()) == mt.fvu(x[rows], x[::-1][rows].copy())
        assert mt.linear_cka(acts, x[:, :8].copy()) == mt.linear_cka(x, x[:, :8].copy())
    finally:
        mt.set_num_threads(before)


def test_a_file_system_without_direct_io_is_read_through_the_cache_with_one_warning(tmp_path, monkeypatch):
    x = stored.write(tmp_path / "run")
    opened = _core.StoreReader
    monkeypatch.setattr(_core, "StoreReader", lambda path, verify, _: opened(path, verify, "pread"))
    with pytest.warns(UserWarning, match=r"backend: expected direct I/O .*run, found none") as caught:
        store = mt.ActivationStore(tmp_path / "run", backend="direct")
    assert np.array_equal(store[HOOK].numpy(), x)
    assert len(caught) == 1
    assert store.backend == "pread"


def test_a_scan_past_the_page_cache_stops_at_damage_and_at_truncation(tmp_path):
    wide(tmp_path / "run", steps=(6000, 3000), width=512)
    shard = tmp_path / "run" / "000001" / f"{HOOK}.safetensors"
    acts = mt.ActivationStore(tmp_path / "run", backend="direct")[HOOK]
    acts[6000:6001]
    damage(shard, 4096 + 5_000_000)
    with pytest.raises(errors.CorruptShardError, match=r"damaged block 4, rows 8048\.\.8560"):
        _core.word_sum(acts)
    damage(shard, 4096 + 5_000_000)
    assert _core.word_sum(acts) > 0
    shard.chmod(0o644)
    with shard.open("r+b") as file:
        file.truncate(1 << 20)
    with pytest.raises(errors.StoreError, match="shard changed while open"):
        _core.word_sum(acts)


# --- rows under damage ---


def test_damaged_rows_are_skipped_only_when_asked_for_and_are_listed(tmp_path):
    x = wide(tmp_path / "run", steps=(700, 600), width=1024)  # 256 rows per block
    damage(tmp_path / "run" / "000000" / f"{HOOK}.safetensors", 4096 + (1 << 20) + 17)
    with pytest.raises(errors.CorruptShardError):
        mt.ActivationStore(tmp_path / "run")[HOOK].numpy()
    store = mt.ActivationStore(tmp_path / "run", on_corrupt="skip")
    with pytest.warns(UserWarning, match="256 rows of .* lie under damage and are skipped"):
        acts = store[HOOK]
    assert acts.skipped.tolist() == list(range(256, 512))
    sound = np.r_[0:256, 512:1300]
    assert acts.row_numbers.tolist() == sound.tolist()
    assert np.array_equal(acts.numpy(), x[sound])
    assert acts.rows.collect().height == len(acts) == 1044
    first = acts.where(pl.col("position") == 0)
    assert np.array_equal(first.numpy(), x[first.row_numbers])
    assert first.skipped.tolist() == acts.skipped.tolist()


def test_a_shard_that_cannot_be_opened_is_skipped_as_a_whole(tmp_path):
    x = wide(tmp_path / "run", steps=(300, 200), width=64)
    damage(tmp_path / "run" / "000000" / f"{HOOK}.safetensors", 100)
    with pytest.warns(UserWarning, match="300 rows"):
        acts = mt.ActivationStore(tmp_path / "run", on_corrupt="skip")[HOOK]
    assert np.array_equal(acts.numpy(), x[300:])
    with pytest.raises(errors.ShapeError, match="on_corrupt: expected 'error' or 'skip', found 'hide'"):
        mt.ActivationStore(tmp_path / "run", on_corrupt="hide")
