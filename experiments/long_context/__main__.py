"""Train a small sparse mixture of experts on short documents, lengthen them, and find needles at 32,768 tokens.

python -m experiments.long_context [--out FOLDER] [--json FILE] [--small]
"""

import sys
import time
from collections.abc import Callable, Mapping, Sequence
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
from experiments.curve import Curve
from experiments.long_context import haystack, model
from experiments.long_context.haystack import KINDS, Needle, Sources
from experiments.omni.sources import HELD_OUT, TRAIN
from ftrain import TrainState
from ftrain.checkpoint import Checkpointer
from ftrain.modules import decoder
from ftrain.modules.omni import OmniModel
from ftrain.run.folder import write_json
from ftrain.run.stages import Stage, always, fold


class Part(NamedTuple):
    """So many `steps` on packs of `documents` documents of `tokens` tokens, with so many needles of `kinds` in each."""

    kinds: tuple[str, ...]
    steps: int
    documents: int
    tokens: int
    needles: int

    @property
    def name(self) -> str:
        """What it is called in logs."""
        return f"{', '.join(self.kinds)} in {self.tokens:,} tokens"


WRITTEN = KINDS[:1]
CURRICULUM = (Part(WRITTEN, 160, 16, 72, 6), Part(KINDS, 320, 16, 96, 8), Part(KINDS, 40, 3, 1024, 8))
"""How to find a needle is learned from written ones, which need no reading; then to read what is drawn and said."""

LENGTHS = (256, 2048, 8192, 32_768)


@dataclass(frozen=True)
class Options:
    """What can be chosen."""

    out: Path = Path("runs/long_context")
    """Folder of checkpoints; a run that was stopped goes on."""
    json: Path | None = None
    """Where figures are written."""
    small: bool = False
    """A few steps on short documents, to see that all runs."""
    needles: int = 8
    """Digits that are hidden in each held-out document, about a third of each kind."""
    questions: int = 96
    """Held-out needles that are looked for at each length."""
    rate: float = 1e-2
    """Learning rate."""
    threads: int = 2
    """CPU threads of each op."""
    seed: int = 0
    """Of weights and documents."""


Say = Callable[[str], None]


def main(options: Options) -> dict[str, Any]:
    """Train through the curriculum, then look for needles at every length."""
    torch.set_num_threads(options.threads)
    console, began = Console(width=110), time.monotonic()

    def say(line: str) -> None:
        console.print(f"{time.monotonic() - began:6.0f} s  {line}", highlight=False)

    parts = (Part(WRITTEN, 2, 2, 64, 3), Part(KINDS, 1, 1, 256, 6)) if options.small else CURRICULUM
    lengths = (256, 512) if options.small else LENGTHS
    of = haystack.load(*model.readers(), takes=1 if options.small else 6, seed=options.seed)
    net = model.omni_model(of)
    say(f"{len(of.train.text_N):,} words of text, {len(of.train.speech.mels_NFM):,} spoken digits, "
        f"{len(of.train.images.labels_N):,} pictures of digits to train on")  # fmt: skip
    curve = Curve(options.out / "losses.jsonl", 1 if options.small else 20, say)
    state = train(of, net, parts, options, curve)
    asked = []
    for tokens in lengths:
        asked.append(ask(state, of, net, tokens, options))
        say(f"{tokens:,} tokens: {_shares(asked[-1]['by_kind'])}")
    table(asked, console)
    found = {**asdict(Machine.here()), "seed": options.seed, "needles": options.needles, "rate": options.rate,
             "threads": options.threads,
             "curriculum": [part._asdict() for part in parts], "losses": curve.rows(), "held_out": asked}  # fmt: skip
    if options.json is not None:
        write_json(options.json, found)
    return found


def train(of: Sources, net: OmniModel, parts: Sequence[Part], options: Options, curve: Curve) -> TrainState:
    """The state after all parts. A folder that holds a part of the training is gone on from.

    `curve` gets the losses of each step, and `cpu_s`, the seconds of CPU that it took with its data.
    """
    tx = model.optimizer(options.rate, sum(part.steps for part in parts))

    def stage(number: int, part: Part) -> Stage:
        def data(i: int) -> dict[str, Any]:
            return haystack.batch(
                of, net, split=TRAIN, documents=part.documents, tokens=part.tokens, needles=part.needles,
                seed=options.seed, number=number << 32 | i, kinds=part.kinds,
            ).batch  # fmt: skip

        def start(state: Any, key: Any) -> TrainState:
            return model.init_state(net, tx, key) if number == 0 else state

        step = ftrain.jit(model.train_step(net, tx, part.kinds), donate="state")
        return Stage(part.name, part.steps, [(always, step)], data, start)

    used_s = time.process_time()

    def log(stage: str, number: int, losses: Mapping[str, Any]) -> None:
        nonlocal used_s
        before, used_s = used_s, time.process_time()
        curve.log(stage, number, {**losses, "cpu_s": used_s - before})

    with Checkpointer(options.out / "checkpoints") as checkpoints:
        stages = [stage(number, part) for number, part in enumerate(parts)]
        state: TrainState = fold(stages, {}, seed=options.seed, checkpoints=checkpoints, save=40, log=log)
    return state


def ask(state: TrainState, of: Sources, net: OmniModel, tokens: int, options: Options) -> dict[str, Any]:
    """The share of held-out needles found in documents of so many tokens, by kind and by depth.

    Each document asks for all of its needles one after the other; the true answers to earlier questions, which are of
    other names, stand before a question.
    """

    def answer(params: Any, balance: Any, batch: Any) -> Any:
        hidden_AD, _ = model.thoughts(params, batch, model=net, balance=balance)
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
