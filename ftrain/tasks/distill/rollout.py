"""A student's own samples as it makes them when it is used, with a gradient through one step of it alone.

Legend: N rows, n rows of a chunk, `...` further dims of a row.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from ftrain.kernels import random
from ftrain.modules.flow_sampling import renoised, rows_at
from ftrain.modules.velocity import Velocity, clean, holding, require_descending
from ftrain.tasks.distill.trajectory import place_of
from ftrain.tasks.flow import Flow

Chunk = Callable[[Any, Tensor, Tensor, int], tuple[Tensor, Any]]
"""A causal field: from a cache of the chunks before, rows `[n, ...]`, their times `[n]` and the chunk's number to
velocities, and the cache with this chunk in it as well."""


def exit_step(seed: int, number: int, steps: int) -> int:
    """At which of its steps, from 0, a student's rollout ends at step `number` of a run: the same on every rank, and
    known to the host without waiting for a device.

    A step takes it as a number of Python, so that it is traced once for each exit.

    >>> [exit_step(0, number, 4) for number in range(8)]
    [1, 0, 1, 2, 2, 2, 0, 0]
    """
    return int(random.randint(random.fold_in(random.key(seed), number), (1,), low=0, high=steps))


def rollout(
    velocity: Velocity,
    noise: Tensor,
    times: Sequence[float],
    *,
    key: Tensor,
    exit: int | None = None,
    given_N: Tensor | None = None,
) -> Tensor:
    """The data that a student predicts at step number `exit` of its few, after those before it without gradient.

    - `noise`: `[N, ...]`, at the first of `times`. `key`: int64 `[2]`, of the noise between steps.
    - `exit`: None is the last step: the sample that it makes when it is used.
    - `given_N`: bool, rows that are data already, and stay as they are.

    ValueError for times that do not go down, or no such step.
    """
    times, exit = _checked(times, exit)
    x = noise
    field = velocity if given_N is None else holding(velocity, given_N)
    with torch.no_grad():
        for number in range(exit):
            data = clean(x, rows_at(times[number], x), field(x, rows_at(times[number], x)))
            x = renoised(data, times[number + 1], random.fold_in(key, number), given_N=given_N)
    return clean(x, rows_at(times[exit], x), field(x, rows_at(times[exit], x)))


def from_data(
    student: Velocity,
    data: Tensor,
    times: Sequence[float],
    *,
    ids_N: Tensor,
    key: Tensor,
    given_N: Tensor | None = None,
) -> Tensor:
    """What a student predicts of noisy real data `[N, ...]`, in the place of a rollout: one call, at one of its times
    for each sample, all as likely. It never sees what its own first steps make of noise.

    `times`: of the student, down to 0. `ids_N`: int64, the sample of each row. `key`: int64 `[2]`. `given_N`: bool,
    rows that are data already. ValueError for times that do not go down.
    """
    times, _ = _checked(times, None)
    at = torch.tensor(times, dtype=torch.promote_types(data.dtype, torch.float32), device=data.device)
    time_N = at[place_of(key, ids_N, len(times) - 1)]
    noisy = Flow().noisy(data, ids_N=ids_N, key=key, time_N=time_N, given_N=given_N)
    return clean(noisy.x, noisy.time_N, student(noisy.x, noisy.time_N))


def causal_rollout(
    chunk: Chunk, cache: Any, noises: Sequence[Tensor], times: Sequence[float], *, key: Tensor, exit: int | None = None
) -> list[Tensor]:
    """The data of each chunk after the other, `[n, ...]` each: self-forcing (Huang et al., arXiv 2506.08009).

    A chunk is made as by `rollout`, reading the cache of those before it. What it becomes goes into the cache by one
    more call at time 0, without gradient: each chunk's gradient is its own exit step's. Without gradient, and without
    `exit`, this is how the student is used.

    - `cache`: of no chunk, a value: nothing is written into it, so a step may be computed again.
    - `noises`: `[n, ...]` of each chunk. `times`, `key`, `exit`: as in `rollout`; all chunks end at one step.

    ValueError as `rollout`.
    """
    times, exit = _checked(times, exit)
    made = list[Tensor]()
    for number, noise in enumerate(noises):
        here = _at_chunk(chunk, cache, number)
        made.append(rollout(here, noise, times, key=random.fold_in(key, number), exit=exit))
        if number + 1 < len(noises):
            with torch.no_grad():
                data = made[-1].detach()
                _, cache = chunk(cache, data, rows_at(0.0, data), number)
    return made


def with_history(chunk: Chunk, cache: Any, chunks: Sequence[Tensor]) -> list[Velocity]:
    """The field of each chunk after the true ones before it, `[n, ...]` each: teacher forcing, for flow matching or
    regression chunk by chunk.

    The cache is differentiated as well: what a chunk leaves for later ones is trained by them.
    """
    fields = []
    for number, data in enumerate(chunks):
        fields.append(_at_chunk(chunk, cache, number))
        if number + 1 < len(chunks):
            _, cache = chunk(cache, data, rows_at(0.0, data), number)
    return fields


def _at_chunk(chunk: Chunk, cache: Any, number: int) -> Velocity:
    return lambda x, time_N: chunk(cache, x, time_N, number)[0]


def _checked(times: Sequence[float], exit: int | None) -> tuple[tuple[float, ...], int]:
    times = tuple(times)
    require_descending(times, "rollout")
    steps = len(times) - 1
    exit = steps - 1 if exit is None else exit
    if not 0 <= exit < steps:
        raise ValueError(f"rollout: exit={exit} is none of the {steps} steps, which are numbered from 0")
    return times, exit
