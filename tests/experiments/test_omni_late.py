"""Metrics are read one step late: the device has the next step before the host waits for the numbers of the last."""

import math

import pytest
import torch

import ftrain
from experiments.omni.survival import Guard
from ftrain.resilience.anomalies import BadSteps, Verdict
from ftrain.resilience.failure_dump import read_batch, read_failure_dump
from ftrain.run.late import Done, Issued, LateReader
from ftrain.run.ranks import asked_of_ranks
from ftrain.runtime.host_copy import HostCopy


@ftrain.jit(donate="state")
def step(state, batch):
    """A real step: `w` moves towards the batch."""
    loss, grads = ftrain.value_and_grad(lambda w, batch: (w - batch["x"]).square().sum())(state, batch)
    return state - 0.1 * grads, {"loss": loss, "grad_norm": grads.norm()}


class Told(torch.Tensor):
    """A metric that says when somebody looks at its number."""

    looked: list[str]

    def __float__(self):
        self.looked.append("read")
        return float(self.as_subclass(torch.Tensor))


def batches(values):
    return [{"x": torch.full((3,), float(value))} for value in values]


def trained(given, judge, *, told):
    """All steps one after the other; `told`: what happened, in order. Ends where a verdict says so."""
    state, late = torch.zeros(3), LateReader(judge)
    for number, batch in enumerate(given, start=1):
        state, metrics = step(state, batch)
        told.append(f"given {number}")
        if late.issued(Issued(number, batch, HostCopy(metrics), 0.0, 1.0)) is Verdict.ROLL_BACK:
            return number, Verdict.ROLL_BACK
    return len(given), late.flush()


def test_a_step_is_read_when_the_next_was_given():
    told, losses = [], []

    def judge(done: Done) -> Verdict:
        loss = done.metrics["loss"].as_subclass(Told)
        loss.looked = told
        losses.append((done.number, float(loss), float(done.batch["x"][0])))
        return Verdict.GO_ON

    assert trained(batches([1, 2, 3]), judge, told=told) == (3, Verdict.GO_ON)
    assert told == ["given 1", "given 2", "read", "given 3", "read", "read"]
    at_once, state = [], torch.zeros(3)
    for number, batch in enumerate(batches([1, 2, 3]), start=1):
        state, metrics = step(state, batch)
        at_once.append((number, float(metrics["loss"]), float(batch["x"][0])))
    assert losses == at_once, "the same numbers, under the same steps, beside their batches"


def test_a_bad_step_is_named_with_its_own_batch(tmp_path):
    """Steps 2 and 3 are bad; step 4 was given before that was known, and is not judged."""
    guard, told = Guard(BadSteps(limit=2), tmp_path, done=0), []

    def judge(done: Done) -> Verdict:
        return guard.look({"step": done.number, **{k: float(v) for k, v in done.metrics.items()}}, done.batch)

    given = batches([1, math.nan, 3, 4, 5])
    assert trained(given, judge, told=told) == (4, Verdict.ROLL_BACK)
    assert guard.history.bad == (2, 3)
    assert [read_failure_dump(tmp_path, n) is not None for n in range(1, 6)] == [False, True, True, False, False]
    assert read_batch(tmp_path, 2, like=given[0])["x"].isnan().all()
    assert torch.equal(read_batch(tmp_path, 3, like=given[0])["x"], given[2]["x"])


def test_the_last_step_is_judged_once():
    judged = []
    late = LateReader(lambda done: judged.append((done.number, done.seconds)) or Verdict.GO_ON)
    assert late.read is None
    late.issued(Issued(7, None, HostCopy({"loss": torch.ones(())}), 2.0, 5.0))
    assert late.flush() is late.flush() is Verdict.GO_ON
    assert judged == [(7, 3.0)]
    assert late.read == 7


def test_a_copy_of_host_tensors_is_read_as_it_is():
    copy = HostCopy({"loss": torch.tensor(2.0), "step": 3})
    assert not copy.queued
    assert copy.read() == {"loss": torch.tensor(2.0), "step": 3}
    assert asked_of_ranks(lambda: True)()


@pytest.mark.gpu
def test_a_copy_is_of_the_moment_and_waits_for_nothing_after_it():
    value = torch.ones((), device="cuda")
    copy = HostCopy(value)
    torch.cuda._sleep(10**9)
    value.fill_(2.0)
    assert float(copy.read()) == 1.0
    assert not torch.cuda.current_stream().query(), "what came later is still under way"
