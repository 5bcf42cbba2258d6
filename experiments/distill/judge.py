"""A judge of films: a small convolutional net that has seen frames of real films alone, and measures upon it.

Legend: B films, S frames, H rows of pixels, W columns, M frames of all films, F features.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as nnf

import ftrain
from experiments.distill.films import Film, Source
from experiments.omni.digits import CLASSES
from experiments.omni.video import DIRECTIONS
from ftrain import Mean, TrainState, optim
from ftrain.modules.spec import ParamSpec, fan_in, zeros

_STEPS = {"left": (0, -1), "right": (0, 1), "up": (-1, 0), "down": (1, 0)}  # rows, columns
_FEATURES = 48


def specs(side: int) -> dict[str, Any]:
    """Two convolutions, a layer of features, and scores of the digits."""
    cells = (side // 2) ** 2 * 32
    return {
        "first": ParamSpec((16, 1, 3, 3), (None, None, None, None), fan_in(9)),
        "second": ParamSpec((32, 16, 3, 3), (None, None, None, None), fan_in(144)),
        "features": {
            "w": ParamSpec((cells, _FEATURES), (None, None), fan_in(cells)),
            "b": ParamSpec((_FEATURES,), (None,), zeros()),
        },
        "scores": {
            "w": ParamSpec((_FEATURES, CLASSES), (None, None), fan_in(_FEATURES)),
            "b": ParamSpec((CLASSES,), (None,), zeros()),
        },
    }


def features(params: Any, frames_MHW: Tensor) -> Tensor:
    """What the last layer reads of each frame, `[M, F]`."""
    x = nnf.relu(nnf.conv2d(frames_MHW[:, None], params["first"], padding=1))
    x = nnf.max_pool2d(nnf.relu(nnf.conv2d(x, params["second"], padding=1)), 2)
    return nnf.relu(x.flatten(1) @ params["features"]["w"] + params["features"]["b"])


def scores(params: Any, frames_MHW: Tensor) -> Tensor:
    """Of each digit, `[M, 10]`."""
    return features(params, frames_MHW) @ params["scores"]["w"] + params["scores"]["b"]


@dataclass(frozen=True)
class Measures:
    """Of films: the share of frames in which the judge sees the digit that was asked for, the Frechet distance of the
    frames' features from those of real films to train on, and the mean distance in pixels of a digit's motion
    between frames from the one that was asked for.
    """

    accuracy: float
    frechet: float
    motion: float


@dataclass(frozen=True)
class Judge:
    """A trained net. `unit`: the deviation of each feature of real frames, by which features are divided; `mean`,
    `covariance`: of theirs.
    """

    params: Any
    film: Film
    unit: Tensor
    mean: np.ndarray
    covariance: np.ndarray

    def measure(self, films_BSHW: np.ndarray, words_BW: Tensor) -> Measures:
        """Films against their words."""
        frames = torch.from_numpy(films_BSHW).flatten(0, 1).clamp(-1, 1).float()
        with torch.no_grad():
            found = features(self.params, frames) / self.unit
            seen_BS = scores(self.params, frames).argmax(-1).view(len(films_BSHW), -1)
        right = (seen_BS == words_BW[:, :1]).double().mean().item()
        mean, covariance = moments(found)
        distance = frechet(mean, covariance, self.mean, self.covariance)
        return Measures(right, distance, motion_error(films_BSHW, words_BW, speed=self.film.video.speed))


def train(trained: Source, *, steps: int, seed: int, judged: int = 600) -> Judge:
    """A judge from `steps` steps of 48 films; it compares features with those of `judged` real films."""
    film = trained.film
    params = ftrain.init(specs(film.video.side), ftrain.fold_in(ftrain.key(seed), 1))
    tx = optim.adamw(
        optim.warmup_cosine(2e-3, warmup_steps=max(1, steps // 20), total_steps=steps + 1), weight_decay=1e-3
    )

    def step(state: TrainState, frames: Tensor, labels: Tensor) -> tuple[TrainState, Tensor]:
        def loss(params: Any) -> Mean:
            return Mean.of(nnf.cross_entropy(scores(params, frames), labels, reduction="none"))

        value, grads = ftrain.value_and_grad(loss)(state.params)
        return state.apply(tx, grads), value

    jitted, state = ftrain.jit(step, donate="state"), TrainState.create(params, tx)
    for number in range(steps):
        frames, labels = _frames(trained, 48, seed=seed + 1, number=number)
        state, _ = jitted(state, frames, labels)
    with torch.no_grad():
        found = features(state.params, _frames(trained, judged, seed=seed, number=0)[0])
    unit = found.std(0).clamp(min=1e-2)
    return Judge(state.params, film, unit, *moments(found / unit))


def _frames(source: Source, films: int, *, seed: int, number: int) -> tuple[Tensor, Tensor]:
    """Frames of real films `[M, H, W]`, and their digits `[M]`."""
    rows_NP, words_BW = source.batch(films, seed=seed, number=number)
    found = torch.from_numpy(source.film.to_films(rows_NP.numpy())).flatten(0, 1)
    return found, words_BW[:, 0].repeat_interleave(source.film.video.frames)


def moments(features_MF: Tensor) -> tuple[np.ndarray, np.ndarray]:
    """Mean and covariance of features, in float64."""
    found = features_MF.double().numpy()
    return found.mean(0), np.cov(found, rowvar=False)


def frechet(mean: np.ndarray, covariance: np.ndarray, other_mean: np.ndarray, other_covariance: np.ndarray) -> float:
    """The squared Frechet distance of two normal distributions (Heusel et al., arXiv 1706.08500).

    >>> frechet(np.zeros(2), np.eye(2), np.ones(2), 4 * np.eye(2))
    4.0
    """
    values = np.linalg.eigvals(covariance @ other_covariance)
    root = np.sqrt(np.clip(values.real, 0, None)).sum()
    spread = float(np.trace(covariance) + np.trace(other_covariance) - 2 * root)
    return float(((mean - other_mean) ** 2).sum()) + spread


def motion_error(films_BSHW: np.ndarray, words_BW: Tensor, *, speed: int) -> float:
    """How far, in pixels and on average, the centre of the ink moves otherwise than the words say, from frame to
    frame.
    """
    ink = (np.clip(films_BSHW.astype(np.float64), -1, 1) + 1) / 2
    ink = np.where(ink > 0.2, ink, 0)  # a little grey all over would pull the centre to the middle
    total = ink.sum((2, 3)).clip(min=1e-6)
    rows, columns = np.arange(ink.shape[2]), np.arange(ink.shape[3])
    centre = np.stack([(ink.sum(3) * rows).sum(2) / total, (ink.sum(2) * columns).sum(2) / total], -1)
    steps = np.array([_STEPS[DIRECTIONS[way]] for way in (words_BW[:, 1] - CLASSES).tolist()])
    return float(np.linalg.norm(np.diff(centre, axis=1) - speed * steps[:, None], axis=-1).mean())
