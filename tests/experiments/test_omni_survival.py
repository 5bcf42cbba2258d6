"""The main job meets bad batches: it goes back, leaves them out, and can show what was wrong with them."""

import math
import os
from pathlib import Path

import pytest
import torch

from experiments.omni.batches import Batches
from experiments.omni.survival import Guard, SurvivalFlags
from experiments.omni_moe import Options, main
from ftrain import checkpoint, tree
from ftrain.checkpoint import Checkpointer, Ranks
from ftrain.cli.main import main as ftrain_command
from ftrain.resilience.anomalies import BadSteps, Verdict
from ftrain.resilience.failure_dump import read_failure_dump
from ftrain.resilience.skipped import read_skipped
from ftrain.run import folder as run_folder
from ftrain.run.folder import RunFolder
from tests.helpers.rank_processes import exit_codes


class Source:
    """Batches that are their positions."""

    def ahead(self, first, last):
        yield from range(first, last)


def row(step, loss):
    return {"step": step, "loss": loss, "grad_norm": 1.0}


def test_bad_steps_are_undone_on_the_disk(tmp_path):
    """Steps 1 to 3 are good, 4 and 5 bad; checkpoints after 2 and, by a stop, after 4."""
    losses = [3.0, 2.0, 1.0, math.nan, math.inf]
    files = RunFolder.create(tmp_path, {"size": "tiny"})
    guard = Guard(BadSteps(limit=2), tmp_path, done=0)
    with Checkpointer(tmp_path / "checkpoints") as checkpoints:
        for step, loss in enumerate(losses, start=1):
            files.log(row(step, loss))
            verdict = guard.look(row(step, loss), {"x": torch.full((2,), float(step))})
            assert guard.calm == (step < 4)
            if step in (2, 4):
                checkpoints.save({"w": torch.zeros(2)}, step)
        assert verdict is Verdict.ROLL_BACK
        done, words = guard.go_back(checkpoints)
        files.go_back(done)
    assert done == 2
    assert words == "steps 4 to 5 were bad (the loss is inf): back to step 2, without the batches at positions 3, 4"
    assert checkpoint.steps(tmp_path / "checkpoints") == [2]
    assert [r["step"] for r in run_folder.read_metrics(tmp_path)] == [1, 2]
    assert list(guard.batches(Source(), done, 5)) == [2, 5, 6]
    assert guard.calm
    assert read_failure_dump(tmp_path, 5).why == "the loss is inf"
    files.log(row(3, 1.0))
    assert [r["step"] for r in run_folder.read_metrics(tmp_path)] == [1, 2, 3]
    files.close()


def test_a_resumed_run_knows_its_bad_steps_and_what_it_leaves_out(tmp_path):
    files = RunFolder.create(tmp_path, {"size": "tiny"})
    for step, loss in enumerate([3.0, math.nan, 9.9], start=1):
        files.log(row(step, loss))
    files.close()
    guard = Guard(BadSteps(limit=2), tmp_path, done=2)
    assert guard.history.bad == (2,)
    assert guard.look(row(3, math.nan), {"x": torch.zeros(1)}) is Verdict.ROLL_BACK


def in_two_processes(rank, folder):
    """Each process judges, saves and goes back; only the main one reads the metrics and writes the list."""
    os.environ["RANK"] = str(rank)
    run = folder / "run"
    files = RunFolder.create(run, {"size": "tiny"}) if rank == 0 else None
    with Checkpointer(run / "checkpoints", ranks=Ranks.of_run()) as checkpoints:
        guard = Guard(BadSteps(limit=2), run, done=0)
        for step, loss in enumerate([3.0, 2.0, math.nan, math.nan], start=1):
            if files is not None:
                files.log(row(step, loss))
            verdict = guard.look(row(step, loss), {"x": torch.zeros(1)})
            if step in (2, 3):
                checkpoints.save({"w": torch.full((2,), float(step))}, step)
        assert verdict is Verdict.ROLL_BACK
        done, _ = guard.go_back(checkpoints)
        assert float(checkpoints.restore({"w": torch.zeros(2)}, done)["w"][0]) == 2.0
        assert list(guard.batches(Source(), done, 4)) == [4, 5]


def test_ranks_go_back_together(tmp_path):
    assert exit_codes(in_two_processes, 2, tmp_path) == [0, 0]
    assert checkpoint.steps(tmp_path / "run" / "checkpoints") == [2]
    assert read_skipped(tmp_path / "run").positions == (2, 3)


@pytest.mark.parametrize("name", ["bad_steps_limit", "spike", "hang_seconds", "check_replicas"])
def test_flags_below_zero_are_refused(name):
    with pytest.raises(ValueError, match=f"--{name.replace('_', '-')} must be at least 0, not -1"):
        SurvivalFlags(**{name: -1})


def test_flags_switch_off(tmp_path):
    flags = SurvivalFlags(hang_seconds=0, spike=5.0)
    assert flags.policy().spikes.z == 5.0
    assert SurvivalFlags().policy().spikes is None
    with flags.watchdog(tmp_path) as watchdog:
        assert watchdog is None


@pytest.mark.exhaustive
def test_a_planted_nan_is_left_out_and_its_step_replayed(tmp_path: Path, monkeypatch, capsys) -> None:
    make = Batches._arrays

    def poisoned(self, position):
        batch = make(self, position)
        if position == 1:
            for leaf in tree.leaves(batch["encoders"]):
                if leaf.dtype.kind == "f":
                    leaf.flat[0] = math.nan
        return batch

    run = tmp_path / "run"
    options = {"size": "smoke", "steps": 2, "tokenizer_steps": 3, "held_out": 1, "checkpoint_every": 1, "out": run}
    with monkeypatch.context() as patched:
        patched.setattr(Batches, "_arrays", poisoned)
        assert main(Options(**options, survival=SurvivalFlags(bad_steps_limit=1))) == 0
    assert "steps 2 to 2 were bad (the loss is nan): back to step 1, without the batches at positions 1" in (
        capsys.readouterr().out.replace("\n", " ")
    )
    rows = run_folder.read_metrics(run)
    assert [r["step"] for r in rows] == [1, 2]
    assert all(math.isfinite(r["loss"]) for r in rows)
    assert read_skipped(run).positions == (1,)
    assert not (run / "stacks").exists()

    assert ftrain_command(["replay", str(run), "--step", "2", "--check"]) == 0
    said = capsys.readouterr().out
    assert "step 2: loss nan, the run's nan: equal to the bit" in said
    assert "argument leaf 'batch.encoders." in said
    assert "which the data no longer gives" in said
