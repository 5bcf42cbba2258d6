"""Any step of a run is run again with its numbers, and a bad one says where it went wrong."""

import json
import math

import pytest
import torch

from ftrain import checkpoint
from ftrain.cli.main import main
from ftrain.debug.finite import check_finite
from ftrain.resilience import failure_dump as dump
from ftrain.resilience.failure_dump import FailureDump, read_batch, read_failure_dump, write_failure_dump
from ftrain.resilience.replay import Replayed, load_run, recorded, replay
from ftrain.resilience.skipped import Rollback, Skipped, write_skipped
from ftrain.sharding import Mesh
from tests.helpers.rank_processes import exit_codes
from tests.helpers.replayed_experiment import batch_at, made_of, train

EXPERIMENT = "tests.helpers.replayed_experiment"


def numbers(run, step, **options):
    return list(replay(load_run(run, EXPERIMENT), run, step, say=lambda words: None, **options))


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
    assert main(["replay", str(tmp_path), "--experiment", EXPERIMENT, "--step", "4"]) == 1
    assert "step 4: loss" in (said := capsys.readouterr().out)
    assert said.count("DIFFERENT") == 1
    assert main(["replay", str(tmp_path), "--experiment", EXPERIMENT, "--step", "3"]) == 0


def test_left_out_batches_are_left_out_again(tmp_path):
    write_skipped(tmp_path, Skipped((Rollback((1, 4), (2, 3), 0, "?"),)))
    train(tmp_path)
    assert all(r.equal for r in numbers(tmp_path, 6))
    assert all(r.equal for r in numbers(tmp_path, 2))


def plant(run, *, step, value):
    """The batch of a step as if a bad one had been met there, with one number changed."""
    batch = batch_at(step - 1)
    batch["x_TD"][3, 2] = value
    write_failure_dump(run, FailureDump(step, step - 1, math.nan, "the loss is nan", Skipped()), batch)


def test_a_bad_step_is_replayed_on_the_batches_that_led_to_it(tmp_path):
    """The run has gone back to step 2 since then, and made its checkpoint 4 without the batch at position 2."""
    before, run = tmp_path / "before", tmp_path / "run"
    train(before)
    loss = numbers(before, 5)[-1].found["loss"]
    run.mkdir()
    write_skipped(run, Skipped((Rollback((2,), (3,), 2, "?"),)))
    train(run)
    write_failure_dump(run, FailureDump(5, 4, loss, "a spike", Skipped()), batch_at(4))
    found = numbers(run, 5)
    assert [(r.step, r.equal) for r in found] == [(3, None), (4, None), (5, True)]
    again = numbers(run, 5, kept=True)
    assert [(r.step, r.equal) for r in again] == [(5, True)]
    assert again[-1].found["loss"] != loss


@pytest.mark.parametrize("mesh", [None, Mesh(1, 2, kind="virtual")], ids=["one device", "virtual mesh"])
def test_the_first_node_that_went_wrong_is_named(tmp_path, capsys, mesh):
    train(tmp_path, mesh=mesh)
    plant(tmp_path, step=4, value=1e30)  # its square is not finite
    assert main(["replay", str(tmp_path), "--experiment", EXPERIMENT, "--step", "4", "--check"]) in (0, 1)
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
    assert main(["replay", str(tmp_path), "--experiment", EXPERIMENT, "--step", "5", "--check"]) == 0, (
        "the loss is NaN, as it was"
    )
    assert "argument leaf 'batch.x_TD' holds NaN in 1 of 96 elements" in capsys.readouterr().out


def test_a_poisoned_parameter_is_named_by_its_path(tmp_path, capsys):
    train(tmp_path)
    made = load_run(tmp_path, EXPERIMENT)
    state = checkpoint.restore(made.abstract_state, tmp_path / "checkpoints", 4)
    state.params["scale"][7] = math.inf
    checkpoint.save(state, tmp_path / "checkpoints", 4)
    assert main(["replay", str(tmp_path), "--experiment", EXPERIMENT, "--step", "5", "--check"]) == 1
    assert "argument leaf 'state.params.scale' holds infinity in 1 of 16" in capsys.readouterr().out


def test_a_sound_step_is_said_to_be_sound(tmp_path, capsys):
    train(tmp_path)
    assert main(["replay", str(tmp_path), "--experiment", EXPERIMENT, "--step", "5", "--check"]) == 0
    assert "step 5: every node's values are finite" in capsys.readouterr().out


def test_a_step_that_the_run_has_not_come_to(tmp_path, capsys):
    train(tmp_path)
    assert main(["replay", str(tmp_path), "--experiment", EXPERIMENT, "--step", "9"]) == 2
    assert "has not come to step 9: it has noted steps 1 to 6" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (None, r"is not the folder of a run \(it has no config.json\)"),
        ({}, "config.json has no 'replay'"),
        ({"replay": "json"}, r"config.json names the module 'json', which is not one of experiments\.\*"),
        (
            {"replay": "experiments.decoder_plan"},
            r"experiments.decoder_plan, which .*config.json names, has no function replayable",
        ),
        ({"replay": "experiments"}, "'experiments', which is not one of"),
        ({"replay": "experiments..mesh"}, "'experiments..mesh', which is not one of"),
        ([1], "config.json: the value is a list, not an object"),
    ],
)
def test_a_run_that_does_not_say_what_it_is_made_of(tmp_path, config, message):
    if config is not None:
        (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=message):
        load_run(tmp_path)


def test_code_that_came_with_a_run_is_not_run(tmp_path, monkeypatch):
    """Wherever the folder lies: below the folder that Python starts in, or within the experiments."""
    monkeypatch.syspath_prepend(str(tmp_path))
    own = tmp_path / "experiments"
    for run in (tmp_path / "runs" / "sent", own / "sent"):
        run.mkdir(parents=True)
        for folder in (run, run.parent):
            (folder / "__init__.py").touch()
        (run / "payload.py").write_text("raise SystemExit('code of the run has run')")
        name = run.relative_to(tmp_path).as_posix().replace("/", ".")
        (run / "config.json").write_text(json.dumps({"replay": f"{name}.payload"}))
        with pytest.raises(ValueError, match=r"payload', which is not one of experiments.*--experiment MODULE"):
            load_run(run)
    with pytest.raises(SystemExit, match="code of the run has run"):
        load_run(tmp_path / "runs" / "sent", "runs.sent.payload")  # who asks may name it


@pytest.mark.parametrize("about", [b"", b"[]", b"{}", b"[" * 100_000, b'{"step": 1e999}', b"\0" * 9], ids=repr)
def test_evidence_that_is_not_what_was_written(tmp_path, about):
    write_failure_dump(tmp_path, FailureDump(3, 2, 1.0, "why", Skipped()), {"x": torch.arange(5)})
    (tmp_path / "replay" / "step_3" / "about.json").write_bytes(about)
    with pytest.raises(ValueError, match=r"replay/step_3/about.json"):
        read_failure_dump(tmp_path, 3)


@pytest.mark.parametrize("stored", [b"", (2**62).to_bytes(8, "little") + b"{}"])
def test_a_batch_that_is_not_what_was_written(tmp_path, stored):
    write_failure_dump(tmp_path, FailureDump(3, 2, 1.0, "why", Skipped()), {"x": torch.arange(5)})
    file = tmp_path / "replay" / "step_3" / "batch.safetensors"
    file.write_bytes(stored)
    with pytest.raises(ValueError, match=r"batch.safetensors is not what the run wrote"):
        read_batch(tmp_path, 3, like={"x": torch.arange(5)})
    file.unlink()
    file.symlink_to("/etc/passwd")
    with pytest.raises(ValueError, match=r"batch\.safetensors is a link, not a regular file"):
        read_batch(tmp_path, 3, like={"x": torch.arange(5)})


def test_rows_that_are_no_rows_are_named(tmp_path):
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "loss": 1.0}\n[2]\n{"step": 3')
    with pytest.raises(ValueError, match=r"metrics\.jsonl"):
        recorded(tmp_path)
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "loss": NaN, "why": "text"}\n{"step": 3')
    assert list(recorded(tmp_path)) == [1]


def test_evidence_comes_back_as_it_was(tmp_path):
    skipped = Skipped((Rollback((3,), (4,), 2, "a spike"),))
    left = FailureDump(7, 7, math.inf, "the loss is inf", skipped)
    batch = {"x": torch.randn(4, 3).T, "ids": {"n": torch.arange(3)}, "name": "train", "rows": 4}
    assert write_failure_dump(tmp_path, left, batch) == tmp_path / "replay" / "step_7"
    assert read_failure_dump(tmp_path, 7) == left
    assert read_failure_dump(tmp_path, 6) is None
    found = read_batch(tmp_path, 7, like=batch)
    assert (found["name"], found["rows"]) == ("train", 4)
    assert torch.equal(found["x"], batch["x"])
    assert torch.equal(found["ids"]["n"], batch["ids"]["n"])
    with pytest.raises(ValueError, match="holds other leaves than a batch of this run has"):
        read_batch(tmp_path, 7, like={"x": torch.zeros(2)})


def test_a_broken_run_does_not_fill_the_disk(tmp_path, monkeypatch):
    monkeypatch.setattr(dump, "KEPT", 2)
    left = [
        write_failure_dump(tmp_path, FailureDump(step, step, math.nan, "?", Skipped()), {"x": torch.zeros(1)})
        for step in (1, 2, 3, 2)
    ]
    assert [folder is not None for folder in left] == [True, True, False, True]


def test_nan_equals_nan_and_zeros_do_not_equal():
    assert Replayed(1, {"loss": math.nan}, {"loss": math.nan}).equal
    assert not Replayed(1, {"loss": 0.0}, {"loss": -0.0}).equal
    assert Replayed(1, {"loss": 0.0}, None).equal is None


def leave(run, batch, **about):
    """What a bad step 5 left, with entries of its about.json changed."""
    write_failure_dump(run, FailureDump(5, 4, math.nan, "the loss is nan", Skipped()), batch)
    file = run / "replay" / "step_5" / "about.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **about}))
    return file


@pytest.mark.parametrize(
    ("about", "words"),
    [
        ({"step": 7}, "is about step 7, not step 5"),
        ({"position": 2**62}, "has the position 4611686018427387904, and step 5 took the batch at position 4"),
    ],
)
def test_what_a_bad_step_left_belongs_to_it(tmp_path, about, words):
    file = leave(tmp_path, batch_at(4), **about)
    with pytest.raises(ValueError, match=f"{file} {words}"):
        read_failure_dump(tmp_path, 5)


@pytest.mark.parametrize(
    ("left", "words"),
    [
        ({"x": torch.zeros(7), "n": 3}, r"'x' is float32\[7\], and a batch of this run has float32\[4\]"),
        ({"x": torch.zeros(4).int(), "n": 3}, r"'x' is int32\[4\], and a batch of this run has float32\[4\]"),
        ({"x": torch.zeros(4), "n": "3"}, "'n' is a str, and a batch of this run has an int"),
        ({"x": 5, "n": 3}, r"'x' is an int, and a batch of this run has float32\[4\]"),
        ({"x": torch.zeros(4), "n": torch.zeros(2)}, r"'n' is float32\[2\], and a batch of this run has an int"),
    ],
)
def test_a_batch_that_was_left_must_be_one_of_the_run(tmp_path, left, words):
    leave(tmp_path, left)
    with pytest.raises(ValueError, match=rf"{tmp_path}/replay/step_5: {words}"):
        read_batch(tmp_path, 5, like={"x": torch.zeros(4), "n": 2})


def test_a_leaf_that_is_kept_twice_is_refused(tmp_path):
    leave(tmp_path, {"x": torch.zeros(4), "n": 3}, other_leaves={"x": 1, "n": 3})
    with pytest.raises(ValueError, match=r"'x' is in batch\.safetensors and in about\.json"):
        read_batch(tmp_path, 5, like={"x": torch.zeros(4), "n": 2})


def test_a_number_that_no_float_holds_is_not_compared(tmp_path):
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "loss": 1.0, "grad_norm": 1' + "0" * 400 + "}\n")
    with pytest.raises(ValueError, match=r"metrics\.jsonl: grad_norm is a number of more than 40 digits, not a number"):
        recorded(tmp_path)
