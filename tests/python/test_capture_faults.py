"""Capture neither disturbs the model nor lies (P22), and loses nothing that was committed (P11)."""

import dataclasses
import json
import multiprocessing
import os
import random
import sys
import threading
import time

import numpy as np
import pytest
import torch
from torch import nn

import microtome as mt
import tiny_models
from killed_capture import capture_all
from microtome.capture import adapt
from microtome.capture.writer import Block, Cut, Matrix, WriterThread
from microtome.errors import (
    DtypeError,
    Error,
    ForkedError,
    LockedError,
    NonFiniteError,
    ShapeError,
    StoreError,
)
from test_capture import Stored, captured, hook_counts

HOOKS = ["blocks.*.hook_resid_post"]


@pytest.fixture
def llama():
    return tiny_models.build("llama")


def state_of(model):
    attributes = [sorted(m.__dict__) for m in model.modules()]
    return hook_counts(model), attributes, [p.clone() for p in model.state_dict().values()]


def assert_as_found(model, before):
    after = state_of(model)
    assert after[:2] == before[:2]
    assert all(torch.equal(a, b) for a, b in zip(after[2], before[2], strict=True))


# --- the model is left as it was ----------------------------------------------------------------------------


@pytest.mark.parametrize("failure", [RuntimeError, KeyboardInterrupt])
@pytest.mark.parametrize("where", ["body", "forward", "generate"])
@pytest.mark.parametrize("stop_early", [False, True])
def test_the_model_is_as_found_after_any_exception(llama, tmp_path, failure, where, stop_early):
    if where == "generate" and stop_early:
        pytest.skip("refused")
    before, rng = state_of(llama.model), torch.get_rng_state()
    with pytest.raises(failure):
        with (
            mt.capture(llama.model, tmp_path / "s", HOOKS, stop_early=stop_early) as recorder,
            torch.no_grad(),
        ):
            recorder.samples(ids=["a"])
            if where == "body":
                llama.model(**llama.batch())
                raise failure
            with llama.model.model.layers[1].mlp.register_forward_pre_hook(raises(failure)):
                if where == "forward":
                    llama.model(**llama.batch())
                llama.model.generate(**llama.batch(), max_new_tokens=3)
    assert_as_found(llama.model, before)
    assert torch.equal(torch.get_rng_state(), rng)
    with mt.capture(llama.model, tmp_path / "s", HOOKS, stop_early=stop_early) as recorder:
        assert len(recorder.done) == 0, "the open step was dropped, and the lock is free"


def raises(failure):
    def hook(*_):
        raise failure

    return hook


def test_a_failed_forward_leaves_no_rows_and_its_ids_may_come_again(llama, tmp_path):
    with mt.capture(llama.model, tmp_path / "s", HOOKS, dtype="float32") as recorder, torch.no_grad():
        recorder.samples(ids=["a"])
        with (
            llama.model.model.layers[2].register_forward_pre_hook(raises(RuntimeError)),
            pytest.raises(RuntimeError),
        ):
            llama.model(**llama.batch([4]))
        for ids, lengths in ((["a"], [4]), (["b"], [2])):
            recorder.samples(ids=ids)
            llama.model(**llama.batch(lengths))
    store = Stored(tmp_path / "s")
    assert store.samples["id"].to_list() == ["a", "b"]
    assert store.rows().height == 5 + 3


def test_captures_nest_and_each_stores_its_own(llama, tmp_path):
    before = state_of(llama.model)
    with mt.capture(llama.model, tmp_path / "outer", HOOKS, dtype="float32") as outer, torch.no_grad():
        outer.samples(ids=["a"])
        with mt.capture(llama.model, tmp_path / "inner", HOOKS, dtype="float32") as inner:
            inner.samples(ids=["b"])
            llama.model.generate(**llama.batch(), max_new_tokens=3, do_sample=False, eos_token_id=-1)
    assert_as_found(llama.model, before)
    hook = "blocks.1.hook_resid_post"
    assert torch.equal(Stored(tmp_path / "outer")[hook], Stored(tmp_path / "inner")[hook])


def test_an_early_exit_that_leaves_another_capture_short_is_an_error_there(llama, tmp_path):
    with mt.capture(llama.model, tmp_path / "outer", ["blocks.0.hook_resid_post"], stop_early=True) as outer:
        outer.samples(ids=["a"])
        with pytest.raises(ShapeError, match=r"hook blocks\.2\.hook_resid_post.*found none"):
            with mt.capture(llama.model, tmp_path / "inner", ["blocks.2.hook_resid_post"]) as inner:
                inner.samples(ids=["b"])
                llama.model(**llama.batch())
    assert Stored(tmp_path / "outer").samples["id"].to_list() == ["a"]


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode, torch.enable_grad])
def test_outputs_and_gradients_are_bitwise_unchanged_in_every_mode(mode, tmp_path):
    tiny = tiny_models.build("llava")
    batch = tiny.batch([5, 9])

    def run():
        tiny.model.zero_grad()
        with mode():
            loss = tiny.model(**batch, labels=batch["input_ids"]).loss
        if loss.requires_grad:
            loss.backward()
            return loss, [p.grad.clone() for p in tiny.model.parameters() if p.grad is not None]
        return loss, []

    plain = run()
    with mt.capture(tiny.model, tmp_path / "s", ["blocks.*.hook_*", "vision_*"]) as recorder:
        recorder.samples(ids=["a", "b"])
        with_capture = run()
    assert torch.equal(plain[0], with_capture[0])
    assert len(plain[1]) == len(with_capture[1])
    assert all(torch.equal(a, b) for a, b in zip(plain[1], with_capture[1], strict=True))


def test_recomputation_by_gradient_checkpointing_adds_no_rows(llama, tmp_path):
    llama.model.train()
    llama.model.gradient_checkpointing_enable()
    batch = llama.batch([6])
    with mt.capture(llama.model, tmp_path / "s", ["blocks.*.mlp.hook_post"]) as recorder:
        recorder.samples(ids=["a"])
        llama.model(**batch, labels=batch["input_ids"]).loss.backward()
    assert Stored(tmp_path / "s").rows().height == 7


def test_autocast_values_are_stored_as_the_model_computed_them(llama, tmp_path):
    batch, seen = llama.batch([6]), []
    handle = (
        adapt(llama.model)
        .layers[1]
        .o_proj.module.register_forward_pre_hook(lambda m, a: seen.append(a[0].clone()))
    )
    with mt.capture(llama.model, tmp_path / "s", ["blocks.1.attn.hook_z"]) as recorder, torch.no_grad():
        recorder.samples(ids=["a"])
        with torch.autocast("cpu", torch.bfloat16):
            llama.model(**batch)
    handle.remove()
    assert seen[0].dtype == torch.bfloat16
    assert torch.equal(Stored(tmp_path / "s")["blocks.1.attn.hook_z"], seen[0][0])


# --- what a hook may meet -----------------------------------------------------------------------------------


def test_a_value_changed_in_place_later_is_stored_as_the_hook_saw_it(llama, tmp_path):
    layer, seen = llama.model.model.layers[1], []

    class InPlace(nn.Module):
        def forward(self, x):
            seen.append(x.clone())
            return x.mul_(0)

    layer.mlp.act_fn = nn.Sequential(llama.model.model.layers[1].mlp.act_fn, InPlace())
    store, _ = captured(llama, tmp_path / "s", [llama.batch([4])], ["model.layers.1.mlp.act_fn.0"])
    assert torch.equal(store["model.layers.1.mlp.act_fn.0"], seen[0][0])
    assert seen[0].abs().sum() > 0


@dataclasses.dataclass
class Output:
    hidden: torch.Tensor
    extra: int = 0


@pytest.mark.parametrize("wrap", [lambda x: (x, None), lambda x: [x], lambda x: {"x": x}, Output])
def test_tuple_list_mapping_and_dataclass_outputs_are_read(llama, tmp_path, wrap):
    plain, _ = captured(llama, tmp_path / "plain", [llama.batch([4])], ["model.layers.1.mlp"])
    mlp = llama.model.model.layers[1].mlp

    def unwrap(out):
        return out.hidden if isinstance(out, Output) else (out["x"] if isinstance(out, dict) else out[0])

    with (
        mt.capture(llama.model, tmp_path / "s", ["model.layers.1.mlp"], dtype="float32") as recorder,
        torch.no_grad(),
    ):
        handles = [mlp.register_forward_hook(lambda m, a, o: wrap(o), prepend=True)]
        handles.append(mlp.register_forward_hook(lambda m, a, o: unwrap(o)))
        recorder.samples(ids=["a"])
        llama.model(**llama.batch([4]))
        for handle in handles:
            handle.remove()
    assert torch.equal(Stored(tmp_path / "s")["model.layers.1.mlp"], plain["model.layers.1.mlp"])


@pytest.mark.parametrize(
    ("output", "found"),
    [((None,), "found tuple"), ("text", "found str"), (torch.ones(1, 2, dtype=torch.long), "torch.int64")],
)
def test_an_output_of_unknown_type_is_an_error_that_names_the_hook(llama, tmp_path, output, found):
    hook = "model.layers.1.post_attention_layernorm"
    norm = llama.model.get_submodule(hook)
    with pytest.raises((ShapeError, DtypeError), match=f"hook {hook}.*{found}"):
        with mt.capture(llama.model, tmp_path / "s", [hook]) as recorder, torch.no_grad():
            with norm.register_forward_hook(lambda m, a, o: output, prepend=True):
                recorder.samples(ids=["a"])
                llama.model(**llama.batch([4]))
    assert hook_counts(llama.model) == [0] * len(list(llama.model.modules()))


def test_a_module_called_twice_in_a_forward_is_an_error_that_names_the_hook(llama, tmp_path):
    layers = llama.model.model.layers
    layers[2].mlp = layers[1].mlp
    with pytest.raises(ShapeError, match=r"hook model\.layers\.1\.mlp.*found two"):
        captured(llama, tmp_path / "s", [llama.batch([4])], ["model.layers.1.mlp"])


def test_a_second_call_with_other_rows_is_told_apart(llama, tmp_path):
    up = llama.model.model.layers[1].mlp.up_proj

    def another_call(module, args):
        up(torch.zeros(1, 2, 64))  # not the rows of the tokens

    with llama.model.model.layers[2].register_forward_pre_hook(another_call):
        store, _ = captured(llama, tmp_path / "s", [llama.batch([4])], ["model.layers.1.mlp.up_proj"])
    assert store["model.layers.1.mlp.up_proj"].shape == (5, 128)


def test_a_hook_that_never_sees_its_rows_is_an_error(llama, tmp_path):
    with (
        pytest.raises(
            ShapeError,
            match=r"hook lm_head.*expected one value for \(1, 5\) tokens, found shape \(1, 1, 64\)",
        ),
        mt.capture(llama.model, tmp_path / "s", ["lm_head"]) as recorder,
        torch.no_grad(),
    ):
        recorder.samples(ids=["a"])
        llama.model(**llama.batch([4]), logits_to_keep=1)


# --- bad input ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"hooks": ["blocks.9.hook_resid_post"]}, "hooks: expected a hook name"),
        ({"hooks": []}, "hooks: expected at least one"),
        ({"dtype": "float64"}, "dtype: expected one of"),
        ({"step_rows": 0}, "step_rows: expected a positive integer, found 0"),
        ({"queue_mib": 0}, "queue_mib: expected a positive integer, found 0"),
        ({"pool": "max"}, "pool: expected None or 'mean', found 'max'"),
        ({"pool_by_kind": True}, "pool_by_kind: expected pool='mean'"),
        ({"where": "audio"}, "where: expected kinds of tokens"),
        ({"nonfinite": "drop"}, "nonfinite: expected 'error' or 'keep'"),
        ({"model_facts": {"x": object()}}, "model_facts: expected JSON values"),
    ],
)
def test_bad_arguments_are_refused_before_anything_is_made(llama, tmp_path, options, message):
    with pytest.raises(Error, match=message):
        mt.capture(llama.model, tmp_path / "s", **{"hooks": HOOKS} | options)
    assert not (tmp_path / "s").exists()


@pytest.mark.parametrize(
    ("ids", "columns", "message"),
    [
        ([], {}, "expected one id per sample"),
        (["a", "a"], {"x": [1, 2]}, "expected every id once, found 'a' again"),
        (["b"], {"x": [1, 2]}, "samples: x: expected 1 values, one per id, found 2"),
        (["b"], {"x": "word"}, "found one string"),
        (["b"], {"id": [1]}, "this column is the table's own"),
        ([1.5], {"x": [1]}, "ids: expected strings or integers, found float"),
        (["first"], {"x": [1]}, "expected every id once, found 'first' again"),
        (["b"], {"y": [1]}, r"expected the columns \['x'\] of this store, found \['y'\]"),
    ],
)
def test_bad_names_are_refused(llama, tmp_path, ids, columns, message):
    with mt.capture(llama.model, tmp_path / "s", HOOKS) as recorder, torch.no_grad():
        recorder.samples(ids=["first"], x=[1])
        llama.model(**llama.batch([4]))
        with pytest.raises((ShapeError, DtypeError), match=message):
            recorder.samples(ids=ids, **columns)
    assert Stored(tmp_path / "s").samples["id"].to_list() == ["first"]


def test_a_forward_without_names_or_ids_is_refused(llama, tmp_path):
    batch = llama.batch([4, 5])
    with mt.capture(llama.model, tmp_path / "s", HOOKS) as recorder, torch.no_grad():
        with pytest.raises(Error, match=r"recorder\.samples"):
            llama.model(**batch)
        recorder.samples(ids=["a"])
        with pytest.raises(ShapeError, match="expected a batch of 1, the samples that were named, found 2"):
            llama.model(**batch)
        recorder.samples(ids=["a", "b"])
        with pytest.raises(ShapeError, match="found inputs_embeds alone"):
            llama.model(inputs_embeds=torch.zeros(2, 3, 64))
        with pytest.raises(Error, match="a part of it"):
            llama.model.model(**batch)
        llama.model(**batch)
        with pytest.raises(Error, match="found a forward without names"):
            llama.model(**batch)
        recorder.samples(ids=["c", "d"])
        with pytest.raises(ShapeError, match="attention_mask: expected shape"):
            llama.model(**batch | {"attention_mask": torch.ones(2, 1, 6, 6)})
    assert Stored(tmp_path / "s").samples["id"].to_list() == ["a", "b"]


def test_beams_and_assistants_are_refused(llama, tmp_path):
    with mt.capture(llama.model, tmp_path / "s", HOOKS) as recorder:
        recorder.samples(ids=["a"])
        with pytest.raises(ShapeError, match="Beams"):
            llama.model.generate(**llama.batch([4]), num_beams=2, max_new_tokens=2)
        recorder.samples(ids=["a"])
        with pytest.raises(Error, match="assisted decoding"):
            llama.model.generate(**llama.batch([4]), prompt_lookup_num_tokens=2, max_new_tokens=2)
        recorder.samples(ids=["a"])
        llama.model(**llama.batch([4]))


def test_a_capture_whose_model_never_ran_says_so(llama, tmp_path):
    other = tiny_models.build("llama")
    with pytest.raises(Error, match="found none"):
        with mt.capture(llama.model, tmp_path / "s", HOOKS) as recorder:
            recorder.samples(ids=["a"])
            other.model(**other.batch([4]))


def test_nan_is_refused_naming_the_hook_and_what_was_committed_stays(llama, tmp_path):
    captured(llama, tmp_path / "s", [llama.batch([4])])
    with torch.no_grad():
        llama.model.model.layers[1].mlp.down_proj.weight[0, 0] = float("nan")
    with pytest.raises(NonFiniteError, match=r"blocks\.1\.hook_resid_post"):
        with mt.capture(llama.model, tmp_path / "s", HOOKS, dtype="float32") as recorder, torch.no_grad():
            recorder.samples(ids=[99], even=[True])
            llama.model(**llama.batch([4]))
    assert Stored(tmp_path / "s").samples["id"].to_list() == [0]
    assert mt.ActivationStore(tmp_path / "s").verify() == []
    captured(llama, tmp_path / "kept", [llama.batch([4])], nonfinite="keep")
    assert Stored(tmp_path / "kept")["blocks.1.hook_resid_post"].isnan().any()


def test_a_store_of_another_run_and_a_second_writer_are_refused(llama, tmp_path):
    captured(llama, tmp_path / "s", [llama.batch([4])])
    with pytest.raises(StoreError, match="cannot resume"):
        with mt.capture(llama.model, tmp_path / "s", ["hook_embed"], dtype="float32"):
            pass
    before = state_of(llama.model)
    with mt.capture(llama.model, tmp_path / "s", HOOKS, dtype="float32"):
        inside = hook_counts(llama.model)
        with pytest.raises(LockedError):
            with mt.capture(llama.model, tmp_path / "s", HOOKS, dtype="float32"):
                pass
        assert hook_counts(llama.model) == inside
    assert_as_found(llama.model, before)


# --- compiled models ----------------------------------------------------------------------------------------


def test_a_compiled_model_is_refused(llama, tmp_path):
    with pytest.raises(Error, match="not compiled"):
        mt.capture(torch.compile(llama.model, backend="eager"), tmp_path / "s", HOOKS)
    llama.model.model.layers[1].compile(backend="eager")
    with pytest.raises(Error, match="not compiled"):
        mt.capture(llama.model, tmp_path / "s", HOOKS)


@pytest.mark.full
def test_an_allowed_compiled_model_is_compiled_anew_with_its_hooks(llama, tmp_path):
    compiled = torch.compile(llama.model, backend="eager")
    plain, _ = captured(llama, tmp_path / "plain", [llama.batch([4])])
    with torch.no_grad():
        compiled(**llama.batch([4]))  # compiled once without hooks
    before = state_of(llama.model)
    with (
        mt.capture(compiled, tmp_path / "s", HOOKS, dtype="float32", allow_compiled=True) as recorder,
        torch.no_grad(),
    ):
        recorder.samples(ids=[0], even=[True])
        compiled(**llama.batch([4]))
    assert_as_found(llama.model, before)
    store = Stored(tmp_path / "s")
    torch.testing.assert_close(store["blocks.1.hook_resid_post"], plain["blocks.1.hook_resid_post"])
    with torch.no_grad():
        compiled(**llama.batch([4]))


# --- the writer thread --------------------------------------------------------------------------------------


class SlowStore:
    """Counts what is written while the test holds the gate shut."""

    def __init__(self):
        self.gate, self.rows = threading.Event(), 0

    def append(self, space, rows, arrays):
        self.gate.wait(10)
        self.rows += len(rows["sample"])


def block(n_bytes):
    x = torch.zeros(n_bytes // 4, 1)
    rows = {"tokens": {"sample": np.zeros(len(x), np.uint64)}}
    return Block(rows, {"tokens": {"h": Matrix([x], None)}}, [Cut({"tokens": len(x)})])


def test_a_full_queue_makes_the_model_wait_and_then_goes_on():
    store = SlowStore()
    writer = WriterThread(store, limit=1000, committed=lambda ids: None)
    put = []

    def produce():
        for _ in range(5):
            writer.put(block(400))
            put.append(1)

    producer = threading.Thread(target=produce)
    producer.start()
    time.sleep(0.2)
    assert len(put) == 2, "two blocks of 400 bytes fit into 1000"
    store.gate.set()
    producer.join(10)
    writer.close(keep=True)
    assert store.rows == 500
    big = WriterThread(store, limit=10, committed=lambda ids: None)
    big.put(block(4000))  # larger than the queue: taken alone
    big.close(keep=True)
    assert store.rows == 1500


def test_an_error_of_the_writer_is_raised_in_the_users_thread_at_the_next_call():
    class Broken:
        def append(self, space, rows, arrays):
            raise OSError(28, "No space left on device")

    writer = WriterThread(Broken(), limit=1000, committed=lambda ids: None)
    writer.put(block(400))
    with pytest.raises(OSError, match="No space left"):
        for _ in range(100):
            time.sleep(0.01)
            writer.put(block(400))
    with pytest.raises(OSError, match="No space left"):
        writer.close(keep=True)


# --- resuming -----------------------------------------------------------------------------------------------


def test_an_interrupted_run_resumes_to_the_bytes_of_an_uninterrupted_one(tmp_path):
    capture_all(tmp_path / "whole")
    for skip_done in (True, False):
        path = tmp_path / f"resumed-{skip_done}"
        for stop_after in (2, 8, 9, 13):
            with pytest.raises(KeyboardInterrupt):
                capture_all(path, stop_after, skip_done)
        capture_all(path, None, skip_done)
        assert Stored(path).files() == Stored(tmp_path / "whole").files()
    assert len(Stored(path).steps) > 8


def committed(path):
    manifest = path / "manifest.json"
    return len(json.loads(manifest.read_text())["steps"]) if manifest.exists() else 0


def killed_run(context, path, rng):
    """Captures into ``path``, killed and started again until it is whole; how often it was killed."""
    kills = 0
    while True:
        process = context.Process(target=capture_all, args=(path, None, True, 0.01))
        process.start()
        goal = committed(path) + rng.randint(1, 3)
        while process.is_alive() and committed(path) < goal:
            process.join(0.01)
        process.join(rng.uniform(0, 0.05))
        if process.is_alive():
            process.kill()
            kills += 1
        process.join()
        if process.exitcode == 0:
            return kills
        assert process.exitcode == -9


def test_a_run_killed_at_any_moment_resumes_to_the_same_bytes(tmp_path, monkeypatch):
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(sys.path))
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["killed_capture"])
    capture_all(tmp_path / "whole")
    whole, rng, kills, runs = Stored(tmp_path / "whole").files(), random.Random(1), 0, 0
    while kills < 6:
        path = tmp_path / f"killed{runs}"
        kills, runs = kills + killed_run(context, path, rng), runs + 1
        assert Stored(path).files() == whole


def test_samples_of_the_store_are_dropped_from_inside_a_batch(llama, tmp_path):
    batch = llama.batch([4, 6, 5])
    captured(llama, tmp_path / "s", [{key: value[:2] for key, value in batch.items()}])
    with mt.capture(llama.model, tmp_path / "s", HOOKS, dtype="float32") as recorder, torch.no_grad():
        assert set(recorder.done) == {0, 1}
        recorder.samples(ids=[1, 7, 0], even=[False, True, True])
        llama.model(**batch)
    store = Stored(tmp_path / "s")
    assert store.samples["id"].to_list() == [0, 1, 7]
    assert store.samples["sample"].to_list() == [0, 1, 2]
    assert store.rows().filter(store.rows()["sample"] == 2).height == 7


def test_steps_end_between_samples_wherever_batches_do(llama, tmp_path):
    whole = llama.batch([7] * 12)
    rows = []
    for size in (1, 3, 12):
        parts = [{k: v[i : i + size] for k, v in whole.items()} for i in range(0, 12, size)]
        store, _ = captured(llama, tmp_path / str(size), parts, step_rows=20)
        rows.append([step["rows"]["tokens"] for step in store.manifest["steps"]])
    assert rows == [[24, 24, 24, 24]] * 3


def test_the_type_of_a_column_is_that_of_its_first_step(llama, tmp_path):
    with pytest.raises(DtypeError, match="samples: x: expected Int64"):
        with mt.capture(llama.model, tmp_path / "s", HOOKS, step_rows=1) as recorder, torch.no_grad():
            for i, x in enumerate([1, 2, "three"]):
                recorder.samples(ids=[i], x=[x])
                llama.model(**llama.batch([4]))
            while len(recorder.done) < 2:
                time.sleep(0.01)
    assert Stored(tmp_path / "s").samples["x"].to_list() == [1, 2]


# --- forks --------------------------------------------------------------------------------------------------


class Numbers(torch.utils.data.Dataset):
    def __len__(self):
        return 8

    def __getitem__(self, i):
        return i, torch.tensor([1, 20 + i, 30, 40])


def test_a_data_loader_with_forked_workers_feeds_a_capture(llama, tmp_path):
    loader = torch.utils.data.DataLoader(
        Numbers(), batch_size=2, num_workers=2, multiprocessing_context="fork"
    )
    with mt.capture(llama.model, tmp_path / "s", HOOKS, step_rows=10) as recorder, torch.no_grad():
        for numbers, ids in loader:
            recorder.samples(ids=numbers.tolist())
            llama.model(input_ids=ids)
    assert Stored(tmp_path / "s").samples["id"].to_list() == list(range(8))


def test_a_forked_child_is_refused_and_leaves_the_store_to_its_parent(llama, tmp_path):
    with mt.capture(llama.model, tmp_path / "s", HOOKS) as recorder, torch.no_grad():
        recorder.samples(ids=["a"])
        llama.model(**llama.batch([4]))
        pid = os.fork()
        if pid == 0:
            try:
                recorder.samples(ids=["b"])
            except ForkedError:
                recorder.__exit__(None, None, None)
                os._exit(7)
            os._exit(1)
        assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 7
    assert Stored(tmp_path / "s").samples["id"].to_list() == ["a"]
