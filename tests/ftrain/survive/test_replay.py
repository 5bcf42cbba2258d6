"""Any step of a run is run again with its numbers, and a bad one says where it went wrong."""

import json
import math

import pytest
import torch
from rank_processes import exit_codes
from replayed_experiment import batch_at, made_of, train

from ftrain import checkpoint
from ftrain.command import main
from ftrain.debug import check_finite
from ftrain.survive import evidence
from ftrain.survive.evidence import Evidence, leave_evidence, read_batch, read_evidence
from ftrain.survive.replay import Replayed, load_run, replay
from ftrain.survive.skipped import Rollback, Skipped, write_skipped
from sharding import Mesh


def numbers(run, step, **options):
    return list(replay(load_run(run), run, step, say=lambda words: None, **options))


@pytest.mark.parametrize("mesh", [None, Mesh(1, 2, kind="virtual")], ids=["one device", "virtual mesh"])
def test_every_step_has_its_numbers_again(tmp_path, mesh):
    train(tmp_path, mesh=mesh)
    for step, first in ((1, 1), (2, 1), (3, 3), (4, 3), (6, 5)):
        found = numbers(tmp_path, step)
        assert [r.step for r in found] == list(range(first, step + 1)), "from the nearest checkpoint before"
        assert all(r.equal for r in found)
        assert set(found[0].found) == {"loss", "grad_norm"}


def in_two_processes(rank, folder):
    train(folder / "run", mesh=Mesh(1, 2), rank=rank)
    made, batch = made_of(Mesh(1, 2)), batch_at(0)
    batch["x_TD"][8, 2] = 1e30
    found = check_finite(made.step, made.fresh_state(), made.step.share(batch))
    (folder / f"found_by_{rank}.txt").write_text(str(found))


def test_a_run_of_two_processes_is_replayed_in_one(tmp_path):
    (tmp_path / "run").mkdir()
    assert exit_codes(in_two_processes, 2, tmp_path) == [0, 0]
    assert "first infinity in the forward phase" in (tmp_path / "found_by_1.txt").read_text(), "its share went wrong"
    assert "first infinity in the forward phase" not in (tmp_path / "found_by_0.txt").read_text()
    assert json.loads((tmp_path / "run" / "config.json").read_text())["mesh"] == [1, 2, 1]
    for step in (1, 4, 6):
        assert all(r.equal for r in numbers(tmp_path / "run", step))


def test_other_numbers_are_said_to_be_other(tmp_path, capsys):
    train(tmp_path)
    rows = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    rows[3]["loss"] = math.nextafter(rows[3]["loss"], 9.0)
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert main(["replay", str(tmp_path), "--step", "4"]) == 1
    assert "step 4: loss" in (said := capsys.readouterr().out)
    assert said.count("DIFFERENT") == 1
    assert main(["replay", str(tmp_path), "--step", "3"]) == 0


def test_left_out_batches_are_left_out_again(tmp_path):
    write_skipped(tmp_path, Skipped((Rollback((1, 4), (2, 3), 0, "?"),)))
    train(tmp_path)
    assert all(r.equal for r in numbers(tmp_path, 6))
    assert all(r.equal for r in numbers(tmp_path, 2))


def plant(run, *, step, value):
    """The batch of a step as if a bad one had been met there, with one number changed."""
    batch = batch_at(step - 1)
    batch["x_TD"][3, 2] = value
    leave_evidence(run, Evidence(step, step - 1, math.nan, "the loss is nan", Skipped()), batch)


def test_a_bad_step_is_replayed_on_the_batches_that_led_to_it(tmp_path):
    """The run has gone back to step 2 since then, and made its checkpoint 4 without the batch at position 2."""
    before, run = tmp_path / "before", tmp_path / "run"
    train(before)
    loss = numbers(before, 5)[-1].found["loss"]
    run.mkdir()
    write_skipped(run, Skipped((Rollback((2,), (3,), 2, "?"),)))
    train(run)
    leave_evidence(run, Evidence(5, 4, loss, "a spike", Skipped()), batch_at(4))
    found = numbers(run, 5)
    assert [(r.step, r.equal) for r in found] == [(3, None), (4, None), (5, True)]
    again = numbers(run, 5, kept=True)
    assert [(r.step, r.equal) for r in again] == [(5, True)]
    assert again[-1].found["loss"] != loss


@pytest.mark.parametrize("mesh", [None, Mesh(1, 2, kind="virtual")], ids=["one device", "virtual mesh"])
def test_the_first_node_that_went_wrong_is_named(tmp_path, capsys, mesh):
    train(tmp_path, mesh=mesh)
    plant(tmp_path, step=4, value=1e30)  # its square is not finite
    assert main(["replay", str(tmp_path), "--step", "4", "--check"]) in (0, 1)
    said = capsys.readouterr().out
    assert "step 4 was bad: the loss is nan; with the batch it left, from position 3" in said
    assert "which the data no longer gives: x_TD differ" in said
    assert "first infinity in the forward phase at" in said
    assert ("on rank 0 (replicate 0, shard 0, sequence 0)" in said) == (mesh is not None)
    assert "replayed_experiment.py:" in said
    assert "params.up" in said


def test_a_poisoned_batch_is_named_by_its_leaf(tmp_path, capsys):
    train(tmp_path)
    plant(tmp_path, step=5, value=math.nan)
    assert main(["replay", str(tmp_path), "--step", "5", "--check"]) == 0, "the loss is NaN, as it was"
    assert "argument leaf 'batch.x_TD' holds NaN in 1 of 96 elements" in capsys.readouterr().out


def test_a_poisoned_parameter_is_named_by_its_path(tmp_path, capsys):
    train(tmp_path)
    made = load_run(tmp_path)
    state = checkpoint.restore(made.abstract_state, tmp_path / "checkpoints", 4)
    state.params["scale"][7] = math.inf
    checkpoint.save(state, tmp_path / "checkpoints", 4)
    assert main(["replay", str(tmp_path), "--step", "5", "--check"]) == 1
    assert "argument leaf 'state.params.scale' holds infinity in 1 of 16" in capsys.readouterr().out


def test_a_sound_step_is_said_to_be_sound(tmp_path, capsys):
    train(tmp_path)
    assert main(["replay", str(tmp_path), "--step", "5", "--check"]) == 0
    assert "step 5: every node's values are finite" in capsys.readouterr().out


def test_a_step_that_the_run_has_not_come_to(tmp_path, capsys):
    train(tmp_path)
    assert main(["replay", str(tmp_path), "--step", "9"]) == 2
    assert "has not come to step 9: it has noted steps 1 to 6" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (None, r"is not the folder of a run \(it has no config.json\)"),
        ({}, "config.json has no 'replay'"),
        ({"replay": "json"}, r"json, which .*config.json names, has no function replayable"),
    ],
)
def test_a_run_that_does_not_say_what_it_is_made_of(tmp_path, config, message):
    if config is not None:
        (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=message):
        load_run(tmp_path)


def test_evidence_comes_back_as_it_was(tmp_path):
    skipped = Skipped((Rollback((3,), (4,), 2, "a spike"),))
    left = Evidence(7, 8, math.inf, "the loss is inf", skipped)
    batch = {"x": torch.randn(4, 3).T, "ids": {"n": torch.arange(3)}, "name": "train", "rows": 4}
    assert leave_evidence(tmp_path, left, batch) == tmp_path / "replay" / "step_7"
    assert read_evidence(tmp_path, 7) == left
    assert read_evidence(tmp_path, 6) is None
    found = read_batch(tmp_path, 7, like=batch)
    assert (found["name"], found["rows"]) == ("train", 4)
    assert torch.equal(found["x"], batch["x"])
    assert torch.equal(found["ids"]["n"], batch["ids"]["n"])
    with pytest.raises(ValueError, match="holds other leaves than a batch of this run has"):
        read_batch(tmp_path, 7, like={"x": torch.zeros(2)})


def test_a_broken_run_does_not_fill_the_disk(tmp_path, monkeypatch):
    monkeypatch.setattr(evidence, "KEPT", 2)
    left = [
        leave_evidence(tmp_path, Evidence(step, step, math.nan, "?", Skipped()), {"x": torch.zeros(1)})
        for step in (1, 2, 3, 2)
    ]
    assert [folder is not None for folder in left] == [True, True, False, True]


def test_nan_equals_nan_and_zeros_do_not_equal():
    assert Replayed(1, {"loss": math.nan}, {"loss": math.nan}).equal
    assert not Replayed(1, {"loss": 0.0}, {"loss": -0.0}).equal
    assert Replayed(1, {"loss": 0.0}, None).equal is None
