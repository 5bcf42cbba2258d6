"""Real processes that hang: all ranks' files name the line where each stood, and all end with the documented code."""

import os
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

import ftrain
from ftrain.graph.host_waits import excused_until, expected_wait
from ftrain.kernels.mean import sum_over_batch
from ftrain.resilience.signals import EXIT_HUNG, EXIT_NOT_SAVED, EXIT_RESUMABLE
from ftrain.resilience.watchdog import Watchdog
from ftrain.sharding import Layout, Mesh, Plan
from ftrain.sharding.private import flight_record
from tests.helpers.rank_processes import exit_codes

ROOT = Path(__file__).resolve().parents[3]


def total(batch):
    return sum_over_batch(batch.sum())


def one_rank_sleeps(rank, folder):
    step = ftrain.jit(total, plan=Plan(Mesh(1, 2), Layout()))
    batch = torch.ones(4)
    with Watchdog(folder / "stacks", seconds=2.0, first=30.0) as watchdog:
        for number in range(1, 1000):
            if rank == 1 and number == 5:
                time.sleep(3600)  # the line
            step(batch)
            watchdog.step_ended(number)


def test_every_rank_writes_where_it_stood(tmp_path):
    assert exit_codes(one_rank_sleeps, 2, tmp_path) == [EXIT_HUNG, EXIT_HUNG]
    waiting, asleep = ((tmp_path / "stacks" / f"rank_{r}.txt").read_text() for r in (0, 1))
    assert "time.sleep(3600)  # the line" in asleep
    assert "one_rank_sleeps" in waiting
    assert re.search(r"stands at all_reduce .* over .*test_watchdog.py:\d+", waiting), waiting
    for rank, text in enumerate((waiting, asleep)):
        assert f"rank {rank}, process" in text
        assert "no step ended for 2 s, the last was step 4" in text
        assert "thread MainThread" in text
        assert "torch's flight recorder" in text
        assert "no report from" not in text


def all_end(rank, folder):
    with Watchdog(folder / "stacks", seconds=1.0, first=30.0) as watchdog:
        for number in range(1, 5):
            time.sleep(0.4)
            dist.barrier()
            watchdog.step_ended(number)


def test_a_run_whose_steps_end_leaves_no_files(tmp_path):
    assert exit_codes(all_end, 2, tmp_path) == [0, 0]
    assert not (tmp_path / "stacks").exists()


def one_rank_is_early(rank, folder):
    """Only rank 0's time is over; rank 1 is told."""
    with Watchdog(folder / "stacks", seconds=1.0 if rank == 0 else 3000.0, first=1.0 if rank == 0 else None):
        time.sleep(3600)


def test_the_first_to_notice_tells_the_others(tmp_path):
    assert exit_codes(one_rank_is_early, 2, tmp_path) == [EXIT_HUNG, EXIT_HUNG]
    told = (tmp_path / "stacks" / "rank_1.txt").read_text()
    assert "rank 0: no step ended for 1 s, the last was step 0" in told
    assert "one_rank_is_early" in told


ALONE = """
import re, sys, time
from pathlib import Path
from ftrain.resilience.watchdog import Watchdog
with Watchdog(Path(sys.argv[1]), seconds=0.5, first=0.5) as watchdog:
    {hang}
"""


@pytest.mark.parametrize(
    ("hang", "code"),
    [("time.sleep(3600)", EXIT_HUNG), ("re.match(r'(a+)+$', 'a' * 64 + 'b')", 1)],
    ids=["waits", "holds the GIL"],
)
def test_a_process_alone(tmp_path, hang, code):
    began = time.monotonic()
    command = [sys.executable, "-c", ALONE.format(hang=hang), str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.returncode == code, done.stderr
    text = (tmp_path / "rank_0.txt").read_text()
    assert 'File "<string>", line 6' in text
    assert time.monotonic() - began < 60


def test_reports_of_earlier_attempts_are_kept(tmp_path):
    (tmp_path / "rank_0.txt").write_text("an earlier report\n")
    with Watchdog(tmp_path, seconds=60.0) as watchdog:
        watchdog.step_ended(1)
    assert (tmp_path / "rank_0.txt").read_text() == "an earlier report\n"


def test_a_time_must_be_positive(tmp_path):
    with pytest.raises(ValueError, match="positive seconds, not 0"):
        Watchdog(tmp_path, seconds=0)


def test_the_flight_record_is_text_and_empty_without_collectives():
    assert flight_record() == ""


def test_the_exit_code_is_its_own():
    assert len({0, 1, 2, EXIT_RESUMABLE, EXIT_NOT_SAVED, EXIT_HUNG}) == 6
    assert os.WEXITSTATUS(EXIT_HUNG << 8) == EXIT_HUNG


SLOW_SAVE = """
import time, torch
from pathlib import Path
from ftrain.checkpoint import Checkpointer
from ftrain.checkpoint import checkpointer
from ftrain.resilience.watchdog import Watchdog
write = checkpointer.write_checkpoint
def slow(*args, **options):
    time.sleep(3)
    write(*args, **options)
checkpointer.write_checkpoint = slow
with Checkpointer("run") as checkpoints, Watchdog(Path("stacks"), seconds=1.0, first=30.0) as watchdog:
    for number in range(1, 5):
        if number % 2 == 0:
            checkpoints.save({"w": torch.ones(3)}, number)
        watchdog.step_ended(number)
    checkpoints.wait()
    print(checkpoints.steps())
    time.sleep(60)
"""


def test_a_slow_save_is_no_hang_and_a_hang_after_it_is(tmp_path):
    made = subprocess.run(
        [sys.executable, "-c", SLOW_SAVE],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
    )
    assert made.returncode == EXIT_HUNG, made.stderr
    assert made.stdout == "[2, 4]\n"
    assert "no step ended for 1 s, the last was step 4" in made.stderr


def test_a_wait_that_lasts_longer_than_it_may_is_a_hang(tmp_path):
    with expected_wait("a save", seconds=0.2):
        until, what = excused_until(5.0)
        assert what == "a save"
        assert until - time.monotonic() <= 0.2
        with expected_wait("a slower save", seconds=9.0):
            assert excused_until(5.0)[1] == "a slower save"
        assert excused_until(5.0)[1] == "a save"
    until, what = excused_until(5.0)
    assert what == ""
    assert 4.0 < until - time.monotonic() <= 5.0, "then there is the usual time again"
