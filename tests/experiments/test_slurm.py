"""experiments/launch/slurm.sh under a real Slurm: signals reach every rank, its exit code is heard, the job goes on."""

import sys
import time
from pathlib import Path

import pytest

from tests.helpers.slurm_cluster import cluster, why_not

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = ROOT / "experiments" / "launch" / "slurm.sh"

JOB = """
import os, sys, time
from ftrain.resilience.signals import EXIT_RESUMABLE, interruptible

assert sys.argv[1:] == ["--option", "value", "--out", f"runs/slurm-{os.environ['SLURM_JOB_ID']}", "--resume", "auto"]
rank, world = os.environ["RANK"], os.environ["WORLD_SIZE"]
restart, start = int(os.environ.get("SLURM_RESTART_COUNT", "0")), int(os.environ["MASTER_PORT"]) % 4

def say(words):
    with open("said.txt", "a") as file:
        file.write(f"{restart}.{start} rank {rank} of {world} {words}\\n")

with interruptible() as stop:
    say("begins")
    if (restart, start) == (1, 0):
        time.sleep(1.0 if rank == "0" else 0.0)  # rank 1 is lost, and rank 0's next collective fails
        sys.exit(1)
    for _ in range(3000):
        time.sleep(0.1)
        if stop.requested:
            time.sleep(0.2 + 2.0 * int(rank))  # one rank saves longer than the other
            say(f"saved after {stop.signal.name}")
            sys.exit(EXIT_RESUMABLE)
"""


def said(folder, words, count, while_waiting=lambda: None):
    deadline = time.monotonic() + 180
    while (text := (folder / "said.txt").read_text() if (folder / "said.txt").exists() else "").count(words) < count:
        assert time.monotonic() < deadline, text + "".join(p.read_text() for p in folder.glob("runs/*.log"))
        while_waiting()
        time.sleep(0.5)


@pytest.mark.exhaustive
def test_a_job_that_is_warned_saves_on_all_ranks_and_is_queued_again(tmp_path):
    if why_not():
        pytest.skip(why_not())
    (tmp_path / "runs").mkdir()
    (tmp_path / "job.py").write_text(JOB)
    with cluster(tmp_path / "slurm") as slurm:
        slurm.environment |= {"PYTHON": sys.executable, "PYTHONPATH": str(ROOT)}
        sizes = ("--nodes=1", "--ntasks-per-node=2", "--gpus-per-node=0", "--cpus-per-task=1", "--time=10")
        options = ("--parsable", *sizes, str(SCRIPT), "job.py", "--option", "value")
        number = slurm.run("sbatch", *options, cwd=tmp_path).strip()
        begun = ("0.0", "1.1")  # the first start; the second one of the job that was queued again
        for restart, signal in enumerate(("USR1", "TERM")):
            for rank in (0, 1):
                # Slurm lets a job that is queued again wait for two minutes.
                said(tmp_path, f"{begun[restart]} rank {rank} of 2 begins", 1, lambda: slurm.start_now(number))
            slurm.run("scancel", f"--signal={signal}", number)  # what Slurm itself sends, and to whom
            said(tmp_path, f"saved after SIG{signal}", 2)
            assert slurm.wait_for(number, "PENDING")["Restarts"] == str(restart + 1)
        slurm.run("scancel", number)
    text = (tmp_path / "said.txt").read_text()
    assert text.count("1.0 rank") == 2, "a lost rank is started again, with all others, within the job"
