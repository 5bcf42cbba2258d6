"""torchrun starts a job again when a process or a node is lost, and it goes on from its checkpoint."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from ftrain import checkpoint
from tests.helpers.elastic_job import STEPS, WAITS, train

ROOT = Path(__file__).resolve().parents[2]
JOB = ROOT / "tests" / "helpers" / "elastic_job.py"
QUICK = "last_call_timeout=2,keep_alive_interval=1,keep_alive_max_attempt=3"
"""How long agents wait for more nodes, and how soon one counts as lost; their defaults are for networks."""


def losses(run: Path) -> list[dict]:
    return [json.loads(line) for line in (run / "losses.jsonl").read_text().splitlines()]


def start_node(run: Path, port: int, log, *, lost: bool) -> subprocess.Popen:
    """`lost`: it will be killed; the other one is where the nodes meet."""
    elastic = ["--nnodes", "1:2", "--nproc-per-node", "1", "--max-restarts", "2", "--monitor-interval", "0.1"]
    meeting = ["--rdzv-backend", "c10d", "--rdzv-endpoint", f"127.0.0.1:{port}", "--rdzv-id", "job"]
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        *elastic,
        *meeting,
        "--rdzv-conf",
        f"{QUICK},is_host={int(not lost)}",
    ]
    env = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"}
    env |= {"WAITS": "1"} if lost else {}
    return subprocess.Popen([*command, str(JOB), str(run)], cwd=ROOT, stdout=log, stderr=log, env=env)


def workers_of(agent: subprocess.Popen) -> list[int]:
    return [int(pid) for pid in Path(f"/proc/{agent.pid}/task/{agent.pid}/children").read_text().split()]


def kill_node(agent: subprocess.Popen) -> None:
    for pid in (*workers_of(agent), agent.pid):
        os.kill(pid, signal.SIGKILL)
    agent.wait()


def wait_for(step: int, run: Path, nodes: list[subprocess.Popen], log: Path) -> None:
    """Until the step is saved."""
    deadline = time.monotonic() + 180
    while checkpoint.latest(run / "checkpoints") != step:
        assert all(node.poll() is None for node in nodes), log.read_text()[-3000:]
        assert time.monotonic() < deadline, log.read_text()[-3000:]
        time.sleep(0.1)


@pytest.mark.slow
def test_a_run_goes_on_after_a_lost_process_and_on_fewer_ranks_after_a_lost_node(tmp_path):
    alone, run, log = tmp_path / "alone", tmp_path / "run", tmp_path / "log"
    alone.mkdir()
    run.mkdir()
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    with log.open("w") as out:
        nodes = [start_node(run, port, out, lost=lost) for lost in (False, True)]
        try:
            train(alone, None)
            wait_for(WAITS[0] - 1, run, nodes, log)
            os.kill(workers_of(nodes[1])[0], signal.SIGKILL)
            wait_for(WAITS[1] - 1, run, nodes, log)
            kill_node(nodes[1])
            assert nodes[0].wait(timeout=180) == 0, log.read_text()[-3000:]
        finally:
            for node in nodes:
                if node.poll() is None:
                    kill_node(node)
    found, expected = losses(run), losses(alone)
    assert [row["step"] for row in found] == list(range(1, STEPS + 1))
    assert [row["ranks"] for row in found] == [2, 2, 2, 2, 1, 1]
    for row, wanted in zip(found, expected, strict=True):
        assert row["loss"] == pytest.approx(wanted["loss"], abs=1e-6)
