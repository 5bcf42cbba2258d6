"""Films that a video transformer of Wan's makes: one clip, by a sampler, with guidance; one model or two experts.

Legend: N rows (patches) of the clip, Q numbers of a row; Z channels, F frames, H and W rows and columns of latents; S
text rows, C their width; I rows of the image encoder.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from ftrain.kernels import random
from ftrain.modules.families.wan_config import WanConfig
from ftrain.modules.families.wan_latents import Clip, grid, lay, patchify, unpatchify
from ftrain.modules.flow_sampling import euler, few_steps, unipc
from ftrain.modules.model import Model
from ftrain.modules.spec import Tree
from ftrain.modules.velocity import Velocity, holding, shifted
from ftrain.run.clip_encoders import first_frame_mask

_STEPS = 1000  # of the grid that Wan is trained on


@dataclass(frozen=True)
class Sampling:
    """How a film is made.

    - `sampler`: "unipc" and "euler" go from noise to data in `steps`, at times that diffusers' schedulers of these
      kinds have; "few" is for distilled models, which predict the data at each of `times` and get new noise.
    - `shift`: moves times towards noise. `guidance`: how far the caption's velocity is followed beyond that of the
      negative one, 1 for not at all; `guidance_low`: that of the second of two experts, None for the same.
    - `times`: of "few": going down to 0, such as 1.0 0.937 0.833 0.624 0.

    ValueError for numbers out of range, and for times that are not those of "few".
    """

    sampler: Literal["unipc", "euler", "few"] = "unipc"
    steps: int = 50
    shift: float = 3.0
    guidance: float = 5.0
    guidance_low: float | None = None
    times: tuple[float, ...] = ()

    def __post_init__(self) -> None:
        if self.sampler not in ("unipc", "euler", "few"):
            raise ValueError(f"sampler={self.sampler!r} is none of unipc, euler, few")
        if self.steps < 1 or not self.shift > 0 or self.guidance < 0:
            raise ValueError(
                f"steps={self.steps}, shift={self.shift:g}, guidance={self.guidance:g}: at least one step, a positive "
                "shift, and guidance of at least 0"
            )
        if bool(self.times) != (self.sampler == "few"):
            raise ValueError('times are of the sampler "few", which needs them: such as 1.0 0.937 0.833 0.624 0')

    def timetable(self) -> tuple[float, ...]:
        """The times that are visited, from noise to 0, as float32 rounds them."""
        return self.times if self.sampler == "few" else (*torch.from_numpy(self._wide()).float().tolist(), 0.0)

    def seen(self, time: float) -> float:
        """The time that the model is told at one of the timetable: UniPC's are whole steps of a thousand, as in
        diffusers and in Wan's own program.

        >>> sampling = Sampling(steps=8)
        >>> round(sampling.timetable()[3], 4), sampling.seen(sampling.timetable()[3])
        (0.8336, 0.833)
        """
        if self.sampler != "unipc":
            return time
        wide = self._wide()
        return int(wide[np.abs(wide - time).argmin()] * _STEPS) / _STEPS

    def _wide(self) -> np.ndarray:
        """The times without the last, in float64, of which schedulers cut whole steps."""
        if self.sampler == "unipc":
            plain = np.linspace(1, 1 / _STEPS, self.steps + 1)[:-1]
        else:  # diffusers' scheduler of Euler shifts its last time twice
            plain = np.linspace(1, float(shifted(1 / _STEPS, self.shift)), self.steps)
        found = self.shift * plain / (1 + (self.shift - 1) * plain)
        if self.sampler == "unipc" and found[0] > 1 - 1e-6:
            found[0] = 1 - 1e-6  # where the data still has a share
        return np.asarray(found)


@dataclass(frozen=True)
class Expert:
    """A model with its parameters, for the times of `cfg`."""

    model: Model
    params: Tree
    cfg: WanConfig


@dataclass(frozen=True, eq=False)
class Asked:
    """What a film is to be: `size`, channels, frames, rows and columns of its latents; states of the caption and of the
    negative one `[S, C]`.

    - `condition_ZFHW`: latents of the first frame before gray ones, for models with channels for it. `image_IC`: rows
      of the image encoder. `first_ZHW`: latents of a first frame that is given in its own place.
    """

    size: tuple[int, int, int, int]
    text_SC: Tensor
    negative_SC: Tensor
    condition_ZFHW: Tensor | None = None
    image_IC: Tensor | None = None
    first_ZHW: Tensor | None = None


def noise_of(asked: Asked, key: Tensor) -> Tensor:
    """The noise of a film's latents, float32 `[Z, F, H, W]`. `key`: int64 `[2]`."""
    return random.normal(key, asked.size)


def make_film(
    asked: Asked, experts: Sequence[Expert], sampling: Sampling, *, noise_ZFHW: Tensor, key: Tensor | None = None
) -> Tensor:
    """The scaled latents of a film, float32 `[Z, F, H, W]`.

    - `experts`: one model, or two, of which each is asked at the times that it is for. `noise_ZFHW`: as `noise_of`
      gives it. `key`: int64 `[2]`, of the new noise of "few".

    ValueError for noise or conditions that do not fit, for times that no expert is for, and for "few" without a key.
    """
    cfg = experts[0].cfg
    if tuple(noise_ZFHW.shape) != asked.size:
        raise ValueError(f"noise of {list(noise_ZFHW.shape)} for latents of {list(asked.size)}")
    field = _Field(asked, tuple(experts), sampling)
    x_NQ, given_N = patchify(noise_ZFHW.float(), cfg.patch), None
    velocity: Velocity = field.velocity
    if asked.first_ZHW is not None:
        held = torch.zeros_like(noise_ZFHW)
        held[:, 0] = asked.first_ZHW
        given_N = torch.arange(len(x_NQ), device=x_NQ.device) < len(x_NQ) // grid(asked.size[1:], cfg.patch)[0]
        x_NQ = torch.where(given_N[:, None], patchify(held, cfg.patch), x_NQ)
        velocity = holding(field.velocity, given_N)
    times = sampling.timetable()
    with torch.no_grad():
        if sampling.sampler == "few":
            if key is None:
                raise ValueError("the sampler few draws new noise: give a key")
            found = few_steps(field.velocity, x_NQ, times, key=key, given_N=given_N)
        else:
            found = (unipc if sampling.sampler == "unipc" else euler)(velocity, x_NQ, times)
    return unpatchify(found, asked.size[1:], cfg.patch)


class _Field:
    """The guided velocity of a clip."""

    def __init__(self, asked: Asked, experts: tuple[Expert, ...], sampling: Sampling) -> None:
        self.experts, self.sampling = experts, sampling
        self.sides = [_batch(asked, experts[0].cfg, text) for text in (asked.text_SC, asked.negative_SC)]

    def velocity(self, x_NQ: Tensor, time_N: Tensor) -> Tensor:
        """Of rows at one time, but for those at 0, which are given."""
        time = float(time_N.max())
        seen = self.sampling.seen(time)
        number = next((i for i, expert in enumerate(self.experts) if _is_for(expert.cfg, seen)), None)
        if number is None:
            ranges = "; ".join(f"{e.cfg.times[0]:g} to {e.cfg.times[1]:g}" for e in self.experts)
            raise ValueError(f"no model here is for time {seen:g}, only for {ranges}: give the whole pipeline")
        expert, low = self.experts[number], self.sampling.guidance_low
        scale = self.sampling.guidance if number == 0 or low is None else low
        ask = lambda side: _ask(expert, side, x_NQ, torch.where(time_N == 0, 0.0, seen))  # noqa: E731
        if scale == 1:
            return ask(self.sides[0])
        with_text, without = ask(self.sides[0]), ask(self.sides[1])
        return without + scale * (with_text - without)


def _is_for(cfg: WanConfig, time: float) -> bool:
    low, high = cfg.times
    return low <= time < high or time == high == 1


def _ask(expert: Expert, side: dict[str, object], x_NQ: Tensor, time_N: Tensor) -> Tensor:
    beside = side["beside"]
    given = {name: leaf for name, leaf in side.items() if name != "beside"}
    values, rows = time_N.unique(return_inverse=True)
    latents = x_NQ if beside is None else torch.cat([x_NQ, beside], -1)  # type: ignore[list-item]
    assert expert.model.outputs is not None
    found: Tensor = expert.model.outputs(
        expert.params, {**given, "latents": latents, "times": values, "time_rows": rows}
    )
    return found.to(x_NQ.dtype)


def _batch(asked: Asked, cfg: WanConfig, text_SC: Tensor) -> dict[str, object]:
    """The clip as the model reads it, with `beside`, columns of conditions."""
    data = torch.zeros(asked.size, device=text_SC.device)
    parts = [data]
    if asked.condition_ZFHW is not None:
        mask = first_frame_mask(data, cfg.channels_in - 2 * cfg.channels_out)
        parts += [mask, asked.condition_ZFHW.float()]
    laid = lay([[Clip(torch.cat(parts), cfg.times[0], text_SC.float(), asked.image_IC)]], cfg)
    latents = laid.pop("latents")
    found: dict[str, object] = {n: leaf for n, leaf in laid.items() if n not in ("times", "time_rows")}
    own = cfg.row_out
    return {**found, "beside": latents[:, own:] if latents.shape[1] > own else None}
