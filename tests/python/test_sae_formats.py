"""Every format of a dictionary: told by its keys, read as its own library reads it, refused when it says too little.

The fixtures under ``tests/golden/sae`` were written by the peers' libraries where those install; see the
README there.
"""

from __future__ import annotations

import json
import shutil
import zipfile
from pathlib import Path

import numpy as np
import pytest

torch = pytest.importorskip("torch")

from safetensors import safe_open  # noqa: E402
from safetensors.torch import load_file, save_file  # noqa: E402

import microtome as mt  # noqa: E402
from microtome.dictionary import formats  # noqa: E402
from microtome.errors import CheckpointError, NonFiniteError, ShapeError, UnsafeCheckpointError  # noqa: E402
from test_sae import RECIPES, dictionary  # noqa: E402

GOLDEN = Path(__file__).resolve().parents[1] / "golden" / "sae"
FIXTURES = sorted(
    path for path in GOLDEN.glob("*/*") if path.is_dir() and path.parent.name in formats.FORMATS
)
PEERS = [name for name in formats.FORMATS if name != "microtome"]


def fixture_id(path: Path) -> str:
    return f"{path.parent.name}/{path.name}"


def golden(name: str, tmp_path: Path) -> Path:
    """A copy of a fixture that a test may damage."""
    return Path(shutil.copytree(GOLDEN / name, tmp_path / Path(name).name))


def test_every_format_but_our_own_has_a_golden_fixture():
    assert {path.parent.name for path in FIXTURES} == set(PEERS)


@pytest.mark.parametrize("folder", FIXTURES, ids=fixture_id)
def test_golden_dictionary_gives_the_codes_of_its_own_library(folder):
    sae = mt.SAE.load_from_disk(folder)
    wanted = np.load(folder.with_name(f"{folder.name}.expected.npz"), allow_pickle=False)
    x = torch.from_numpy(wanted["x"])
    assert sae.recipe.source == folder.parent.name
    assert (sae.d_in, sae.d_sae) == (8, 16)
    codes = np.asarray(sae.encode(x).to_dense())
    assert 0 < (codes > 0).mean() < 0.9
    assert np.array_equal(codes > 0, wanted["codes"] > 0)
    np.testing.assert_allclose(codes, wanted["codes"], rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(sae.encode_torch(x).numpy(), wanted["codes"], rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(sae.decode(sae.encode(x), x).numpy(), wanted["x_hat"], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("folder", FIXTURES, ids=fixture_id)
def test_golden_dictionary_is_told_by_keys_not_by_file_names(folder, tmp_path):
    source = folder / "checkpoints" if (folder / "checkpoints").exists() else folder
    (tmp_path / "a" / "L0_3").mkdir(parents=True)
    for number, file in enumerate(
        sorted(p for p in {*source.iterdir(), *folder.glob("*.json")} if p.is_file())
    ):
        shutil.copy(file, tmp_path / "a" / "L0_3" / f"file{number}{file.suffix}")
    assert mt.SAE.load_from_disk(tmp_path / "a" / "L0_3").recipe.source == folder.parent.name


@pytest.mark.parametrize("folder", FIXTURES, ids=fixture_id)
def test_golden_dictionary_survives_its_own_writer(folder, tmp_path):
    sae = mt.SAE.load_from_disk(folder)
    wanted = np.load(folder.with_name(f"{folder.name}.expected.npz"), allow_pickle=False)
    if sae.d_in == sae.d_out and folder.name != "topk_layer_norm":
        sae = sae.with_probe(wanted["x"])
    sae.save_to_disk(tmp_path / "L0_3", folder.parent.name)
    again = mt.SAE.load_from_disk(tmp_path / "L0_3", format=folder.parent.name)
    x = torch.from_numpy(wanted["x"])
    np.testing.assert_allclose(again.reconstruct(x).numpy(), wanted["x_hat"], rtol=1e-4, atol=1e-4)
    assert again.recipe.hook_name == sae.recipe.hook_name or folder.parent.name in ("gemma_scope", "goodfire")


@pytest.mark.parametrize("form", PEERS)
@pytest.mark.parametrize("recipe", RECIPES.values(), ids=RECIPES.keys())
def test_writing_keeps_the_function_or_is_refused(form, recipe, tmp_path):
    sae, x = dictionary(**recipe, hook_name="blocks.3.hook_resid_post"), torch.randn(40, 12)
    try:
        sae.with_probe(x).save_to_disk(tmp_path / "L0_5", form)
    except CheckpointError:
        with pytest.raises(CheckpointError, match=f"save_to_disk: {form}"):
            sae.save_to_disk(tmp_path / "L0_5", form)
        assert not list(tmp_path.rglob("*.*")), "refused before anything is written"
        return
    again = mt.SAE.load_from_disk(tmp_path / "L0_5")
    assert again.recipe.source == form
    assert again.self_check()["l0"] > 0
    torch.testing.assert_close(again.reconstruct(x), sae.reconstruct(x), rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize(
    "hook", [None, "blocks.3.hook_resid_post", "blocks.3.hook_mlp_out", "blocks.3.hook_mlp_in"]
)
@pytest.mark.parametrize("form", PEERS)
def test_no_format_reads_back_another_hook(form, hook, tmp_path):
    written = 0
    for number, recipe in enumerate(RECIPES.values()):
        folder = tmp_path / str(number) / "L0_5"
        try:
            dictionary(**recipe, hook_name=hook).save_to_disk(folder, form)
        except CheckpointError:
            continue
        assert mt.SAE.load_from_disk(folder).recipe.hook_name in (hook, None)
        written += 1
    assert written or hook is not None


@pytest.mark.parametrize(
    ("place", "hook"),
    [("resid_post_layer_8", "blocks.8.hook_resid_post"), ("attn_out_layer_8", None), (None, None)],
)
def test_dictionary_learning_names_the_residual_stream_alone(place, hook, tmp_path):
    dictionary(**RECIPES["topk"]).save_to_disk(tmp_path, "dictionary_learning")
    trainer = json.loads((tmp_path / "config.json").read_text())["trainer"]
    edit(tmp_path, "config.json", trainer={**trainer, "layer": 8, "submodule_name": place})
    assert mt.SAE.load_from_disk(tmp_path).recipe.hook_name == hook


def test_qwen_scope_k_is_that_of_the_innermost_folder(tmp_path):
    sae, folder = dictionary(**RECIPES["topk"]), tmp_path / "sweep_L0_20" / "SAE-L0_5"
    sae.save_to_disk(folder, "qwen_scope")
    assert mt.SAE.load_from_disk(folder).k == 5
    with pytest.raises(CheckpointError, match="expected the innermost L0_… of the path to be L0_5"):
        sae.save_to_disk(tmp_path / "L0_5" / "SAE-L0_20", "qwen_scope")


def test_every_activation_can_be_written_for_somebody(tmp_path):
    for name, recipe in RECIPES.items():
        written = 0
        for form in PEERS:
            try:
                dictionary(**recipe).save_to_disk(tmp_path / name / form / "L0_5", form)
                written += 1
            except CheckpointError:
                continue
        assert written >= 1, name


@pytest.mark.parametrize("recipe", RECIPES.values(), ids=RECIPES.keys())
def test_own_format_keeps_everything(recipe, tmp_path):
    sae = dictionary(**recipe, hook_name="h", model_name="m", metadata={"context_size": 128}).with_probe(
        torch.randn(9, 12)
    )
    file = sae.save_to_disk(tmp_path)
    for path in (tmp_path, file):
        again = mt.SAE.load_from_disk(path)
        assert again.recipe == sae.recipe
        assert again.fingerprint() == sae.fingerprint()
        assert again.probe_targets == sae.probe_targets
        assert torch.equal(again.probe, sae.probe)


def test_bf16_weights_are_widened_without_loss(tmp_path):
    folder = golden("saelens/topk_rescaled", tmp_path)
    weights = {name: t.bfloat16() for name, t in load_file(folder / "sae_weights.safetensors").items()}
    save_file(weights, folder / "sae_weights.safetensors")
    sae = mt.SAE.load_from_disk(folder)
    assert sae.W_enc.dtype == torch.float32
    assert torch.equal(sae.W_enc, weights["W_enc"].float())


# --- traps of the single formats ----------------------------------------------------------------------------------


def edit(folder: Path, name: str, **changes) -> None:
    cfg = json.loads((folder / name).read_text())
    cfg.update(changes)
    (folder / name).write_text(json.dumps(cfg))


def test_saelens_old_configuration_means_b_dec_is_subtracted(tmp_path):
    folder = golden("saelens/standard", tmp_path)
    old = {
        "d_in": 8,
        "d_sae": 16,
        "hook_point": "h",
        "activation_fn_str": "topk",
        "activation_fn_kwargs": {"k": 4},
    }
    (folder / "cfg.json").write_text(json.dumps(old))
    recipe = mt.SAE.load_from_disk(folder).recipe
    assert (recipe.activation, recipe.k, recipe.apply_b_dec_to_input, recipe.hook_name) == (
        "topk",
        4,
        True,
        "h",
    )


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"architecture": "temporal"}, "architecture: .* found 'temporal'"),
        ({"normalize_activations": "expected_average_only_in"}, "factors are not in the file"),
        ({"d_sae": 17}, r"\(8, 17\) of the configuration, found W_enc \(8, 16\)"),
    ],
)
def test_saelens_configuration_that_weights_cannot_obey_is_refused(changes, message, tmp_path):
    folder = golden("saelens/standard", tmp_path)
    edit(folder, "cfg.json", **changes)
    with pytest.raises(CheckpointError, match=message):
        mt.SAE.load_from_disk(folder)


def test_saelens_file_name_with_llamascopium_keys_is_llamascopium():
    assert (GOLDEN / "llamascopium" / "relu" / "sae_weights.safetensors").exists()
    assert mt.SAE.load_from_disk(GOLDEN / "llamascopium" / "relu").recipe.source == "llamascopium"


def test_sparsify_encoder_is_transposed_and_decoder_is_not():
    raw = load_file(GOLDEN / "sparsify" / "topk" / "sae.safetensors")
    sae = mt.SAE.load_from_disk(GOLDEN / "sparsify" / "topk")
    assert torch.equal(sae.W_enc, raw["encoder.weight"].T)
    assert torch.equal(sae.W_dec, raw["W_dec"])


def test_sparsify_subtracts_b_dec_unless_it_transcodes():
    assert mt.SAE.load_from_disk(GOLDEN / "sparsify" / "topk").recipe.apply_b_dec_to_input
    assert not mt.SAE.load_from_disk(GOLDEN / "sparsify" / "skip_transcode").recipe.apply_b_dec_to_input


@pytest.mark.parametrize("changes", [{"activation": "groupmax"}, {"signed": True}])
def test_sparsify_selection_that_is_no_topk_is_refused(changes, tmp_path):
    folder = golden("sparsify/topk", tmp_path)
    edit(folder, "cfg.json", **changes)
    with pytest.raises(CheckpointError, match="expected an unsigned topk"):
        mt.SAE.load_from_disk(folder)


def test_dictionary_learning_class_is_read_from_the_configuration(tmp_path):
    folder = golden("dictionary_learning/BatchTopKSAE", tmp_path)
    assert mt.SAE.load_from_disk(folder).recipe.activation == "batch_topk"
    edit(folder, "config.json", trainer={"dict_class": "AutoEncoderTopK", "k": 3})
    assert mt.SAE.load_from_disk(folder).recipe.activation == "topk"
    edit(folder, "config.json", trainer={"dict_class": "CrossCoder"})
    with pytest.raises(CheckpointError, match=r"dict_class: .* found 'CrossCoder'"):
        mt.SAE.load_from_disk(folder)


def test_dictionary_learning_unset_threshold_falls_back_to_topk(tmp_path):
    folder = golden("dictionary_learning/BatchTopKSAE", tmp_path)
    state = torch.load(folder / "ae.pt", weights_only=True)
    torch.save({**state, "threshold": torch.tensor(-1.0)}, folder / "ae.pt")
    sae = mt.SAE.load_from_disk(folder)
    assert sae.threshold is None
    assert (sae.encode_torch(torch.randn(5, 8)) > 0).sum(1).max() <= 3


def test_dictionary_learning_backup_is_unwrapped_and_scaled(tmp_path):
    folder = golden("dictionary_learning/AutoEncoderTopK", tmp_path)
    state = torch.load(folder / "ae.pt", weights_only=True)
    plain = mt.SAE.load_from_disk(folder)
    torch.save({"step": 5, "ae": state, "optimizer": {}, "config": {}, "norm_factor": 4.0}, folder / "ae.pt")
    backup = mt.SAE.load_from_disk(folder)
    x = torch.randn(5, 8)
    torch.testing.assert_close(backup.encode_torch(4 * x), plain.encode_torch(x))
    torch.testing.assert_close(backup.reconstruct(4 * x), 4 * plain.reconstruct(x))


def test_llama_scope_without_norms_or_scale_has_another_l0():
    sae = mt.SAE.load_from_disk(GOLDEN / "llama_scope" / "jumprelu")
    x = torch.randn(2000, 8)
    l0 = sae.quality(x)["l0"]
    for change in ({"norm_aware": False}, {"input_scale": 1.0}):
        assert abs(sae.with_tensors(sae.tensors, sae.recipe.replace(**change)).quality(x)["l0"] - l0) > 0.2


def test_llamascopium_threshold_is_the_exponential_of_what_is_stored():
    name = "activation_function.log_jumprelu_threshold"
    raw = load_file(GOLDEN / "llamascopium" / "jumprelu_norm_aware" / "sae_weights.safetensors")
    sae = mt.SAE.load_from_disk(GOLDEN / "llamascopium" / "jumprelu_norm_aware")
    torch.testing.assert_close(sae.threshold, raw[name].exp())


def test_qwen_scope_k_is_taken_from_the_path_or_asked_for(tmp_path):
    shutil.copy(next(GOLDEN.glob("qwen_scope/*/layer3.sae.pt")), tmp_path)
    with pytest.raises(CheckpointError, match="Pass k="):
        mt.SAE.load_from_disk(tmp_path)
    assert mt.SAE.load_from_disk(tmp_path, k=2).k == 2
    assert mt.SAE.load_from_disk(next(GOLDEN.glob("qwen_scope/SAE*/"))).k == 3


def test_circuit_tracer_file_in_saelens_orientation_is_not_guessed_at(tmp_path):
    raw = load_file(GOLDEN / "circuit_tracer" / "relu" / "layer_3.safetensors")
    save_file({**raw, "W_enc": raw["W_enc"].T.contiguous()}, tmp_path / "layer_3.safetensors")
    with pytest.raises(CheckpointError, match="unknown dictionary format"):
        mt.SAE.load_from_disk(tmp_path)


def test_gemma_scope_2_cross_layer_decoder_is_refused(tmp_path):
    folder = golden("gemma_scope_2/skip_transcoder", tmp_path)
    raw = load_file(folder / "params.safetensors")
    save_file({**raw, "w_dec": raw["w_dec"][:, None].repeat(1, 2, 1)}, folder / "params.safetensors")
    with pytest.raises(CheckpointError, match=r"w_dec \(16, 2, 8\)"):
        mt.SAE.load_from_disk(folder)


# --- files that are not what they should be -----------------------------------------------------------------------


class Canary:
    """Runs code when unpickled: creates the file it is told to."""

    def __init__(self, file: Path) -> None:
        self.file = file

    def __reduce__(self):
        return (Path.touch, (self.file,))


@pytest.mark.parametrize("name", ["ae.pt", "weights.safetensors", "params.npz", "sae.pth"])
@pytest.mark.parametrize("zipped", [True, False])
def test_pickle_with_code_is_refused_and_does_not_run(name, zipped, tmp_path):
    import pickle

    canary = tmp_path / "ran"
    (tmp_path / "d").mkdir()
    if zipped:
        torch.save({"W_enc": Canary(canary)}, tmp_path / "d" / name)
    else:
        (tmp_path / "d" / name).write_bytes(pickle.dumps({"W_enc": Canary(canary)}))
    with pytest.raises(UnsafeCheckpointError, match="Convert it to safetensors"):
        mt.SAE.load_from_disk(tmp_path / "d")
    assert not canary.exists()


def test_npz_with_objects_is_refused(tmp_path):
    np.savez(tmp_path / "params.npz", W_enc=np.array([{}], object), allow_pickle=True)
    with pytest.raises(UnsafeCheckpointError, match="Convert it to safetensors"):
        mt.SAE.load_from_disk(tmp_path)


@pytest.mark.parametrize("content", [b"", b"not a file of weights", b"\x00" * 64, b"\xff" * 64])
def test_damaged_weights_are_refused(content, tmp_path):
    (tmp_path / "sae.safetensors").write_bytes(content)
    with pytest.raises(CheckpointError, match="damaged or unknown weights"):
        mt.SAE.load_from_disk(tmp_path)


def test_truncated_weights_are_refused(tmp_path):
    file = dictionary(**RECIPES["topk"]).save_to_disk(tmp_path)
    file.write_bytes(file.read_bytes()[:-5])
    with pytest.raises(CheckpointError, match="damaged"):
        mt.SAE.load_from_disk(tmp_path)


def test_flipped_bit_in_own_file_is_found_by_the_fingerprint(tmp_path):
    file = dictionary(**RECIPES["topk"]).save_to_disk(tmp_path)
    data = bytearray(file.read_bytes())
    data[-100] ^= 1
    file.write_bytes(bytes(data))
    with pytest.raises(CheckpointError, match="expected fingerprint"):
        mt.SAE.load_from_disk(tmp_path)


def test_peer_file_with_other_weights_fails_its_self_check(tmp_path):
    dictionary(**RECIPES["topk"]).with_probe(torch.randn(30, 12)).save_to_disk(tmp_path, "saelens")
    edit(tmp_path, "cfg.json", k=9)
    with pytest.raises(CheckpointError, match=r"self-check .* expected l0 5 on 30 probe rows, found"):
        mt.SAE.load_from_disk(tmp_path)


@pytest.mark.parametrize(
    ("fixture", "file", "tensor"),
    [
        ("saelens/gated", "sae_weights.safetensors", "W_dec"),
        ("sparsify/topk", "sae.safetensors", "encoder.bias"),
        ("llama_scope/jumprelu", "checkpoints/final.safetensors", "decoder.weight"),
        ("llamascopium/relu", "sae_weights.safetensors", "b_E"),
        ("circuit_tracer/relu", "layer_3.safetensors", "b_dec"),
    ],
)
def test_missing_tensor_is_refused_by_name(fixture, file, tensor, tmp_path):
    folder = golden(fixture, tmp_path)
    raw = load_file(folder / file)
    del raw[tensor]
    save_file(raw, folder / file)
    with pytest.raises(CheckpointError, match=r"missing tensor|unknown dictionary format"):
        mt.SAE.load_from_disk(folder)


def test_nan_among_the_weights_is_refused(tmp_path):
    folder = golden("saelens/topk", tmp_path)
    raw = load_file(folder / "sae_weights.safetensors")
    raw["W_dec"][0, 0] = float("nan")
    save_file(raw, folder / "sae_weights.safetensors")
    with pytest.raises(NonFiniteError, match="W_dec"):
        mt.SAE.load_from_disk(folder)


def test_shapes_that_disagree_are_refused_with_both_sides(tmp_path):
    folder = golden("saelens/topk", tmp_path)
    raw = load_file(folder / "sae_weights.safetensors")
    raw["W_dec"] = raw["W_dec"][:-1].contiguous()
    save_file(raw, folder / "sae_weights.safetensors")
    with pytest.raises(ShapeError, match=r"W_dec: expected shape \(16, 8\) .* found \(15, 8\)"):
        mt.SAE.load_from_disk(folder)


def test_nothing_there_unknown_format_and_wrong_format_are_told_apart(tmp_path):
    with pytest.raises(FileNotFoundError):
        mt.SAE.load_from_disk(tmp_path / "absent")
    with pytest.raises(CheckpointError, match="no weights in"):
        mt.SAE.load_from_disk(tmp_path)
    with pytest.raises(CheckpointError, match="format: expected one of microtome, saelens"):
        mt.SAE.load_from_disk(GOLDEN / "saelens" / "topk", format="keras")
    with pytest.raises(CheckpointError, match="expected sparsify, found saelens"):
        mt.SAE.load_from_disk(GOLDEN / "saelens" / "topk", format="sparsify")
    with pytest.raises(CheckpointError, match="format: expected one of"):
        dictionary(**RECIPES["topk"]).save_to_disk(tmp_path, "keras")


def test_folder_of_dictionaries_names_what_is_inside(tmp_path):
    for layer in (3, 4):
        dictionary(**RECIPES["topk"]).save_to_disk(tmp_path / f"layers.{layer}", "sparsify")
    with pytest.raises(CheckpointError, match=r"found the folders layers\.3, layers\.4\. Pass one of them"):
        mt.SAE.load_from_disk(tmp_path)


def test_two_dictionaries_in_one_folder_are_not_chosen_between(tmp_path):
    for name in ("layer_3", "layer_4"):
        shutil.copy(
            GOLDEN / "circuit_tracer" / "relu" / "layer_3.safetensors", tmp_path / f"{name}.safetensors"
        )
    with pytest.raises(
        CheckpointError, match=r"found layer_3.safetensors, layer_4.safetensors. Pass the path"
    ):
        mt.SAE.load_from_disk(tmp_path)
    assert mt.SAE.load_from_disk(tmp_path / "layer_4.safetensors").recipe.hook_name == "blocks.4.hook_mlp_in"


def test_saving_over_a_dictionary_leaves_no_stale_probe_and_no_temporary_file(tmp_path):
    sae = dictionary(**RECIPES["topk"])
    sae.with_probe(torch.randn(9, 12)).save_to_disk(tmp_path, "saelens")
    assert (tmp_path / "probe.safetensors").exists()
    dictionary(seed=5, **RECIPES["topk"]).save_to_disk(tmp_path, "saelens")
    assert {path.name for path in tmp_path.iterdir()} == {"cfg.json", "sae_weights.safetensors"}
    mt.SAE.load_from_disk(tmp_path)


def test_header_length_that_begins_like_a_pickle_is_read_as_safetensors(tmp_path):
    from microtome.dictionary.formats.files import Checkpoint, write_safetensors

    for padding in range(0, 256, 8):  # one of these headers has a length of 0x80 modulo 256
        metadata = {"format": "x", "padding": "y" * padding}
        file = write_safetensors(tmp_path / f"{padding}.safetensors", {"a": torch.zeros(2)}, metadata)
        assert Checkpoint(file, {}).metadata == metadata


@pytest.mark.parametrize(
    ("form", "file", "change"),
    [
        ("saelens", "cfg.json", {"metadata": "abc"}),
        ("saelens", "cfg.json", {"k": "abc"}),
        ("sparsify", "cfg.json", {"k": []}),
        ("dictionary_learning", "config.json", {"trainer": {"dict_class": []}}),
        ("llamascopium", "config.json", {"d_model": -1}),
        ("llamascopium", "config.json", {"act_fn": {}}),
    ],
)
def test_configuration_of_other_types_is_refused_by_file(form, file, change, tmp_path):
    dictionary(**RECIPES["topk"]).save_to_disk(tmp_path, form)
    edit(tmp_path, file, **change)
    with pytest.raises((CheckpointError, ShapeError)):
        mt.SAE.load_from_disk(tmp_path, form)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("recipe", "{"),
        ("recipe", "5"),
        ("recipe", '{"activation": "topk", "k": "5"}'),
        ("probe", "[]"),
        ("probe", '{"l0": "a"}'),
        ("probe", "x"),
    ],
)
def test_header_of_our_own_file_is_refused_by_name(key, value, tmp_path):
    file = dictionary(**RECIPES["topk"]).with_probe(torch.randn(9, 12)).save_to_disk(tmp_path)
    with safe_open(file, framework="pt") as opened:
        metadata = dict(opened.metadata())
    save_file(load_file(file), file, {**metadata, f"microtome.{key}": value})
    with pytest.raises((CheckpointError, ShapeError)):
        mt.SAE.load_from_disk(tmp_path)


def npz(path: Path, member: bytes) -> None:
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name in ("W_enc", "W_dec", "b_enc", "b_dec", "threshold"):
            archive.writestr(f"{name}.npy", member)


def npy(shape: str, content: bytes = b"") -> bytes:
    header = f"{{'descr': '<f4', 'fortran_order': False, 'shape': {shape}, }}".ljust(117) + "\n"
    return b"\x93NUMPY\x01\x00" + len(header).to_bytes(2, "little") + header.encode() + content


def test_npz_is_refused_whatever_is_wrong_with_it(tmp_path):
    file = tmp_path / "params.npz"
    for member in (
        npy("(1000000000000,)"),
        npy("(10,)", b"abc"),
        npy("(((((((("),
        b"",
        npy("(4,)", bytes(200 << 20)),
    ):
        npz(file, member)
        with pytest.raises(UnsafeCheckpointError, match=r"params\.npz: expected"):
            mt.SAE.load_from_disk(tmp_path)
    npz(file, npy("(1000,)", np.random.default_rng(0).bytes(4000)))
    content = bytearray(file.read_bytes())
    content[200:400] = b"\xff" * 200
    file.write_bytes(content)
    with pytest.raises(UnsafeCheckpointError, match=r"params\.npz: expected"):
        mt.SAE.load_from_disk(tmp_path)


def test_pickle_of_another_tool_beside_a_dictionary_is_passed_over(tmp_path):
    sae = dictionary(**RECIPES["topk"])
    sae.save_to_disk(tmp_path, "saelens")
    torch.save({"options": Path("x")}, tmp_path / "trainer_state.pt")
    assert mt.SAE.load_from_disk(tmp_path).recipe.source == "saelens"
