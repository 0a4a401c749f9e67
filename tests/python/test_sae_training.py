"""Training: planted features come back, an interruption changes nothing, regimes and warm starts mean what they say."""

from __future__ import annotations

import io
import math
import time
from pathlib import Path

import numpy as np
import polars as pl
import pytest

torch = pytest.importorskip("torch")

import microtome as mt  # noqa: E402
from microtome import _core  # noqa: E402
from microtome.dictionary import TrainConfig, train_layers, train_sae  # noqa: E402
from microtome.dictionary.train import checkpoint, layers  # noqa: E402
from microtome.dictionary.train.data import BatchReader, RowSource, Shuffle  # noqa: E402
from microtome.dictionary.train.sparse import topk_autoencode  # noqa: E402
from microtome.dictionary.train.start import geometric_median  # noqa: E402
from microtome.errors import CheckpointError, DtypeError, HookError, NonFiniteError, ShapeError  # noqa: E402
from process_memory import anonymous_bytes, needs_procfs  # noqa: E402

D, PLANTED = 16, 24
HOOK = "blocks.1.hook_resid_post"


@pytest.fixture(autouse=True)
def _one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def planted(n: int = 12_000, seed: int = 0, offset: float = 0.0) -> tuple[torch.Tensor, torch.Tensor]:
    """Rows that are sums of about three of the planted unit vectors, and those vectors ``(PLANTED, D)``."""
    g = torch.Generator().manual_seed(0)
    truth = torch.nn.functional.normalize(torch.randn(PLANTED, D, generator=g), dim=1)
    g.manual_seed(seed + 1)
    active = torch.rand(n, PLANTED, generator=g) < 3 / PLANTED
    strength = 1 + torch.rand(n, PLANTED, generator=g)
    noise = 0.01 * torch.randn(n, D, generator=g)
    return (active * strength) @ truth + noise + offset, truth


def config(**changes) -> TrainConfig:
    return TrainConfig(
        **{"d_sae": 32, "k": 3, "steps": 120, "batch_size": 256, "lr": 3e-3, "eval_rows": 512, **changes}
    )


class Stored:
    """Rows with a table, read the way a store's activations are."""

    hook = HOOK

    def __init__(self, x: torch.Tensor, table: pl.DataFrame) -> None:
        self.x, self.table, self.shape = x, table, tuple(x.shape)

    def __len__(self) -> int:
        return len(self.x)

    def __getitem__(self, rows):
        return self.x[rows]

    def blocks(self, n):
        return iter(self.x.split(n))

    @property
    def rows(self):
        return self.table.lazy()

    def where(self, predicate):
        kept = self.table.with_row_index("row_").filter(predicate)
        return Stored(self.x[np.array(kept["row_"])], kept.drop("row_"))


# --- what is learnt -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("activation", ["topk", "batch_topk", "jumprelu"])
def test_planted_dictionary_is_recovered(activation):
    x, truth = planted()
    result = train_sae(x, config(activation=activation, steps=600))
    cosine = truth @ torch.nn.functional.normalize(result.sae.W_dec, dim=1).T
    assert float(cosine.max(1).values.mean()) > 0.9
    assert result.fvu < 0.2
    assert 1.5 < result.curves["l0"][-1] < 5


@pytest.mark.parametrize("activation", ["relu", "gated"])
def test_l1_dictionaries_learn_too(activation):
    x, truth = planted()
    result = train_sae(x, config(activation=activation, steps=600, sparsity=1.0))
    cosine = truth @ torch.nn.functional.normalize(result.sae.W_dec, dim=1).T
    assert float(cosine.max(1).values.mean()) > 0.8
    assert result.fvu < 0.3
    assert result.curves["l0"][-1] < 16


@pytest.mark.parametrize("activation", ["relu", "gated", "jumprelu"])
def test_a_sparsity_of_zero_is_no_sparsity(activation):
    losses = [
        train_sae(planted(2000)[0], config(activation=activation, steps=1, sparsity=weight)).curves["loss"][0]
        for weight in (0.0, 1e-12, None)
    ]
    assert losses[0] == pytest.approx(losses[1], rel=1e-6)
    assert losses[0] < losses[2]


def test_fvu_on_held_out_rows_falls_and_is_that_of_the_dictionary():
    x, _ = planted()
    result = train_sae(x, config(eval_every=40))
    assert result.curves["fvu"].is_sorted(descending=True)
    assert result.curves.columns[:6] == ["hook", "regime", "step", "tokens", "fvu", "l0"]
    assert result.curves["tokens"].to_list() == [40 * 256, 80 * 256, 120 * 256]
    fresh, _ = planted(4000, seed=5)
    assert result.sae.quality(fresh)["fvu"] == pytest.approx(result.fvu, rel=0.2)
    assert result.sae.quality(fresh)["l0"] == pytest.approx(result.curves["l0"][-1], rel=0.05)


def test_dictionary_carries_its_recipe_probe_and_unit_rows():
    x, _ = planted(offset=5.0)
    sae = train_sae(x, config()).sae
    torch.testing.assert_close(sae.W_dec.norm(dim=1), torch.ones(32))
    assert sae.recipe.input_scale == pytest.approx(math.sqrt(D) / float(x.norm(dim=1).mean()), rel=0.02)
    assert sae.recipe.input_scale * sae.recipe.output_scale == pytest.approx(1)
    assert sae.self_check()["fvu"] < 1


def test_batch_topk_threshold_keeps_k_features_on_average():
    x, _ = planted()
    sae = train_sae(x, config(activation="batch_topk", steps=400, threshold_beta=0.9)).sae
    assert sae.threshold is not None
    assert sae.quality(planted(4000, seed=9)[0])["l0"] == pytest.approx(3, abs=0.5)


def test_auxk_revives_dead_features():
    x, _ = planted()
    base = train_sae(x, config(steps=60)).sae
    faint = base.W_enc.clone()
    faint[:, :16] *= 0.01  # positive where they were, but never among the k largest
    bias = base.b_enc.clone()
    bias[:16] = 0
    crippled = base.with_tensors({**base.tensors, "W_enc": faint, "b_enc": bias})
    common = {"steps": 150, "dead_after_tokens": 2048}
    without = train_sae(x, config(auxk_alpha=0, **common), base=crippled)
    revived = train_sae(x, config(auxk_k=8, **common), base=crippled)
    assert without.curves["dead_share"][-1] > 0.3
    assert revived.curves["dead_share"][-1] < without.curves["dead_share"][-1] / 2


def test_k_annealing_falls_linearly_to_k():
    told = config(k_annealing=0.5, k_start=13, steps=100)
    assert [told.k_at(step, 100, 32) for step in (0, 25, 50, 99)] == [13, 8, 3, 3]
    x, _ = planted(2000)
    curve = train_sae(x, told.replace(eval_every=25)).curves
    assert curve["k"].to_list()[-1] == 3
    assert curve["k"][0] > 3


def test_learning_rate_rises_and_falls():
    told = config(warmup=0.1, decay=0.2, steps=100)
    assert [told.rate_at(step, 100) for step in (0, 4, 50, 90, 99)] == pytest.approx([0.1, 0.5, 1, 0.5, 0.05])


# --- resume ---------------------------------------------------------------------------------------------------------


class _InterruptionError(Exception):
    pass


@pytest.mark.parametrize("activation", ["topk", "batch_topk", "jumprelu", "gated"])
@pytest.mark.parametrize("stop", [37, 61])
def test_interrupted_run_ends_with_the_same_weights_bit_for_bit(activation, stop, tmp_path):
    x, _ = planted(3000)
    told = config(
        activation=activation, steps=80, checkpoint_every=10, k_annealing=0.5, dead_after_tokens=500
    )
    whole = train_sae(x, told)

    def interrupt(step: int, _: float) -> None:
        if step == stop:
            raise _InterruptionError

    with pytest.raises(_InterruptionError):
        train_sae(x, told, checkpoint_dir=tmp_path, on_step=interrupt)
    steps = []
    resumed = train_sae(x, told, checkpoint_dir=tmp_path, on_step=lambda step, _: steps.append(step))
    assert steps == list(range(stop // 10 * 10, 80))
    assert resumed.sae.fingerprint() == whole.sae.fingerprint()
    assert resumed.curves.drop("seconds").equals(whole.curves.drop("seconds"))


def test_finished_run_is_not_trained_again(tmp_path):
    x, _ = planted(2000)
    first = train_sae(x, config(steps=20), checkpoint_dir=tmp_path)
    again = train_sae(
        x, config(steps=20), checkpoint_dir=tmp_path, on_step=lambda *_: pytest.fail("trained again")
    )
    assert again.sae.fingerprint() == first.sae.fingerprint()
    assert again.curves.equals(first.curves)


def test_checkpoint_of_another_run_is_refused_with_both_sides(tmp_path):
    x, _ = planted(2000)
    train_sae(x, config(steps=20), checkpoint_dir=tmp_path)
    with pytest.raises(CheckpointError, match=r"config lr = 0.003, found 0.01"):
        train_sae(x, config(steps=20, lr=0.01), checkpoint_dir=tmp_path)
    with pytest.raises(CheckpointError, match="data"):
        train_sae(x + 1, config(steps=20), checkpoint_dir=tmp_path)
    train_sae(x + 1, config(steps=20), checkpoint_dir=tmp_path, resume=False)


def test_damaged_checkpoint_is_refused(tmp_path):
    x, _ = planted(2000)
    train_sae(x, config(steps=20), checkpoint_dir=tmp_path)
    file = checkpoint.latest(tmp_path)
    file.write_bytes(file.read_bytes()[:-9])
    with pytest.raises(CheckpointError, match="damaged"):
        train_sae(x, config(steps=20), checkpoint_dir=tmp_path)


def test_only_the_last_two_checkpoints_are_kept(tmp_path):
    x, _ = planted(2000)
    train_sae(x, config(steps=20, checkpoint_every=4), checkpoint_dir=tmp_path)
    assert [file.name for file in sorted(tmp_path.iterdir())] == [
        "step-000000016.safetensors",
        "step-000000020.safetensors",
    ]


def test_run_that_starts_anew_keeps_its_own_checkpoints(tmp_path):
    x, told = planted(2000)[0], config(steps=20, checkpoint_every=4)
    train_sae(x, told, checkpoint_dir=tmp_path)
    anew = told.replace(lr=1e-3)

    def interrupt(step: int, _: float) -> None:
        if step == 9:
            raise _InterruptionError

    with pytest.raises(_InterruptionError):
        train_sae(x, anew, checkpoint_dir=tmp_path, resume=False, on_step=interrupt)
    assert sorted(p.name for p in tmp_path.iterdir()) == [f"step-{n:09d}.safetensors" for n in (4, 8)]
    again = train_sae(x, anew, checkpoint_dir=tmp_path)
    assert again.sae.fingerprint() == train_sae(x, anew).sae.fingerprint()


def test_same_seed_same_weights_another_seed_others():
    x, _ = planted(2000)
    first, second, other = (train_sae(x, config(steps=10, seed=seed)).sae.fingerprint() for seed in (0, 0, 1))
    assert first == second != other


# --- regimes and warm starts ------------------------------------------------------------------------------------------


def stored() -> Stored:
    """Image rows on the first half of the dimensions, text rows on the second; 20 rows to a sample."""
    x, _ = planted(6000)
    image = np.arange(6000) % 20 < 10
    x = x.clone()
    x[image, D // 2 :] = 0
    x[~image, : D // 2] = 0
    table = pl.DataFrame({"sample": np.arange(6000) // 20, "kind": np.where(image, "image", "text")})
    return Stored(x, table)


def test_loss_where_says_which_rows_are_learnt():
    acts = stored()
    fvu = {}
    for kind in ("image", "text"):
        result = train_sae(
            acts, config(steps=300, loss_where=pl.col("kind") == kind, regime=kind, normalize=False)
        )
        assert result.curves["regime"].unique().to_list() == [kind]
        assert result.curves["hook"].unique().to_list() == [acts.hook]
        for other in ("image", "text"):
            fvu[kind, other] = result.sae.quality(acts.where(pl.col("kind") == other)[:1000])["fvu"]
    for kind, other in (("image", "text"), ("text", "image")):
        assert fvu[kind, kind] < 0.3
        assert fvu[kind, other] > fvu[kind, kind] + 0.3


def test_rows_of_a_captured_store_are_trained_on_and_named(tmp_path):
    transformers = pytest.importorskip("transformers")
    shape = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    torch.manual_seed(0)
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(vocab_size=40, **shape))
    hook = "blocks.0.hook_resid_post"
    with mt.capture(model, tmp_path / "run", hooks=[hook], dtype="bfloat16", step_rows=512) as recorder:
        for i in range(30):
            recorder.samples(ids=[i], domain=["even" if i % 2 == 0 else "odd"])
            with torch.no_grad():
                model(input_ids=torch.randint(0, 40, (1, 40)))
    acts = mt.ActivationStore(tmp_path / "run")[hook]
    even = pl.col("domain") == "even"
    told = config(steps=100, loss_where=even, regime="even")
    result = train_sae(acts, told)
    rows = acts.where(even)
    assert train_sae(rows[:], told.replace(loss_where=None, eval_fraction=0)).tokens == result.tokens
    recipe = result.sae.recipe
    assert (recipe.hook_name, recipe.model_name, recipe.metadata["regime"]) == (
        hook,
        "LlamaForCausalLM",
        "even",
    )
    codes = result.sae.encode(rows)
    assert len(codes) == 15 * 40
    assert mt.fvu(rows, result.sae.decode(codes)) == pytest.approx(result.fvu, abs=0.15)
    assert result.fvu < 0.6


def test_warm_start_keeps_the_index_of_features():
    x, _ = planted()
    base = train_sae(x, config(steps=300)).sae
    moved, _ = planted(6000, seed=3)
    warm = train_sae(moved, config(steps=60, lr=1e-3), base=base).sae
    cold = train_sae(moved, config(steps=60, lr=1e-3, seed=7)).sae
    cosine = lambda a, b: float((a.W_dec * b.W_dec).sum(1).mean())  # noqa: E731
    assert cosine(base, warm) > 0.95
    assert abs(cosine(base, cold)) < 0.5


def test_warm_start_without_steps_of_size_gives_the_base_function():
    x, _ = planted()
    base = train_sae(x, config(steps=100)).sae
    norms = 0.5 + torch.rand(32)
    scaled = base.with_tensors(
        {
            **base.tensors,
            "W_dec": base.W_dec * norms[:, None],
            "W_enc": base.W_enc / norms,
            "b_enc": base.b_enc / norms,
        },
        base.recipe.replace(norm_aware=True),
    )
    for told in (config(steps=1, lr=1e-12), config(steps=1, lr=1e-12, decoder_norm="free")):
        warm = train_sae(x, told, base=scaled).sae
        torch.testing.assert_close(warm.reconstruct(x[:100]), base.reconstruct(x[:100]), rtol=1e-3, atol=1e-3)


def test_jumprelu_base_becomes_a_topk_over_the_same_features():
    x, _ = planted()
    base = train_sae(x, config(steps=100)).sae.to_jumprelu(x)
    warm = train_sae(x, config(steps=1, lr=1e-12), base=base).sae
    assert (warm.recipe.activation, warm.k, warm.threshold) == ("topk", 3, None)
    torch.testing.assert_close(warm.W_dec, base.W_dec)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"d_sae": 40}, ShapeError, "d_sae: expected 32 as in the base dictionary, found 40"),
        ({"activation": "gated"}, CheckpointError, "becomes gated by its threshold alone, found topk"),
    ],
)
def test_base_that_does_not_fit_is_refused(change, error, message):
    x, _ = planted(2000)
    base = train_sae(x, config(steps=2)).sae
    with pytest.raises(error, match=message):
        train_sae(x, config(steps=2, **change), base=base)


@pytest.mark.parametrize(
    ("tensors", "recipe", "found"),
    [
        ({"W_skip": torch.eye(D)}, {}, "found a transcoder to its rows with W_skip"),
        ({}, {"hook_name_out": "blocks.1.hook_mlp_out"}, r"found a transcoder to blocks\.1\.hook_mlp_out"),
    ],
)
def test_transcoder_is_no_base(tensors, recipe, found):
    x, _ = planted(2000)
    base = train_sae(x, config(steps=2)).sae
    base = base.with_tensors({**base.tensors, **tensors}, base.recipe.replace(**recipe))
    with pytest.raises(CheckpointError, match=f"base: expected an autoencoder, {found}"):
        train_sae(x, config(steps=2), base=base)


def test_jumprelu_from_a_norm_aware_topk_is_the_dictionary_that_was_trained():
    x, _ = planted(4000)
    base = train_sae(x, config(steps=50)).sae
    norms = torch.linspace(0.2, 5, 32)[:, None]
    stretched = {**base.tensors, "W_dec": base.W_dec * norms, "W_enc": base.W_enc / norms.T}
    base = base.with_tensors(stretched, base.recipe.replace(norm_aware=True))
    told = config(
        activation="jumprelu", decoder_norm="free", steps=1, lr=1e-12, eval_fraction=0.0, eval_rows=4000
    )
    sae = train_sae(x, told, base=base).sae
    pre = x * sae.recipe.input_scale - sae.b_dec
    pre = pre @ sae.W_enc + sae.b_enc
    assert torch.equal(sae.encode_torch(x) > 0, (pre > sae.threshold) & (pre > 0))


def test_base_of_another_width_is_refused_with_both_sides():
    x, _ = planted(2000)
    base = train_sae(x, config(steps=2)).sae
    with pytest.raises(ShapeError, match="expected a dictionary of width 15 as the rows, found d_in=16"):
        train_sae(x[:, :15], config(steps=2), base=base)


def test_base_of_another_hook_is_refused_with_both_sides(tmp_path):
    acts = stored()
    base = train_sae(acts, config(steps=2)).sae
    other = base.with_tensors(base.tensors, base.recipe.replace(hook_name="blocks.2.hook_resid_post"))
    with pytest.raises(
        HookError, match=r"base: .* blocks\.2\.hook_resid_post, .* found blocks\.1\.hook_resid_post"
    ):
        train_sae(acts, config(steps=2), base=other)


@needs_procfs
def test_memory_of_training_does_not_grow_with_the_store(tmp_path):
    used, d = {}, 384
    for n in (4_000, 20_000, 200_000):  # the first run warms the allocator up
        store_of(tmp_path / str(n), n, d)
        acts, peak = mt.ActivationStore(tmp_path / str(n))[HOOK], []
        told = config(steps=12, eval_rows=64, b_dec_init="zeros", shuffle_pool_rows=8_192)
        train_sae(acts, told, on_step=lambda *_, peak=peak: peak.append(anonymous_bytes()))
        used[n] = max(peak)
    grown, stored_bytes = used[200_000] - used[20_000], 180_000 * d * 4
    assert grown < stored_bytes / 6  # row numbers and the sample of each row, never the rows


def store_of(path: Path, n: int, d: int = 256) -> None:
    """A store of ``n`` float32 rows of width ``d``, 100 to a sample."""
    x = np.random.default_rng(0).standard_normal((n, d), dtype=np.float32)
    number = np.arange(n)
    column = lambda values, dtype: values.astype(dtype)  # noqa: E731
    table = {
        "sample": column(number // 100, np.uint64),
        "position": column(number % 100, np.uint32),
        "token_id": column(number % 7, np.uint32),
        "kind": column(number * 0, np.uint8),
        "special": column(number * 0, np.uint8),
    }
    samples = io.BytesIO()
    ids = np.unique(table["sample"])
    pl.DataFrame({"sample": ids, "id": [str(i) for i in ids]}).write_parquet(samples)
    with _core.StoreWriter(str(path), hooks=[(HOOK, d, "tokens")], dtype="float32", facts="{}") as writer:
        writer.append("tokens", table, {HOOK: x})
        writer.commit(samples.getvalue())


def test_layers_are_trained_named_saved_and_not_trained_twice(tmp_path):
    x, _ = planted(2000)
    acts = {f"blocks.{i}.hook_resid_post": x * (i + 1) for i in range(2)}
    rates = lambda hook: 1e-2 if "0" in hook else 1e-3  # noqa: E731
    found = train_layers(acts, config(steps=20), lr=rates, out=tmp_path, parallel=2)
    assert set(found.saes) == set(acts)
    assert found.curves["hook"].unique(maintain_order=True).to_list() == list(acts)
    assert {round(r.curves["lr"].max(), 4) for r in found.results.values()} == {1e-2, 1e-3}
    alone = train_layers(acts, config(steps=20), lr=rates, out=tmp_path / "alone")
    for hook, sae in found.saes.items():
        assert alone.saes[hook].fingerprint() == sae.fingerprint()
        assert mt.SAE.load_from_disk(tmp_path / hook).recipe.hook_name == hook
    with pytest.raises(ShapeError, match=r"found blocks.7"):
        train_layers(acts, config(steps=20), hooks=["blocks.7.hook_resid_post"])


@pytest.mark.parametrize(("runs", "at_once"), [(0.5, 1), (1.0, 1), (2.5, 2), (99, 3)])
def test_a_memory_budget_says_how_many_layers_are_trained_at_once(monkeypatch, runs, at_once):
    x, _ = planted(400)
    acts, real, active, most = {f"blocks.{i}": x for i in range(4)}, layers.train_sae, [], []

    def watched(*args, **options):
        active.append(1)
        most.append(len(active))
        time.sleep(0.05)
        result = real(*args, **options)
        active.pop()
        return result

    monkeypatch.setattr(layers, "train_sae", watched)
    told = config(steps=2)
    budget = int(runs * layers.run_bytes(told, x.shape[1]))
    train_layers(acts, told, parallel=3, memory_budget=budget, progress=False)
    assert max(most) == at_once


def test_no_run_at_a_time_is_refused():
    with pytest.raises(ShapeError, match="parallel: expected at least 1, found 0"):
        train_layers({"blocks.0": planted(100)[0]}, config(), parallel=0)


# --- rows ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("n", "block", "pool", "size"), [(100, 1, 1000, 7), (103, 8, 24, 16), (50, 64, 8, 60)]
)
def test_every_pass_of_the_shuffle_gives_every_row_once(n, block, pool, size):
    order = Shuffle(np.arange(n) * 3, seed=1, block_rows=block, pool_rows=pool)
    steps = -(-2 * n // size)
    stream = np.concatenate([order.batch(step, size) for step in range(steps)])
    counts = np.bincount(stream // 3, minlength=n)
    assert set(counts) <= {2, 3}
    assert counts.sum() == steps * size


def test_shuffle_of_a_step_does_not_depend_on_the_steps_before():
    rows = np.arange(1000)
    forwards, alone = (Shuffle(rows, 3, 8, 128) for _ in range(2))
    batches = [forwards.batch(step, 64) for step in range(40)]
    assert np.array_equal(batches[37], alone.batch(37, 64))
    assert not np.array_equal(batches[0], np.arange(64))


def test_shuffle_over_pools_mixes_the_whole_data():
    first = Shuffle(np.arange(100_000), 0, 32, 4096).batch(0, 1024)
    assert np.histogram(first, bins=10, range=(0, 100_000))[0].min() > 20


def test_no_sample_is_on_both_sides_of_the_split():
    source = RowSource(stored())
    training, held_out = source.split(0.2, seed=0)
    assert not set(source.samples[training]) & set(source.samples[held_out])
    assert len(training) + len(held_out) == source.n
    assert 0.1 < len(held_out) / source.n < 0.3


def test_rows_are_read_ahead_in_order_and_the_thread_ends():
    source = RowSource(planted(300)[0])
    order = Shuffle(np.arange(300), 0, 1, 300)
    with BatchReader(source, order, 32, 5, 9, "cpu") as batches:
        got = dict(batches)
    assert list(got) == [5, 6, 7, 8]
    assert torch.equal(got[6], source.read(order.batch(6, 32)))
    with BatchReader(source, order, 32, 0, 10_000, "cpu") as batches:
        next(iter(batches))  # left early, with the queue full
    assert not batches._thread.is_alive()


def test_batches_are_ready_before_they_are_asked_for():
    source = RowSource(planted(300)[0])
    with BatchReader(source, Shuffle(np.arange(300), 0, 1, 300), 32, 0, 100, "cpu") as batches:
        deadline = time.monotonic() + 20
        while not batches._ready.full():
            assert time.monotonic() < deadline
            time.sleep(0.01)
        next(iter(batches))
        assert batches.seconds_waited < 0.05
    result = train_sae(planted(2000)[0], config(steps=20))
    assert 0 <= result.data_wait_share < 1


@pytest.mark.parametrize(
    ("rows", "change", "error", "message"),
    [
        (torch.zeros(0, D), {}, ShapeError, "found none"),
        (torch.zeros(10), {}, ShapeError, r"expected rows \(n, d\)"),
        (torch.zeros(50, D), {}, ShapeError, "found zeros alone"),
        (
            [[0.0] * D] * 50,
            {},
            DtypeError,
            "acts: expected activations of a store, a tensor or an array, found list",
        ),
        (
            torch.ones(50, D),
            {"max_norm_multiple": 0.5},
            ShapeError,
            "max_norm_multiple: expected rows within it",
        ),
        (
            torch.randn(50, D),
            {"d_sae": None, "expansion": 1, "k": 17},
            ShapeError,
            "k: expected at most d_sae = 16",
        ),
        (torch.full((50, D), math.nan), {}, NonFiniteError, "NaN or infinity in row"),
        (
            torch.randn(50, D),
            {"loss_where": pl.col("kind") == "image"},
            ShapeError,
            "loss_where: expected activations",
        ),
        (
            torch.randn(3, D),
            {"eval_fraction": 1e-6},
            ShapeError,
            "eval_fraction: expected samples on both sides",
        ),
    ],
)
def test_rows_that_cannot_be_trained_on_are_refused(rows, change, error, message):
    with pytest.raises(error, match=message):
        train_sae(rows, config(**change))


COUNTS = ("eval_every", "checkpoint_every", "dead_after_tokens", "shuffle_block_rows", "shuffle_pool_rows")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"k": 0}, "k: expected a whole number"),
        ({"warmup": 1.5}, r"warmup: expected a number in \[0, 1\), found 1.5"),
        ({"steps": 5, "tokens": 10}, "steps: expected steps or tokens"),
        ({"lr": -1.0}, r"lr: expected a number in \(0, inf\)"),
        *(({name: 0}, f"{name}: expected a whole number of at least 1, found 0") for name in COUNTS),
        ({"k": True}, "k: expected a whole number of at least 1, found True"),
        ({"k": None}, "k: expected a whole number of at least 1, found None"),
        ({"k": 33}, "k: expected at most d_sae = 32, found 33"),
        ({"seed": -1}, "seed: expected a whole number of at least 0, found -1"),
        ({"max_norm_multiple": 0.0}, r"max_norm_multiple: expected a number in \(0, inf\), found 0.0"),
        ({"bandwidth": 0.0}, "bandwidth: expected a number"),
        ({"threshold_beta": 2.0}, "threshold_beta: expected a number"),
        ({"auxk_alpha": math.nan}, "auxk_alpha: expected a number"),
        ({"sparsity": math.inf}, "sparsity: expected a number"),
        ({"decoder_norm": "Unit"}, "decoder_norm: expected one of unit, free, found 'Unit'"),
        ({"b_dec_init": "mean"}, "b_dec_init: expected one of"),
        ({"autocast": "none"}, "autocast: expected None or 'bfloat16', found 'none'"),
        ({"activation": "tanh"}, "activation: expected one of"),
    ],
)
def test_configuration_that_means_nothing_is_refused(change, message):
    with pytest.raises(ShapeError, match=message):
        config(**change)


# --- the pieces -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("norm_aware", [False, True])
def test_sparse_gradients_equal_those_of_the_dense_definition(norm_aware):
    g = torch.Generator().manual_seed(0)
    draw = lambda *shape: torch.randn(*shape, generator=g, dtype=torch.double).float()  # noqa: E731
    u, encoder, b_enc, W_dec, target = draw(40, 6), draw(20, 6), draw(20), draw(20, 5), draw(40, 5)
    norms = W_dec.norm(dim=1) if norm_aware else None
    sparse = [t.clone().requires_grad_() for t in (u, encoder, b_enc, W_dec)]
    out, _, _ = topk_autoencode(*sparse, 4, norms, False)
    (out - target).square().sum().backward()
    dense = [t.double().clone().requires_grad_() for t in (u, encoder, b_enc, W_dec)]
    pre = dense[0] @ dense[1].T + dense[2]
    score = pre if norms is None else pre * norms.double()
    mask = torch.zeros_like(pre).scatter_(1, score.topk(4).indices, 1.0)
    wanted = (pre.relu() * mask) @ dense[3]
    (wanted - target).square().sum().backward()
    torch.testing.assert_close(out, wanted.float(), rtol=1e-4, atol=1e-4)
    for ours, theirs in zip(sparse, dense, strict=True):
        torch.testing.assert_close(ours.grad, theirs.grad.float(), rtol=1e-4, atol=1e-4)


def test_geometric_median_is_not_moved_by_an_outlier():
    x = torch.randn(999, 3, generator=torch.Generator().manual_seed(0))
    far = torch.cat([x, torch.full((1, 3), 1e5)])
    assert float(geometric_median(far).norm()) < 0.2
    assert float(far.mean(0).norm()) > 100


def test_rows_of_a_huge_norm_can_be_left_out():
    x, _ = planted(4000)
    x[::50] *= 1000
    told = config(steps=150, eval_fraction=0)
    clean = planted(2000, seed=8)[0]
    with_sinks = train_sae(x, told).sae.quality(clean)["fvu"]
    without = train_sae(x, told.replace(max_norm_multiple=10)).sae.quality(clean)["fvu"]
    assert without < with_sinks / 2


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_cuda_run_learns_as_the_cpu_run_does():
    x, truth = planted()
    result = train_sae(x, config(steps=400, device="cuda", autocast="bfloat16"))
    assert result.sae.device.type == "cuda"
    cosine = truth @ result.sae.W_dec.cpu().T
    assert float(cosine.max(1).values.mean()) > 0.9
    codes = result.sae.encode(x[:100])
    cpu = result.sae.to("cpu").encode(x[:100])
    assert (np.asarray(codes.indices) == np.asarray(cpu.indices)).mean() > 0.99
