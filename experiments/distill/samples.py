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
from experiments.distill.films import PATCH, WORDS
from experiments.distill.painter import Painter
from experiments.distill.workflow import FOUR, FRAMES, ONE
from experiments.omni.digits import CLASSES
from experiments.omni.video import DIRECTIONS
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
        noise_NP = ftrain.normal(key, (len(words) * painter.film.rows, PATCH * PATCH))
        with torch.no_grad():
            found.append(sampler.make(params, words, noise_NP, random.fold_in(key, 1)).numpy())
    return painter.film.to_films(np.concatenate(found))


def grid(rows: Mapping[str, np.ndarray], words_BW: Tensor, file: Path) -> None:
    """A film of each digit by each sampler, one under the other: a PNG in which a film is a strip of its frames.

    The films are those of `all_words`.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    ways = len(DIRECTIONS)
    chosen = [digit * ways + digit % ways for digit in range(CLASSES)]
    ink = np.concatenate([np.concatenate([_strip(films[at]) for at in chosen], 1) for films in rows.values()])
    high, wide = ink.shape[0] / len(rows), ink.shape[1] / len(chosen)
    figure = Figure(figsize=(1.5 * len(chosen) + 1, 0.7 * len(rows) + 0.5), layout="constrained")
    axes = figure.subplots()
    axes.imshow(ink, cmap="gray_r", vmin=-1, vmax=1, aspect="auto", interpolation="nearest")
    titles = [" ".join(WORDS[word] for word in words_BW[at].tolist()) for at in chosen]
    axes.set_xticks([(place + 0.5) * wide for place in range(len(chosen))], titles, fontsize=8)
    axes.set_yticks([(line + 0.5) * high for line in range(len(rows))], list(rows), fontsize=8)
    axes.tick_params(length=0, top=False, labeltop=True, bottom=False, labelbottom=False)
    file.parent.mkdir(parents=True, exist_ok=True)
    FigureCanvasAgg(figure).print_figure(file, dpi=100, format="png")


def _strip(film_SHW: np.ndarray) -> np.ndarray:
    """The frames side by side, each with a frame of ink, and room around them."""
    framed = [np.pad(np.pad(image, 1, constant_values=0.2), 1, constant_values=-1) for image in film_SHW]
    return np.pad(np.concatenate(framed, 1), ((1, 1), (2, 2)), constant_values=-1)
