"""Train a small sparse mixture of experts on short documents, lengthen them, and find needles at 32,768 tokens.

python -m experiments.long_context [--out FOLDER] [--json FILE] [--small]
"""

import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import tyro
from rich.console import Console
from rich.table import Table

import ftrain
from experiments.bench.machine import Machine
from experiments.long_context import haystack, model
from experiments.long_context.haystack import KINDS, Needle, Sources
from experiments.omni import training
from experiments.omni.sources import HELD_OUT, TRAIN
from ftrain import TrainState
from ftrain.modules import decoder, omni
from ftrain.modules.omni import OmniModel
from ftrain.run.folder import write_json


class Stage(NamedTuple):
    """So many `steps` on packs of `documents` documents of `tokens` tokens, with so many needles in each."""

    steps: int
    documents: int
    tokens: int
    needles: int


CURRICULUM = (Stage(200, 32, 64, 4), Stage(150, 12, 256, 12), Stage(50, 2, 2048, 15), Stage(10, 1, 8192, 15))
LENGTHS = (256, 2048, 8192, 32_768)


@dataclass(frozen=True)
class Options:
    """What can be chosen."""

    json: Path | None = None
    """Where figures are written."""
    small: bool = False
    """A few steps on short documents, to see that all runs."""
    needles: int = 15
    """Digits that are hidden in each held-out document, a third of each kind."""
    questions: int = 150
    """Held-out needles that are looked for at each length."""
    rate: float = 3e-3
    """Learning rate."""
    threads: int = 2
    """CPU threads of each op."""
    seed: int = 0
    """Of weights and documents."""


Say = Callable[[str], None]


def main(options: Options) -> dict[str, Any]:
    """Train through the curriculum, ask at every length after each stage, and tell the last answers by depth."""
    torch.set_num_threads(options.threads)
    console, began = Console(width=110), time.monotonic()

    def say(line: str) -> None:
        console.print(f"{time.monotonic() - began:6.0f} s  {line}", highlight=False)

    stages = (Stage(2, 2, 64, 3), Stage(1, 1, 256, 6)) if options.small else CURRICULUM
    lengths = (256, 512) if options.small else LENGTHS
    of = haystack.load(*model.readers(), takes=1 if options.small else 6, seed=options.seed)
    net = model.omni_model(of)
    say(f"{len(of.train.text_N):,} words of text, {len(of.train.speech.mels_NFM):,} spoken digits, "
        f"{len(of.train.images.labels_N):,} pictures of digits to train on")  # fmt: skip
    tx = model.optimizer(options.rate, sum(s.steps for s in stages))
    step = ftrain.jit(training.train_step(net, tx, KINDS, dict.fromkeys(KINDS, 1.0)), donate="state")
    state = training.init_state(net, tx, ftrain.key(options.seed))
    curves: list[dict[str, Any]] = []
    told: list[dict[str, Any]] = []
    number = 0
    for stage in stages:
        state, number = train(step, state, of, net, stage, number, options, curves, say)
        asked = [ask(state, of, net, tokens, options) for tokens in lengths if tokens <= 8192 or stage is stages[-1]]
        told.append({"after": stage._asdict(), "held_out": asked})
        say("; ".join(f"{a['tokens']:,}: {_shares(a['by_kind'])}" for a in asked))
    table(told[-1]["held_out"], console)
    found = {**asdict(Machine.here()), "seed": options.seed, "needles": options.needles, "rate": options.rate,
             "seconds": round(time.monotonic() - began), "losses": curves, "stages": told}  # fmt: skip
    if options.json is not None:
        write_json(options.json, found)
    return found


def train(
    step: Any, state: TrainState, of: Sources, net: OmniModel, stage: Stage, number: int, options: Options,
    curves: list[dict[str, Any]], say: Say,
) -> tuple[TrainState, int]:  # fmt: skip
    """The state and the number of the next step after a stage; mean losses of its parts go to `curves`."""
    each, losses = max(1, stage.steps // 5), list[np.ndarray]()
    for i in range(stage.steps):
        made = haystack.batch(
            of, net, split=TRAIN, documents=stage.documents, tokens=stage.tokens, needles=stage.needles,
            seed=options.seed, number=number,
        )  # fmt: skip
        state, metrics = step(state, made.batch)
        losses.append(np.array([float(metrics["terms"][kind]) for kind in KINDS]))
        number += 1
        if (i + 1) % each == 0:
            mean = dict(zip(KINDS, np.mean(losses, 0).round(4).tolist(), strict=True))
            curves.append({"step": number, "tokens": stage.tokens, **mean})
            say(f"step {number}, {stage.documents} x {stage.tokens}: {mean}")
            losses.clear()
    return state, number


def ask(state: TrainState, of: Sources, net: OmniModel, tokens: int, options: Options) -> dict[str, Any]:
    """The share of held-out needles found in documents of so many tokens, by kind and by depth.

    Each document asks for all of its needles one after the other; the true answers to earlier questions, which are of
    other names, stand before a question.
    """

    def answer(params: Any, balance: Any, batch: Any) -> Any:
        rows, places, _ = omni.media_rows(params, batch, model=net)
        x_TD = omni.merge(decoder.embed(params["foundation"], batch["tokens_T"]), rows, places)
        hidden_TD, _ = omni.hidden_states(params, x_TD, batch, model=net, balance=balance)
        hidden_AD = hidden_TD.index_select(0, batch["place_A"])
        return decoder.logits(params["foundation"], hidden_AD, net.foundation).argmax(-1) == batch["answer_A"]

    run, needles, right = ftrain.jit(answer), list[Needle](), list[np.ndarray]()
    documents = max(1, min(-(-options.questions // options.needles), 8192 // tokens))
    number = 0
    while len(needles) < options.questions:
        made = haystack.batch(
            of, net, split=HELD_OUT, documents=documents, tokens=tokens, needles=options.needles, seed=options.seed,
            number=number,
        )  # fmt: skip
        right.append(run(state.params, state.extra["balance"], made.batch).numpy())
        needles += made.needles
        number += 1
    right_A = np.concatenate(right)
    kind_A = np.array([needle.kind for needle in needles])
    return {
        "tokens": tokens,
        "questions": len(needles),
        "all": float(right_A.mean()),
        "by_kind": {kind: float(right_A[kind_A == k].mean()) for k, kind in enumerate(KINDS)},
        "by_depth": haystack.depths(needles, right_A),
    }


def _shares(shares: dict[str, float]) -> str:
    return ", ".join(f"{name} {share:.0%}" for name, share in shares.items())


def table(asked: list[dict[str, Any]], console: Console) -> None:
    """Accuracy by length, kind and depth."""
    shown = Table(title="needles found in held-out text, of held-out writers and voices")
    for column in ("tokens", "questions", *KINDS, *(f"depth {20 * p} to {20 * p + 20}%" for p in range(5))):
        shown.add_column(column, justify="right")
    for a in asked:
        by_depth = ["" if share is None else f"{share:.1%}" for share in a["by_depth"]]
        shown.add_row(f"{a['tokens']:,}", str(a["questions"]), *(f"{s:.1%}" for s in a["by_kind"].values()), *by_depth)
    console.print(shown)


if __name__ == "__main__":
    try:
        main(tyro.cli(Options))
    except ValueError as error:
        sys.exit(f"long_context: {error}")
