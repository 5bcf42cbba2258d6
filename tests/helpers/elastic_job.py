"""A training job for torchrun on however many ranks there are: `elastic_job.py RUN`.

It goes on from the latest checkpoint, saves every step, and notes each step's ranks and loss in RUN/losses.jsonl. On a
node with WAITS in its environment it stops at step WAITS[0] and waits to be killed; started again, at WAITS[1].
"""

import json
import os
import sys
import time
from pathlib import Path

import torch

import ftrain
from ftrain import optim, tree
from ftrain.checkpoint import Checkpointer, Ranks
from ftrain.modules import decoder, spec
from ftrain.modules.attention import AttentionConfig
from ftrain.modules.decoder import DecoderConfig
from ftrain.run.ranks import MeshFlags, is_main, open_mesh
from ftrain.sharding import Mesh, Plan

STEPS, WAITS = 6, (3, 5)
CFG = DecoderConfig(64, 16, layers=1, attention=AttentionConfig(16, heads=2, kv_heads=1, head_dim=8), d_hidden=24)
TX = optim.chain(optim.clip_by_global_norm(1.0), optim.adamw(1e-2))


def train_step(state, batch):
    def loss_fn(params, batch):
        hidden, _ = decoder.apply(
            params, batch["tokens"], positions=batch["positions"], segments=batch["segments"], cfg=CFG
        )
        return decoder.loss(params, hidden, batch["labels"], CFG)

    loss, grads = ftrain.value_and_grad(loss_fn)(state.params, batch)
    return state.apply(TX, grads), {"loss": loss}


def batch_at(position):
    numbers = torch.Generator().manual_seed(position)
    tokens, segments = torch.randint(0, CFG.vocab, (64,), generator=numbers), torch.arange(64) // 16
    labels = decoder.next_token_labels(tokens, segments)
    return {"tokens": tokens, "segments": segments, "positions": torch.arange(64) % 16, "labels": labels}


def waits_at():
    attempt = int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0"))
    return WAITS[attempt] if "WAITS" in os.environ and attempt < len(WAITS) else None


def train(run: Path, mesh: Mesh | None) -> None:
    specs = decoder.specs(CFG)
    step = ftrain.jit(train_step, donate="state", plan=None if mesh is None else Plan(mesh), specs=specs)
    with Checkpointer(run / "checkpoints", ranks=Ranks.of_run() if mesh is not None else None) as checkpoints:
        done = checkpoints.latest() or 0
        if done:
            whole = ftrain.TrainState.create(spec.abstract(specs), TX)
            state = tree.map(lambda leaf: leaf.to("cpu"), checkpoints.restore(step.abstract(whole), done))
        else:
            state = step.init(lambda k: ftrain.TrainState.create(ftrain.init(specs, k), TX), ftrain.key(0))
        for number in range(done + 1, STEPS + 1):
            if number == waits_at():
                time.sleep(600)
            state, metrics = step(state, step.share(batch_at(number)))
            if is_main():
                with (run / "losses.jsonl").open("a") as file:
                    row = {"step": number, "ranks": 1 if mesh is None else mesh.size, "loss": float(metrics["loss"])}
                    file.write(json.dumps(row) + "\n")
            checkpoints.save(state, number)
            checkpoints.wait()


if __name__ == "__main__":
    torch.set_num_threads(1)
    with open_mesh(MeshFlags(timeout=60), torch.device("cpu")) as mesh:
        train(Path(sys.argv[1]), mesh)
