"""Train a model that hears a spoken number and answers with the next one, in writing and in speech at the same time.

python -m experiments.stream [--steps N] [--json FILE]

Layers below a language model hear (CTC), layers above it speak; the voices are espeak-ng's, and it is judged on voices
that are held out. It prints a table and whether every loss has fallen.
"""

from typing import Any

import numpy as np
import torch
import tyro
from rich.console import Console

from experiments.bench.table import Row, publish, row
from experiments.stream import model, talk, words
from experiments.stream.fitting import Options, fit, loss_rows
from experiments.stream.model import Talker
from experiments.stream.words import BLANK, NUMBERS, Judge, Said, spelled
from ftrain.modules.packed_ctc import collapsed


def main(options: Options) -> list[Row]:
    """Make the words, train, judge, print and write the rows. ValueError without espeak-ng."""
    clips = words.clips(takes=options.takes, seed=options.seed)
    units = words.learnt_units(clips[0], seed=options.seed)
    trained, deliveries, voices = (words.said(one, units) for one in clips)
    return run(options, (trained, deliveries, voices), talk.TALKER)


def run(options: Options, splits: tuple[Said, Said, Said], cfg: Talker) -> list[Row]:
    """The same with words that are there (to train on, said otherwise, of other voices) and a model of any size."""
    torch.set_num_threads(options.threads)
    console = Console(width=110)
    trained, deliveries, voices = splits
    judge = words.judge(trained, voices)
    console.print(f"{len(trained.number_N)} words to train on; {len(voices.number_N)} of held-out voices")

    def batch(rng: np.random.Generator) -> Any:
        return talk.batch_of(trained, rng.choice(len(trained.number_N), options.batch, replace=False), rng)

    params, curve = fit(
        model.specs(cfg),
        lambda params, batch: model.loss_terms(params, batch, cfg),
        batch,
        options=options,
        console=console,
    )
    rows = []
    for name, split in (("held-out voices", voices), ("held-out deliveries", deliveries)):
        rows += _rows(name, measured(params, split, judge, cfg), judge, options)
    rows += loss_rows(curve)
    publish(rows, "hears a number, answers with the next in text and speech", options.json)
    return rows


def measured(params: Any, split: Said, judge: Judge, cfg: Talker) -> dict[str, float]:
    """The share of words that are heard, written and spoken right, and of answers that say what they write."""
    heard, written, units_NU = talk.talk(params, split.heard_NLW, cfg)
    asked = [NUMBERS[n] for n in split.number_N]
    replies = talk.answers(split.number_N)
    told_N = judge.told(units_NU)
    wrote = [spelled(tokens) for tokens in written]
    hears = [spelled(collapsed(tokens, blank=BLANK)) for tokens in heard]
    return {
        "heard": float(np.mean([x == y for x, y in zip(hears, asked, strict=True)])),
        "written": float(np.mean([x == NUMBERS[n] for x, n in zip(wrote, replies, strict=True)])),
        "spoken": float(np.mean(told_N == replies)),
        "spoken as written": float(np.mean([NUMBERS[n] == x for n, x in zip(told_N, wrote, strict=True)])),
    }


def _rows(split: str, found: dict[str, float], judge: Judge, options: Options) -> list[Row]:
    how = (
        f"{options.steps} steps of {options.batch} talks; the share of words wrong; peer: of real words of held-out "
        "voices, what the judge of speech gets wrong"
    )
    peer = round(1 - judge.held_out, 4)
    return [
        row(f"{split}: not {name}", 1 - value, "", peer=peer if name == "spoken" else None, how=how)
        for name, value in found.items()
    ]


if __name__ == "__main__":
    main(tyro.cli(Options))
