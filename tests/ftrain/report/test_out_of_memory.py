"""A step that does not fit says what holds the memory, and what would fit."""

import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import ftrain
from ftrain.report import out_of_memory

ROOT = Path(__file__).resolve().parents[3]


def refused(compiled, words):
    """What is said when an allocation of a step is refused with these words."""
    error = torch.OutOfMemoryError(words)
    device = compiled.setting.device
    return out_of_memory.explained(compiled, error, device=device, running=compiled.graph)


STEP = """
import resource, sys
import torch
import ftrain

def loss(params, x):
    for layer in params["layers"]:
        x = x + torch.tanh(x @ layer["w"]).sin()
    return x.square().mean()

def step(params, x):
    return ftrain.value_and_grad(loss)(params, x)
"""

RUN = """
torch.set_num_threads(1)
params = {"layers": [{"w": torch.eye(64)} for _ in range(12)]}
step = ftrain.jit(step)
small = torch.ones(64, 64)
step(params, small)
x = torch.ones(1 << 18, 64)
plan = step.lower(params, x).memory()
pages = int(open("/proc/self/statm").read().split()[0])
room = pages * resource.getpagesize() + int(0.7 * plan.peak)
resource.setrlimit(resource.RLIMIT_AS, (room, resource.RLIM_INFINITY))
try:
    step(params, x)
except ftrain.OutOfMemory as error:
    print(error)
    resource.setrlimit(resource.RLIMIT_AS, (room, resource.RLIM_INFINITY))
"""


def test_an_allocation_that_fails_is_explained():
    done = subprocess.run([sys.executable, "-c", STEP + RUN], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr[-2000:]
    said = done.stdout
    assert "step ran out of memory" in said
    assert re.search(r"It failed at \w+.* where up to .* had fitted", said)
    assert "params.layers" in said
    assert len(re.findall(r"Remat\(budget=\d+\) = .*: \+\d", said)) == 3


def test_the_plan_can_be_asked_before():
    scope: dict = {}
    exec(STEP, scope)
    params = {"layers": [{"w": torch.eye(64)} for _ in range(6)]}
    compiled = ftrain.jit(scope["step"]).lower(params, torch.ones(4096, 64))
    text = ftrain.explain_oom(compiled)
    budgets = list(map(int, re.findall(r"budget=(\d+)", text)))
    assert len(budgets) == 3
    for budget in budgets:
        assert budget < compiled.memory().total
        assert compiled.recompile(remat=ftrain.Remat(budget=budget)).memory().total <= budget


def test_what_no_budget_can_free_is_said():
    compiled = ftrain.jit(lambda x: (x @ x).sum()).lower(torch.ones(256, 256))
    assert "  none: " in ftrain.explain_oom(compiled)


def test_other_errors_stay_what_they_are():
    step = ftrain.jit(lambda x: x @ x)
    step.runner(torch.ones(2, 2)).use_program(lambda inputs: (_ for _ in ()).throw(RuntimeError("something else")))
    with pytest.raises(RuntimeError, match="something else"):
        step(torch.ones(2, 2))


def test_a_second_refusal_does_not_hide_the_first(monkeypatch):
    """To price recompute the device is measured, for which a full one has no room."""

    def full(device, mesh=None):
        raise torch.OutOfMemoryError("a second refusal")

    compiled = ftrain.jit(lambda x: (x @ x).sin().sum()).lower(torch.ones(256, 256))
    monkeypatch.setattr(out_of_memory.OpTimes, "on", staticmethod(full))
    error = refused(compiled, "the first refusal")
    said = str(error)
    assert "ran out of memory: the first refusal" in said
    assert "planned: " in said
    assert "too full to measure what recompute costs (a second refusal)" in said


def test_whatever_fails_in_explaining_is_said_after_the_refusal(monkeypatch):
    def broken(compiled, *, at=None):
        raise ZeroDivisionError("nothing to divide by")

    compiled = ftrain.jit(lambda x: x @ x).lower(torch.ones(2, 2))
    monkeypatch.setattr(out_of_memory, "explain_oom", broken)
    said = str(refused(compiled, "the refusal"))
    assert "ran out of memory: the refusal" in said
    assert "the explanation failed: ZeroDivisionError: nothing to divide by" in said


@pytest.mark.gpu
def test_of_a_card_the_report_tells_what_is_reserved():
    compiled = ftrain.jit(lambda x: (x @ x).sin().sum()).lower(torch.ones(256, 256, device="cuda"))
    said = str(refused(compiled, "the refusal"))
    assert "torch's allocator has reserved" in said
    assert "will be reserved (an estimate)" in said
