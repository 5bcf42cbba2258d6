"""Samplers of flow matching: from noise to data along a velocity field, at times known beforehand.

Euler, UniPC (Zhao et al., arXiv 2302.04867), and the few steps of a distilled student, which predicts the data and is
given new noise (Song et al., arXiv 2303.01469). All are loops of plain functions, whose coefficients are numbers of
Python: they trace, and a host never waits.

Legend: N rows of the batch, `...` further dims of a row.
"""

import itertools
import math
from collections.abc import Sequence
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ftrain.kernels import random
from ftrain.kernels.pack import draw_over_batch
from ftrain.modules.velocity import Velocity, between, clean, holding, require_descending


def rows_at(time: float, x: Tensor) -> Tensor:
    """The time of every row of `x` `[N, ...]`, `[N]` in float32, or float64 for float64."""
    return torch.full((len(x),), time, dtype=torch.promote_types(x.dtype, torch.float32), device=x.device)


def euler(velocity: Velocity, noise: Tensor, times: Sequence[float]) -> Tensor:
    """Rows `[N, ...]` at the last of `times`, from those at the first, by one step of Euler between neighbours.

    ValueError for times that do not go down within [0, 1].

    >>> euler(lambda x, time_N: 2 * torch.ones_like(x), torch.ones(1, 1), (1.0, 0.5, 0.0)).item()
    -1.0
    """
    return path(velocity, noise, times)[-1]


def path(velocity: Velocity, noise: Tensor, times: Sequence[float]) -> list[Tensor]:
    """As `euler`, the rows `[N, ...]` at each of the times, the first ones included. Errors are those of `euler`."""
    times = tuple(times)
    require_descending(times, "euler")
    found = [noise]
    for now, then in itertools.pairwise(times):
        x = found[-1]
        found.append(x + (then - now) * velocity(x, rows_at(now, x)))
    return found


def few_steps(
    velocity: Velocity, noise: Tensor, times: Sequence[float], *, key: Tensor, given_N: Tensor | None = None
) -> Tensor:
    """The data `[N, ...]` of a distilled student: at each time it predicts the data, which gets new noise of the next.

    `noise`: at the first of `times`, which go down to 0. `key`: int64 `[2]`, of the new noise; rows of the batch get
    the numbers of one device on any mesh. `given_N`: bool `[N]`, rows that are data already, and stay as they are.
    ValueError for times that do not go down to 0.

    >>> few_steps(lambda x, time_N: x, torch.ones(1, 1), (1.0, 0.0), key=random.key(0)).item()
    0.0
    """
    times = tuple(times)
    require_descending(times, "few_steps")
    if times[-1] != 0:
        raise ValueError(f"few_steps: times={times} must end at 0, where the data is")
    x = noise
    field = velocity if given_N is None else holding(velocity, given_N)
    for number, now in enumerate(times[:-1]):
        data = clean(x, rows_at(now, x), field(x, rows_at(now, x)))
        then = times[number + 1]
        x = data if then == 0 else renoised(data, then, random.fold_in(key, number), given_N=given_N)
    return x


def renoised(data: Tensor, time: float, key: Tensor, *, given_N: Tensor | None = None) -> Tensor:
    """Rows `[N, ...]` with new noise of that time, but for those that are `given_N` (bool). `key`: int64 `[2]`."""
    draw = partial(random.normal, dtype=torch.promote_types(data.dtype, torch.float32))
    noise = draw_over_batch(draw, key, tuple(data.shape)).to(data.dtype)
    x = between(data, noise, rows_at(time, data))
    return x if given_N is None else torch.where(given_N.view(-1, *[1] * (data.dim() - 1)), data, x)


def unipc(velocity: Velocity, noise: Tensor, times: Sequence[float], *, order: int = 2) -> Tensor:
    """Rows `[N, ...]` at the last of `times`: predictor and corrector with B(h) = exp(h) - 1 ("bh2") on data
    predictions, as `UniPCMultistepScheduler` of diffusers does with flow matching. One call of the field for each step.

    - `times`: go down from below 1, where the data still has a share (diffusers begins at 0.999 before the shift).
    - `order`: 1, 2 or 3, of the predictor; the first steps and the last have less.

    ValueError for other times or orders.

    >>> round(unipc(lambda x, time_N: x / time_N[:, None], torch.ones(1, 1), (0.9, 0.5, 0.0)).item(), 6)
    0.0
    """
    times = tuple(times)
    require_descending(times, "unipc")
    if times[0] >= 1 or order not in (1, 2, 3):
        raise ValueError(
            f"unipc: first time {times[0]}, order {order}: it begins below 1, e.g. at 0.999, with an order of 1, 2 or 3"
        )
    steps = len(times) - 1
    x, predictions, before, used = noise, list[Tensor](), noise, 0
    for step, now in enumerate(times[:-1]):
        data = clean(x, rows_at(now, x), velocity(x, rows_at(now, x)))
        if step:
            x = _corrected(before, predictions, data, times, step, used)
        predictions.append(data)
        used = min(order, step + 1, steps - step)
        before = x
        x = _predicted(x, predictions, times, step, used)
    return x


def _predicted(x: Tensor, predictions: list[Tensor], times: tuple[float, ...], step: int, order: int) -> Tensor:
    """From time `step` to the next one."""
    now, then = times[step], times[step + 1]
    grown, ratios, rows, right = _coefficients(times, step, order, [step - i for i in range(1, order)])
    latest = predictions[-1]
    x = then / now * x - (1 - then) * grown * latest
    if order == 1:
        return x
    weights = [0.5] if order == 2 else np.linalg.solve(rows[:-1, :-1], right[:-1]).tolist()
    for i, (weight, ratio) in enumerate(zip(weights, ratios, strict=False)):
        x = x - (1 - then) * grown * weight / ratio * (predictions[-2 - i] - latest)
    return x


def _corrected(
    x: Tensor, predictions: list[Tensor], newest: Tensor, times: tuple[float, ...], step: int, order: int
) -> Tensor:
    """The rows at time `step` again, from those at the one before, now that the field is known here."""
    before, now = times[step - 1], times[step]
    grown, ratios, rows, right = _coefficients(times, step - 1, order, [step - 1 - i for i in range(1, order)])
    weights = [0.5] if order == 1 else np.linalg.solve(rows, right).tolist()
    latest = predictions[-1]
    x = now / before * x - (1 - now) * grown * latest
    for i, (weight, ratio) in enumerate(zip(weights[:-1], ratios, strict=False)):
        x = x - (1 - now) * grown * weight / ratio * (predictions[-2 - i] - latest)
    return x - (1 - now) * grown * weights[-1] * (newest - latest)


def _coefficients(
    times: tuple[float, ...], step: int, order: int, earlier: list[int]
) -> tuple[float, list[float], Any, Any]:
    """`exp(-h) - 1` of the step, the places of earlier predictions in units of h, and the equations of the weights."""
    h = _log_ratio(times[step + 1]) - _log_ratio(times[step])
    if math.isinf(h):  # the last step, to the data itself
        return -1.0, [], np.zeros((0, 0)), np.zeros(0)
    grown = math.expm1(-h)
    ratios = [(_log_ratio(times[i]) - _log_ratio(times[step])) / h for i in earlier]
    phi, factorial, rows, right = grown / -h - 1, 1, list[list[float]](), list[float]()
    for power in range(order):
        rows.append([ratio**power for ratio in [*ratios, 1.0]])
        right.append(phi * factorial / grown)
        factorial *= power + 2
        phi = phi / -h - 1 / factorial
    return grown, ratios, np.array(rows), np.array(right)


def _log_ratio(time: float) -> float:
    """The log of data's share over noise's."""
    return math.inf if time == 0 else math.log1p(-time) - math.log(time)
