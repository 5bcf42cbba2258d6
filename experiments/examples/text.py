"""A language model of characters on text files of your own: evaluation, checkpoints, resume, text written at the end.

python -m experiments.examples.text FILE... [--steps 200] [--out runs/text]
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import tyro
from torch import Tensor

import ftrain
from ftrain import Mean, TrainState, optim
from ftrain.checkpoint import Checkpointer, Retention
from ftrain.modules import decoder
from ftrain.modules.attention import AttentionConfig
from ftrain.modules.generation import generate_text
from ftrain.modules.omni import OmniModel
from ftrain.modules.packing import Text
from ftrain.resilience.signals import interruptible


@dataclass(frozen=True)
class Options:
    """What to train on, and how long."""

    files: tyro.conf.Positional[tuple[Path, ...]]
    steps: int = 200
    rows: int = 16
    length: int = 128
    out: Path = Path("runs/text")


def batch_of(ids: Tensor, options: Options, seed: int) -> dict[str, Tensor]:
    """Pieces of the text that lie anywhere, one document each, packed one after the other."""
    rows, length = options.rows, options.length
    starts = torch.randint(0, len(ids) - length, (rows,), generator=torch.Generator().manual_seed(seed))
    tokens, segments = torch.cat([ids[s : s + length] for s in starts]), torch.arange(rows).repeat_interleave(length)
    labels = decoder.next_token_labels(tokens, segments)
    return {"tokens": tokens, "positions": torch.arange(length).repeat(rows), "segments": segments, "labels": labels}


def main(options: Options) -> str:
    """Train from where the last run stopped, and return text that the model has written."""
    text = "\n".join(file.read_text() for file in options.files)
    letters = sorted(set(text))
    number = {letter: i for i, letter in enumerate(letters)}
    ids = torch.tensor([number[letter] for letter in text])
    train, held_out = ids[: int(0.9 * len(ids))], ids[int(0.9 * len(ids)) :]
    heads = AttentionConfig(128, heads=4, kv_heads=2, head_dim=32)
    cfg = decoder.DecoderConfig(len(letters), 128, layers=3, attention=heads, d_hidden=256)
    specs = decoder.specs(cfg)
    rate = optim.warmup_cosine(3e-3, warmup_steps=10, total_steps=options.steps)
    tx = optim.chain(optim.clip_by_global_norm(1.0), optim.adamw(rate, weight_decay=0.1))

    def loss_fn(params: Any, batch: Any) -> Mean:
        hidden, _ = decoder.apply(
            params, batch["tokens"], positions=batch["positions"], segments=batch["segments"], cfg=cfg
        )
        return decoder.loss(params, hidden, batch["labels"], cfg)

    def train_step(state: TrainState, batch: Any) -> Any:
        loss, grads = ftrain.value_and_grad(loss_fn)(state.params, batch)
        return state.apply(tx, grads), {"loss": loss}

    step, evaluate = ftrain.jit(train_step, donate="state"), ftrain.jit(ftrain.forward(loss_fn))
    state = TrainState.create(ftrain.init(specs, ftrain.key(0)), tx)
    with Checkpointer(options.out, keep=Retention(last=2), specs=specs) as checkpoints, interruptible() as stop:
        done = checkpoints.latest() or 0
        state = checkpoints.restore(state) if done else state
        for n in range(done + 1, options.steps + 1):
            state, metrics = step(state, batch_of(train, options, n))
            if n % 50 == 0 or n == options.steps or stop.requested:
                found = evaluate(state.params, batch_of(held_out, options, 0)).value()
                print(f"step {n}: loss {float(metrics['loss']):.3f}, held out {float(found):.3f}")
                checkpoints.save(state, n)
            if stop.requested:
                break
    prompt = text[:8]
    (written,) = generate_text(
        {"foundation": state.params}, [[Text([number[letter] for letter in prompt])]], model=OmniModel(cfg),
        max_new=120, key=ftrain.key(1), temperature=0.8,
    )  # fmt: skip
    print(prompt + "".join(letters[i] for i in written))
    return "".join(letters[i] for i in written)


if __name__ == "__main__":
    main(tyro.cli(Options))
