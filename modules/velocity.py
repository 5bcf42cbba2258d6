"""Velocity fields of flow matching: what every loss and sampler of it knows of a model.

At time t, from 0 (data) to 1 (noise), a sample is `x = (1 - t) data + t noise`, and its velocity is `noise - data`
(Lipman et al., arXiv 2210.02747; Liu et al., arXiv 2209.03003). A model with its parameters and its condition bound is
a `Velocity`: `velocity(x, time_N)`. Samples lie row by row, with a time for each row; rows of one sample have one time.

Legend: N rows of the batch (samples, or latent rows of packed samples), `...` further dims of a row.
"""

import itertools
from collections.abc import Callable

import torch
from torch import Tensor

Velocity = Callable[[Tensor, Tensor], Tensor]
"""From rows `[N, ...]` and their times `[N]` in [0, 1] to velocities like the rows."""


def along(time_N: Tensor, x: Tensor) -> Tensor:
    """Numbers of rows `[N]` in the dtype of `x` `[N, ...]`, with as many dims, so that they multiply it.

    >>> along(torch.tensor([1.0, 2.0]), torch.zeros(2, 3)).shape
    torch.Size([2, 1])
    """
    return time_N.to(x.dtype).view(-1, *[1] * (x.dim() - 1))


def between(data: Tensor, noise: Tensor, time_N: Tensor) -> Tensor:
    """`(1 - t) data + t noise`, for rows `[N, ...]` of one shape and dtype and times `[N]`.

    >>> between(torch.zeros(2, 1), torch.ones(2, 1), torch.tensor([0.25, 1.0])).tolist()
    [[0.25], [1.0]]
    """
    return torch.lerp(data, noise, along(time_N, data))


def clean(x: Tensor, time_N: Tensor, velocity: Tensor) -> Tensor:
    """The data that a velocity predicts, `x - t velocity`; `x` and `velocity`: rows `[N, ...]`.

    >>> clean(torch.tensor([[0.5]]), torch.tensor([0.5]), torch.tensor([[3.0]])).item()
    -1.0
    """
    return x - along(time_N, x) * velocity


def moved(x: Tensor, time_N: Tensor, to_N: Tensor, velocity: Tensor) -> Tensor:
    """Rows `[N, ...]` after one step of Euler along their velocities, from their times to others, each `[N]`.

    >>> moved(torch.tensor([[1.0]]), torch.tensor([1.0]), torch.tensor([0.75]), torch.tensor([[2.0]])).item()
    0.5
    """
    return x + along(to_N.to(time_N.dtype) - time_N, x) * velocity


def guided(conditional: Velocity, unconditional: Velocity, scale: float) -> Velocity:
    """`unconditional + scale * (conditional - unconditional)`, in which 1 is no guidance (Ho and Salimans, arXiv
    2207.12598).

    Some projects write `conditional + w * (conditional - unconditional)` instead: their w is `scale - 1`.

    >>> field = guided(lambda x, t: torch.ones_like(x), lambda x, t: torch.zeros_like(x), 5.0)
    >>> field(torch.zeros(1, 1), torch.ones(1)).item()
    5.0
    """

    def velocity(x: Tensor, time_N: Tensor) -> Tensor:
        without = unconditional(x, time_N)
        return without + scale * (conditional(x, time_N) - without)

    return velocity


def holding(velocity: Velocity, given_N: Tensor) -> Velocity:
    """The field in which rows that are `given_N` (bool `[N]`) are data: their time is 0, and they do not move.

    For first frames that a video begins with. ValueError if `given_N` is not bool.

    >>> field = holding(lambda x, time_N: time_N[:, None].expand_as(x), torch.tensor([True, False]))
    >>> field(torch.zeros(2, 1), torch.tensor([0.5, 0.5])).tolist()
    [[0.0], [0.5]]
    """
    if given_N.dtype != torch.bool:
        raise ValueError(f"holding: given_N is {given_N.dtype}, expected bool: True for rows that are data")

    def held(x: Tensor, time_N: Tensor) -> Tensor:
        found = velocity(x, torch.where(given_N, 0, time_N))
        return torch.where(given_N.view(-1, *[1] * (x.dim() - 1)), 0, found)

    return held


def shifted(time: float | Tensor, shift: float) -> float | Tensor:
    """Times moved towards noise by a shift above 1: `shift * t / (1 + (shift - 1) * t)`; a float, or times `[N]`.

    Large latents need it: their coarse content survives more noise (Esser et al., arXiv 2403.03206).

    >>> shifted(0.5, 3.0)
    0.75
    """
    return shift * time / (1 + (shift - 1) * time)


def timetable(steps: int, *, shift: float = 1.0, first: float = 1.0) -> tuple[float, ...]:
    """The times that a sampler visits: `steps + 1` of them from `first` to 0, evenly before the shift.

    ValueError for less than one step, a first time outside of (0, 1] or a shift that is not positive.

    >>> timetable(4)
    (1.0, 0.75, 0.5, 0.25, 0.0)
    """
    if steps < 1 or not 0 < first <= 1 or not shift > 0:
        raise ValueError(
            f"timetable: steps={steps}, first={first}, shift={shift}: needs at least one step, a first time in (0, 1], "
            "and a positive shift"
        )
    return tuple(float(shifted(first * (steps - i) / steps, shift)) for i in range(steps)) + (0.0,)


def require_descending(times: tuple[float, ...], who: str) -> None:
    """ValueError unless times go down within [0, 1], two at least; `who` asks."""
    falls = all(a > b for a, b in itertools.pairwise(times))
    if len(times) < 2 or not falls or not (times[-1] >= 0 and times[0] <= 1):
        raise ValueError(f"{who}: times={times} must go down from at most 1 to at least 0, in one step or more")
