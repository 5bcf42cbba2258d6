"""Picture tokenizers trained on crops of two photos, in four ways: what comes back, and how much of a codebook is used.

python -m experiments.pictures.codec [--steps N] [--json FILE]

The photos are scikit-learn's (china.jpg, flower.jpg). The right quarter of each is held out. A codebook learns by
gradient or follows averages; entries that nothing uses are seated anew; a judge of patches may be trained beside.
"""

import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import tyro
from sklearn.datasets import load_sample_images
from torch import Tensor

import ftrain
from experiments.bench.table import Row, publish, row
from ftrain import Mean, TrainState, optim
from ftrain.modules import codebook, codebook_averages, patch_judge, vq_image
from ftrain.modules.patch_judge import JudgeConfig
from ftrain.modules.vq_image import VqConfig

_VQGAN = VqConfig(size=16, widths=(16, 32), codes=128, d_code=8, groups=8, networks="vqgan", latent=32, attention=(1,))
JUDGE = JudgeConfig(width=16, layers=1)
_FOOLING = 0.02  # weight of what the judge says, once it has learned for a while


@dataclass(frozen=True)
class Way:
    """A tokenizer and how it is trained: `averages`: its codebook follows them; `judged`: beside a judge of patches."""

    cfg: VqConfig
    averages: bool = False
    judged: bool = False


WAYS = {
    "VQGAN": Way(_VQGAN),
    "VQGAN, averages": Way(replace(_VQGAN, pull=0.0), averages=True),
    "VQGAN, judged": Way(_VQGAN, judged=True),
    "MoVQGAN": Way(replace(_VQGAN, networks="movq")),
}


@dataclass(frozen=True)
class Options:
    """What can be chosen."""

    steps: int = 400
    """updates of each tokenizer"""
    batch: int = 32
    """crops of a step"""
    rate: float = 2e-3
    """peak learning rate"""
    seed: int = 0
    """of the weights and the crops"""
    json: Path | None = None
    """also write the rows to this file"""


class State(NamedTuple):
    """The tokenizer and the judge in training, what its codebook follows, and how often entries were used of late."""

    made: TrainState
    judge: TrainState
    averages: Any
    usage_QK: Tensor


class Told(NamedTuple):
    """What a step tells: squared error of a pixel, and the judge's loss."""

    error: Tensor
    judged: Tensor


def photos() -> tuple[list[np.ndarray], list[np.ndarray]]:
    """What is trained on and what is held out, each `[H, W, 3]` in [-1, 1]."""
    whole = [image.astype(np.float32) / 127.5 - 1 for image in load_sample_images().images]
    edge = [image.shape[1] * 3 // 4 for image in whole]
    return [w[:, :e] for w, e in zip(whole, edge, strict=True)], [w[:, e:] for w, e in zip(whole, edge, strict=True)]


def crops(images: list[np.ndarray], count: int, size: int, rng: np.random.Generator) -> Tensor:
    """Random crops `[count, 3, size, size]`."""
    found = []
    for _ in range(count):
        image = images[rng.integers(len(images))]
        top, left = (int(rng.integers(side - size + 1)) for side in image.shape[:2])
        found.append(image[top : top + size, left : left + size])
    return torch.from_numpy(np.stack(found)).permute(0, 3, 1, 2).contiguous()


def step_of(way: Way, tx: Any, judge_tx: Any) -> Any:
    """The pure step of a way to train: the state, crops, and whether what the judge says counts (1 or 0)."""
    cfg = way.cfg

    def loss_fn(params: Any, images_BCHW: Tensor, judge: Any, counts: Tensor) -> tuple[Any, Any]:
        made = vq_image.autoencoded(params, images_BCHW, cfg=cfg)
        terms = {"made": made.loss}
        if way.judged:
            fool = patch_judge.fool_loss(judge, made.images_BCHW, JUDGE)
            terms["fool"] = Mean(fool.total * counts, fool.count)
        error = made.terms["reconstruction"].value()
        return ftrain.weighted_sum(terms, {"fool": _FOOLING}), (error, made)

    def step(state: State, images_BCHW: Tensor, counts: Tensor) -> tuple[State, Told]:
        gradient = ftrain.value_and_grad(loss_fn, has_aux=True)
        (_, (error, back)), grads = gradient(state.made.params, images_BCHW, state.judge.params, counts)
        made, judge, judged = state.made.apply(tx, grads), state.judge, torch.zeros(())
        if way.judged:
            of_judge = ftrain.value_and_grad(
                lambda params: patch_judge.judge_loss(params, images_BCHW, back.images_BCHW, JUDGE)
            )
            judged, judge_grads = of_judge(judge.params)
            judge = judge.apply(judge_tx, judge_grads)
        averages = state.averages
        if way.averages:
            averages = codebook_averages.moved(averages, back.found)
            made = made.replace(params={**made.params, "codebooks_QKZ": codebook_averages.books(averages)})
        usage_QK = state.usage_QK + vq_image.usage(back.codes_BN, cfg)
        return State(made, judge, averages, usage_QK), Told(error, judged)

    return ftrain.jit(step, donate="state")


def revived(state: State, images_BCHW: Tensor, key: Tensor, way: Way) -> State:
    """Entries that were not used are put where the data is, and counting starts again."""
    rows = vq_image.latents(state.made.params, images_BCHW, cfg=way.cfg)
    averages, books = state.averages, state.made.params["codebooks_QKZ"]
    if way.averages:
        averages = codebook_averages.revived(averages, rows, key=key)
        books = codebook_averages.books(averages)
    else:
        books = codebook.revive(books, state.usage_QK, rows, key=key)
    made = state.made.replace(params={**state.made.params, "codebooks_QKZ": books})
    return State(made, state.judge, averages, torch.zeros_like(state.usage_QK))


def fit(way: Way, seen: list[np.ndarray], options: Options) -> tuple[Any, list[float], float]:
    """The trained parameters, the error of each step, and seconds."""
    cfg, key = way.cfg, ftrain.key(options.seed)
    rate = optim.warmup_cosine(options.rate, warmup_steps=min(20, options.steps // 5 + 1), total_steps=options.steps)
    tx = optim.chain(optim.clip_by_global_norm(1.0), optim.adamw(rate, weight_decay=0.0))
    judge_tx = optim.adamw(options.rate / 2, b1=0.5, weight_decay=0.0)
    params = ftrain.init(vq_image.specs(cfg), ftrain.fold_in(key, 1))
    judge = ftrain.init(patch_judge.specs(JUDGE), ftrain.fold_in(key, 2))
    usage_QK = torch.zeros(cfg.depth, cfg.codes)
    averages = codebook_averages.begun(params["codebooks_QKZ"])
    state = State(TrainState.create(params, tx), TrainState.create(judge, judge_tx), averages, usage_QK)
    rng, step = np.random.default_rng(options.seed), step_of(way, tx, judge_tx)
    errors, began = list[float](), time.monotonic()
    for i in range(options.steps):
        images_BCHW = crops(seen, options.batch, cfg.size, rng)
        if i % 25 == 24 and i < options.steps * 2 // 3:
            state = revived(state, images_BCHW, ftrain.fold_in(key, 1000 + i), way)
        state, told = step(state, images_BCHW, torch.tensor(float(i > options.steps // 3)))
        errors.append(float(told.error))
    return state.made.params, errors, time.monotonic() - began


def main(options: Options) -> list[Row]:
    """Train in each way, judge on what is held out, print and write the rows."""
    seen, held_out = photos()
    rows = list[Row]()
    for name, way in WAYS.items():
        params, errors, seconds = fit(way, seen, options)
        images_BCHW = crops(held_out, 128, way.cfg.size, np.random.default_rng(99))
        codes_BN = vq_image.encode(params, images_BCHW, cfg=way.cfg)
        with torch.no_grad():
            error = float((vq_image.decode(params, codes_BN, cfg=way.cfg) - images_BCHW).square().mean())
        used_QK, few = vq_image.usage(codes_BN, way.cfg), max(1, options.steps // 20)
        first, last = float(np.mean(errors[:few])), float(np.mean(errors[-few:]))
        how = f"{options.steps} steps of {options.batch} crops; errors are squares of pixels in [-1, 1]"
        rows += [
            row(
                f"{name}: error, last steps", last, "", goal=first / 2, peer=first, how=f"{how}; peer: the first steps"
            ),
            row(f"{name}: error, held out", error, "", goal=float(images_BCHW.var()) / 2, how=how),
            row(f"{name}: entries used of {way.cfg.codes}", int((used_QK > 0).sum()), "", how="of 128 held-out crops"),
            row(f"{name}: perplexity", float(codebook.perplexity(used_QK)[0]), "", how="of 128 held-out crops"),
            row(f"{name}: time", seconds, "s", how=how),
        ]
    publish(rows, "picture tokenizers on crops of photos", options.json)
    return rows


if __name__ == "__main__":
    main(tyro.cli(Options))
