"""Two gloo processes that train an adapter, write it, and merge it into a folder, for test_lora_folders."""

from pathlib import Path
from typing import Any

import torch

import ftrain
from ftrain import TrainState, lora, optim, tree
from ftrain.hf import save_hf
from ftrain.modules import decoder
from ftrain.modules.hf_names import decoder_names
from ftrain.sharding import Layout, Mesh, Plan
from ftrain.sharding.layout import Dropless
from tests.helpers import rank_processes

CFG = decoder.preset("qwen3-moe-tiny")


def run(folder: Path, mesh: Mesh) -> list[Any]:
    """The deltas after two steps as each rank sees them whole; adapters and merged folders lie below `folder`."""
    found = rank_processes.run(_train, mesh.size, folder, mesh)
    return [found[rank] for rank in range(mesh.size)]


def adapter() -> Any:
    """Of every linear layer and the table, with the model's names."""
    return lora.add(decoder.specs(CFG), ["all-linear", "table_VD"], rank=3, names=decoder_names(CFG))


def begin(key: torch.Tensor, tx: Any) -> TrainState:
    """Deltas that change something beside a base."""
    made, base = adapter(), ftrain.init(decoder.specs(CFG), key)
    return TrainState.create(tree.map(lambda x: x + 0.01, made.init(key)), tx, extra=base)


def write(folder: Path, state: TrainState) -> None:
    """The adapter's folder, and the merged one."""
    lora.save(state.params, adapter(), folder / "adapter")
    save_hf(lora.merge(state.extra, state.params, adapter()), folder / "merged", {}, decoder_names(CFG))


def batch() -> dict[str, torch.Tensor]:
    """Two packs of one document each."""
    tokens = torch.arange(64) % CFG.vocab
    segments = torch.arange(2).repeat_interleave(32)
    return {"tokens": tokens, "positions": torch.arange(32).repeat(2), "segments": segments, "labels": tokens.roll(-1)}


def train(state: TrainState, batch: Any, tx: Any) -> TrainState:
    """One step."""

    def loss(delta: Any, base: Any, batch: Any) -> Any:
        params = lora.bind(base, delta, adapter())
        hidden, _ = decoder.apply(
            params, batch["tokens"], positions=batch["positions"], segments=batch["segments"], cfg=CFG
        )
        return decoder.loss(params, hidden, batch["labels"], CFG)

    return state.apply(tx, ftrain.grad(loss)(state.params, state.extra, batch))


def _train(rank: int, folder: Path, mesh: Mesh, found: dict) -> None:
    tx = optim.adamw(1e-3)
    step = ftrain.jit(
        lambda state, batch: train(state, batch, tx),
        plan=Plan(mesh, Layout(experts=Dropless())),
        specs=adapter().all_specs(),
    )
    state = step.init(lambda key: begin(key, tx), ftrain.key(0))
    write(folder / "before", state)
    for _ in range(2):
        state = step(state, step.share(batch()))
    divided = sum(hasattr(leaf, "to_local") for leaf in tree.leaves((state.params, state.extra)))
    found[rank] = divided, tree.map(lambda x: x.clone(), step.whole(state.params))
