"""Schedules against their closed forms, at every kind of count."""

import math
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.fx.experimental.proxy_tensor import make_fx

from ftrain import optim

COUNTS = st.integers(0, 3000)
STEPS = st.integers(1, 1000)
RATES = st.floats(2**-20, 8.0, width=32)


def at(schedule: optim.Schedule, count: int) -> float:
    value = schedule(torch.tensor(count))
    assert value.dtype == torch.float32
    assert value.shape == ()
    return float(value)


def close(value: float, expected: float, peak: float) -> bool:
    return math.isclose(value, expected, rel_tol=1e-5, abs_tol=1e-6 * peak)


@given(COUNTS, RATES, RATES, STEPS)
def test_linear(count: int, start: float, end: float, steps: int):
    expected = start + (end - start) * min(count / steps, 1)
    assert close(at(optim.linear(start, end, steps=steps), count), expected, max(start, end))


@given(COUNTS, RATES, st.integers(0, 500), STEPS, st.floats(0, 1))
def test_warmup_cosine(count: int, peak: float, warmup: int, fall: int, part: float):
    floor = peak * part
    schedule = optim.warmup_cosine(peak, warmup_steps=warmup, total_steps=warmup + fall, floor=floor)
    if count < warmup:
        expected = peak * count / warmup
    else:
        done = min((count - warmup) / fall, 1)
        expected = floor + (peak - floor) * (1 + math.cos(math.pi * done)) / 2
    assert close(at(schedule, count), expected, peak)


@given(COUNTS, RATES, st.integers(0, 300), st.integers(0, 300), STEPS, st.floats(0, 1))
def test_wsd(count: int, peak: float, warmup: int, stable: int, decay: int, part: float):
    floor = peak * part
    schedule = optim.wsd(peak, warmup_steps=warmup, stable_steps=stable, decay_steps=decay, floor=floor)
    if count < warmup:
        expected = peak * count / warmup
    else:
        expected = peak + (floor - peak) * min(max(count - warmup - stable, 0) / decay, 1)
    assert close(at(schedule, count), expected, peak)


@given(RATES, st.integers(0, 300), STEPS, st.floats(0, 1))
def test_the_ends_are_exact(peak: float, warmup: int, fall: int, part: float):
    def rounded(value: float) -> float:
        return float(torch.tensor(value, dtype=torch.float32))

    floor = rounded(peak * part)
    cosine = optim.warmup_cosine(peak, warmup_steps=warmup, total_steps=warmup + fall, floor=min(floor, peak))
    line = optim.wsd(peak, warmup_steps=warmup, stable_steps=7, decay_steps=fall, floor=min(floor, peak))
    for schedule, end in ((cosine, warmup + fall), (line, warmup + 7 + fall)):
        assert at(schedule, 0) == (0.0 if warmup else peak)
        assert at(schedule, warmup) == peak
        assert at(schedule, end) == at(schedule, end + 10**6) == min(floor, peak)


def test_join_gives_each_piece_its_own_count():
    schedule = optim.join([optim.constant(5.0), optim.linear(0.0, 4.0, steps=4)], boundaries=[3])
    assert [at(schedule, t) for t in range(9)] == [5.0, 5.0, 5.0, 0.0, 1.0, 2.0, 3.0, 4.0, 4.0]


def test_a_traced_schedule_follows_the_count():
    schedule = optim.wsd(1.0, warmup_steps=2, stable_steps=2, decay_steps=2)
    traced = make_fx(schedule, tracing_mode="fake")(torch.tensor(0))
    assert [float(traced(torch.tensor(t))) for t in range(8)] == [0.0, 0.5, 1.0, 1.0, 1.0, 0.5, 0.0, 0.0]


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (
            lambda: optim.warmup_cosine(1.0, warmup_steps=9, total_steps=9),
            "warmup_steps=9 must be less than total_steps=9",
        ),
        (lambda: optim.warmup_cosine(-1.0, warmup_steps=1, total_steps=9), "peak must be >= 0.0, not -1.0"),
        (
            lambda: optim.wsd(1.0, warmup_steps=1, stable_steps=1, decay_steps=1, floor=2.0),
            "floor=2.0 must lie between",
        ),
        (lambda: optim.wsd(1.0, warmup_steps=1, stable_steps=1, decay_steps=0), "decay_steps must be >= 1, not 0"),
        (lambda: optim.linear(0.0, 1.0, steps=0), "steps must be >= 1"),
        (lambda: optim.join([optim.constant(1.0)], boundaries=[1]), "1 schedules need 0 boundaries, not 1"),
        (lambda: optim.join([optim.constant(1.0)] * 3, boundaries=[5, 2]), r"ascend, not \[5, 2\]"),
    ],
)
def test_bad_schedules_are_named(make: Any, message: str):
    with pytest.raises(ValueError, match=message):
        make()
