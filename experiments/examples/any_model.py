"""Train a model that exists, of any family, on a text of your own: in and out as a folder that transformers loads.

torchrun --nproc-per-node 2 -m experiments.examples.any_model FOLDER NEW_FOLDER TEXT_FILE
"""

import sys
from pathlib import Path
from typing import Any

import torch
from transformers import AutoTokenizer

import ftrain
from ftrain import TrainState, optim
from ftrain.modules.decoder import next_token_labels


def main(folder: str, new: str, file: str, steps: int = 20, length: int = 128) -> None:
    """Make so many steps of AdamW, each on two pieces of `length` tokens for every rank, and print their losses."""
    model, tx, tokenizer = ftrain.hf.open(folder), optim.adamw(1e-4), AutoTokenizer.from_pretrained(folder)
    pieces_NL = tokenizer(Path(file).read_text(), return_tensors="pt").input_ids[0].unfold(0, length, length)

    def loss_of(params: Any, batch: Any) -> Any:  # balancing biases of routers stay as the folder has them
        return model.loss(params, batch)[0] if model.state else model.loss(params, batch)

    def train_step(state: TrainState, batch: Any) -> Any:
        loss, grads = ftrain.value_and_grad(loss_of)(state.params, batch)
        return state.apply(tx, grads), loss

    with ftrain.run.session() as run:
        step = ftrain.jit(train_step, plan=run.plan(), specs=model.specs, donate="state", remat="layer")
        state = step.init(lambda k: TrainState.create(ftrain.init(model.specs, k), tx), ftrain.key(0).to(run.device))
        model.load(state.params)  # each rank reads its own part
        places, each = torch.arange(2 * run.mesh.size), torch.arange(2 * run.mesh.size).repeat_interleave(length)
        for n in run.steps(0, steps):
            tokens = pieces_NL[(n * len(places) + places) % len(pieces_NL)].flatten()
            batch = {"tokens": tokens, "segments": each, "labels": next_token_labels(tokens, each)}
            state, loss = step(state, run.share(batch))
            run.print(f"step {n} on {run.mesh.size} ranks: loss {float(loss):.4f}")
        model.save(state.params, new)


if __name__ == "__main__":
    main(*sys.argv[1:4])
