"""Train LLaMA#Omni or Qwen3-MoE#Omni: a foundation that sees, hears and draws, of parts that each stand alone.

python -m experiments.composed [--foundation llama|qwen3_moe] [--parts.foundation DIR ...] [--json FILE]

Real handwritten digits and espeak-ng's voices. It is judged on writers, voices and pairs of numbers that are held out;
drawn digits are told by a judge of real ones.
"""

from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
import tyro
from rich.console import Console

import ftrain
from experiments.bench.table import Row, publish, row
from experiments.composed.documents import TOLD, Asker, Question, Things, enlarged, shrunk, things
from experiments.composed.model import Composition, Folders, Kind, Size, compose
from experiments.composed.training import KINDS, Curve, Frozen, Training, fit
from experiments.composed.vocabulary import NUMBERS
from experiments.omni import corpus, digits
from experiments.omni import judge as judge_of_digits
from experiments.omni.corpus import CorpusConfig
from experiments.omni.judge import Judge
from experiments.omni.language import LANGUAGES
from experiments.omni.speech import Silence
from experiments.omni.tokenizer_training import train_tokenizer
from experiments.omni.training import made_by
from ftrain.modules import vq_image
from ftrain.modules.generation import generate_codes, generate_text
from ftrain.modules.spec import Tree

_AT_ONCE = 60


@dataclass(frozen=True)
class Options:
    """What can be chosen."""

    foundation: Kind = "llama"
    """dense, or a mixture of experts"""
    parts: Folders = field(default_factory=Folders)
    """published folders in the place of random parts"""
    freeze: tuple[Frozen, ...] = ()
    """parts that stay as they begin"""
    steps: int = 240
    """updates"""
    dozens: int = 4
    """twelve documents of a step each"""
    rate: float = 2e-3
    """peak learning rate"""
    tokenizer_steps: int = 240
    """updates of the tokenizer of pictures before, where it is no folder's"""
    takes: int = 4
    """how often each trained voice says each number"""
    held_out: int = 120
    """held-out questions of each kind"""
    threads: int = 1
    """CPU threads of each op"""
    seed: int = 0
    """of the clips, the weights and the order"""
    json: Path | None = None
    """also write the rows to this file"""


def main(options: Options) -> list[Row]:
    """Make the things, train, judge, print and write the rows. ValueError without espeak-ng."""
    made = corpus.load(cfg=CorpusConfig(options.takes, voice_takes=2, seed=options.seed), languages=LANGUAGES[:1])
    if isinstance(made, Silence):
        raise ValueError(made.reason)
    apart_N = np.isin([delivery.voice for delivery in made.held_out.deliveries], corpus.HELD_OUT_VOICES)
    voices = corpus.part(made.held_out, apart_N)
    return run(options, things(digits.split(), (made.train, voices)), Size())


def run(options: Options, splits: tuple[Things, Things], size: Size) -> list[Row]:
    """The same with things that are there, to train on and held out, and random parts of any size."""
    torch.set_num_threads(options.threads)
    console = Console(width=130)
    to = compose(options.foundation, options.parts, size)
    judge = judge_of_digits.train(splits[0].digits, splits[1].digits, copies=0)
    cfg = Training(options.steps, options.dozens, options.rate, options.freeze, options.seed)
    params, curve = fit(begun(to, splits[0], options, console), Asker(splits[0], to), cfg, console)
    answers = Asker(splits[1], to)
    found = {kind: measured(params, answers, kind, options.held_out, judge, seed=options.seed) for kind in KINDS}
    rows = [*_right_rows(found, options, judge, ceiling(params, to, splits[1], judge)), *_loss_rows(curve)]
    publish(rows, f"{options.foundation} with towers of pictures and sounds, and codes of pictures", options.json)
    return rows


def begun(to: Composition, of: Things, options: Options, console: Console) -> Tree:
    """The parameters that training begins with, after the tokenizer of pictures has been trained, if it is new."""
    params = to.params(ftrain.key(options.seed))
    if not to.learnt:
        images = np.stack([enlarged(one, to.codec.size, to.codec.channels) for one in of.digits.images_NHWC])
        trained, error = train_tokenizer(
            np.ascontiguousarray(images.transpose(0, 3, 1, 2)), cfg=to.codec, steps=options.tokenizer_steps,
            seed=options.seed, device=torch.device("cpu"),
        )  # fmt: skip
        params["decoders"]["image"]["tokenizer"] = trained
        console.print(f"tokenizer of pictures: squared error {error:.4f} of pixels in [-1, 1]", highlight=False)
    return params


def measured(params: Tree, asker: Asker, kind: str, count: int, judge: Judge, *, seed: int) -> float:
    """The share of held-out questions of a kind that are answered right."""
    rng = np.random.default_rng(seed)
    asked, right = [asker.ask(kind, number, rng) for number in range(count)], 0
    for first in range(0, count, _AT_ONCE):
        few = asked[first : first + _AT_ONCE]
        if made_by(kind):
            right += _drawn_right(params, asker.to, few, judge, seed + first)
        else:
            right += _said_right(params, asker.to, few)
    return right / count


def _said_right(params: Tree, to: Composition, asked: list[Question]) -> int:
    longest = max(len(to.words.encode(one.words)) for one in asked) + 1
    said = generate_text(
        params, [one.prompt for one in asked], model=to.model, max_new=longest, stop=to.words.mark("</s>")
    )
    return sum(to.words.decode(ids) == one.words for ids, one in zip(said, asked, strict=True))


def _drawn_right(params: Tree, to: Composition, asked: list[Question], judge: Judge, seed: int) -> int:
    codes_BN = generate_codes(
        params, [one.prompt for one in asked], model=to.model, decoder="image", key=ftrain.key(seed), temperature=0.3
    )
    with torch.no_grad():
        images = to.model.decoder("image").lm_generate(params["decoders"]["image"], codes_BN).numpy()
    told = judge.recognise(shrunk(images))
    return sum(NUMBERS[number] == one.words[0] for number, one in zip(told, asked, strict=True))


def ceiling(params: Tree, to: Composition, of: Things, judge: Judge) -> float:
    """The share of real held-out digits that the judge tells rightly when they have gone through the tokenizer."""
    images = np.stack([enlarged(one, to.codec.size, to.codec.channels) for one in of.digits.images_NHWC])
    tokenizer = params["decoders"]["image"]["tokenizer"]
    with torch.no_grad():
        codes_BN = vq_image.encode(tokenizer, torch.from_numpy(images.transpose(0, 3, 1, 2).copy()), cfg=to.codec)
        back = vq_image.decode(tokenizer, codes_BN, cfg=to.codec).numpy()
    return judge.accuracy(shrunk(back), of.digits.labels_N)


def _right_rows(found: dict[str, float], options: Options, judge: Judge, through: float) -> list[Row]:
    frozen = f", {' and '.join(options.freeze)} frozen" if options.freeze else ""
    how = f"{options.steps} steps of {12 * options.dozens} documents{frozen}; of {options.held_out} held-out questions"
    real = f"peer: real digits through the tokenizer; the judge without it: {1 - judge.held_out_accuracy:.4f}"
    rows = list[Row]()
    for kind, value in found.items():
        drawn = made_by(kind) is not None
        peer = round(1 - through, 4) if drawn else None
        rows.append(row(f"{TOLD[kind]}: wrong", 1 - value, "", peer=peer, how=f"{how}; {real}" if drawn else how))
    return rows


def _loss_rows(curve: Curve) -> list[Row]:
    rows, few = list[Row](), max(1, len(curve) // 20)
    for kind in KINDS:
        first, last = (float(np.mean([step[kind] for step in part])) for part in (curve[:few], curve[-few:]))
        rows.append(
            row(f"{TOLD[kind]}: loss", last, "nats", goal=first * (0.75 if made_by(kind) else 0.5),
                peer=round(first, 4), how="mean of the last steps, a twentieth of all; peer: of the first")
        )  # fmt: skip
    return rows


if __name__ == "__main__":
    main(tyro.cli(Options))
