"""What a capture stores: every family end to end, and every trap that running models lay for hooks."""

import json

import numpy as np
import polars as pl
import pytest
import torch
import transformers
from safetensors.torch import load_file

import microtome as mt
import tiny_models
from microtome.capture import adapt

EVERY = list(tiny_models.FAMILIES)
HOOKS = ["hook_embed", "blocks.*.hook_*", "blocks.*.attn.hook_[qkvz]", "blocks.*.mlp.hook_post"]


class Stored:
    """A store as the safetensors and polars libraries read it."""

    def __init__(self, path):
        self.path = path
        self.manifest = json.loads((path / "manifest.json").read_text())
        self.steps = sorted(p for p in path.iterdir() if p.name.isdigit())
        self.samples = pl.concat(
            [pl.read_parquet(step / "samples.parquet", glob=False) for step in self.steps]
        )

    def __getitem__(self, hook):
        return torch.cat([load_file(step / f"{hook}.safetensors")["x"] for step in self.steps])

    def rows(self, space="tokens"):
        name = "rows.safetensors" if space == "tokens" else f"rows.{space}.safetensors"
        parts = [load_file(step / name) for step in self.steps]
        names = ("sample", "position", "token_id", "kind", "special")
        return pl.DataFrame({n: np.concatenate([part[n].numpy() for part in parts]) for n in names})

    def files(self):
        """Every committed byte."""
        found = {p.relative_to(self.path): p.read_bytes() for step in self.steps for p in step.iterdir()}
        return found | {"manifest.json": (self.path / "manifest.json").read_bytes()}


def captured(tiny, path, batches, hooks=("blocks.*.hook_resid_post",), **options):
    """Capture batches of one forward each, samples named 0, 1, ...; gives the store and the last output."""
    n, output = 0, None
    with (
        mt.capture(tiny.model, path, hooks=hooks, **{"dtype": "float32"} | options) as recorder,
        torch.no_grad(),
    ):
        for batch in batches:
            size = len(batch["input_ids"])
            recorder.samples(ids=list(range(n, n + size)), even=[i % 2 == 0 for i in range(n, n + size)])
            output = tiny.model(**batch)
            n += size
    return Stored(path), output


def hook_counts(model):
    return [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules()]


@pytest.fixture(scope="module", params=EVERY)
def tiny(request):
    return tiny_models.build(request.param)


def test_every_family_is_captured_end_to_end(tiny, tmp_path):
    batch = tiny.batch([5, 9, 3], images=[True, False, True])
    vision = ["vision_*"] if tiny.image_processor else []
    adapter = adapt(tiny.model)
    before = {}
    handles = [
        layer.module.register_forward_hook(
            lambda m, a, out, i=layer.index: before.__setitem__(
                i, (out[0] if isinstance(out, tuple) else out).clone()
            )
        )
        for layer in adapter.layers
    ]
    with torch.no_grad():
        reference = tiny.model(**batch)
    for handle in handles:
        handle.remove()
    hooks = hook_counts(tiny.model)
    store, output = captured(tiny, tmp_path / "s", [batch], HOOKS + vision)

    assert torch.equal(output.logits, reference.logits), "capture does not disturb the model"
    assert hook_counts(tiny.model) == hooks
    mask = batch["attention_mask"].bool()
    rows = store.rows()
    assert rows["token_id"].to_list() == batch["input_ids"][mask].tolist()
    assert rows["position"].to_list() == [p for n in mask.sum(1).tolist() for p in range(n)]
    assert rows["kind"].to_list() == [int(t == tiny_models.IMAGE) for t in rows["token_id"]]
    wrappers = {tiny_models.PAD, tiny_models.BOS, tiny_models.EOS} & set(rows["token_id"])
    assert set(rows.filter(pl.col("special") == 1)["token_id"]) >= wrappers
    assert rows.filter(pl.col("kind") == 1)["special"].sum() == 0
    for i in range(3):
        assert torch.equal(store[f"blocks.{i}.hook_resid_post"], before[i][mask])
    assert store["blocks.0.attn.hook_z"].shape[1] == 64
    assert store["blocks.0.attn.hook_k"].shape[1] == 16 * adapter.n_kv_heads
    assert store.samples["id"].to_list() == [0, 1, 2]
    assert all(tiny.model.get_submodule(path) for path in store.manifest["facts"]["modules"].values())


def test_the_next_layer_enters_where_the_last_one_left_but_for_deepstack(tiny, tmp_path):
    store, _ = captured(tiny, tmp_path / "s", [tiny.batch([5, 9])], ["blocks.*.hook_resid_*"])
    deepstack = adapt(tiny.model).deepstack_layers
    image = torch.from_numpy((store.rows()["kind"] == 1).to_numpy())
    for i in range(2):
        left, entered = store[f"blocks.{i}.hook_resid_post"], store[f"blocks.{i + 1}.hook_resid_pre"]
        assert torch.equal(left[~image], entered[~image])
        assert torch.equal(left[image], entered[image]) == (i not in deepstack)
    assert torch.equal(store["blocks.0.hook_resid_pre"][~image], store["blocks.0.hook_resid_pre"][~image])


VLMS = list(tiny_models.VLMS)


@pytest.mark.parametrize("name", VLMS)
def test_tower_and_projector_rows_belong_to_the_sample_with_the_image(name, tmp_path):
    tiny = tiny_models.build(name)
    batch = tiny.batch([5, 9, 3], images=[True, False, True])
    together, _ = captured(tiny, tmp_path / "s", [batch], ["vision_*"])
    per_image = {
        "vision_encoder": 16,
        "vision_projector": int((batch["input_ids"][0] == tiny_models.IMAGE).sum()),
    }
    per_image |= {"llava": {"vision_encoder": 17}, "internvl": {"vision_encoder": 17}}.get(name, {})
    per_image |= {"llava_next": {"vision_encoder": 51, "vision_projector": 48}}.get(name, {})
    for space, n in per_image.items():
        rows = together.rows(space)
        assert rows.group_by("sample", maintain_order=True).len().rows() == [(0, n), (2, n)]
        assert rows["position"].to_list() == [*range(n)] * 2
        assert rows["kind"].unique().to_list() == [1]


@pytest.mark.parametrize("name", ["llava_next", "pixtral", "mistral3", "qwen2_5_vl", "qwen3_vl"])
def test_images_of_unequal_size_keep_their_own_rows(name, tmp_path):
    tiny = tiny_models.build(name)
    sizes = {"qwen3_vl": [(64, 128), (64, 64)], "pixtral": [(28, 56), (56, 56)]}.get(
        name, [(112, 56), (56, 56)]
    )
    batch = tiny.batch([4, 6], size=sizes)
    together, _ = captured(
        tiny, tmp_path / "both", [batch], ["vision_encoder.blocks.1.*", "vision_projector.hook_out"]
    )
    counts = {}
    for i, size in enumerate(sizes):
        alone, _ = captured(
            tiny, tmp_path / str(i), [tiny.batch([4], size=size)], ["vision_encoder.blocks.1.*"]
        )
        counts[i] = alone.rows("vision_encoder").height
    found = dict(together.rows("vision_encoder").group_by("sample").len().rows())
    assert found == counts
    if name != "llava_next":
        assert counts[0] != counts[1]


@pytest.mark.parametrize("name", VLMS)
def test_generation_appends_a_row_per_token_and_sees_the_tower(name, tmp_path):
    tiny = tiny_models.build(name)
    batch = tiny.batch([5, 9], images=[True, True])
    hooks = ["blocks.1.hook_resid_post", "vision_encoder.blocks.1.hook_resid_post"]
    free = {"max_new_tokens": 4, "do_sample": False, "eos_token_id": -1, "pad_token_id": 0}
    free["bad_words_ids"] = [
        [i] for i in range(64) if i not in tiny_models.WORDS
    ]  # no image tokens in the answer
    expected = tiny.model.generate(**batch, **free)
    with mt.capture(tiny.model, tmp_path / "s", hooks, dtype="float32") as recorder:
        recorder.samples(ids=["a", "b"])
        out = tiny.model.generate(**batch, **free)
    assert torch.equal(out, expected)
    assert "generate" not in tiny.model.__dict__
    store, rows = Stored(tmp_path / "s"), Stored(tmp_path / "s").rows()
    mask = torch.cat([batch["attention_mask"], torch.ones(2, 3, dtype=torch.long)], 1).bool()
    assert rows["token_id"].to_list() == out[:, :-1][mask].tolist(), "the last token is never fed"
    assert rows["position"].to_list() == [p for n in mask.sum(1).tolist() for p in range(n)]
    assert store.rows("vision_encoder")["sample"].unique(maintain_order=True).to_list() == [0, 1]
    if name == "gemma3":
        return  # its image tokens see each other only in the prompt pass
    whole = {
        **batch,
        "input_ids": out[:, :-1],
        "attention_mask": mask.long(),
        **tiny.more_inputs(out[:, :-1]),
    }
    full, _ = captured(tiny, tmp_path / "full", [whole], ["blocks.1.hook_resid_post"])
    torch.testing.assert_close(
        store["blocks.1.hook_resid_post"], full["blocks.1.hook_resid_post"], atol=1e-5, rtol=1e-4
    )


def test_a_sequence_that_ended_gets_no_rows_while_the_others_go_on(tmp_path):
    tiny = tiny_models.build("llama")
    batch = tiny.batch([4, 7])
    free = tiny.model.generate(**batch, max_new_tokens=6, do_sample=False, eos_token_id=-1, pad_token_id=0)
    end = int(free[0, -5])  # what the first sample says second ends its sequence
    ended = [int(np.argmax(row[-6:].numpy() == end)) if end in row[-6:] else 6 for row in free]
    for name, cache in (("cached", True), ("whole", False)):
        with mt.capture(tiny.model, tmp_path / name, ["hook_embed"], dtype="float32") as recorder:
            recorder.samples(ids=["a", "b"])
            tiny.model.generate(
                **batch, max_new_tokens=6, do_sample=False, eos_token_id=end, pad_token_id=0, use_cache=cache
            )
        lengths = (
            Stored(tmp_path / name).rows().group_by("sample", maintain_order=True).len()["len"].to_list()
        )
        assert lengths == [5 + min(ended[0], 5), 8 + min(ended[1], 5)]


def test_ids_that_end_nothing_are_words_like_others(tmp_path):
    tiny = tiny_models.build("llama")
    batch, free = tiny.batch([4]), {"max_new_tokens": 6, "do_sample": False}
    word = int(tiny.model.generate(**batch, eos_token_id=None, pad_token_id=0, **free)[0, -4])
    tiny.model.generation_config.eos_token_id = word
    for i, options in enumerate(
        [{"eos_token_id": None, "pad_token_id": word}, {"eos_token_id": 0, "pad_token_id": word}]
    ):
        with mt.capture(tiny.model, tmp_path / str(i), ["hook_embed"]) as recorder:
            recorder.samples(ids=["a"])
            out = tiny.model.generate(**batch, **free, **options)
        assert out[0, 5:].tolist().count(word) > 0
        assert Stored(tmp_path / str(i)).rows().height == 5 + 5, "the last word is not fed back"


@pytest.mark.parametrize("positional", [False, True])
def test_padding_after_a_sequence_that_a_criterion_ended_is_no_row(tmp_path, positional):
    tiny = tiny_models.build("llama")
    batch = tiny.batch([4, 7])

    def first_ends_at_two(ids, scores, **_):
        return torch.tensor([ids.shape[1] >= 8 + 2, False])

    criteria = transformers.StoppingCriteriaList([first_ends_at_two])
    with mt.capture(tiny.model, tmp_path / "s", ["hook_embed"]) as recorder:
        recorder.samples(ids=["a", "b"])
        options = {"max_new_tokens": 6, "do_sample": False, "eos_token_id": 63, "pad_token_id": 0}
        if positional:
            mask, ids = batch["attention_mask"], batch["input_ids"]
            out = tiny.model.generate(ids, None, None, criteria, attention_mask=mask, **options)
        else:
            out = tiny.model.generate(**batch, stopping_criteria=criteria, **options)
    assert out[0, -4:].tolist() == [0] * 4
    rows = Stored(tmp_path / "s").rows()
    assert rows.group_by("sample", maintain_order=True).len()["len"].to_list() == [5 + 2, 8 + 5]


def test_a_decoding_loop_of_ones_own_appends_to_the_same_samples(tmp_path):
    tiny = tiny_models.build("llama")
    batch = tiny.batch([4, 7])
    with (
        mt.capture(tiny.model, tmp_path / "s", ["blocks.2.hook_resid_post"], dtype="float32") as recorder,
        torch.no_grad(),
    ):
        recorder.samples(ids=["a", "b"])
        out = tiny.model(**batch, use_cache=True)
        mask = torch.cat([batch["attention_mask"], torch.ones(2, 1, dtype=torch.long)], 1)
        tiny.model(
            input_ids=torch.tensor([[20], [30]]), attention_mask=mask, past_key_values=out.past_key_values
        )
    rows = Stored(tmp_path / "s").rows()
    assert rows.group_by("sample", maintain_order=True).agg(pl.col("position").max() + 1)[
        "position"
    ].to_list() == [6, 9]
    assert rows.filter(pl.col("position") == pl.col("position").max().over("sample"))[
        "token_id"
    ].to_list() == [20, 30]


def test_left_and_right_padding_and_none_store_the_same_rows(tmp_path):
    tiny = tiny_models.build("llava")
    stores = {}
    for side in ("left", "right"):
        stores[side], _ = captured(tiny, tmp_path / side, [tiny.batch([5, 9, 3], side=side)])
    lengths = [5, 9, 3]
    whole = tiny.batch(lengths)
    alone = []
    for i in range(3):
        ids = whole["input_ids"][i : i + 1, -17 - lengths[i] :]
        alone.append({"input_ids": ids, "pixel_values": whole["pixel_values"][i : i + 1]})  # no mask at all
    stores["none"], _ = captured(tiny, tmp_path / "none", alone)
    for other in ("right", "none"):
        assert stores["left"].rows().equals(stores[other].rows())
        torch.testing.assert_close(
            stores["left"]["blocks.1.hook_resid_post"],
            stores[other]["blocks.1.hook_resid_post"],
            atol=1e-5,
            rtol=1e-4,
        )


def test_the_last_hidden_state_is_normed_and_the_last_residual_is_not(tmp_path):
    tiny = tiny_models.build("llama")
    batch = tiny.batch([6])
    store, _ = captured(tiny, tmp_path / "s", [batch])
    with torch.no_grad():
        states = tiny.model(**batch, output_hidden_states=True).hidden_states
        last = store["blocks.2.hook_resid_post"]
        assert not torch.equal(states[-1][0], last)
        assert torch.equal(states[-1][0], adapt(tiny.model).final_norm(last))
    assert torch.equal(states[2][0], store["blocks.1.hook_resid_post"])


def test_a_patched_value_is_captured_even_after_the_models_own_recording_hooks(tmp_path):
    tiny = tiny_models.build("llama")
    batch = tiny.batch([6])
    with torch.no_grad():
        tiny.model(**batch, output_hidden_states=True)  # installs the model's own hooks for good
    point = adapt(tiny.model).hook_points()["blocks.1.hook_resid_post"]
    with point.replace(torch.zeros_like):
        store, _ = captured(tiny, tmp_path / "s", [batch])
    assert store["blocks.1.hook_resid_post"].abs().sum() == 0
    assert store["blocks.0.hook_resid_post"].abs().sum() > 0


def test_attention_patterns_need_eager_and_count_keys_from_the_first_token(tmp_path):
    tiny = tiny_models.build("qwen2")
    batch = tiny.batch([4, 7])
    hooks = ["blocks.1.attn.hook_pattern"]
    with pytest.raises(
        mt.errors.Error, match=r"expected eager attention, found sdpa.*set_attn_implementation\('eager'\)"
    ):
        mt.capture(tiny.model, tmp_path / "s", hooks, pattern_keys=10)
    tiny.model.set_attn_implementation("eager")
    with pytest.raises(mt.errors.ShapeError, match="pattern_keys"):
        mt.capture(tiny.model, tmp_path / "s", hooks)
    store, _ = captured(tiny, tmp_path / "s", [batch], hooks, pattern_keys=10)
    pattern = store[hooks[0]].unflatten(1, (4, 10))  # (rows, heads, keys)
    assert store[hooks[0]].shape == (13, 40)
    torch.testing.assert_close(pattern.sum(-1), torch.ones(13, 4))
    with torch.no_grad():
        weights = tiny.model(**batch, output_attentions=True).attentions[1]  # (2, heads, 8, 8)
    assert torch.equal(pattern[:5, :, :5], weights[0, :, 3:, 3:].transpose(0, 1))
    assert torch.equal(pattern[5:, :, :8], weights[1].transpose(0, 1))
    with pytest.raises(mt.errors.ShapeError, match="Raise pattern_keys"):
        captured(tiny, tmp_path / "short", [batch], hooks, pattern_keys=7)


def test_training_mode_with_extra_inputs_and_gradients_is_captured(tmp_path):
    tiny = tiny_models.build("gemma3")
    batch = tiny.batch([5])
    kinds = (batch["input_ids"] == tiny_models.IMAGE).long()
    tiny.model.train()
    with mt.capture(tiny.model, tmp_path / "s", ["blocks.*.hook_resid_post"], dtype="float32") as recorder:
        recorder.samples(ids=["a"])
        out = tiny.model(**batch, token_type_ids=kinds, labels=batch["input_ids"])
        out.loss.backward()
    assert Stored(tmp_path / "s")["blocks.2.hook_resid_post"].isfinite().all()
    assert all(p.grad is not None for p in adapt(tiny.model).layers[0].module.parameters())


def test_special_tokens_of_the_processor_mark_breaks_that_no_config_names(tmp_path):
    class Tokenizer:
        all_special_ids = (tiny_models.PAD, tiny_models.BREAK, tiny_models.CLOSE, tiny_models.IMAGE)

    tiny = tiny_models.build("pixtral")
    store, _ = captured(tiny, tmp_path / "s", [tiny.batch([3])], processor=Tokenizer())
    marked = store.rows().filter(pl.col("special") == 1)["token_id"].to_list()
    assert marked == [tiny_models.BOS, *[tiny_models.BREAK] * 3, tiny_models.CLOSE]


@pytest.mark.parametrize(("dtype", "torch_dtype"), [("bfloat16", torch.bfloat16), ("float16", torch.float16)])
def test_the_value_is_cast_once_to_the_stores_type(dtype, torch_dtype, tmp_path):
    tiny = tiny_models.build("llama")
    exact, _ = captured(tiny, tmp_path / "f32", [tiny.batch([6, 3])])
    store, _ = captured(tiny, tmp_path / dtype, [tiny.batch([6, 3])], dtype=dtype)
    values = store["blocks.1.hook_resid_post"]
    assert values.dtype == torch_dtype
    assert torch.equal(values, exact["blocks.1.hook_resid_post"].to(torch_dtype))


def test_kinds_of_tokens_can_be_kept_alone(tmp_path):
    tiny = tiny_models.build("pixtral")
    batches = [tiny.batch([5, 9, 3], images=[True, False, True])]
    whole, _ = captured(tiny, tmp_path / "all", batches)
    for where, kinds in (("image", [1]), (["text"], [0]), (["text", "image"], [0, 1])):
        part, _ = captured(tiny, tmp_path / f"{kinds}", batches, where=where)
        keep = whole.rows()["kind"].is_in(kinds)
        assert part.rows().equals(whole.rows().filter(keep))
        kept = whole["blocks.1.hook_resid_post"][torch.from_numpy(keep.to_numpy())]
        assert torch.equal(part["blocks.1.hook_resid_post"], kept)
        assert part.samples.height == 3


def test_pooled_rows_are_the_means_of_the_rows(tmp_path):
    tiny = tiny_models.build("pixtral")
    batches = [tiny.batch([5, 9, 3], images=[True, False, True])]
    whole, _ = captured(tiny, tmp_path / "all", batches, ["blocks.*.hook_resid_*"])
    pooled, _ = captured(tiny, tmp_path / "mean", batches, ["blocks.*.hook_resid_*"], pool="mean")
    by_kind, _ = captured(
        tiny, tmp_path / "kind", batches, ["blocks.*.hook_resid_*"], pool="mean", pool_by_kind=True
    )
    rows = whole.rows()
    assert pooled.rows("samples")["sample"].to_list() == [0, 1, 2]
    assert by_kind.rows("samples").select("sample", "kind").rows() == [(0, 0), (0, 1), (1, 0), (2, 0), (2, 1)]
    for hook in ("blocks.0.hook_resid_pre", "blocks.2.hook_resid_post"):
        x = whole[hook].double().numpy()
        for row, (sample,) in enumerate(pooled.rows("samples").select("sample").rows()):
            mean = x[(rows["sample"] == sample).to_numpy()].mean(0)
            np.testing.assert_allclose(pooled[hook][row].numpy(), mean, rtol=1e-5, atol=1e-6)
        for row, (sample, kind) in enumerate(by_kind.rows("samples").select("sample", "kind").rows()):
            mean = x[((rows["sample"] == sample) & (rows["kind"] == kind)).to_numpy()].mean(0)
            np.testing.assert_allclose(by_kind[hook][row].numpy(), mean, rtol=1e-5, atol=1e-6)


def test_generated_tokens_enter_the_mean(tmp_path):
    tiny = tiny_models.build("llama")
    free = {"max_new_tokens": 4, "do_sample": False, "eos_token_id": -1, "pad_token_id": 0}
    stores = {}
    for name, options in (("rows", {}), ("mean", {"pool": "mean"})):
        with mt.capture(tiny.model, tmp_path / name, ["hook_embed"], dtype="float32", **options) as recorder:
            recorder.samples(ids=["a", "b"])
            tiny.model.generate(**tiny.batch([4, 7]), **free)
        stores[name] = Stored(tmp_path / name)
    first = stores["rows"]["hook_embed"][torch.from_numpy((stores["rows"].rows()["sample"] == 0).to_numpy())]
    assert len(first) == 8
    torch.testing.assert_close(stores["mean"]["hook_embed"][0], first.mean(0))


@pytest.mark.parametrize("name", ["llava", "qwen3_vl", "gpt2"])
def test_an_early_exit_stores_the_same_rows_and_runs_no_later_layer(name, tmp_path):
    tiny = tiny_models.build(name)
    hooks = ["blocks.0.hook_resid_post", "blocks.1.attn.hook_z"]
    batches = [tiny.batch([5, 3]), tiny.batch([2, 8], images=False, seed=1)]
    full, _ = captured(tiny, tmp_path / "full", batches, hooks)
    later = []
    handle = adapt(tiny.model).layers[2].module.register_forward_pre_hook(lambda m, a: later.append(1))
    early, output = captured(tiny, tmp_path / "early", batches, hooks, stop_early=True)
    handle.remove()
    assert output is None
    assert not later
    assert early.files() == full.files()
    assert "forward" not in tiny.model.__dict__
    with torch.no_grad():
        assert tiny.model(**batches[0]) is not None


def test_an_early_exit_after_the_vision_tower_skips_the_decoder(tmp_path):
    tiny = tiny_models.build("llava")
    entered = []
    handle = adapt(tiny.model).layers[0].module.register_forward_pre_hook(lambda m, a: entered.append(1))
    captured(tiny, tmp_path / "s", [tiny.batch([5, 3])], ["vision_encoder.blocks.0.*"], stop_early=True)
    handle.remove()
    assert not entered


def test_generation_with_an_early_exit_is_refused(tmp_path):
    tiny = tiny_models.build("llama")
    with mt.capture(tiny.model, tmp_path / "s", ["hook_embed"], stop_early=True) as recorder:
        recorder.samples(ids=["a"])
        with pytest.raises(mt.errors.Error, match="stop_early"):
            tiny.model.generate(**tiny.batch([4]), max_new_tokens=2)
        assert tiny.model(**tiny.batch([4])) is None


def test_module_paths_are_captured_as_outputs_and_widths_are_learned(tmp_path):
    tiny = tiny_models.build("llava")
    layer = "model.language_model.layers.1"
    hooks = [
        layer,
        f"{layer}.input_layernorm",
        f"{layer}.mlp.up_proj",
        "model.multi_modal_projector.linear_1",
    ]
    batches = [tiny.batch([5]), tiny.batch([7], seed=1)]
    for _ in range(2):  # the second run resumes, with widths from the store
        store, _ = captured(tiny, tmp_path / "s", batches, [*hooks, "blocks.1.hook_resid_post"])
    assert torch.equal(store[layer], store["blocks.1.hook_resid_post"])
    assert [store[h].shape[1] for h in hooks] == [64, 64, 128, 64]
    assert store.rows("vision_projector").height == 32


def test_wildcards_leave_attention_patterns_out_unless_they_name_them():
    adapter = adapt(tiny_models.build("llama").model)
    assert not any(p.name.endswith("pattern") for p in adapter.select(["blocks.*"]))
    assert [p.name for p in adapter.select(["blocks.0.*pattern"])] == ["blocks.0.attn.hook_pattern"]


def test_the_facts_say_what_made_the_store(tmp_path):
    tiny = tiny_models.build("llava")
    store, _ = captured(tiny, tmp_path / "s", [tiny.batch([3])], model_facts={"data": "noise"})
    facts = store.manifest["facts"]
    assert facts["model"]["class"] == "LlavaForConditionalGeneration"
    assert facts["modules"] == {
        f"blocks.{i}.hook_resid_post": f"model.language_model.layers.{i}" for i in range(3)
    }
    assert facts["data"] == "noise"
    assert set(facts["versions"]) == {"microtome", "torch", "transformers"}


def test_the_store_opens_with_its_selections(tmp_path):
    tiny = tiny_models.build("llava")
    stored, _ = captured(tiny, tmp_path / "s", [tiny.batch([5, 9, 3])], step_rows=30)
    store = mt.ActivationStore(tmp_path / "s")
    assert store.verify() == []
    acts = store["blocks.1.hook_resid_post"]
    assert torch.equal(torch.as_tensor(acts[0 : acts.shape[0]]), stored["blocks.1.hook_resid_post"])
    assert acts.where(pl.col("even")).shape[0] == 22 + 20


def test_the_module_and_the_function_are_called_alike(tmp_path):
    import sys

    from microtome.capture import capture

    module = sys.modules["microtome.capture"]
    model = tiny_models.build("llama").model
    for call in (mt.capture, module, capture):
        recorder = call(model, tmp_path / "s", hooks=["hook_embed"])
        assert isinstance(recorder, mt.Recorder)
        assert recorder.hooks == ["hook_embed"]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_asynchronous_copies_from_a_gpu_hold_the_values_at_hook_time(tmp_path):
    tiny = tiny_models.build("llava")
    tiny.model.cuda()
    batch = {name: value.cuda() for name, value in tiny.batch([5, 9, 3], images=[True, False, True]).items()}
    layer, seen = adapt(tiny.model).layers[1].module, []
    with layer.register_forward_hook(lambda m, a, out: seen.append(out.clone().cpu())):
        store, _ = captured(tiny, tmp_path / "s", [batch], ["blocks.1.hook_resid_post", "vision_*"])
    assert torch.equal(store["blocks.1.hook_resid_post"], seen[0][batch["attention_mask"].bool().cpu()])
    assert store.rows("vision_projector").height == 32
