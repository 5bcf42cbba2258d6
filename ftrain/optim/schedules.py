"""Schedules: functions from the count of updates made (0-d int64 tensor) to a rate (0-d float32 tensor).

The first update of a run sees count 0. All arithmetic is float32, without branches on values, so a schedule is a few
nodes of the step's graph; float32 holds counts exactly up to 2^24. At the ends of a piece the values are exact.
"""

import math

import torch
from torch import Tensor

from ftrain.optim.transform import Schedule, require_range


def constant(value: float) -> Schedule:
    """`value` at every count; a number >= 0, else ValueError.

    >>> import torch
    >>> from ftrain import optim
    >>> optim.constant(3e-4)(torch.tensor(7))
    tensor(0.0003)
    """
    require_range("value", value, 0.0)
    return lambda count: torch.full((), value, dtype=torch.float32, device=count.device)


def linear(start: float, end: float, *, steps: int) -> Schedule:
    """From `start` at count 0 in a straight line to `end` at count `steps`, and `end` from there on.

    ValueError for values below 0 and less than one step.

    >>> import torch
    >>> from ftrain import optim
    >>> rate = optim.linear(0.0, 1.0, steps=4)
    >>> [float(rate(torch.tensor(count))) for count in (0, 1, 4, 9)]
    [0.0, 0.25, 1.0, 1.0]
    """
    require_range("start", start, 0.0)
    require_range("end", end, 0.0)
    require_range("steps", steps, 1)
    return lambda count: _line(_fraction(count, 0, steps), start, end)


def cosine(start: float, end: float, *, steps: int) -> Schedule:
    """From `start` at count 0 along half a cosine to `end` at count `steps`, and `end` from there on.

    ValueError for values below 0 and less than one step. Source: Loshchilov and Hutter, "SGDR", arXiv 1608.03983.

    >>> import torch
    >>> from ftrain import optim
    >>> rate = optim.cosine(1.0, 0.0, steps=4)
    >>> [round(float(rate(torch.tensor(count))), 3) for count in (0, 1, 2, 4)]
    [1.0, 0.854, 0.5, 0.0]
    """
    require_range("start", start, 0.0)
    require_range("end", end, 0.0)
    require_range("steps", steps, 1)
    return lambda count: _line(_half_cosine(_fraction(count, 0, steps)), start, end)


def warmup_cosine(peak: float, *, warmup_steps: int, total_steps: int, floor: float = 0.0) -> Schedule:
    """A straight line from 0 to `peak` in `warmup_steps`, then half a cosine down to `floor` at `total_steps`.

    - `peak`: the highest rate, >= 0. `floor`: the last one, between 0 and `peak`.
    - `warmup_steps`, `total_steps`: updates, both counted from the start; the first is less than the second.

    ValueError for values out of these ranges.

    >>> import torch
    >>> from ftrain import optim
    >>> rate = optim.warmup_cosine(3e-4, warmup_steps=100, total_steps=1000, floor=3e-5)
    >>> [round(float(rate(torch.tensor(count))), 6) for count in (0, 50, 100, 1000)]
    [0.0, 0.00015, 0.0003, 3e-05]
    """
    require_range("warmup_steps", warmup_steps, 0)
    _require_floor(floor, peak)
    if not warmup_steps < total_steps:
        raise ValueError(f"warmup_steps={warmup_steps} must be less than total_steps={total_steps}")
    fall = cosine(peak, floor, steps=total_steps - warmup_steps)
    if warmup_steps == 0:
        return fall
    return join([linear(0.0, peak, steps=warmup_steps), fall], boundaries=[warmup_steps])


def wsd(peak: float, *, warmup_steps: int, stable_steps: int, decay_steps: int, floor: float = 0.0) -> Schedule:
    """Warm-up, stable, decay: a line up from 0 to `peak`, `peak`, and a line down to `floor`.

    - `peak`: the highest rate, >= 0. `floor`: the last one, between 0 and `peak`.
    - `warmup_steps`, `stable_steps`, `decay_steps`: updates of each part, one after the other; the last is at least 1.

    ValueError for values out of these ranges. Source: Hu et al., "MiniCPM", arXiv 2404.06395.

    >>> import torch
    >>> from ftrain import optim
    >>> rate = optim.wsd(1.0, warmup_steps=2, stable_steps=4, decay_steps=4)
    >>> [float(rate(torch.tensor(count))) for count in (1, 2, 6, 8, 10)]
    [0.5, 1.0, 1.0, 0.5, 0.0]
    """
    require_range("warmup_steps", warmup_steps, 0)
    require_range("stable_steps", stable_steps, 0)
    require_range("decay_steps", decay_steps, 1)
    _require_floor(floor, peak)
    pieces = [constant(peak), linear(peak, floor, steps=decay_steps)]
    boundaries = [warmup_steps + stable_steps]
    if warmup_steps:
        pieces, boundaries = [linear(0.0, peak, steps=warmup_steps), *pieces], [warmup_steps, *boundaries]
    return join(pieces, boundaries=boundaries)


def join(schedules: list[Schedule], *, boundaries: list[int]) -> Schedule:
    """Schedules one after the other: piece i+1 begins, at its own count 0, at `boundaries[i]`.

    ValueError unless boundaries ascend, are at least 0 and are one fewer than the schedules.

    >>> import torch
    >>> from ftrain import optim
    >>> rate = optim.join([optim.constant(1.0), optim.linear(1.0, 0.0, steps=2)], boundaries=[10])
    >>> [float(rate(torch.tensor(count))) for count in (9, 11, 12)]
    [1.0, 0.5, 0.0]
    """
    if len(schedules) != len(boundaries) + 1:
        raise ValueError(f"{len(schedules)} schedules need {len(schedules) - 1} boundaries, not {len(boundaries)}")
    if any(b > c for b, c in zip([0, *boundaries], boundaries, strict=False)):
        raise ValueError(f"boundaries must be >= 0 and ascend, not {boundaries}")

    def at(count: Tensor) -> Tensor:
        value = schedules[0](count)
        for boundary, piece in zip(boundaries, schedules[1:], strict=True):
            value = torch.where(count < boundary, value, piece(count - boundary))
        return value

    return at


def _fraction(count: Tensor, begin: int, end: int) -> Tensor:
    """How far `count` is from `begin` to `end`, in [0, 1]."""
    return ((count - begin).to(torch.float32) / (end - begin)).clamp(0.0, 1.0)


def _half_cosine(fraction: Tensor) -> Tensor:
    return 0.5 - 0.5 * torch.cos(fraction * math.pi)


def _line(fraction: Tensor, start: float, end: float) -> Tensor:
    """`start` at 0 and `end` at 1, both exact: the two terms are weighed, not a difference added."""
    return (1 - fraction) * start + fraction * end


def _require_floor(floor: float, peak: float) -> None:
    require_range("peak", peak, 0.0)
    if not 0.0 <= floor <= peak:
        raise ValueError(f"floor={floor} must lie between 0 and the peak, {peak}")
