"""A step captured as one CUDA graph. What does not need a card is in test_argument_memory.py and test_recordable.py."""

import subprocess
import sys
import threading

import pytest
import torch

import ftrain

SIZE = 1024


def step(state: dict, x: torch.Tensor) -> tuple[dict, torch.Tensor]:
    new = {"w": state["w"] * 0.5 + x, "n": state["n"] + 1}
    return new, new["w"].sum()


def fresh() -> dict:
    return {"w": torch.ones(SIZE, device="cuda"), "n": torch.tensor(0, device="cuda")}


def batch(i: int) -> torch.Tensor:
    return torch.full((SIZE,), float(i), device="cuda")


def same(ours: object, theirs: object) -> None:
    torch.testing.assert_close(ours, theirs, rtol=0, atol=0)


def test_it_needs_a_cuda_device() -> None:
    jitted = ftrain.jit(step, donate="state", backend="cudagraph")
    with pytest.raises(ValueError, match="needs arguments on a CUDA device"):
        jitted({"w": torch.ones(3), "n": torch.tensor(0)}, torch.ones(3))


@pytest.mark.gpu
def test_every_call_is_one_step_and_writes_in_place() -> None:
    jitted = ftrain.jit(step, donate="state", backend="cudagraph")
    state, eager = fresh(), fresh()
    address = state["w"].data_ptr()
    totals = []
    for i in range(8):
        x = batch(i)
        state, total = jitted(state, x)
        eager, expected = step(eager, x)
        same(x, batch(i))
        totals.append((total, expected))
    for total, expected in totals:  # earlier results are not overwritten by later replays
        same(total, expected)
    same(state, eager)
    assert state["w"].data_ptr() == address
    assert int(state["n"]) == 8


@pytest.mark.gpu
def test_without_donation_the_old_state_stays() -> None:
    jitted = ftrain.jit(step, backend="cudagraph")
    state = fresh()
    for i in range(6):
        new, total = jitted(state, batch(i))
        expected, expected_total = step(state, batch(i))
        same(new, expected)
        same(total, expected_total)
    same(state, fresh())


@pytest.mark.gpu
def test_a_restored_state_at_another_address_goes_on_rightly() -> None:
    jitted = ftrain.jit(step, donate="state", backend="cudagraph")
    state = fresh()
    for i in range(5):
        state, _ = jitted(state, batch(i))
    old, kept = state, {k: v.clone() for k, v in state.items()}
    restored, eager = {k: v.clone() for k, v in state.items()}, kept
    for i in range(5):
        restored, _ = jitted(restored, batch(i))
        eager, _ = step(eager, batch(i))
    same(restored, eager)
    same(old, kept)


@pytest.mark.gpu
def test_a_number_on_the_cpu_may_change() -> None:
    jitted = ftrain.jit(lambda x, rate: x * rate, backend="cudagraph")
    for rate in (0.5, 0.5, 0.5, 0.5, 0.25, 0.25, 0.125):
        same(jitted(batch(8), torch.tensor(rate)), batch(8) * rate)


@pytest.mark.gpu
def test_other_threads_use_cuda_during_the_capture() -> None:
    jitted = ftrain.jit(step, donate="state", backend="cudagraph")
    state, stop, rounds, errors = fresh(), threading.Event(), [0], []

    def snapshots() -> None:
        stream = torch.cuda.Stream()
        try:
            with torch.cuda.stream(stream):
                while not stop.is_set():
                    kept = torch.ones(SIZE + rounds[0], device="cuda")
                    kept.to("cpu", non_blocking=True)
                    stream.synchronize()
                    rounds[0] += 1
        except RuntimeError as error:
            errors.append(error)

    thread = threading.Thread(target=snapshots)
    thread.start()
    try:
        for i in range(8):
            state, _ = jitted(state, batch(i))
    finally:
        stop.set()
        thread.join()
    assert not errors
    assert rounds[0] > 0


WAITS = """
import torch, ftrain
from ftrain.kernels.opaque import opaque_op

@opaque_op("test_waits(Tensor x) -> Tensor", fake=lambda x: torch.empty_like(x))
def waits(x):
    return x * x.sum().item()

def step(x):
    y = x + 1
    return waits(y) * 2  # line 11

jitted = ftrain.jit(step, backend="cudagraph")
x = torch.ones(8, device="cuda")
for i in range(3):
    jitted(x)
try:
    jitted(x)
except ValueError as error:
    print(error)
torch.cuda.set_stream(torch.cuda.default_stream())
import os
os._exit(0)  # the process is of no more use
"""


@pytest.mark.gpu
def test_a_capture_that_fails_names_the_op_and_the_line(tmp_path) -> None:
    """In a process of its own, since a failed capture may spoil it."""
    script = tmp_path / "waits.py"
    script.write_text(WAITS)
    done = subprocess.run([sys.executable, script], capture_output=True, text=True, timeout=300, check=False)
    assert "test_waits" in done.stdout, done.stdout + done.stderr
    assert "waits.py:11 cannot be captured" in done.stdout
    assert "backend='inductor'" in done.stdout


@pytest.mark.gpu
def test_a_size_that_depends_on_data_is_refused_before_anything_runs() -> None:
    jitted = ftrain.jit(lambda x: x.nonzero().sum(), backend="cudagraph")
    with pytest.raises(ValueError, match=r"nonzero .*test_cudagraph.py:\d+ has a size that depends on data"):
        jitted(batch(1))
