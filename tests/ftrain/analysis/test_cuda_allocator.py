"""The setting of CUDA's allocator, and what is reserved for a plan."""

import os
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch

import ftrain
from ftrain.analysis.cuda_allocator import (
    CUBLAS_WORKSPACE,
    allocator_state,
    has_expandable_segments,
    prefer_expandable_segments,
    warn_without_expandable_segments,
)
from ftrain.analysis.meter import measure_card
from ftrain.cli.main import main

CUDA = torch.device("cuda", 0)
ROOT = Path(__file__).resolve().parents[3]
NEW, OLD = "PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF"


@pytest.fixture
def unset(monkeypatch):
    for name in (NEW, OLD):
        monkeypatch.delenv(name, raising=False)
    return monkeypatch


def test_expandable_segments_are_preferred_where_the_user_says_nothing():
    environ: dict[str, str] = {}
    prefer_expandable_segments(environ)
    assert environ == {NEW: "expandable_segments:True"}
    assert has_expandable_segments(environ)


@pytest.mark.parametrize("name", [NEW, OLD])
def test_what_the_user_says_stays(name):
    environ = {name: "max_split_size_mb:512"}
    prefer_expandable_segments(environ)
    assert environ == {name: "max_split_size_mb:512"}
    assert not has_expandable_segments(environ)


@pytest.mark.parametrize(
    ("environ", "expected"),
    [
        ({}, False),
        ({OLD: "expandable_segments:True"}, True),
        ({NEW: "max_split_size_mb:64, expandable_segments:true"}, True),
        ({NEW: "expandable_segments:False"}, False),
        ({NEW: "", OLD: "expandable_segments:True"}, False),  # torch takes the new name where it is set
    ],
)
def test_the_setting_is_read_from_both_names(environ, expected):
    assert has_expandable_segments(environ) is expected


def test_a_run_without_them_is_warned_of_what_that_costs(unset):
    with pytest.warns(UserWarning, match=r"a quarter more .* export PYTORCH_ALLOC_CONF=expandable_segments:True"):
        warn_without_expandable_segments(CUDA)


def test_runs_with_them_and_runs_on_a_cpu_are_not_warned(unset):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warn_without_expandable_segments(torch.device("cpu"))
        unset.setenv(NEW, "expandable_segments:True")
        warn_without_expandable_segments(CUDA)


def test_the_command_line_sets_them(unset, capsys):
    unset.setenv(NEW, "")  # so that it is as before after this test
    unset.delenv(NEW)
    assert main(["plan", "no_such_file.py", "--gpus", "1"]) == 2
    assert os.environ[NEW] == "expandable_segments:True"


def lowered(device):
    aval = ftrain.Aval((1024, 1024), torch.float32, device)
    return ftrain.jit(lambda x, y: (x @ y).sin() @ y, backend="aten").lower(aval, aval)


def test_a_plan_for_a_card_tells_what_is_reserved(unset):
    """Arguments and peak are what a budget bounds; cuBLAS's workspace and unused parts of blocks come on top."""
    plan = lowered(CUDA).memory()
    assert plan.total == plan.inputs + plan.peak == 4 * (4 << 20)  # two arguments, a product, its sine or the next one
    assert plan.allocated == plan.total + CUBLAS_WORKSPACE
    assert plan.reserved == round(1.25 * plan.allocated)
    unset.setenv(NEW, "expandable_segments:True")
    assert lowered(CUDA).memory().reserved == round(1.04 * plan.allocated)


def test_a_plan_for_a_cpu_reserves_what_it_allocates():
    plan = lowered(torch.device("cpu")).memory()
    assert plan.reserved == plan.allocated == plan.total


def test_a_cpu_has_no_such_allocator():
    assert allocator_state(torch.device("cpu")) == ""


@pytest.mark.gpu
def test_the_planned_allocation_is_the_one_of_a_process_that_does_nothing_else():
    done = subprocess.run([sys.executable, "-c", ALONE], cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]
    planned, measured, reserved = map(int, done.stdout.split()[-3:])
    assert planned == pytest.approx(measured, rel=0.01)
    assert measured <= reserved


ALONE = """
import torch
import ftrain

x, y = (torch.ones(4096, 4096, device="cuda") for _ in range(2))
step = ftrain.jit(lambda x, y: (x @ y).sin() @ y, backend="aten")
planned = step.lower(x, y).memory().allocated
step(x, y)
torch.cuda.synchronize()
print(planned, torch.cuda.max_memory_allocated(), torch.cuda.max_memory_reserved())
"""


@pytest.mark.gpu
def test_the_meter_tells_reserved_beside_allocated():
    x = torch.ones(1024, 1024, device="cuda")
    torch.cuda.empty_cache()
    measured = measure_card(lambda: (x + 1) * 2)
    assert measured.kept == x.nbytes
    assert measured.peak == 2 * x.nbytes
    assert measured.reserved >= measured.peak


@pytest.mark.gpu
def test_the_state_of_the_allocator_is_told_in_words():
    kept = torch.ones(1 << 20, device="cuda")
    text = allocator_state(kept.device)
    assert "torch's allocator has reserved" in text
    assert "handed out" in text
