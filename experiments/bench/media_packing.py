"""Packs with films and pictures over many simulated ranks: how even encoders and the decoder are, at once.

    python -m experiments.bench.data --parts media

Documents are those of a video-heavy mixture; costs are FLOPs of a published model by formula. Packs are planned as
`ftrain train` plans them, from what it knows of a document: its tokens, and which of them stand side by side.

Legend: N documents, K costs (of encoders, of the decoder), P packs, R ranks.
"""

import time
from dataclasses import dataclass

import numpy as np

from experiments.decoder_plan import active_weights
from experiments.sight_plan import described
from ftrain.data.cost import Cost
from ftrain.data.layout import PackLayout, Stream
from ftrain.data.packing import Packing
from ftrain.data.row_plan import RowGroup
from ftrain.modules import spec, vision_tower
from ftrain.modules.vision_tower import TowerConfig

MODEL = "qwen3-vl-30b-a3b"
_TOKEN = 0  # stands for a place of media
_FILMS, _PICTURES = 0.5, 0.25  # parts of documents
_TEXT = (350.0, 0.9)  # median and deviation of the logarithm
_FRAMES = (20.0, 0.9)  # the same
_SIDES = ((8, 10, 12, 14, 16), (8, 12, 16, 20))  # tokens of the sides of a frame of a film
_PICTURE = (64, 2500)  # tokens of a picture, evenly by the logarithm


@dataclass(frozen=True)
class Stepped:
    """Of many steps: what ranks wait for each other in encoders and in the decoder, as a part of the mean, of all steps
    together (`encoder`, `decoder`) and of the worst one; the `padding` of the budget, CPU seconds of a step.
    """

    encoder: float
    decoder: float
    worst_encoder: float
    worst_decoder: float
    padding: float
    seconds: float


def documents(count: int, most: int, *, seed: int = 0) -> list[tuple[int, np.ndarray]]:
    """Tokens of text, and those of each frame or picture, of documents of about half of `most` tokens, or less."""
    rng = np.random.default_rng(seed)
    texts = np.exp(rng.normal(np.log(_TEXT[0]), _TEXT[1], count)).astype(np.int64).clip(16, most // 8)
    found = []
    for text, kind in zip(texts.tolist(), rng.random(count).tolist(), strict=True):
        media = np.zeros(0, np.int64)
        if kind < _FILMS:
            frame = int(rng.choice(_SIDES[0]) * rng.choice(_SIDES[1]))
            frames = int(np.exp(rng.normal(np.log(_FRAMES[0]), _FRAMES[1])))
            media = np.full(min(max(2, frames), most * 3 // 8 // frame), frame)
        elif kind < _FILMS + _PICTURES:
            media = np.exp(rng.uniform(*np.log(_PICTURE), rng.integers(1, 5))).astype(np.int64)
        found.append((text, media))
    return found


@dataclass(frozen=True)
class TowerFlops:
    """FLOPs of a forward pass over frames: `linear` of a token, and attention in each frame."""

    linear: float
    square: float

    @staticmethod
    def of(cfg: TowerConfig) -> "TowerFlops":
        """Of a tower whose layers all see whole frames."""
        specs, patches = vision_tower.specs(cfg), cfg.merge**2
        of_patch = spec.count({"patch": specs["patch"], "layers": specs["layers"]})
        of_token = spec.count({name: specs[name] for name in ("merger", "deep") if name in specs})
        return TowerFlops(2.0 * (patches * of_patch + of_token), 4.0 * cfg.layers * cfg.d_model * patches**2)

    def __call__(self, frames_n: np.ndarray) -> float:
        """Of frames of so many tokens each."""
        tokens_n = frames_n.astype(np.float64)
        return float((self.linear * tokens_n + self.square * tokens_n**2).sum())


def measured(packing: Packing, *, steps: int, even: bool, seed: int = 0) -> Stepped:
    """Of so many steps. `even`: encoders are looked at; else the decoder alone, as for text."""
    model = described(MODEL)
    tower, text = model.media.tower, model.text
    flops_of = TowerFlops.of(tower)
    heads = text.attention
    cost = Cost.of_sizes(parameters=active_weights(text), layers=text.layers, width=heads.heads * heads.head_dim)
    stream = Stream(_TOKEN, 1, dict, quadratic=tower.merge**2 / (6 * tower.d_model))
    layout, source = PackLayout((stream,)), iter(documents((steps + 6) * packing.packs * 16, packing.tokens, seed=seed))
    rows, flops, since = list[RowGroup](), list[float](), list[int]()
    found, spent = [], 0.0
    for number in range(steps):
        while sum(row.tokens for row in rows) < packing.waiting:
            words, media = next(source)
            tokens = np.concatenate([np.r_[np.full(n, _TOKEN), _TOKEN + 1] for n in media] or [np.zeros(0)])
            seen = stream.seen(tokens)[0] if even else 0.0
            rows.append(RowGroup(words + int(media.sum()), words, (int(media.sum()),), 1, seen))
            flops.append(flops_of(media))
            since.append(number)
        costs_N = cost(np.array([row.tokens for row in rows]))
        began = time.thread_time()
        plan = layout.plan(rows, costs_N, number - np.array(since), packing)
        spent += time.thread_time() - began
        costs_NK = np.stack([np.array(flops), costs_N], 1)
        sums_PK = np.stack([costs_NK[plan.pack_N == pack].sum(0) for pack in range(packing.packs)])
        found.append((sums_PK.max(0), sums_PK.mean(0), 1 - plan.tokens_P.sum() / (packing.tokens * packing.packs)))
        left = plan.pack_N < 0
        rows, flops, since = ([x for x, waits in zip(one, left, strict=True) if waits] for one in (rows, flops, since))
    most_SK, mean_SK = np.stack([most for most, _, _ in found]), np.stack([mean for _, mean, _ in found])
    together, worst = most_SK.sum(0) / mean_SK.sum(0) - 1, (most_SK / mean_SK).max(0) - 1
    padding = float(np.mean([empty for *_, empty in found]))
    return Stepped(*map(float, (*together, *worst)), padding, spent / steps)
