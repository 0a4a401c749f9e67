"""The dictionary object: one recipe, the same codes by every path, folds that change nothing."""

from __future__ import annotations

import math

import numpy as np
import pytest

torch = pytest.importorskip("torch")

import microtome as mt  # noqa: E402
from microtome.dictionary import Recipe  # noqa: E402
from microtome.dictionary.encoding import encode_on_device  # noqa: E402
from microtome.errors import CheckpointError, DtypeError, HookError, NonFiniteError, ShapeError  # noqa: E402
from microtome.metrics import RaggedCodes  # noqa: E402

D, F, K, N = 12, 40, 5, 64

RECIPES = {
    "topk": {"activation": "topk", "k": K},
    "topk, b_dec subtracted": {"activation": "topk", "k": K, "apply_b_dec_to_input": True},
    "topk, norm-aware": {"activation": "topk", "k": K, "norm_aware": True},
    "topk, rescaled": {"activation": "topk", "k": K, "rescale_acts_by_decoder_norm": True},
    "topk, scaled": {
        "activation": "topk",
        "k": K,
        "input_scale": 1.7,
        "output_scale": 0.4,
        "apply_b_dec_to_input": True,
    },
    "topk, layer norm": {"activation": "topk", "k": K, "normalize": "layer_norm"},
    "topk, row norm": {"activation": "topk", "k": K, "normalize": "constant_norm_rescale"},
    "topk, norm-aware, layer norm": {
        "activation": "topk",
        "k": K,
        "norm_aware": True,
        "normalize": "layer_norm",
    },
    "batch_topk": {"activation": "batch_topk", "k": K},
    "jumprelu, rescaled": {"activation": "jumprelu", "rescale_acts_by_decoder_norm": True},
    "jumprelu": {"activation": "jumprelu"},
    "jumprelu, norm-aware": {
        "activation": "jumprelu",
        "norm_aware": True,
        "input_scale": 1.7,
        "output_scale": 0.4,
    },
    "relu": {"activation": "relu"},
    "gated": {"activation": "gated", "apply_b_dec_to_input": True},
    "gated, rescaled": {"activation": "gated", "rescale_acts_by_decoder_norm": True},
}


def dictionary(seed: int = 0, d_out: int = D, **recipe) -> mt.SAE:
    g = torch.Generator().manual_seed(seed)
    draw = lambda *shape: torch.randn(*shape, generator=g)  # noqa: E731
    tensors = {"b_dec": 0.1 * draw(d_out)}
    if recipe["activation"] == "gated":
        tensors |= {"b_gate": 0.1 * draw(F), "b_mag": 0.1 * draw(F), "r_mag": 0.1 * draw(F)}
    else:
        tensors |= {"b_enc": 0.1 * draw(F)}
    if recipe["activation"] in ("jumprelu", "batch_topk"):
        tensors |= {"threshold": 1 + 0.2 * draw(F).abs()}
    return mt.SAE(draw(D, F), draw(F, d_out), tensors=tensors, recipe=Recipe(**recipe))


def rows(n: int = N, seed: int = 1) -> torch.Tensor:
    return torch.randn(n, D, generator=torch.Generator().manual_seed(seed))


def definition(sae: mt.SAE, x: torch.Tensor) -> np.ndarray:
    """Codes by the recipe's formulas, float64, one feature at a time."""
    t = {name: tensor.double().numpy() for name, tensor in sae.tensors.items()}
    r, x = sae.recipe, x.double().numpy()
    if r.normalize == "layer_norm":
        x = (x - x.mean(1, keepdims=True)) / (x.std(1, ddof=1, keepdims=True) + 1e-5)
    if r.normalize == "constant_norm_rescale":
        x = x * math.sqrt(D) / np.linalg.norm(x, axis=1, keepdims=True)
    u = r.input_scale * x - (t["b_dec"] if r.apply_b_dec_to_input else 0)
    norms = np.linalg.norm(t["W_dec"], axis=1)
    if r.activation == "gated":
        magnitude = np.exp(t["r_mag"]) * (u @ t["W_enc"]) + t["b_mag"]
        codes = np.where(u @ t["W_enc"] + t["b_gate"] > 0, np.maximum(magnitude, 0), 0)
        return codes * (norms if r.rescale_acts_by_decoder_norm else 1)
    pre = u @ t["W_enc"] + t["b_enc"]
    score = pre * (norms if r.norm_aware else 1)
    chosen = score > t["threshold"] if "threshold" in t else np.ones_like(pre, bool)
    if r.activation == "topk":
        chosen = np.argsort(np.argsort(-score, axis=1, kind="stable"), axis=1) < r.k
    return np.where(chosen, np.maximum(pre, 0), 0) * (norms if r.rescale_acts_by_decoder_norm else 1)


@pytest.mark.parametrize("recipe", RECIPES.values(), ids=RECIPES.keys())
def test_every_path_gives_the_codes_of_the_definition(recipe):
    sae, x = dictionary(**recipe), rows()
    wanted = definition(sae, x)
    assert 0 < (wanted > 0).mean() < 1
    sparse, on_device = sae.encode(x), encode_on_device(sae, x)
    assert type(on_device) is type(sparse) is (mt.SparseCodes if sae.slots else RaggedCodes)
    for found in (
        sae.encode_torch(x).numpy(),
        np.asarray(sparse.to_dense()),
        on_device.to_dense(),
        sae.module().encode(x).detach().numpy(),
    ):
        assert np.array_equal(found > 0, wanted > 0)
        np.testing.assert_allclose(found, wanted, rtol=2e-5, atol=2e-5)
    assert len(sparse) == N and sparse.d_sae == F
    if recipe["activation"] == "topk":
        assert np.asarray(sparse.indices).shape == (N, K)


@pytest.mark.parametrize("recipe", RECIPES.values(), ids=RECIPES.keys())
def test_sparse_and_dense_decoding_agree_with_the_definition(recipe):
    sae, x = dictionary(**recipe), rows()
    r, t = sae.recipe, {name: tensor.double().numpy() for name, tensor in sae.tensors.items()}
    codes = definition(sae, x)
    if r.rescale_acts_by_decoder_norm:
        codes = codes / np.linalg.norm(t["W_dec"], axis=1)
    wanted = r.output_scale * (codes @ t["W_dec"] + t["b_dec"])
    if r.normalize == "layer_norm":
        wanted = wanted * x.double().std(1, keepdim=True).numpy() + x.double().mean(1, keepdim=True).numpy()
    if r.normalize == "constant_norm_rescale":
        wanted = wanted * x.double().norm(dim=1, keepdim=True).numpy() / math.sqrt(D)
    for found in (
        sae.decode(sae.encode(x), x),
        sae.decode(sae.encode_torch(x), x),
        sae.reconstruct(x),
        sae.module()(x),
    ):
        np.testing.assert_allclose(found.detach().numpy(), wanted, rtol=1e-4, atol=1e-4)


def test_arrays_bf16_and_tensors_are_encoded_alike():
    sae, x = dictionary(**RECIPES["topk"]), rows().bfloat16()
    from_tensor = sae.encode(x)
    assert np.array_equal(sae.encode(x.float().numpy()).to_dense(), from_tensor.to_dense())


def test_ties_go_to_the_lower_index():
    W = torch.eye(4).repeat_interleave(2, 0)  # (8, 4): features 2i and 2i+1 are the same
    sae = mt.SAE(W.T, W, activation="topk", k=3)
    x = torch.tensor([[3.0, 2.0, 1.0, 0.0]])
    assert sae.encode_torch(x).nonzero()[:, 1].tolist() == [0, 1, 2]
    assert sorted(np.asarray(sae.encode(x).indices)[0].tolist()) == [0, 1, 2]


def test_fewer_positive_preactivations_than_k_give_fewer_codes():
    sae = mt.SAE(torch.eye(4), torch.eye(4), activation="topk", k=3)
    x = torch.tensor([[2.0, -1.0, -1.0, -1.0], [-1.0, -1.0, -1.0, -1.0]])
    assert (sae.encode_torch(x) > 0).sum(1).tolist() == [1, 0]
    assert (np.asarray(sae.encode(x).values) > 0).sum(1).tolist() == [1, 0]


def test_gradients_reach_selected_features_alone():
    sae, x = dictionary(**RECIPES["topk"]), rows(4)
    module = sae.module()
    (module(x) - x).square().sum().backward()
    silent = (sae.encode_torch(x) > 0).sum(0) == 0
    assert silent.any() and not silent.all()
    assert (module.tensors["W_enc"].grad[:, silent] == 0).all()
    assert (module.tensors["W_enc"].grad[:, ~silent] != 0).any(0).all()


def test_module_shares_the_memory_of_the_dictionary():
    sae = dictionary(**RECIPES["topk"])
    with torch.no_grad():
        sae.module().tensors["b_dec"].add_(1.0)
    assert sae.b_dec.min() > 0.5


def test_training_the_module_changes_what_encode_gives():
    sae, x = dictionary(**RECIPES["topk"]), rows()
    before = sae.encode(x).to_dense()
    module = sae.module()
    optimizer = torch.optim.Adam(module.parameters(), lr=0.1, fused=True)
    (module(x) - x).square().sum().backward()
    optimizer.step()
    after = np.asarray(sae.encode(x).to_dense())
    assert not np.array_equal(before, after)
    np.testing.assert_allclose(after, definition(sae, x), rtol=1e-4, atol=1e-4)


def test_packed_encoder_is_made_once():
    sae = dictionary(**RECIPES["topk"])
    assert sae.packed() is sae.packed()


BY_BARE_SCORE = [
    name for name, r in RECIPES.items() if r["activation"] == "topk" and not dictionary(**r).recipe.norm_aware
]


@pytest.mark.parametrize("name", [name for name in RECIPES if name not in BY_BARE_SCORE])
@pytest.mark.parametrize("scales", [{}, {"input_scale": 1.7, "output_scale": 0.4}])
def test_folding_decoder_norms_keeps_the_reconstruction(name, scales):
    sae, x = dictionary(**{**RECIPES[name], **scales}), rows()
    folded = sae.fold_W_dec_norm()
    torch.testing.assert_close(folded.W_dec.norm(dim=1), torch.ones(F))
    torch.testing.assert_close(folded.reconstruct(x), sae.reconstruct(x), rtol=1e-4, atol=1e-4)
    norms = 1 if sae.recipe.rescale_acts_by_decoder_norm else sae.W_dec.double().norm(dim=1).numpy()
    np.testing.assert_allclose(definition(folded, x), definition(sae, x) * norms, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(
        np.asarray(folded.encode(x).to_dense()), definition(folded, x), rtol=2e-5, atol=2e-5
    )


@pytest.mark.parametrize("name", BY_BARE_SCORE)
def test_folding_decoder_norms_is_refused_where_it_would_change_the_topk(name):
    with pytest.raises(CheckpointError, match="expected a norm-aware Top-K, found topk"):
        dictionary(**RECIPES[name]).fold_W_dec_norm()


def test_folding_a_zero_decoder_row_gives_no_nan():
    sae = dictionary(**RECIPES["topk, norm-aware"])
    sae.W_dec[3] = 0
    folded, x = sae.fold_W_dec_norm(), rows()
    assert all(torch.isfinite(t).all() for t in folded.tensors.values())
    torch.testing.assert_close(folded.reconstruct(x), sae.reconstruct(x), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", RECIPES)
@pytest.mark.parametrize("scales", [(1.7, 0.4), (2.0, 0.5), (0.3, 1.0)])
def test_folding_scales_keeps_codes_and_reconstruction(name, scales):
    told = {**RECIPES[name], "input_scale": scales[0], "output_scale": scales[1]}
    sae, x = dictionary(**told), rows()
    folded = sae.fold_scale()
    assert not folded.recipe.scaled
    kept = (
        not sae.recipe.rescale_acts_by_decoder_norm
    )  # those codes carry norms, which take up the output's scale
    if kept:
        np.testing.assert_allclose(definition(folded, x), definition(sae, x), rtol=1e-4, atol=1e-5)
    assert np.array_equal(definition(folded, x) > 0, definition(sae, x) > 0)
    torch.testing.assert_close(folded.reconstruct(x), sae.reconstruct(x), rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(
        np.asarray(folded.encode(x).to_dense()), definition(folded, x), rtol=2e-5, atol=2e-5
    )


@pytest.mark.parametrize("name", [name for name, r in RECIPES.items() if r["activation"] == "topk"])
def test_topk_as_jumprelu_keeps_k_features_per_row_on_average(name):
    sae, x = dictionary(**RECIPES[name]), rows(500)
    jump = sae.to_jumprelu(x)
    assert jump.recipe.activation == "jumprelu"
    assert int((jump.encode_torch(x) > 0).sum()) == K * 500
    both = (jump.encode_torch(x) > 0) & (sae.encode_torch(x) > 0)
    torch.testing.assert_close(jump.encode_torch(x)[both], sae.encode_torch(x)[both])


@pytest.mark.parametrize("name", ["topk", "topk, norm-aware"])
def test_threshold_of_a_topk_is_its_kn_th_largest_score_over_the_norm(name):
    sae, x = dictionary(**RECIPES[name]), rows(300)
    pre = x.double().numpy() @ sae.W_enc.double().numpy() + sae.b_enc.double().numpy()
    norms = np.linalg.norm(sae.W_dec.double().numpy(), axis=1) if sae.recipe.norm_aware else np.ones(F)
    wanted = np.sort((pre * norms).ravel())[-K * 300] / norms
    np.testing.assert_allclose(sae.to_jumprelu(x).threshold.numpy(), wanted, rtol=1e-5)


def test_calibration_does_not_depend_on_the_blocks_it_reads():
    from microtome.dictionary import folds

    sae = dictionary(**RECIPES["topk"])
    x = rows(100) * torch.linspace(3, 0.1, 100)[:, None]  # the largest scores are all in the first block
    whole, _ = folds.to_jumprelu(sae.tensors, sae.recipe, [x], 100)
    split, _ = folds.to_jumprelu(sae.tensors, sae.recipe, list(x.split(7)), 100)
    torch.testing.assert_close(whole["threshold"], split["threshold"], rtol=1e-6, atol=0)


def test_batch_topk_without_a_threshold_reads_as_topk_per_row():
    recipe = Recipe(activation="batch_topk", k=K)
    full = dictionary(**RECIPES["batch_topk"])
    bare = mt.SAE(full.W_enc, full.W_dec, full.b_enc, full.b_dec, recipe=recipe)
    assert ((bare.encode_torch(rows()) > 0).sum(1) == K).all()
    assert (bare.slots, full.slots) == (K, None)
    for codes in (bare.encode(rows()), encode_on_device(bare, rows())):
        assert (codes.indices.shape, (codes.values > 0).all()) == ((N, K), True)


@pytest.mark.parametrize("recipe", ["jumprelu", "relu", "batch_topk", "gated"])
def test_one_pass_takes_ragged_dictionaries_bit_for_bit(recipe):
    sae, x = dictionary(**RECIPES[recipe]), rows(9000).numpy()  # three blocks of rows
    one, codes = mt.analyse(x, sae, top=3), sae.encode(x)
    table = {"sample": np.arange(9000), "position": np.zeros(9000, np.int64)}
    for field in ("fires", "sum", "sum_sq", "max"):
        assert np.array_equal(getattr(one.stats, field), getattr(mt.feature_stats(codes), field))
    assert one.top.equals(mt.top_samples(codes, table, n=3))
    assert math.isclose(one.fvu, mt.fvu(x, sae.decode(codes)), rel_tol=1e-6)
    assert math.isclose(one.l0, len(codes.indices) / 9000)


def test_transcoder_has_its_own_width_and_skip():
    sae = dictionary(d_out=7, activation="relu")
    made = mt.SAE(
        sae.W_enc, sae.W_dec, sae.b_enc, sae.b_dec, activation="relu", tensors={"W_skip": torch.ones(7, D)}
    )
    x = rows()
    assert made.decode(made.encode(x), x).shape == (N, 7)
    gained = made.reconstruct(x) - sae.reconstruct(x)
    torch.testing.assert_close(gained, x.sum(1, keepdim=True).expand(N, 7), rtol=1e-4, atol=1e-4)
    with pytest.raises(ShapeError, match="x: expected the rows"):
        made.decode(made.encode(x))


def test_fingerprint_tells_weights_and_recipe_but_not_provenance():
    sae = dictionary(**RECIPES["topk"])
    same = sae.with_tensors(sae.tensors, sae.recipe.replace(source="elsewhere", model_name="m"))
    assert sae.fingerprint() == same.fingerprint()
    assert sae.fingerprint() != sae.with_tensors(sae.tensors, sae.recipe.replace(k=K + 1)).fingerprint()
    assert sae.fingerprint() != sae.with_tensors({**sae.tensors, "b_dec": sae.b_dec + 1e-6}).fingerprint()


def test_self_check_finds_a_dictionary_read_by_another_recipe():
    sae = dictionary(**RECIPES["topk"]).with_probe(rows())
    assert sae.self_check()["l0"] == K
    wrong = sae.with_tensors(sae.tensors, sae.recipe.replace(activation="relu", k=None))
    with pytest.raises(CheckpointError, match="expected l0 5"):
        wrong.self_check()


def test_quality_is_fraction_of_variance_unexplained():
    sae, x = dictionary(**RECIPES["relu"]), rows()
    error = (x.double() - sae.reconstruct(x).double()).square().sum()
    assert sae.quality(x)["fvu"] == pytest.approx(
        float(error / (x.double() - x.double().mean(0)).square().sum())
    )


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (
            {"W_dec": torch.zeros(F + 1, D)},
            ShapeError,
            r"W_dec: expected shape \(40, 12\) .* found \(41, 12\)",
        ),
        ({"b_enc": torch.zeros(F - 1)}, ShapeError, r"b_enc: expected shape \(40,\)"),
        ({"b_dec": torch.zeros(D + 1)}, ShapeError, r"b_dec: expected shape \(12,\)"),
        ({"W_enc": torch.zeros(D)}, ShapeError, "W_enc: expected a matrix"),
        ({"W_enc": torch.full((D, F), math.nan)}, NonFiniteError, "W_enc: expected finite"),
        ({"W_enc": torch.zeros(D, F, dtype=torch.int)}, DtypeError, "W_enc: expected floating"),
        ({"k": F + 1}, ShapeError, "k: expected at most d_sae = 40, found 41"),
        ({"k": 0}, ShapeError, "k: expected a whole number of at least 1"),
        ({"k": None}, ShapeError, "k: expected the number"),
        ({"activation": "topk2"}, CheckpointError, "activation: expected one of topk"),
        ({"activation": "jumprelu"}, CheckpointError, "threshold: expected a threshold"),
        ({"tensors": {"threshold": torch.ones(F)}}, CheckpointError, "threshold: expected none"),
        ({"tensors": {"W_extra": torch.ones(F)}}, ShapeError, "W_extra: expected one of"),
    ],
)
def test_weights_that_do_not_fit_are_refused_with_both_sides_named(change, error, message):
    good = {"W_enc": torch.zeros(D, F), "W_dec": torch.zeros(F, D), "activation": "topk", "k": K}
    with pytest.raises(error, match=message):
        mt.SAE(**{**good, **change})


def test_rows_of_another_width_are_refused_with_both_sides_named():
    sae = dictionary(**RECIPES["topk"], hook_name="blocks.3.hook_resid_post")
    for path in (sae.encode, sae.encode_torch):
        with pytest.raises(ShapeError, match=r"\(n, 12\) .*blocks.3.hook_resid_post, found shape \(4, 13\)"):
            path(torch.zeros(4, D + 1))
    with pytest.raises(ShapeError, match="expected 40 features"):
        sae.decode(torch.zeros(4, F + 1))


class Captured:
    """Rows with the name of the hook that they come from, as a store gives them."""

    def __init__(self, hook: str) -> None:
        self.hook, self.x = hook, rows()
        self.shape = tuple(self.x.shape)


@pytest.mark.parametrize(
    ("hook", "fits"),
    [
        ("blocks.3.hook_resid_post", True),
        ("blocks.4.hook_resid_pre", True),
        ("model.layers.7", True),  # another spelling says nothing
        ("blocks.4.hook_resid_post", False),
        ("blocks.3.hook_resid_pre", False),
        ("blocks.3.hook_mlp_out", False),
    ],
)
def test_activations_of_another_hook_are_refused_with_both_sides_named(hook, fits):
    from microtome.dictionary.checks import check_rows

    recipe = dictionary(**RECIPES["topk"], hook_name="blocks.3.hook_resid_post").recipe
    if fits:
        check_rows(Captured(hook), recipe, D)
        return
    with pytest.raises(
        HookError, match=rf"expected activations of blocks\.3\.hook_resid_post, .* found {hook}"
    ):
        check_rows(Captured(hook), recipe, D)
    sae = dictionary(**RECIPES["topk"], hook_name="blocks.3.hook_resid_post")
    with pytest.raises(HookError, match="x: expected activations of"):
        sae.encode(Captured(hook))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"input_scale": 0.0}, r"input_scale: expected a number in \(0, inf\), found 0.0"),
        ({"output_scale": math.inf}, "output_scale: expected a number"),
        ({"k": 2.5}, "k: expected a whole number of at least 1, found 2.5"),
        ({"norm_aware": "no"}, "norm_aware: expected True or False, found 'no'"),
        ({"relu": "never"}, "relu: expected one of before_topk, after_topk, found 'never'"),
        ({"hook_name": 5}, "hook_name: expected a name or None, found 5"),
        ({"activation": []}, "activation: expected one of"),
    ],
)
def test_recipe_that_means_nothing_is_refused(change, message):
    with pytest.raises((ShapeError, CheckpointError), match=message):
        Recipe(**{"activation": "topk", "k": 4, **change})


@pytest.mark.parametrize("recipe", RECIPES.values(), ids=RECIPES.keys())
def test_no_rows_give_no_codes(recipe):
    sae, x = dictionary(**recipe), rows(0)
    assert len(sae.encode(x)) == len(sae.encode(x.numpy())) == len(encode_on_device(sae, x)) == 0
    assert sae.encode_torch(x.numpy()).shape == (0, F)


def test_unknown_field_of_a_recipe_is_refused():
    with pytest.raises(CheckpointError, match="found unknown future"):
        Recipe.from_dict({**Recipe(activation="relu").to_dict(), "future": 1})
