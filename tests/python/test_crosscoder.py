"""Crosscoders: shared, lost, new and attenuated features come out as such."""

from __future__ import annotations

import math

import numpy as np
import pytest

torch = pytest.importorskip("torch")

from diffing_cases import write_store  # noqa: E402
from microtome.dictionary import Crosscoder, TrainConfig, crosscoder, train_crosscoder  # noqa: E402
from microtome.dictionary.crosscoder import StackedRows  # noqa: E402
from microtome.errors import CheckpointError, ShapeError  # noqa: E402

D, EACH = 16, 6


def two_models(n: int = 8000) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
    """Six features of both models, six of the base, six of the other, whose rows are 3 times as large."""
    g = torch.Generator().manual_seed(0)
    truth = torch.nn.functional.normalize(torch.randn(3 * EACH, D, generator=g), dim=1)
    active = (torch.rand(n, 3 * EACH, generator=g) < 2 / (3 * EACH)) * (
        1 + torch.rand(n, 3 * EACH, generator=g)
    )
    noise = 0.01 * torch.randn(2, n, D, generator=g)
    base = active[:, : 2 * EACH] @ truth[: 2 * EACH] + noise[0]
    other = active[:, :EACH] @ truth[:EACH] + active[:, 2 * EACH :] @ truth[2 * EACH :] + noise[1]
    return {"base": base, "other": 3 * other}, truth


def told(**changes) -> TrainConfig:
    fields = {"activation": "batch_topk", "d_sae": 32, "k": 2, "steps": 1000, "batch_size": 256, "lr": 3e-3}
    return TrainConfig(**{**fields, "threshold_beta": 0.9, "eval_rows": 512, **changes})


@pytest.fixture(scope="module")
def trained():
    torch.set_num_threads(1)
    acts, truth = two_models()
    return acts, truth, train_crosscoder(acts, told())


def test_shared_lost_and_new_features_are_told_apart(trained):
    _, truth, result = trained
    table = result.crosscoder.compare("base", "other")
    decoder = result.crosscoder.sae.W_dec.unflatten(1, (2, D))
    whose = np.repeat(["shared", "base", "other"], EACH)
    relative = []
    for feature, group in enumerate(whose):
        side = 1 if group == "other" else 0
        found = int((decoder[:, side] @ truth[feature]).argmax())
        assert float(torch.cosine_similarity(decoder[found, side], truth[feature], dim=0)) > 0.9
        relative.append(table["relative_norm"][found])
        if group == "shared":
            assert table["cosine"][found] > 0.9
    relative = np.array(relative)
    assert (abs(relative[whose == "shared"] - 0.5) < 0.2).all()
    assert (relative[whose == "base"] < 0.3).all()
    assert (relative[whose == "other"] > 0.7).all()


def test_raw_norm_ratio_undoes_the_scales(trained):
    _, _, result = trained
    table, scales = result.crosscoder.compare(), result.crosscoder.scales
    assert scales[0] / scales[1] == pytest.approx(3, rel=0.1)
    gap = table["raw_log_norm_ratio"] - table["log_norm_ratio"]
    assert np.allclose(gap, math.log(scales[0] / scales[1]))


def test_both_models_are_reconstructed_on_their_own_scale(trained):
    acts, _, result = trained
    crosscoder = result.crosscoder
    explained = crosscoder.explained_variance(acts)
    assert min(explained.values()) > 0.7
    decoded = crosscoder.decode(crosscoder.encode(acts))
    for name, x in acts.items():
        error = (x - decoded[name]).square().sum() / (x - x.mean(0)).square().sum()
        assert float(1 - error) == pytest.approx(explained[name], abs=1e-3)


class Counted:
    """Rows that remember how many were read at once."""

    def __init__(self, x: torch.Tensor) -> None:
        self.x, self.shape, self.most = x, tuple(x.shape), 0

    def __getitem__(self, rows):
        block = self.x[rows]
        self.most = max(self.most, len(block))
        return block


def test_rows_are_read_block_by_block(trained, monkeypatch):
    acts, _, result = trained
    whole = result.crosscoder.encode(acts), result.crosscoder.explained_variance(acts)
    monkeypatch.setattr(crosscoder, "_BLOCK_ROWS", 1000)
    counted = {name: Counted(x) for name, x in acts.items()}
    codes, explained = result.crosscoder.encode(counted), result.crosscoder.explained_variance(counted)
    assert max(x.most for x in counted.values()) == 1000
    assert all(np.array_equal(a, b) for a, b in zip(codes.to_csr(), whole[0].to_csr(), strict=True))
    assert explained == pytest.approx(whole[1], rel=1e-9)


def test_no_rows_have_no_codes(trained):
    acts, _, result = trained
    assert len(result.crosscoder.encode({name: x[:0] for name, x in acts.items()})) == 0


def test_threshold_lets_k_features_fire_on_average(trained):
    acts, _, result = trained
    codes = result.crosscoder.encode(acts)
    assert len(codes.values) / len(codes) == pytest.approx(2, abs=0.5)
    assert result.curves["l0"][-1] == pytest.approx(2, abs=0.5)


def test_l1_crosscoder_learns_too():
    acts, _ = two_models(3000)
    crosscoder = train_crosscoder(acts, told(activation="relu", sparsity=0.5, steps=300)).crosscoder
    assert min(crosscoder.explained_variance(acts).values()) > 0.5


def test_file_keeps_names_and_scales(trained, tmp_path):
    _, _, result = trained
    result.crosscoder.save_to_disk(tmp_path)
    again = Crosscoder.load_from_disk(tmp_path)
    assert (again.models, again.scales) == (result.crosscoder.models, result.crosscoder.scales)
    assert again.sae.fingerprint() == result.crosscoder.sae.fingerprint()


def test_dictionary_of_one_model_is_no_crosscoder(tmp_path):
    from test_sae import RECIPES, dictionary

    dictionary(**RECIPES["relu"]).save_to_disk(tmp_path)
    with pytest.raises(CheckpointError, match="crosscoder: expected"):
        Crosscoder.load_from_disk(tmp_path)


@pytest.mark.parametrize(
    ("acts", "change", "message"),
    [
        ({"a": torch.ones(9, 4)}, {}, "two or more models"),
        ({"a": torch.ones(9, 4), "b": torch.ones(8, 4)}, {}, r"\(8, 4\)"),
        ({"a": torch.ones(9, 4), "b": torch.ones(9, 4)}, {"activation": "topk"}, "relu or batch_topk"),
    ],
)
def test_rows_that_do_not_belong_together_are_refused(acts, change, message):
    with pytest.raises(ShapeError, match=message):
        train_crosscoder(acts, told(**change))


@pytest.mark.parametrize(
    ("other", "message"),
    [
        ({"columns": {"id": [f"other{i}" for i in range(9)]}}, "other sample ids in b"),
        ({"token_ids": np.arange(36) + 500}, "other samples, positions or token ids in b"),
    ],
)
def test_stores_of_other_questions_or_other_tokens_are_refused(other, message, tmp_path):
    hook, x = "blocks.0.hook_resid_post", np.random.default_rng(0).normal(size=(36, 8))
    same = [write_store(tmp_path / name, {hook: x}, 4, {})[hook] for name in "ac"]
    assert StackedRows(dict(zip("ac", same, strict=True))).shape == (36, 16)
    found = write_store(tmp_path / "b", {hook: x}, 4, other.pop("columns", {}), **other)[hook]
    with pytest.raises(ShapeError, match=message):
        train_crosscoder({"a": same[0], "b": found}, told())


def test_missing_model_is_refused_by_name(trained):
    acts, _, result = trained
    with pytest.raises(ShapeError, match="expected rows of base, other, found base"):
        result.crosscoder.encode({"base": acts["base"]})
    with pytest.raises(ShapeError, match="b: expected one of base, other, found 'zzz'"):
        result.crosscoder.compare("base", "zzz")
