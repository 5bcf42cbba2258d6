"""A script's block on its ranks: alone, in lockstep and on several; it ends for all of them, and says why.

tests/test_readme.py has one under torchrun.
"""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

import ftrain
from ftrain import Mean, TrainState, checkpoint, optim
from ftrain.modules import spec
from ftrain.sharding import BatchRows, Replicated
from tests.helpers.rank_processes import run_script

ROOT = Path(__file__).resolve().parents[3]
ENV = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}


def trained(folder, *, last=3, **sizes):
    """The parameters after so many steps, of which those before were saved in the folder."""
    params, tx = {"w": torch.eye(4, dtype=torch.float64)}, optim.adamw(1e-1)

    def train_step(state, batch):
        loss, grads = ftrain.value_and_grad(lambda p, b: Mean.of((b["x"] @ p["w"] - b["x"]).square()))(
            state.params, batch
        )
        return state.apply(tx, grads), loss

    with ftrain.run.session(device="cpu", **sizes) as run:
        step = ftrain.jit(train_step, plan=run.plan(), specs=spec.of(params), donate="state")
        state = TrainState.create(step.shard(params, name="state.params"), tx)
        saves = run.checkpointer(folder, specs=spec.of(params))
        done = saves.latest() or 0
        if done:
            state = saves.restore(state, done)
        for n in run.steps(done, last):
            x = torch.randn(8, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(n)) + n
            state, _ = step(state, run.share({"x": x}))
            if run.is_last:
                saves.save(state, n)
    return state.params["w"]


def test_alone_and_in_lockstep_the_same_block_gives_the_same(tmp_path):
    whole = trained(tmp_path / "whole", last=4)
    trained(tmp_path / "run", last=2, shard=2, kind="virtual")
    torch.testing.assert_close(trained(tmp_path / "run", last=4), whole, rtol=1e-12, atol=1e-12)
    assert checkpoint.latest(tmp_path / "run") == 4


def test_what_stands_after_the_block_is_as_before():
    handler = signal.getsignal(signal.SIGTERM)
    with ftrain.run.session(device="cpu") as run:
        assert signal.getsignal(signal.SIGTERM) != handler
        assert (run.is_first, run.world, run.mesh.size) == (True, 1, 1)
    assert signal.getsignal(signal.SIGTERM) == handler


def test_a_signal_between_steps_lets_one_more_step_save_and_then_ends_the_block():
    seen = []

    def script():
        with ftrain.run.session(device="cpu") as run:
            for n in run.steps(0, 10):
                seen.append((n, run.is_last))
                if n == 2:
                    os.kill(os.getpid(), signal.SIGTERM)

    with pytest.raises(SystemExit) as ended:
        script()
    assert ended.value.code == 75
    assert seen == [(1, False), (2, False), (3, True)]


def test_a_signal_outside_of_the_steps_ends_the_block_and_closes_what_it_opened(tmp_path):
    def script():
        with ftrain.run.session(device="cpu") as run:
            saves = run.checkpointer(tmp_path / "run")
            saves.save({"x": torch.ones(3)}, 1)
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(5)

    with pytest.raises(SystemExit) as ended:
        script()
    assert ended.value.code == 75
    assert checkpoint.latest(tmp_path / "run") == 1


def test_when_no_step_ends_the_stacks_are_written(tmp_path):
    script = tmp_path / "hangs.py"
    script.write_text(HANGS.format(stacks=str(tmp_path / "stacks")))
    job = subprocess.run([sys.executable, str(script)], env=ENV, capture_output=True, text=True, timeout=100)
    assert job.returncode == 76, job.stderr[-3000:]
    assert "time.sleep(60)" in (tmp_path / "stacks" / "rank_0.txt").read_text()


HANGS = """
import time, ftrain
with ftrain.run.session(device="cpu", stacks={stacks!r}, hang_seconds=1.0) as run:
    for n in run.steps(0, 3):
        if n == 2:
            time.sleep(60)
"""


def test_mistakes_say_what_to_do(monkeypatch):
    words = r"4 ranks .* torchrun --nproc-per-node 4, or .*kind='virtual'"
    with pytest.raises(ValueError, match=words), ftrain.run.session(shard=4):
        pass
    with ftrain.run.session(device="cpu") as run:
        run.plan()
        run.plan(batch={"key": Replicated()})
        with pytest.raises(ValueError, match=r"made 2 plans; say which"):
            run.share({"x": torch.ones(2)})
    monkeypatch.setenv("RANK", "0")
    with pytest.raises(ValueError, match="torchrun started several"), ftrain.run.session(kind="virtual"):
        pass


def test_a_later_batch_may_lack_a_modality_but_a_rule_must_match_the_first():
    text, images = {"tokens": torch.arange(8)}, {"images": torch.ones(2, 3)}
    with ftrain.run.session(device="cpu") as run:
        run.plan(batch={"images": BatchRows()})
        assert set(run.share({**text, **images})) == {"tokens", "images"}
        assert set(run.share(text)) == {"tokens"}
        with pytest.raises(ValueError, match=r"'image'.*nearest"):
            run.share(text, plan=run.plan(batch={"image": BatchRows()}))


FAILS = """
import sys, time, torch, torch.distributed as dist, ftrain
with ftrain.run.session(device="cpu", timeout=120) as run:
    if run.rank == 1:
        raise KeyError("no such digit")
    if sys.argv[1] == "collective":
        dist.all_reduce(torch.ones(()))
    else:
        time.sleep(120)
"""


@pytest.mark.parametrize("waits", ["collective", "sleep"])
def test_when_one_rank_fails_the_others_end_with_its_message(tmp_path, waits):
    script = tmp_path / "fails.py"
    script.write_text(FAILS)
    waiting, failed = run_script(script, 2, waits)
    assert (waiting.code, failed.code) == (1, 1)
    assert waiting.stderr.endswith("rank 0 ends: rank 1 failed with KeyError: 'no such digit'\n")
    assert failed.stderr.endswith("KeyError: 'no such digit'\n")


WAITS = """
import time, torch, ftrain
with ftrain.run.session(device="cpu", timeout=120) as run:
    if run.rank == 1:
        run.share({"x": torch.ones(8)})  # takes no other rank
        time.sleep(1)
    print(time.monotonic())
print(time.monotonic())
"""


def test_ranks_leave_the_block_together(tmp_path):
    script = tmp_path / "waits.py"
    script.write_text(WAITS)
    ended = run_script(script, 2)
    assert [rank.code for rank in ended] == [0, 0], ended
    times = [dict(zip(("done", "left"), map(float, rank.stdout.split()), strict=True)) for rank in ended]
    assert max(rank["done"] for rank in times) < min(rank["left"] for rank in times)


KILLED = """
import os, signal, time, ftrain
with ftrain.run.session(device="cpu", timeout=120) as run:
    if run.rank == 0:
        time.sleep(1)
        os.kill(os.getpid(), signal.SIGKILL)
"""


def test_a_rank_that_is_done_does_not_take_the_loss_of_another_for_success(tmp_path):
    script = tmp_path / "killed.py"
    script.write_text(KILLED)
    killed, done = run_script(script, 2)
    assert (killed.code, done.code) == (-9, 1)
    assert "the rank that holds the store ended before all ranks were" in done.stderr


PARTS = """
import sys, torch, ftrain
from ftrain import Mean
how, folder = sys.argv[1:]
def loss(batch):
    return ftrain.forward(lambda b: Mean.of(b["x"]))(batch)
with ftrain.run.session(device="cpu", timeout=90) as run:
    step, saves = ftrain.jit(loss, plan=run.plan()), run.checkpointer(folder)
    for n in run.steps(0, 4):
        alone = run.rank == 1 and n == 2
        if how == "leaves" and alone:
            break
        if how == "saves" and alone:
            saves.save({"x": torch.ones(2)}, n)
        if how == "skips" and alone:
            continue
        step({"x": torch.ones(4) + run.rank})
"""


@pytest.mark.parametrize(
    ("how", "words"),
    [
        ("leaves", "after both began step 2 of run.steps, rank 1 left the session and rank 0 called the step loss"),
        ("saves", "after both began step 2 of run.steps, rank 1 saved step 2 and rank 0 called the step loss"),
        ("skips", "rank 1 began step 3 of run.steps and rank 0 called the step loss"),
    ],
)
def test_ranks_that_wait_for_each_other_at_different_places_end_and_say_where(tmp_path, how, words):
    script = tmp_path / "parts.py"
    script.write_text(PARTS)
    ended = run_script(script, 2, how, str(tmp_path / "run"))
    assert [rank.code for rank in ended] == [1, 1]
    assert all(words in rank.stderr for rank in ended)
