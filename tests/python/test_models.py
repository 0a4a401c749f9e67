"""What an adapter finds in each family, and what a hook point reads and writes."""

import pytest
import torch
from torch import nn

import tiny_models
from microtome.capture import adapt, linear_weight
from microtome.errors import Error, ShapeError

EVERY = list(tiny_models.FAMILIES)
LAYERS = {
    "idefics3": "model.text_model.layers",
    "smolvlm": "model.text_model.layers",
    "gpt2": "transformer.h",
}
TOWER_LAYERS = {
    **dict.fromkeys(("llava", "llava_next", "gemma3", "paligemma"), "model.vision_tower.encoder.layers"),
    **dict.fromkeys(("qwen2_vl", "qwen2_5_vl", "qwen3_vl"), "model.visual.blocks"),
    **dict.fromkeys(("mistral3", "pixtral"), "model.vision_tower.transformer.layers"),
    **dict.fromkeys(("idefics3", "smolvlm"), "model.vision_model.encoder.layers"),
    "internvl": "model.vision_tower.encoder.layer",
}


@pytest.fixture(scope="module", params=EVERY)
def tiny(request):
    return tiny_models.build(request.param)


def observed(model, points, inputs):
    """Every point's value in one forward: {name: tensor}."""
    values, handles = {}, []
    for point in points:
        handles.append(point.observe(lambda value, name=point.name: values.__setitem__(name, value.clone())))
    with torch.no_grad():
        model(**inputs)
    for handle in handles:
        handle.remove()
    return values


def test_every_family_has_its_layers_and_sizes_found(tiny):
    adapter = adapt(tiny.model)
    default = "model.layers" if tiny.image_processor is None else "model.language_model.layers"
    assert adapter.layers[1].path == f"{LAYERS.get(tiny.name, default)}.1"
    assert (adapter.n_layers, adapter.d_model, adapter.d_mlp) == (3, 64, 128)
    assert (adapter.n_heads, adapter.d_head, adapter.d_vocab) == (4, 16, 64)
    assert adapter.n_kv_heads == (4 if tiny.name == "gpt2" else 2)
    assert adapter.lm_head is tiny.model.get_output_embeddings()
    assert adapter.final_norm is list(adapter.decoder.children())[-2 if tiny.name != "gpt2" else -1]
    assert adapter.image_token_id == (None if tiny.image_processor is None else tiny_models.IMAGE)


def test_every_vision_family_has_its_tower_and_projector_found(tiny):
    adapter = adapt(tiny.model)
    if tiny.image_processor is None:
        assert adapter.vision is None
        assert adapter.projector is None
        return
    assert adapter.vision.layers_path == TOWER_LAYERS[tiny.name]
    assert len(adapter.vision.layers) == (3 if tiny.name == "qwen3_vl" else 2)
    assert adapter.projector.path.rpartition(".")[2] in ("multi_modal_projector", "merger", "connector")
    assert adapter.deepstack_layers == ((0, 1) if tiny.name == "qwen3_vl" else ())


def test_every_point_is_read_with_the_width_it_states(tiny):
    adapter = adapt(tiny.model)
    points = [p for p in adapter.hook_points().values() if not p.name.endswith("pattern")]
    inputs = tiny.batch([5, 9], images=[True, False])
    values = observed(tiny.model, points, inputs)
    shape = inputs["input_ids"].shape
    for point in points:
        value = values[point.name]
        wide = value.flatten(-2) if point.heads else value
        assert wide.shape[-1] == point.width, point.name
        assert point.space != "tokens" or wide.shape[:2] == shape, point.name


def test_residuals_are_the_sum_of_what_the_layer_adds(tiny):
    if tiny.name == "gemma3":
        pytest.skip("post norms stand between the modules and the residual stream")
    adapter = adapt(tiny.model)
    points = adapter.select(["blocks.1.hook_*"])
    v = observed(tiny.model, points, tiny.batch())
    added = v["blocks.1.hook_resid_pre"] + v["blocks.1.hook_attn_out"] + v["blocks.1.hook_mlp_out"]
    torch.testing.assert_close(v["blocks.1.hook_resid_post"], added)


def test_heads_sum_to_the_attention_output(tiny):
    adapter = adapt(tiny.model)
    v = observed(tiny.model, adapter.select(["blocks.1.attn.hook_z", "blocks.1.hook_attn_out"]), tiny.batch())
    o = adapter.layers[1].o_proj.module
    weight = linear_weight(o).reshape(adapter.d_model, adapter.n_heads, adapter.d_head)
    heads = torch.einsum("bthd,ohd->bto", v["blocks.1.attn.hook_z"], weight)
    bias = o.bias if getattr(o, "bias", None) is not None else 0
    torch.testing.assert_close(v["blocks.1.hook_attn_out"], heads + bias)


def test_queries_keys_and_values_are_those_the_projections_give(tiny):
    adapter = adapt(tiny.model)
    layer = adapter.layers[0]
    v = observed(tiny.model, adapter.select(["blocks.0.attn.hook_[qkv]"]), tiny.batch())
    x = []
    handle = layer.q_proj.module.register_forward_pre_hook(lambda m, a: x.append(a[0]))
    with torch.no_grad():
        tiny.model(**tiny.batch())
        handle.remove()
        for letter in "qkv":
            at = getattr(layer, f"{letter}_proj")
            out = at.module(x[0])
            out = out[..., slice(*at.columns)] if at.columns else out
            torch.testing.assert_close(v[f"blocks.0.attn.hook_{letter}"].flatten(-2), out)


def test_writing_what_was_read_changes_nothing(tiny):
    points = [p for p in adapt(tiny.model).hook_points().values() if not p.name.endswith("pattern")]
    inputs = tiny.batch()
    with torch.no_grad():
        before = tiny.model(**inputs).logits
        handles = [p.replace(lambda value: value.clone()) for p in points]
        after = tiny.model(**inputs).logits
    for handle in handles:
        handle.remove()
    assert torch.equal(before, after)


@pytest.mark.parametrize(
    "name", ["hook_embed", "blocks.1.attn.hook_z", "blocks.2.attn.hook_k", "blocks.1.mlp.hook_post"]
)
def test_a_written_value_reaches_the_logits_and_lets_gradients_through(tiny, name):
    adapter = adapt(tiny.model)
    point = adapter.hook_points()[name]
    inputs = tiny.batch()
    scale = torch.tensor(0.5, requires_grad=True)
    with torch.no_grad():
        before = tiny.model(**inputs).logits
    with point.replace(lambda value: value.roll(1, -1) * scale + value):
        after = tiny.model(**inputs).logits
    assert not torch.equal(before, after)
    after.square().sum().backward()
    assert scale.grad is not None
    assert scale.grad.abs() > 0
    tiny.model.zero_grad()


def test_kinds_come_from_token_ids_and_may_be_broken_by_rows():
    tiny = tiny_models.build("pixtral")
    inputs = tiny.batch([3], size=(56, 56))
    kinds = adapt(tiny.model).row_kinds(inputs["input_ids"])[0]
    assert kinds.dtype == torch.uint8
    assert int(kinds.sum()) == 16
    runs = int((kinds.diff() == 1).sum())
    assert runs == 4, "four rows of patches, a break token after each"


def test_videos_have_their_own_kind():
    adapter = adapt(tiny_models.build("qwen2_vl").model)
    ids = torch.tensor([[tiny_models.BOS, tiny_models.IMAGE, tiny_models.VIDEO, 20]])
    assert adapter.row_kinds(ids).tolist() == [[0, 1, 2, 0]]


def test_special_tokens_are_the_wrappers_and_never_the_placeholders():
    adapter = adapt(tiny_models.build("gemma3").model)
    assert adapter.special_ids() == {
        tiny_models.PAD,
        tiny_models.BOS,
        tiny_models.EOS,
        tiny_models.OPEN,
        tiny_models.CLOSE,
    }


def test_wildcards_synonyms_and_module_paths_name_the_same_points():
    adapter = adapt(tiny_models.build("llava").model)
    assert [p.name for p in adapter.select(["blocks.*.hook_resid_post"])] == [
        f"blocks.{i}.hook_resid_post" for i in range(3)
    ]
    for synonym, name in {
        "layers_output[1]": "blocks.1.hook_resid_post",
        "blocks.1.hook_in": "blocks.1.hook_resid_pre",
        "blocks.1.attn.o.hook_in": "blocks.1.attn.hook_z",
        "blocks.1.mlp.hook_out": "blocks.1.hook_mlp_out",
    }.items():
        assert [p.name for p in adapter.select([synonym])] == [name]
    (native,) = adapter.select(["model.language_model.layers.1"])
    canonical = adapter.hook_points()["blocks.1.hook_resid_post"]
    assert (native.name, native.module, native.width) == (
        "model.language_model.layers.1",
        canonical.module,
        64,
    )
    paths = [p.name for p in adapter.select(["model.language_model.layers.*.mlp"])]
    assert paths == [f"model.language_model.layers.{i}.mlp" for i in range(3)]
    assert len(adapter.select(["blocks.0.*", "blocks.0.hook_resid_pre"])) == len(
        adapter.select(["blocks.0.*"])
    )


def test_native_paths_know_whose_rows_they_have():
    adapter = adapt(tiny_models.build("qwen2_vl").model)
    spaces = {p.space for p in adapter.select(["model.visual.blocks.0.mlp.fc1"])}
    assert spaces == {"vision_encoder"}
    assert adapter.select(["model.visual.merger"])[0].space == "vision_projector"


def test_a_name_that_names_nothing_is_refused_with_what_is_close():
    adapter = adapt(tiny_models.build("llama").model)
    with pytest.raises(ShapeError, match=r"blocks\.0\.hook_resid_posst.*Close: .*blocks\.0\.hook_resid_post"):
        adapter.select(["blocks.0.hook_resid_posst"])
    with pytest.raises(ShapeError, match="at least one name"):
        adapter.select([])


def test_an_unknown_architecture_is_refused_saying_what_was_looked_for():
    with pytest.raises(Error, match=r"expected a transformers model with a config, found Linear"):
        adapt(nn.Linear(2, 2))
    from transformers import T5Config, T5ForConditionalGeneration

    t5 = T5ForConditionalGeneration(
        T5Config(vocab_size=8, d_model=8, d_kv=4, d_ff=8, num_layers=1, num_heads=2)
    )
    with pytest.raises(Error, match="expected a decoder with a list of layers"):
        adapt(t5)


def test_a_mixture_of_experts_has_no_single_neurons():
    from transformers import MixtralConfig, MixtralForCausalLM

    config = tiny_models.text_config(MixtralConfig, num_local_experts=2, num_experts_per_tok=1)
    points = adapt(MixtralForCausalLM(config)).hook_points()
    assert "blocks.0.hook_mlp_out" in points
    assert "blocks.0.mlp.hook_post" not in points


@pytest.mark.parametrize("family", ["Phi3", "GPTNeoX", "OPT"])
def test_other_layouts_are_told_by_their_shapes(family):
    import transformers

    config = tiny_models.text_config(getattr(transformers, f"{family}Config"))
    if family == "OPT":
        config.ffn_dim, config.word_embed_proj_dim, config.do_layer_norm_before = 128, 64, True
    model = getattr(transformers, f"{family}ForCausalLM")(config).eval()
    adapter = adapt(model)
    assert (adapter.d_head, adapter.d_mlp) == (16, 128)
    assert ("blocks.0.attn.hook_q" in adapter.hook_points()) == (family != "GPTNeoX"), (
        "interleaved heads are left out"
    )
    points = [p for p in adapter.hook_points().values() if not p.name.endswith("pattern")]
    values = observed(model, points, {"input_ids": torch.tensor([[1, 20, 21]])})
    assert all(len(values[p.name].flatten(0, -3 if p.heads else -2)) == 3 for p in points)
