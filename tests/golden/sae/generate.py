"""Writes the golden dictionaries: each by its peer's own library where that is installed, with the codes that library computes.

    python tests/golden/sae/generate.py [format ...]

Every fixture is a folder ``<format>/<name>/`` and ``<format>/<name>.expected.npz`` with ``x (n, d_in)``, ``codes (n, d_sae)`` and
``x_hat (n, d_out)``. Formats without a library (released weights only) are written by hand from their published key layout and
computed by their published formulas, in float64.
"""

from __future__ import annotations

import json
import math
import sys
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save_file

from peers import install_stand_ins

HERE = Path(__file__).parent
D_IN, D_SAE, D_OUT, K, N = 8, 16, 6, 3, 12
HOOK = "blocks.3.hook_resid_post"


def draw(*shape: int, scale: float = 1.0) -> torch.Tensor:
    return scale * torch.randn(*shape)


def rows() -> torch.Tensor:
    return torch.randn(N, D_IN, generator=torch.Generator().manual_seed(7))


def place(form: str, name: str) -> Path:
    torch.manual_seed(sum(map(ord, form + name)))
    folder = HERE / form / name
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def expect(form: str, name: str, codes: torch.Tensor, x_hat: torch.Tensor) -> None:
    arrays = {"x": rows(), "codes": codes, "x_hat": x_hat}
    np.savez(HERE / form / f"{name}.expected.npz", **{k: v.detach().float().numpy() for k, v in arrays.items()})


def randomise(module: torch.nn.Module) -> None:
    """Every parameter drawn, so that no bias or skip is zero and no matrix the transpose of another."""
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            parameter.copy_(draw(*parameter.shape, scale=1.0 if parameter.ndim == 2 else 0.2))
            if "threshold" in name:
                parameter.copy_(parameter.abs() + 0.5)


def saelens() -> None:
    from sae_lens import SAE

    made = {
        "standard": {"apply_b_dec_to_input": True},
        "topk": {"k": K, "apply_b_dec_to_input": False},
        "topk_rescaled": {"k": K, "rescale_acts_by_decoder_norm": True},
        "topk_layer_norm": {"k": K, "normalize_activations": "layer_norm"},
        "jumprelu": {"apply_b_dec_to_input": False},
        "gated": {},
        "transcoder": {"d_out": D_OUT, "apply_b_dec_to_input": False},
        "skip_transcoder": {"d_out": D_OUT, "apply_b_dec_to_input": False},
        "jumprelu_transcoder": {"d_out": D_OUT, "apply_b_dec_to_input": False},
        "jumprelu_skip_transcoder": {"d_out": D_OUT, "apply_b_dec_to_input": False},
    }
    for name, fields in made.items():
        folder = place("saelens", name)
        architecture = name.removesuffix("_rescaled").removesuffix("_layer_norm")
        cfg = {"architecture": architecture, "d_in": D_IN, "d_sae": D_SAE, **fields}
        sae = SAE.from_dict({**cfg, "metadata": {"hook_name": HOOK, "model_name": "tiny"}})
        randomise(sae)
        sae.save_model(folder)
        with torch.no_grad():
            expect("saelens", name, sae.encode(rows()), sae(rows()))


def sparsify() -> None:
    from sparsify import SparseCoder, SparseCoderConfig

    made = {
        "topk": {},
        "num_latents_left_out": {"num_latents": 0, "expansion_factor": D_SAE // D_IN},
        "skip_transcode": {"skip_connection": True, "transcode": True},
    }
    for name, fields in made.items():
        folder = place("sparsify", name)
        coder = SparseCoder(D_IN, SparseCoderConfig(**{"num_latents": D_SAE, "k": K, **fields}))
        randomise(coder)
        coder.save_to_disk(folder)
        with torch.no_grad():
            top = coder.encode(rows())
            dense = torch.zeros(N, D_SAE).scatter_(1, top.top_indices, top.top_acts)
            expect("sparsify", name, dense, coder(rows()).sae_out)


def dictionary_learning() -> None:
    from dictionary_learning import dictionary
    from dictionary_learning.trainers import batch_top_k, matryoshka_batch_top_k, top_k

    made = {
        "AutoEncoder": dictionary.AutoEncoder(D_IN, D_SAE),
        "AutoEncoderNew": dictionary.AutoEncoderNew(D_IN, D_SAE),
        "GatedAutoEncoder": dictionary.GatedAutoEncoder(D_IN, D_SAE),
        "JumpReluAutoEncoder": dictionary.JumpReluAutoEncoder(D_IN, D_SAE),
        "AutoEncoderTopK": top_k.AutoEncoderTopK(D_IN, D_SAE, K),
        "BatchTopKSAE": batch_top_k.BatchTopKSAE(D_IN, D_SAE, K),
        "MatryoshkaBatchTopKSAE": matryoshka_batch_top_k.MatryoshkaBatchTopKSAE(D_IN, D_SAE, K, [4, 12]),
    }
    for name, ae in made.items():
        folder = place("dictionary_learning", name)
        randomise(ae)
        if "Batch" in name:
            ae.threshold.fill_(0.8)
        torch.save(ae.state_dict(), folder / "ae.pt")
        trainer = {"dict_class": name, "activation_dim": D_IN, "dict_size": D_SAE, "layer": 3, "lm_name": "tiny"}
        k = {"k": K} if "TopK" in name else {}
        (folder / "config.json").write_text(json.dumps({"trainer": trainer | k, "buffer": {"ctx_len": 128}}, indent=2))
        with torch.no_grad():
            expect("dictionary_learning", name, ae.encode(rows()), ae(rows()))


def llamascopium() -> None:
    from llamascopium.models.sae import SAEConfig, SparseAutoEncoder

    made = {
        "topk_norm_aware": {"act_fn": "topk", "sparsity_include_decoder_norm": True},
        "jumprelu_norm_aware": {"act_fn": "jumprelu", "sparsity_include_decoder_norm": True},
        "relu": {"act_fn": "relu", "sparsity_include_decoder_norm": False},
    }
    for name, fields in made.items():
        folder = place("llamascopium", name)
        cfg = SAEConfig(
            d_model=D_IN, expansion_factor=D_SAE / D_IN, top_k=K, hook_point_in=HOOK, hook_point_out=HOOK,
            norm_activation="dataset-wise", dtype=torch.float32, device="cpu", **fields,
        )  # fmt: skip
        sae = SparseAutoEncoder(cfg)
        randomise(sae)
        sae.set_dataset_average_activation_norm({HOOK: 2.0})
        cfg.save_hyperparameters(folder)
        sae.save_checkpoint(folder / "sae_weights.safetensors")
        scale = math.sqrt(D_IN) / 2.0
        with torch.no_grad():
            codes = sae.encode(rows() * scale)
            expect("llamascopium", name, codes, sae.decode(codes) / scale)


def circuit_tracer() -> None:
    from circuit_tracer.transcoder.activation_functions import JumpReLU
    from circuit_tracer.transcoder.single_layer_transcoder import SingleLayerTranscoder

    made = {"relu": (torch.nn.functional.relu, False), "jumprelu_skip": (JumpReLU(torch.ones(D_SAE)), True)}
    for name, (activation, skip) in made.items():
        folder = place("circuit_tracer", name)
        cpu = torch.device("cpu")
        coder = SingleLayerTranscoder(
            D_IN, D_SAE, activation, 3, skip_connection=skip, device=cpu, dtype=torch.float32
        )
        randomise(coder)
        coder.to_safetensors(str(folder / "layer_3.safetensors"))
        with torch.no_grad():
            expect("circuit_tracer", name, coder.encode(rows()), coder(rows()))


def by_hand() -> dict[str, torch.Tensor]:
    return {
        "W_enc": draw(D_IN, D_SAE),
        "W_dec": draw(D_SAE, D_IN),
        "b_enc": draw(D_SAE, scale=0.2),
        "b_dec": draw(D_IN, scale=0.2),
        "threshold": draw(D_SAE).abs() + 0.5,
    }


def jumprelu(t: dict[str, torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
    x = rows().double()
    t = {name: tensor.double() for name, tensor in t.items()}
    pre = x @ t["W_enc"] + t["b_enc"]
    codes = pre.relu() * (pre > t["threshold"])
    x_hat = codes @ t["W_dec"] + t["b_dec"]
    return codes, x_hat + x @ t["W_skip"].T if "W_skip" in t else x_hat


def llama_scope() -> None:
    folder = place("llama_scope", "jumprelu")
    t, theta, average = by_hand(), 0.9, {"in": 2.0, "out": 2.5}
    hyper = {
        "d_model": D_IN, "d_sae": D_SAE, "act_fn": "jumprelu", "jump_relu_threshold": theta, "top_k": K,
        "norm_activation": "dataset-wise", "dataset_average_activation_norm": average,
        "sparsity_include_decoder_norm": True, "use_decoder_bias": True,
        "apply_decoder_bias_to_pre_encoder": False, "hook_point_in": HOOK, "hook_point_out": HOOK,
    }  # fmt: skip
    (folder / "hyperparams.json").write_text(json.dumps(hyper, indent=2))
    (folder / "checkpoints").mkdir(exist_ok=True)
    linear = {
        "encoder.weight": t["W_enc"].T.contiguous(), "encoder.bias": t["b_enc"],
        "decoder.weight": t["W_dec"].T.contiguous(), "decoder.bias": t["b_dec"],
    }  # fmt: skip
    save_file(linear, folder / "checkpoints" / "final.safetensors")
    pre = rows().double() * math.sqrt(D_IN) / average["in"] @ t["W_enc"].double() + t["b_enc"].double()
    codes = pre * (pre * t["W_dec"].double().norm(dim=1) > theta)
    out = codes @ t["W_dec"].double() + t["b_dec"].double()
    expect("llama_scope", "jumprelu", codes, out * average["out"] / math.sqrt(D_IN))


def gemma_scope() -> None:
    folder, t = place("gemma_scope", "jumprelu"), by_hand()
    np.savez(folder / "params.npz", **{name: tensor.numpy() for name, tensor in t.items()})
    expect("gemma_scope", "jumprelu", *jumprelu(t))


def gemma_scope_2() -> None:
    folder, t = place("gemma_scope_2", "skip_transcoder"), by_hand()
    lower = {name.replace("W_", "w_"): tensor for name, tensor in t.items()}
    skip = draw(D_IN, D_IN)  # stored (d_in, d_out)
    save_file({**lower, "affine_skip_connection": skip}, folder / "params.safetensors")
    cfg = {"architecture": "jump_relu", "model_name": "gemma-v3-270m", "affine_connection": True}
    (folder / "config.json").write_text(json.dumps(cfg, indent=2))
    expect("gemma_scope_2", "skip_transcoder", *jumprelu({**t, "W_skip": skip.T}))


def qwen_scope() -> None:
    folder, t = place("qwen_scope", f"SAE-Res-Tiny-W16-L0_{K}"), by_hand()
    content = {"W_enc": t["W_enc"].T.contiguous(), "W_dec": t["W_dec"].T.contiguous()}
    torch.save(content | {"b_enc": t["b_enc"], "b_dec": t["b_dec"]}, folder / "layer3.sae.pt")
    pre = (rows().double() @ t["W_enc"].double() + t["b_enc"].double()).relu()
    top = pre.topk(K, dim=1)
    codes = torch.zeros_like(pre).scatter_(1, top.indices, top.values)
    x_hat = codes @ t["W_dec"].double() + t["b_dec"].double()
    expect("qwen_scope", folder.name, codes, x_hat)


def goodfire() -> None:
    folder, t = place("goodfire", "relu"), by_hand()
    content = {
        "encoder_linear.weight": t["W_enc"].T.contiguous(), "encoder_linear.bias": t["b_enc"],
        "decoder_linear.weight": t["W_dec"].T.contiguous(), "decoder_linear.bias": t["b_dec"],
    }  # fmt: skip
    torch.save(content, folder / "Tiny-SAE-l3.pth")
    expect("goodfire", "relu", *jumprelu({**t, "threshold": torch.zeros(D_SAE)}))


WRITERS = {
    write.__name__: write
    for write in (
        saelens, sparsify, dictionary_learning, llamascopium, circuit_tracer,
        llama_scope, gemma_scope, gemma_scope_2, qwen_scope, goodfire,
    )
}  # fmt: skip

if __name__ == "__main__":
    install_stand_ins()
    for form in sys.argv[1:] or WRITERS:
        WRITERS[form]()
        print("wrote", form)
