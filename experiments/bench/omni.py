"""How fast is a training step of a model that sees and hears? ftrain beside transformers, on the same samples.

    python -m experiments.bench.omni --json experiments/bench/results/omni-step-cpu.json

Both sides run in one process, turn by turn, on equal weights. A step is forward, backward, clipping of the gradients'
global norm to 1, and AdamW, in float32. Samples are chats with pictures and films of any size, some of text alone: ours
lie in one pack, theirs are rows that are filled up to the longest. What counts are tokens that are no padding.
"""

import statistics
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
import tyro
from torch import Tensor

import ftrain
from experiments.bench import omni_samples
from experiments.bench.machine import device_title
from experiments.bench.omni_samples import Kind
from experiments.bench.side import Side
from experiments.bench.table import Row, publish, row
from ftrain.analysis.meter import measure_peak
from ftrain.modules.model import Model
from ftrain.optim import adamw, chain, clip_by_global_norm
from ftrain.step.state import TrainState

RATE, DECAY, LARGEST_NORM = 1e-4, 0.01, 1.0
_SAME_LOSS = 1e-3
_GOAL = 0.5  # of their time for a useful token


@dataclass(frozen=True)
class Options:
    """Command line of the bench."""

    models: tuple[Kind, ...] = omni_samples.KINDS
    """which models, small ones of random weights"""
    tokens: int = 2048
    """tokens of a pack; a step has one"""
    rounds: int = 5
    """measured steps of each side, after two that are not"""
    quick: bool = False
    """tiny models and few rounds: to see that it works, not to judge by"""
    json: Path | None = None
    """also write the rows to this file"""


def main(options: Options) -> int:
    """Run, print the rows, and write them; 1 if a goal is missed."""
    rows: list[Row] = []
    for kind in options.models:
        rows += compare(kind, options)
        publish(rows, f"models that see and hear, {device_title('cpu')}", options.json)
    return int(any(r.ok is False for r in rows))


def compare(kind: Kind, options: Options) -> list[Row]:
    """Rows of one model: useful tokens a second of each side, our share of their time and memory."""
    rounds = 1 if options.quick else options.rounds
    with tempfile.TemporaryDirectory() as made:
        theirs = omni_samples.model(kind, quick=options.quick)
        theirs.save_pretrained(made)
        ours = ftrain.hf.open(made, native="always")
        assert ours.load is not None
        params = ours.load()
    batches = omni_samples.packs(theirs.config, rounds + 3, tokens=options.tokens, quick=options.quick)
    hears = omni_samples.media_of(theirs.config).sound is not None
    sides = [
        _ours(ours, params, batches, tokens=options.tokens, hears=hears),
        _theirs(theirs, [omni_samples.padded(batch, hears=hears) for batch in batches]),
    ]
    for number in range(rounds + 2):
        for side in sides:
            side.run(number, kept=number >= 2)
        print(f"{kind}: step {number + 1} of {rounds + 2}: " + ", ".join(_told(side) for side in sides), flush=True)
    for side in sides:
        side.peak = measure_peak(lambda side=side: side.step(rounds + 2)).peak  # type: ignore[misc]
    useful = [sum(len(one["tokens"]) for one in batch) for batch in batches]
    padded = [len(batch) * max(len(one["tokens"]) for one in batch) for batch in batches]
    count = sum(leaf.numel() for leaf in ftrain.tree.leaves(params))
    how = (
        f"{count / 1e6:.1f}M parameters, a pack of {options.tokens} tokens a step, in the mean "
        f"{statistics.mean(map(len, batches)):.0f} samples with {statistics.mean(useful):.0f} tokens, "
        f"that are {statistics.mean(padded):.0f} in their rows, float32, clip {LARGEST_NORM}, AdamW (theirs fused); "
        f"transformers {transformers.__version__}, eager attention; medians of {rounds} alternating steps"
    )
    return _rows(kind, sides[0], sides[1], useful[2 : rounds + 2], how)


def _told(side: Side) -> str:
    return f"{side.name} {side.seconds[-1]:.2f} s" if side.seconds else f"{side.name} warm"


def _ours(
    model: Model, params: Any, batches: Sequence[Sequence[dict[str, Tensor]]], *, tokens: int, hears: bool
) -> Side:
    """Packs of equal budgets, made before: the loader does it beside the step."""
    assert model.media is not None
    budgets = omni_samples.budgets(batches, hears=hears)
    packs = [model.media(omni_samples.pack(batch, tokens=tokens), **budgets) for batch in batches]
    tx = chain(clip_by_global_norm(LARGEST_NORM), adamw(RATE, weight_decay=DECAY))

    def train_step(state: TrainState, batch: dict[str, Any]) -> tuple[TrainState, Tensor]:
        mean, grads = ftrain.value_and_grad(model.loss)(state.params, batch)
        return state.apply(tx, grads), mean

    jitted = ftrain.jit(train_step, donate="state")
    held = [TrainState.create(ftrain.tree.map(lambda x: x.clone(), params), tx)]

    def step(number: int) -> float:
        held[0], loss = jitted(held[0], packs[number])
        return loss.item()

    return Side("ftrain", step)


def _theirs(model: Any, rows: Sequence[dict[str, Any]]) -> Side:
    model.train()
    optimizer = torch.optim.AdamW(model.parameters(), RATE, weight_decay=DECAY, fused=True)

    def step(number: int) -> float:
        loss = model(**rows[number]).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), LARGEST_NORM)
        optimizer.step()
        optimizer.zero_grad()
        return loss.item()

    return Side("transformers", step)


def _rows(kind: Kind, ours: Side, theirs: Side, useful: Sequence[int], how: str) -> list[Row]:
    apart = max(abs(a - b) for a, b in zip(ours.losses, theirs.losses, strict=True))
    rate, other = (
        statistics.median(n / s for n, s in zip(useful, side.seconds, strict=True)) for side in (ours, theirs)
    )
    shares = [a / b for a, b in zip(ours.seconds, theirs.seconds, strict=True)]
    cpu = statistics.median(a / b for a, b in zip(ours.cpu_seconds, theirs.cpu_seconds, strict=True))
    same = f"; valid only if all losses agree to {_SAME_LOSS} (peer: the largest difference)"
    return [
        row(f"{kind}: useful tokens a second", rate, "1/s", peer=other, how=f"{how}; peer: theirs"),
        row(f"{kind}: time of a useful token over theirs", statistics.median(shares), "x", goal=_GOAL, peer=apart,
            valid=apart <= _SAME_LOSS, how=how + same),
        row(f"{kind}: CPU time of a useful token over theirs", cpu, "x", peer=1 / cpu, how=f"{how}; peer: the inverse"),
        row(f"{kind}: memory above the state over theirs", ours.peak / theirs.peak, "x", peer=theirs.peak / 2**20,
            how=f"{how}; peer: theirs in MiB"),
    ]  # fmt: skip


if __name__ == "__main__":
    raise SystemExit(main(tyro.cli(Options, description=__doc__)))
