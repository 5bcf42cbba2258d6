"""What every experiment needs to run on one process, in lockstep, or under torchrun."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import yaml

from ftrain.run.ranks import MeshFlags, any_rank, is_main, of_main, open_mesh

ROOT = Path(__file__).resolve().parents[2]
SMOKE = ["--size", "smoke", "--tokenizer-steps", "2", "--sequence", "2", "--expert", "2"]


def test_a_single_rank_has_no_mesh():
    with open_mesh(MeshFlags(), torch.device("cpu")) as mesh:
        assert mesh is None
    assert is_main()
    assert of_main("here") == "here"
    assert any_rank(True)


def test_sizes_without_torchrun_run_in_lockstep():
    with open_mesh(MeshFlags(replicate=2, shard=2, expert=2), torch.device("cpu")) as mesh:
        assert (mesh.kind, mesh.size, mesh.expert) == ("virtual", 4, 2)


def test_torchrun_with_sizes_that_do_not_fit_lists_those_that_do(monkeypatch):
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "8")
    with (
        pytest.raises(ValueError, match=r"3 \* 2 \* 1 = 6, but there are 8 ranks; .* may be .*2x4x1"),
        open_mesh(MeshFlags(replicate=3, shard=2), torch.device("cpu")),
    ):
        pass


@pytest.mark.slow
def test_the_main_job_runs_under_torchrun(tmp_path):
    run = tmp_path / "run"
    options = [*SMOKE, "--steps", "2", "--held-out", "1"]
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    job = subprocess.run(
        [*command, "-m", "experiments.omni_moe", *options, "--timeout", "60", "--out", str(run)],
        cwd=ROOT, capture_output=True, text=True, timeout=500,
    )  # fmt: skip
    assert job.returncode == 0, job.stderr[-3000:]
    assert "mesh: replicate 1 x shard 1 x sequence 2, expert 2 (process)" in job.stdout
    assert (run / "summary.json").is_file()


@pytest.mark.exhaustive
def test_the_main_job_goes_on_when_a_killed_rank_is_started_again(tmp_path):
    run = tmp_path / "run"
    options = [*SMOKE, "--steps", "4", "--held-out", "2"]
    options += ["--checkpoint-every", "1", "--timeout", "60", "--out", str(run)]
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    with (tmp_path / "log").open("w+") as log:
        job = subprocess.Popen(
            [*command, "--max-restarts", "1", "-m", "experiments.omni_moe", *options], cwd=ROOT, stdout=log, stderr=log
        )
        try:
            while not (run / "checkpoints" / "latest_checkpointed_iteration.txt").is_file():
                assert job.poll() is None, _read(log)
                time.sleep(0.1)
            os.kill(_ranks_of(job.pid)[1], signal.SIGKILL)
            assert job.wait(timeout=240) == 0, _read(log)
        finally:
            job.kill()
        said = _read(log, last=None)
    assert "resumed after step" in said
    assert (run / "summary.json").is_file()


def _ranks_of(pid: int) -> list[int]:
    children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    return [int(c) for c in children if b"omni_moe.py" in Path(f"/proc/{c}/cmdline").read_bytes()]


def _read(log, last=3000):
    log.seek(0)
    text = log.read()
    return text if last is None else text[-last:]


def test_the_launchers_are_well_formed():
    subprocess.run(["bash", "-n", ROOT / "experiments/launch/slurm.sh"], check=True)
    job = yaml.safe_load((ROOT / "experiments/launch/kubeflow.yaml").read_text())
    assert job["kind"] == "PyTorchJob"
