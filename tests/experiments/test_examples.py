"""The examples run, and do what they say."""

import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from experiments.examples import mlp, module_on_mesh, on_many_ranks, own_block, text
from ftrain import checkpoint

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.slow
def test_digits_are_told_apart():
    assert mlp.main(mlp.Options(steps=200)) > 0.9


@pytest.mark.slow
def test_a_model_of_a_text_of_ones_own_goes_on_where_it_stopped(tmp_path, capsys):
    (tmp_path / "a.txt").write_text("the cat sat on the mat and saw the rat; " * 200)
    options = text.Options((tmp_path / "a.txt",), steps=40, rows=4, length=64, out=tmp_path / "run")
    assert len(text.main(options)) == 120
    said = capsys.readouterr().out
    assert float(said.split("held out ")[1].split()[0]) < 2.0
    longer = text.Options((tmp_path / "a.txt",), steps=60, rows=4, length=64, out=tmp_path / "run")
    text.main(longer)
    said = capsys.readouterr().out
    assert "step 60" in said
    assert "step 40" not in said


def test_blocks_of_ones_own_learn_and_write():
    loss, written = own_block.main(steps=30)
    assert loss < 1.0
    assert written.startswith("sat on the")


def test_a_module_on_a_mesh_is_that_of_one_device():
    torch.manual_seed(1)
    assert module_on_mesh.main(steps=5) < 1e-12


def losses(text):
    return {int(n): float(loss) for n, loss in re.findall(r"step (\d+) on \d+ ranks: loss ([0-9.]+)", text)}


@pytest.mark.slow
def test_a_run_on_two_ranks_is_stopped_and_goes_on_on_one(tmp_path, capsys):
    """torchrun passes SIGTERM on: both ranks save after one more step. Then the same script goes on alone."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    module = ["-m", "experiments.examples.on_many_ranks", str(tmp_path / "run"), "100000"]
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    said = ""
    with subprocess.Popen([*command, *module], cwd=ROOT, env=env, stdout=subprocess.PIPE, text=True) as job:
        try:
            for line in job.stdout:
                said += line
                if line.startswith("step 5 "):
                    job.send_signal(signal.SIGTERM)
            job.wait(timeout=60)
        finally:
            job.kill()
    done = checkpoint.latest(tmp_path / "run")
    assert done is not None
    assert done == max(losses(said)) >= 5
    on_many_ranks.main(tmp_path / "run", done + 3)
    on_many_ranks.main(tmp_path / "whole", done + 3)
    went_on, whole = capsys.readouterr().out.split("step 1 on 1 ranks")
    found, expected = losses(said) | losses(went_on), losses("step 1 on 1 ranks" + whole)
    assert list(found) == list(expected)
    assert all(abs(found[n] - expected[n]) < 1e-4 for n in expected)
