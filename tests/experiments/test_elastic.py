"""A rank that is killed: the others stop and say so, torchrun starts all again, and the run goes on where it was saved."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
pytestmark = pytest.mark.exhaustive


def children_of_rank(rank, out):
    """Processes of the run with this rank, by their environment."""
    found = []
    for folder in Path("/proc").iterdir():
        try:
            environment = (folder / "environ").read_bytes().split(b"\0")
            words = (folder / "cmdline").read_bytes()
        except OSError:
            continue
        if f"RANK={rank}".encode() in environment and str(out).encode() in words:
            found.append(int(folder.name))
    return found


def wait_for(condition, seconds, process):
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline and process.poll() is None
        time.sleep(0.5)


def test_a_killed_rank_is_named_and_the_run_resumes(tmp_path):
    out, log = tmp_path / "run", tmp_path / "log"
    options = [
        "--steps",
        "200",
        "--tokenizer-steps",
        "2",
        "--checkpoint-every",
        "4",
        "--expert",
        "2",
        "--timeout",
        "30",
    ]
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--max-restarts", "2"]
    command += ["--nproc-per-node", "2", "experiments/omni_moe.py", *options, "--out", str(out)]
    metrics = out / "metrics.jsonl"
    with log.open("w") as stream, subprocess.Popen(command, cwd=ROOT, stdout=stream, stderr=stream) as process:
        try:
            wait_for(lambda: metrics.is_file() and metrics.read_text().count("\n") >= 9, 180, process)
            for pid in children_of_rank(1, out):
                os.kill(pid, signal.SIGKILL)
            wait_for(lambda: "resumed after step" in log.read_text(), 180, process)
        finally:
            process.send_signal(signal.SIGTERM)
            process.wait(60)
    text = log.read_text()
    assert "rank 0 stopped: rank 1 no longer answers; it stood at" in text
    assert int(text.split("resumed after step ")[1].split()[0]) >= 8
