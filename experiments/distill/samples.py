"""Films of a teacher and its students, how often each asks its network, and a picture of them.

Legend: B films, N rows, S frames, H rows of pixels, W columns.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

import ftrain
from experiments.distill.films import WORDS
from experiments.distill.painter import Painter
from experiments.distill.workflow import FOUR, FRAMES, ONE
from ftrain.kernels import random
from ftrain.modules.flow_sampling import euler, few_steps
from ftrain.modules.velocity import timetable
from ftrain.tasks.distill.rollout import causal_rollout

TEACHER_STEPS = 32


@dataclass(frozen=True)
class Sampler:
    """A way to make films: `make(params, words_BW, noise_NP, key)` gives rows `[N, P]`. `calls`: of the network."""

    name: str
    calls: str
    make: Callable[[Any, Tensor, Tensor, Tensor], Tensor]


def samplers(painter: Painter, guidance: float) -> dict[str, Sampler]:
    """By the stage whose result they sample. A call of a causal network is of one frame."""

    def teacher(params: Any, words_BW: Tensor, noise_NP: Tensor, key: Tensor) -> Tensor:
        return euler(painter.guided(params, words_BW, guidance), noise_NP, timetable(TEACHER_STEPS))

    def student(times: tuple[float, ...]) -> Callable[[Any, Tensor, Tensor, Tensor], Tensor]:
        return lambda params, words_BW, noise_NP, key: few_steps(
            painter.velocity(params, words_BW), noise_NP, times, key=key
        )

    def by_frames(params: Any, words_BW: Tensor, noise_NP: Tensor, key: Tensor) -> Tensor:
        chunk = painter.chunk(params, words_BW)
        return painter.joined(causal_rollout(chunk, (), painter.frames(noise_NP), FRAMES, key=key))

    frames = painter.film.video.frames
    of_frames = f"{frames * (len(FRAMES) - 1) + frames - 1} of a frame"
    return {
        "teacher": Sampler("teacher, guided", str(2 * TEACHER_STEPS), teacher),
        "consistency": Sampler("4 steps, before matching", "4", student(FOUR)),
        "four": Sampler("4 steps", "4", student(FOUR)),
        "one": Sampler("1 step", "1", student(ONE)),
        "frames": Sampler("frame by frame", of_frames, by_frames),
    }


def films(
    painter: Painter, sampler: Sampler, params: Any, words_BW: Tensor, *, seed: int, together: int = 80
) -> np.ndarray:
    """A film for each pair of words, `[B, S, H, W]`, of `together` at a time."""
    found = []
    for number, words in enumerate(words_BW.split(together)):
        key = random.fold_in(random.key(seed), number)
        noise_NP = ftrain.normal(key, (len(words) * painter.film.rows, painter.cfg.d_in))
        with torch.no_grad():
            found.append(sampler.make(params, words, noise_NP, random.fold_in(key, 1)).numpy())
    return painter.film.to_films(np.concatenate(found))


def grid(rows: Mapping[str, np.ndarray], words_BW: Tensor, file: Path, *, columns: int = 10) -> None:
    """The first films of each sampler, one under the other: a PNG in which a film is a strip of its frames."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(1.5 * columns, 0.75 * len(rows) + 0.5), layout="constrained")
    axes = figure.subplots(len(rows), columns, squeeze=False)
    for line, (name, films_BSHW) in enumerate(rows.items()):
        for place in range(columns):
            at, film = axes[line][place], films_BSHW[place]
            at.imshow(
                np.concatenate([np.pad(f, 1, constant_values=1) for f in film], 1), cmap="gray_r", vmin=-1, vmax=1
            )
            at.set_xticks([])
            at.set_yticks([])
            if line == 0:
                at.set_title(" ".join(WORDS[word] for word in words_BW[place].tolist()), fontsize=8)
            if place == 0:
                at.set_ylabel(name.replace(", ", "\n").replace("before", "\nbefore"), fontsize=7)
    file.parent.mkdir(parents=True, exist_ok=True)
    FigureCanvasAgg(figure).print_figure(file, dpi=100, format="png")
