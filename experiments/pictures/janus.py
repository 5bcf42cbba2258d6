"""A small Janus that reads handwritten digits and draws them, trained both ways at once on real digits.

python -m experiments.pictures.janus [--steps N] [--json FILE]

First the tokenizer is trained by itself, then the model beside the frozen tokenizer: of each batch one half is pictures
whose digit is asked for, the other digits that are to be drawn, of which a tenth have no words (for guidance). Read
digits are by writers who are held out; drawn ones are told by a classifier of real digits.
"""

import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import tyro
from rich.console import Console
from rich.table import Table
from sklearn.svm import SVC
from torch import Tensor

import ftrain
from experiments.bench.table import Row, publish, row
from experiments.omni import digits
from experiments.omni.digits import Digits, Warp
from experiments.omni.tokenizer_training import train_tokenizer
from ftrain import TrainState, optim
from ftrain.bridge.native_janus import NativeJanus
from ftrain.modules import janus, vq_image
from ftrain.modules.attention import AttentionConfig
from ftrain.modules.autoregression import generate_ids
from ftrain.modules.decoder_config import DecoderConfig
from ftrain.modules.janus import JanusConfig
from ftrain.modules.janus_generation import janus_codes, without_words
from ftrain.modules.picture_encoder import PictureConfig
from ftrain.modules.sampling import Sampling
from ftrain.modules.vq_image import VqConfig

PAD, BOS, EOS, BEGIN, END, IMAGE, FIRST = range(7)
"""Tokens; the digits are from `FIRST` on."""
CODEC = VqConfig(
    size=8, channels=1, widths=(32, 64), codes=64, d_code=8, groups=8, networks="vqgan", latent=32, attention=(1,)
)
CFG = JanusConfig(
    text=DecoderConfig(16, 64, layers=4, attention=AttentionConfig(64, heads=4, kv_heads=4, head_dim=16), d_hidden=192),
    picture=PictureConfig(64, layers=2, heads=4, d_hidden=128, size=8, patch=2, channels=1),
    codec=CODEC, image=IMAGE, d_head=64,
)  # fmt: skip


@dataclass(frozen=True)
class Options:
    """What can be chosen."""

    steps: int = 400
    """updates of the model"""
    codec_steps: int = 300
    """updates of the tokenizer, before"""
    batch: int = 24
    """pictures of each kind in a step"""
    rate: float = 2e-3
    """peak learning rate"""
    drawn: int = 20
    """pictures of each digit that are judged"""
    guidance: float = 2.0
    """of what is drawn"""
    seed: int = 0
    """of the weights, the order and the draws"""
    json: Path | None = None
    """also write the rows to this file"""


def batch_of(read: np.ndarray, read_N: np.ndarray, drawn: np.ndarray, drawn_N: np.ndarray, silent: np.ndarray) -> Any:
    """Raw leaves of pictures that are read and of pictures that are drawn, each `[N, 8, 8, 1]` and its digits; those
    that are `silent` are drawn without words.
    """
    tokens, labels = list[int](), list[int]()
    for digit in read_N.tolist():
        tokens += [BOS, BEGIN, *[IMAGE] * CFG.seen_tokens, END, FIRST + digit]
        labels += [-100] * (2 + CFG.seen_tokens) + [FIRST + digit, EOS]
    for digit, quiet in zip(drawn_N.tolist(), silent.tolist(), strict=True):
        tokens += [BOS, PAD if quiet else FIRST + digit, BEGIN, *[IMAGE] * CFG.drawn_tokens]
        labels += [-100] * (3 + CFG.drawn_tokens)
    lengths = [CFG.seen_tokens + 4] * len(read_N) + [CFG.drawn_tokens + 3] * len(drawn_N)
    return {
        "tokens": torch.tensor(tokens), "labels": torch.tensor(labels),
        "segments": torch.repeat_interleave(torch.tensor(lengths)),
        "pixels": _channels_first(read), "targets": _channels_first(drawn),
        "drawn": torch.tensor([False] * len(read_N) + [True] * len(drawn_N)),
    }  # fmt: skip


def _channels_first(images_NHWC: np.ndarray) -> Tensor:
    return torch.from_numpy(np.ascontiguousarray(images_NHWC.transpose(0, 3, 1, 2)))


def fit(params: Any, seen: Digits, options: Options, console: Console) -> tuple[Any, dict[str, list[float]]]:
    """The trained parameters, the tokenizer's as they were, and the losses of each step."""
    rate = optim.warmup_cosine(options.rate, warmup_steps=min(40, options.steps // 5 + 1), total_steps=options.steps)
    tx = optim.chain(optim.clip_by_global_norm(1.0), optim.adamw(rate, weight_decay=0.05))
    codec, made = params["codec"], NativeJanus(CFG)

    def loss_fn(trained: Any, frozen: Any, batch: Any) -> Any:
        terms = made.terms({**trained, "codec": frozen}, batch)
        return ftrain.weighted_sum(terms, {}), {name: mean.value() for name, mean in terms.items()}

    @ftrain.jit(donate="state")
    def step(state: TrainState, frozen: Any, batch: Any) -> Any:
        (_, terms), grads = ftrain.value_and_grad(loss_fn, has_aux=True)(state.params, frozen, batch)
        return state.apply(tx, grads), terms

    state = TrainState.create({name: part for name, part in params.items() if name != "codec"}, tx)
    rng, losses, began = np.random.default_rng(options.seed), dict[str, list[float]](), time.monotonic()
    for i in range(options.steps):
        chosen = rng.integers(len(seen.labels_N), size=(2, options.batch))
        bent = [digits.bend(seen.images_NHWC[own], rng, warp=Warp()).astype(np.float32) for own in chosen]
        named = [seen.labels_N[own] for own in chosen]
        raw = batch_of(bent[0], named[0], bent[1], named[1], rng.random(options.batch) < 0.1)
        state, terms = step(state, codec, made.media(raw))
        for name, value in terms.items():
            losses.setdefault(name, []).append(float(value))
        if i % 100 == 0 or i == options.steps - 1:
            told = ", ".join(f"{name} {float(value):.3f}" for name, value in terms.items())
            console.print(f"step {i}: {told}, {time.monotonic() - began:.0f} s", highlight=False)
    return {**state.params, "codec": codec}, losses


@torch.no_grad()
def read(params: Any, given: Digits) -> np.ndarray:
    """What digit the model says each picture is, -1 where it says none."""
    found = []
    for at in range(0, len(given.labels_N), 64):
        images = given.images_NHWC[at : at + 64]
        none = images[:0], np.zeros(0, np.int64), np.zeros(0, bool)
        raw = batch_of(images, np.zeros(len(images), np.int64), *none)
        made = NativeJanus(CFG)
        given_to = made.media({name: leaf for name, leaf in raw.items() if name not in ("targets", "drawn")})
        scores = made.logits(params, given_to)[raw["labels"] == FIRST]
        found.append(scores.argmax(-1).numpy() - FIRST)
    said_N = np.concatenate(found)
    return np.where(said_N >= 0, said_N, -1)


@torch.no_grad()
def draw(params: Any, named: Sequence[int], *, guidance: float, seed: int) -> Tensor:
    """Pictures of these digits, `[N, 1, 8, 8]`."""
    prompts = [[BOS, FIRST + digit, BEGIN] for digit in named]
    quiet = [without_words(prompt, keep=(BOS, BEGIN), fill=PAD) for prompt in prompts]
    family = janus_codes(CFG) if guidance == 1 else janus_codes(CFG, guidance=guidance, unconditional=quiet)
    how, key = Sampling(1.0, None, None), ftrain.key(seed)
    codes_BN = generate_ids(params, prompts, family=family, max_new=CFG.drawn_tokens, key=key, how=how)
    return vq_image.decode(params["codec"], codes_BN, cfg=CFG.codec)


def main(options: Options) -> list[Row]:
    """Train, read, draw, print and write the rows."""
    console = Console(width=110)
    seen, held_out = digits.split()
    flat = [own.images_NHWC.reshape(len(own.labels_N), -1) for own in (seen, held_out)]
    judge = SVC(C=10, gamma=0.02).fit(flat[0], seen.labels_N)
    images, steps = seen.images_NHWC.transpose(0, 3, 1, 2).copy(), options.codec_steps
    codec, error = train_tokenizer(images, cfg=CODEC, steps=steps, seed=options.seed, device=torch.device("cpu"))
    console.print(f"tokenizer: squared error {error:.4f} of pixels in [-1, 1]", highlight=False)
    fresh = {**ftrain.init(janus.specs(CFG), ftrain.key(options.seed)), "codec": codec}
    named = [digit for digit in range(10) for _ in range(options.drawn)]

    def told(drawn: Tensor) -> np.ndarray:
        return judge.predict(drawn.flatten(1).numpy()) == np.array(named)

    before_N = read(fresh, held_out) == held_out.labels_N
    untrained = float(told(draw(fresh, named, guidance=1.0, seed=options.seed)).mean())
    params, losses = fit(fresh, seen, options, console)
    said_N = read(params, held_out) == held_out.labels_N
    plain_N, guided_N = (told(draw(params, named, guidance=g, seed=options.seed)) for g in (1.0, options.guidance))
    targets = _channels_first(held_out.images_NHWC)
    with torch.no_grad():
        codes_BN = vq_image.encode(codec, targets, cfg=CODEC)
        back = vq_image.decode(codec, codes_BN, cfg=CODEC).flatten(1).numpy()
    ceiling = float((judge.predict(back) == held_out.labels_N).mean())
    _print_digits(console, held_out, said_N, np.array(named), plain_N, guided_N, options.guidance)
    few = max(1, options.steps // 20)
    how = f"{options.steps} steps of {options.batch} digits read and {options.batch} drawn"
    rows = [
        row(f"loss of what is {word}, last steps", float(np.mean(losses[name][-few:])), "nats",
            goal=float(np.mean(losses[name][:few])) * most, peer=float(np.mean(losses[name][:few])),
            how=f"{how}; peer: the first steps")
        for name, word, most in (("text", "read", 0.5), ("drawn", "drawn", 0.7))
    ]  # fmt: skip
    rows += [
        row("read wrongly, held-out writers", 1 - float(said_N.mean()), "", goal=0.25, peer=1 - float(before_N.mean()),
            how=f"{len(said_N)} digits; peer: before training"),
        row("drawn, told to be another digit", 1 - float(plain_N.mean()), "", peer=1 - untrained,
            how=f"{len(named)} digits by a support vector machine; peer: before training"),
        row(f"drawn with guidance {options.guidance}, told to be another", 1 - float(guided_N.mean()), "", goal=0.4,
            peer=1 - float(plain_N.mean()), how="peer: without guidance"),
        row("real digits through the tokenizer, told to be another", 1 - ceiling, "",
            peer=1 - float(judge.score(flat[1], held_out.labels_N)), how="held-out writers; peer: without it"),
    ]  # fmt: skip
    publish(rows, "a small Janus on handwritten digits", options.json)
    return rows


def _print_digits(
    console: Console, held_out: Digits, said_N: np.ndarray, named_N: np.ndarray, plain_N: np.ndarray,
    guided_N: np.ndarray, guidance: float,
) -> None:  # fmt: skip
    table = Table("digit", "read rightly, held out", "drawn rightly", f"with guidance {guidance}")
    for digit in range(10):
        own = (said_N[held_out.labels_N == digit], plain_N[named_N == digit], guided_N[named_N == digit])
        table.add_row(str(digit), *(f"{float(x.mean()):.0%}" for x in own))
    console.print(table)


if __name__ == "__main__":
    main(tyro.cli(Options))
