"""The organism's training script: curriculum, resumption, labels."""

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")

from microtome.organism import architecture, parallel, train  # noqa: E402
from microtome.organism.curriculum import ENTRY, Curriculum  # noqa: E402
from microtome.organism.scenes import Scene, Thing  # noqa: E402
from microtome.organism.vision import patch_labels  # noqa: E402

STAGE = train.Stage("tiny", seed=3, rows=2, images=0.0, schedule=train.Schedule(1e-3, 1, 2, 2))


def fresh(out):
    torch.manual_seed(0)
    config = architecture.text_config()
    config.num_hidden_layers = 1
    return train.Run(STAGE, train.LlamaForCausalLM(config), out)


def test_a_resumed_run_ends_with_the_same_weights(tmp_path):
    whole, stopped = tmp_path / "whole", tmp_path / "stopped"
    whole.mkdir()
    stopped.mkdir()
    straight = fresh(whole)
    straight.finish()
    first = fresh(stopped)
    first.advance()
    first.advance()
    first.save()
    second = fresh(stopped)
    assert second.progress.step == 2
    second.finish()
    assert second.progress.step == straight.progress.step == 4
    ours, theirs = straight.model.state_dict(), second.model.state_dict()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    assert (whole / "log.jsonl").read_text().count("\n") == 1


def test_a_kind_enters_once_what_it_builds_on_is_solved_and_stays():
    curriculum = Curriculum()
    assert set(curriculum.entered) == {kind for kind, needs in ENTRY.items() if not needs}
    for _ in range(100):
        curriculum.update({"locate": [True], "compare": [True]})
    assert {"colour", "choose", "place"} <= set(curriculum.entered)
    assert "yesno" not in curriculum.entered
    for _ in range(100):
        curriculum.update({"locate": [False]})
    assert "choose" in curriculum.entered
    assert not curriculum.solved()


def test_the_weakest_kind_is_asked_most():
    curriculum = Curriculum(
        accuracy={"locate": 0.99, "compare": 0.5, "arithmetic": 1.0},
        entered=["locate", "compare", "arithmetic"],
    )
    mix = curriculum.mix(images=0.5)
    assert mix.kinds["compare"] > mix.kinds["locate"] > 0
    assert 0 < mix.digits < 0.1
    assert mix.images == 0.5


def test_the_rate_is_held_and_then_falls_to_zero():
    schedule = train.Schedule(rate=2.0, warm_up=10, most=100, decay=50)
    assert schedule.at(0, None) == pytest.approx(0.2)
    assert schedule.at(80, None) == 2.0
    assert schedule.at(125, 100) == pytest.approx(1.0)
    assert schedule.at(150, 100) == 0.0


def test_patch_labels_name_what_each_cell_shows():
    labels = patch_labels([Scene((Thing("circle", "green", 6), Thing("7", "red", 9)))])[0]
    assert labels[6].tolist() == [0, 1, 1, 2]
    assert labels[9].tolist() == [4 + 7, 0, 2, 1]
    assert labels[0].tolist() == [16, 6, 0, 0]


def _disagree(out):
    model = torch.nn.Linear(2, 1, bias=False)
    model.weight.grad = torch.full((1, 2), float(parallel.rank() + 1))
    parallel.average_gradients(model)
    hits = parallel.gather_hits({("locate", False): [parallel.rank() == 0]})
    (out / str(parallel.rank())).write_text(f"{model.weight.grad.tolist()} {sorted(hits['locate', False])}")


def test_processes_agree_on_gradients_and_hits(tmp_path):
    parallel.run(_disagree, 2, tmp_path)
    assert [(tmp_path / str(i)).read_text() for i in range(2)] == ["[[1.5, 1.5]] [False, True]"] * 2
