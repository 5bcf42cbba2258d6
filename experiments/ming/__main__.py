"""Train a decoder with a router for each modality: what it hears it writes and draws, what it sees it writes and says.

python -m experiments.ming [--steps N] [--json FILE]

Real digits and espeak-ng's voices; it is judged on voices and writers that are held out, by judges of real things.
"""

from typing import Any, NamedTuple

import numpy as np
import torch
import tyro
from rich.console import Console

from experiments.bench.table import Row, publish, row
from experiments.ming import answer, model
from experiments.ming.answer import COMPOSED, Pictures
from experiments.ming.model import Composed
from experiments.omni import digits
from experiments.omni import judge as judge_of_digits
from experiments.stream import words
from experiments.stream.fitting import Options, fit, loss_rows
from experiments.stream.words import NUMBERS, Said, spelled

_MOST = 160  # documents of each kind that are judged
_COPIES = 8


class Things(NamedTuple):
    """What is said and seen, to train on and held out; the patches that are drawn; and the judges of both."""

    said: tuple[Said, Said]
    seen: tuple[Pictures, Pictures]
    shades_KP: torch.Tensor
    ear: words.Judge
    eye: judge_of_digits.Judge


def main(options: Options) -> list[Row]:
    """Make the things, train, judge, print and write the rows. ValueError without espeak-ng."""
    trained, _, voices = words.clips(takes=options.takes, seed=options.seed)
    return run(options, things((trained, voices), digits.split(), seed=options.seed), COMPOSED)


def things(clips: tuple[Any, Any], images: tuple[digits.Digits, digits.Digits], *, seed: int = 0) -> Things:
    """Of clips and images, to train on (images bent in several ways too) and held out."""
    units, shades_KP = words.learnt_units(clips[0], seed=seed), answer.shades(images[0], seed=seed)
    said = words.said(clips[0], units), words.said(clips[1], units)
    bent = digits.enlarge(images[0], copies=_COPIES, seed=seed)
    seen = answer.pictures(bent, shades_KP), answer.pictures(images[1], shades_KP)
    return Things(said, seen, shades_KP, words.judge(*said), judge_of_digits.train(*images, copies=0))


def run(options: Options, of: Things, cfg: Composed) -> list[Row]:
    """The same with things that are there and a model of any size."""
    torch.set_num_threads(options.threads)
    console = Console(width=110)
    params, curve = fit(
        model.specs(cfg),
        lambda params, batch: model.loss_terms(params, batch, cfg),
        lambda rng: answer.batch_of(of.said[0], of.seen[0], rng, options.batch),
        options=options,
        console=console,
        weights={"even": 0.01},
    )
    how = f"{options.steps} steps of {options.batch} documents; the share of held-out numbers that is wrong"
    peers = {"drawn": 1 - of.eye.held_out_accuracy, "spoken": 1 - of.ear.held_out}
    rows = [
        row(name, 1 - value, "", peer=peers.get(name.rpartition(" ")[2]), how=f"{how}; peer: the judge on real ones")
        for name, value in measured(params, of, cfg).items()
    ]
    rows += [one for one in loss_rows(curve) if not one.name.endswith("even")]
    publish(rows, "a router for each modality: heard numbers are drawn, seen ones spoken", options.json)
    return rows


def measured(params: Any, of: Things, cfg: Composed) -> dict[str, float]:
    """The share of held-out numbers that are written, drawn and spoken right."""
    said, seen = of.said[1], of.seen[1]
    heard, codes = answer.answer(params, "heard", said.heard_NLW[:_MOST], cfg)
    viewed, units = answer.answer(params, "seen", seen.patches_NCP[:_MOST], cfg)
    pictures = of.eye.recognise(answer.drawn(codes, of.shades_KP))
    return {
        "heard, not written": _right(heard, said.number_N[:_MOST]),
        "heard, not drawn": float(np.mean(pictures == said.number_N[:_MOST])),
        "seen, not written": _right(viewed, seen.number_N[:_MOST]),
        "seen, not spoken": float(np.mean(of.ear.told(units) == seen.number_N[:_MOST])),
    }


def _right(texts: list[list[int]], numbers: np.ndarray) -> float:
    return float(np.mean([spelled(text) == NUMBERS[number] for text, number in zip(texts, numbers, strict=True)]))


if __name__ == "__main__":
    main(tyro.cli(Options))
