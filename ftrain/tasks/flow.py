"""Flow matching: a velocity field learns `noise - data` at random times (Lipman et al., arXiv 2210.02747).

A sample has one time and one noise. Its rows may lie on several ranks: times and dropped conditions are functions of
the key and the sample's id, so that all ranks agree without a message; noise is that of one device on any mesh.

Legend: N rows of the batch (samples, or latent rows of packed samples), S rows of conditions, `...` further dims.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from statistics import NormalDist
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from ftrain.kernels import random
from ftrain.kernels.mean import Mean
from ftrain.kernels.pack import draw_over_batch
from ftrain.modules.velocity import Velocity, between, shifted

KINDS = ("uniform", "logit_normal", "mode")
WEIGHTINGS = ("none", "bell", "sigma_sqrt", "cosmap")
BINS = (0.1, 0.3, 0.5, 0.7, 0.9)
"""Times at which `Flow.evaluate` measures by default: the middles of five bins."""

_TIME, _NOISE, _DROP = 0, 1, 2  # streams of a step's key
_BELL_MEAN = math.sqrt(math.pi / 2) * math.erf(math.sqrt(0.5)) - math.exp(-0.5)


def uniform_of(key: Tensor, ids_N: Tensor) -> Tensor:
    """A number in (0, 1) for each id, float32: equal ids of one key have equal numbers, on every rank.

    `key`: int64 `[2]`. `ids_N`: int64, of any shape, of samples; not ids that start again on each rank.

    >>> u_N = uniform_of(random.key(0), torch.tensor([4, 4, 9]))
    >>> bool(u_N[0] == u_N[1]), bool(u_N[0] == u_N[2])
    (True, False)
    """
    words_N = random.fold_in(key, ids_N)[..., 0]
    return ((words_N >> 9).to(torch.float32) + 0.5) * 2.0**-23


def dropped(key: Tensor, ids_S: Tensor, share: float) -> Tensor:
    """Which samples train without their condition, bool like `ids_S`, so that guidance has its other side.

    `key`: int64 `[2]`, that of the loss. `ids_S`: int64 ids of the samples, one for each row of the condition.
    ValueError for a share outside of [0, 1).

    >>> dropped(random.key(1), torch.tensor([0, 0, 1, 2]), 0.5).tolist()
    [True, True, True, False]
    """
    if not 0 <= share < 1:
        raise ValueError(f"dropped: share={share} of the samples must be in [0, 1)")
    return uniform_of(random.fold_in(key, _DROP), ids_S) < share


@dataclass(frozen=True)
class Times:
    """How times are drawn.

    - `kind`: "uniform"; "logit_normal", the sigmoid of a normal number of `mean` and `std`; "mode", which `scale` heaps
      about the middle (both of Esser et al., arXiv 2403.03206).
    - `shift`: moves times towards noise (see `ftrain.modules.velocity.shifted`).
    - `low`, `high`: times lie between them, as if all others had been drawn again: the range of an expert of Wan 2.2,
      or what a score is compared at.

    ValueError for numbers out of range.
    """

    kind: Literal["uniform", "logit_normal", "mode"] = "uniform"
    mean: float = 0.0
    std: float = 1.0
    scale: float = 1.29
    shift: float = 1.0
    low: float = 0.0
    high: float = 1.0

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise ValueError(f"times: kind={self.kind!r} is not one of {', '.join(KINDS)}")
        if not self.std > 0 or not self.shift > 0:
            raise ValueError(f"times: std={self.std} and shift={self.shift} must be positive")
        if not -1 <= self.scale <= 2 / (math.pi - 2):
            raise ValueError(f"times: scale={self.scale} of 'mode' must lie between -1 and {2 / (math.pi - 2):.3f}")
        if not 0 <= self.low < self.high <= 1:
            raise ValueError(f"times: low={self.low} and high={self.high} must be in order within [0, 1]")

    def draw(self, key: Tensor, ids_N: Tensor) -> Tensor:
        """A time for each row, `[N]` float32; rows of one sample (int64 `ids_N`) have one. `key`: int64 `[2]`."""
        return self.at(uniform_of(random.fold_in(key, _TIME), ids_N))

    def at(self, share_N: Tensor) -> Tensor:
        """The times below which these shares (in (0, 1), any shape) of all times lie.

        >>> Times(shift=3.0).at(torch.tensor([0.5])).item()
        0.75
        """
        first, last = self.share_below(self.low), self.share_below(self.high)
        u_N = share_N if (first, last) == (0.0, 1.0) else first + (last - first) * share_N
        if self.kind == "logit_normal":
            u_N = torch.sigmoid(self.mean + self.std * math.sqrt(2) * torch.erfinv(2 * u_N - 1))
        elif self.kind == "mode":
            u_N = u_N - self.scale * ((math.pi / 2 * u_N).sin().square() - u_N)
        time_N = shifted(u_N, self.shift)
        assert isinstance(time_N, Tensor)
        return time_N if (first, last) == (0.0, 1.0) else time_N.clamp(self.low, self.high)

    def share_below(self, time: float) -> float:
        """The share of times below one, were there neither `low` nor `high`.

        >>> Times(shift=3.0).share_below(0.75)
        0.5
        """
        if not 0 < time < 1:
            return float(time >= 1)
        u = time / (self.shift - (self.shift - 1) * time)
        if self.kind == "logit_normal":
            return NormalDist(self.mean, self.std).cdf(math.log(u) - math.log1p(-u))
        return u if self.kind == "uniform" else _inverse_mode(u, self.scale)


def _inverse_mode(u: float, scale: float) -> float:
    """By halving: the function grows."""
    low, high = 0.0, 1.0
    for _ in range(60):
        middle = (low + high) / 2
        below = middle - scale * (math.sin(math.pi / 2 * middle) ** 2 - middle) < u
        low, high = (middle, high) if below else (low, middle)
    return (low + high) / 2


class Noisy(NamedTuple):
    """Rows that a field is asked about.

    - `x`: `[N, ...]`, data and noise at `time_N` (float32 or wider).
    - `target`: `noise - data`, in at least float32.
    - `counted_N`: bool `[N]`, the rows that the loss counts; None for all.
    """

    x: Tensor
    time_N: Tensor
    target: Tensor
    counted_N: Tensor | None


@dataclass(frozen=True)
class Flow:
    """The loss of flow matching, of a velocity field.

    - `times`: how times are drawn.
    - `weighting`: of the squared errors by their time t: "none"; "bell" about the middle, of mean 1 (DiffSynth);
      "sigma_sqrt", `t ** -2`; "cosmap", `2 / (pi (1 - 2 t + 2 t ** 2))` (both as diffusers calls them).

    ValueError for another weighting, and for "sigma_sqrt" with times down to 0, where it has no mean.
    """

    times: Times = field(default_factory=Times)
    weighting: Literal["none", "bell", "sigma_sqrt", "cosmap"] = "none"

    def __post_init__(self) -> None:
        if self.weighting not in WEIGHTINGS:
            raise ValueError(f"flow: weighting={self.weighting!r} is not one of {', '.join(WEIGHTINGS)}")
        if self.weighting == "sigma_sqrt" and self.times.low == 0:
            raise ValueError("flow: weighting='sigma_sqrt' is t ** -2, which has no mean: give Times(low=0.01) or more")

    def loss(
        self,
        velocity: Velocity,
        data: Tensor,
        *,
        ids_N: Tensor,
        key: Tensor,
        given_N: Tensor | None = None,
        valid_N: Tensor | None = None,
    ) -> Mean:
        """The mean, over all numbers of the counted rows, of the weighted squared error.

        Args:
            velocity: the field, with the parameters that are trained.
            data: floating `[N, ...]`.
            ids_N: int64, the sample of each row; no two samples of the batch, of all ranks, have one id.
            key: int64 `[2]`, of the step.
            given_N: bool, rows that the model is given as data, such as the first frames of a video: their time is 0,
                and they are outside of the loss.
            valid_N: bool, False for padding, which the field sees as noise alone.

        ValueError for ids or masks of another shape or dtype.
        """
        noisy = self.noisy(data, ids_N=ids_N, key=key, given_N=given_N, valid_N=valid_N)
        return squared_error(velocity(noisy.x, noisy.time_N), noisy.target, noisy.counted_N, self.weight(noisy.time_N))

    def noisy(
        self,
        data: Tensor,
        *,
        ids_N: Tensor,
        key: Tensor,
        given_N: Tensor | None = None,
        valid_N: Tensor | None = None,
        time_N: Tensor | None = None,
    ) -> Noisy:
        """What `loss` asks the field about; arguments are its own, `data` `[N, ...]`. ValueError as there.

        `time_N`: these times, in the place of drawn ones.
        """
        _check(data, ids_N, given_N, valid_N)
        if valid_N is not None:  # what padding holds must not reach a gradient through the field
            data = torch.where(valid_N.view(-1, *[1] * (data.dim() - 1)), data, 0)
        time_N = self.times.draw(key, ids_N) if time_N is None else time_N
        noise = noise_like(data, key)
        x = between(data, noise, time_N)
        if given_N is not None:
            x = torch.where(given_N.view(-1, *[1] * (data.dim() - 1)), data, x)
            time_N = torch.where(given_N, 0, time_N)
        wide = torch.promote_types(data.dtype, torch.float32)
        return Noisy(x, time_N, noise.to(wide) - data.to(wide), counted(given_N, valid_N))

    def weight(self, time_N: Tensor) -> Tensor | None:
        """What the squared error of each row is multiplied by, `[N]`; None for 1.

        >>> Flow(weighting="bell").weight(torch.tensor([0.0])).item()
        0.0
        """
        if self.weighting == "bell":
            return ((-2 * (time_N - 0.5).square()).exp() - math.exp(-0.5)) / _BELL_MEAN
        if self.weighting == "sigma_sqrt":
            return time_N.clamp(min=self.times.low) ** -2
        if self.weighting == "cosmap":
            return 2 / (math.pi * (1 - 2 * time_N + 2 * time_N.square()))
        return None

    def evaluate(
        self,
        velocity: Velocity,
        data: Tensor,
        *,
        ids_N: Tensor,
        key: Tensor,
        at: Sequence[float] = BINS,
        given_N: Tensor | None = None,
        valid_N: Tensor | None = None,
    ) -> dict[str, Mean]:
        """The unweighted loss at fixed times, each a `Mean` by its time ("0.1"): the loss of training is mostly the
        noise of its times. Arguments and errors are those of `loss`, with `data` `[N, ...]`; one noise serves all.
        """
        found = {}
        for time in at:
            time_N = torch.full(ids_N.shape, time, dtype=torch.float32, device=ids_N.device)
            noisy = self.noisy(data, ids_N=ids_N, key=key, given_N=given_N, valid_N=valid_N, time_N=time_N)
            found[f"{time:g}"] = squared_error(velocity(noisy.x, noisy.time_N), noisy.target, noisy.counted_N)
        return found


def counted(given_N: Tensor | None, valid_N: Tensor | None) -> Tensor | None:
    """Rows that a loss counts, bool `[N]`: those that are valid and not given; None where all are.

    >>> counted(torch.tensor([True, False]), None).tolist()
    [False, True]
    """
    if given_N is None:
        return valid_N
    return ~given_N if valid_N is None else valid_N & ~given_N


def noise_like(data: Tensor, key: Tensor, *, stream: int = _NOISE) -> Tensor:
    """Normal numbers like `data` `[N, ...]`: of one device on any mesh. `key`: int64 `[2]`; `stream`: a use of it."""

    draw = partial(random.normal, dtype=torch.promote_types(data.dtype, torch.float32))
    return draw_over_batch(draw, random.fold_in(key, stream), tuple(data.shape)).to(data.dtype)


def squared_error(
    found: Tensor, target: Tensor, counted_N: Tensor | None = None, weight_N: Tensor | None = None
) -> Mean:
    """The mean of squared differences over all numbers of the counted rows (bool `[N]`; None: all), at least float32.

    `found`, `target`: `[N, ...]`. `weight_N`: of each row; the count does not contain it. What other rows hold, NaN
    included, reaches neither the loss nor a gradient. ValueError for two shapes.

    >>> squared_error(torch.zeros(2, 3), torch.ones(2, 3), torch.tensor([True, False])).item()
    1.0
    """
    if found.shape != target.shape:
        raise ValueError(f"a field gave {list(found.shape)} for rows {list(target.shape)}: it must keep their shape")
    wide = torch.promote_types(torch.promote_types(found.dtype, target.dtype), torch.float32)
    error = found.to(wide) - target.to(wide)
    ones = [1] * (error.dim() - 1)
    numbers = error[:1].numel() if len(error) else 1
    count = torch.full((), len(error) * numbers, dtype=wide, device=error.device)
    if counted_N is not None:  # selected before the square: its backward multiplies by the error, and 0 * NaN is NaN
        error = torch.where(counted_N.view(-1, *ones), error, 0)
        count = counted_N.sum().to(wide) * numbers
    square = error.square()
    return Mean((square if weight_N is None else square * weight_N.to(wide).view(-1, *ones)).sum(), count)


def _check(data: Tensor, ids_N: Tensor, given_N: Tensor | None, valid_N: Tensor | None) -> None:
    if ids_N.dtype != torch.int64 or ids_N.shape != data.shape[:1]:
        raise ValueError(
            f"flow: ids_N is {ids_N.dtype} {list(ids_N.shape)}, expected int64 [{len(data)}]: the sample of each row"
        )
    for name, mask in (("given_N", given_N), ("valid_N", valid_N)):
        if mask is not None and (mask.dtype != torch.bool or mask.shape != data.shape[:1]):
            raise ValueError(f"flow: {name} is {mask.dtype} {list(mask.shape)}, expected bool [{len(data)}]")
