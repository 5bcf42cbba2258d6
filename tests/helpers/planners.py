"""Planners of recompute: for random graphs, with a link to the host, and for one real block of each model family."""

import random
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

import ftrain
from ftrain import Aval, tree
from ftrain.analysis.op_times import OpTimes, Speed, op_key
from ftrain.kernels.mean import Mean
from ftrain.modules import decoder, dit, encoder_stack
from ftrain.modules.attention import AttentionConfig
from ftrain.modules.decoder import DecoderConfig
from ftrain.modules.dit import DitConfig
from ftrain.modules.encoder_stack import StackConfig
from ftrain.modules.moe import MoEConfig
from ftrain.remat.offload import HostLink
from ftrain.remat.planner import Planner
from ftrain.remat.policy import Remat

SPEED = Speed("test", {torch.float32: 1e9}, 1e9, 1e9, 1.0)


def random_loss_of(rng, ops):
    """A loss of `ops` random ops, each on a recent value, some on an early one too."""
    kinds = ["sin", "exp", "tanh", "mul", "mm", "add"]
    script = [(rng.choice(kinds), rng.random() ** 2, rng.random()) for _ in range(ops)]

    def loss(params, x):
        values = [x]
        for kind, near, far in script:
            a, b = values[-1 - int(near * len(values))], values[-1 - int(far * len(values))]
            if kind == "mm":
                y = a @ params["w"]
            elif kind in ("mul", "add"):
                y = getattr(torch, kind)(a, b)
            else:
                y = getattr(torch, kind)(0.1 * a)
            values.append(y)
        return values[-1].sum() + values[-2].sum()

    return loss


def random_planner(seed):
    """A planner for a random graph with random times."""
    rng = random.Random(seed)
    step = ftrain.jit(ftrain.value_and_grad(random_loss_of(rng, rng.randint(4, 7))))
    module = step.lower({"w": torch.eye(16)}, torch.ones(rng.choice([16, 64]), 16)).graph
    times = OpTimes(SPEED, {})
    for node in module.graph.nodes:
        if node.op == "call_function":
            times.measured[op_key(node)] = rng.choice([1, 3, 10, 30, 100]) * (1 + rng.random())
    return Planner(module, {}, times, Remat(budget=1))


def linked_planner(seed, bandwidth, latency=1.0):
    planner = random_planner(seed)
    remat = Remat(budget=1, offload=bandwidth)
    return Planner(planner.module, {}, planner.times, remat, link=HostLink(bandwidth, latency))


def scripted_loss(ops):
    """A residual stack whose layers do different things."""

    def loss(params, batch):
        x, y = batch
        for i, layer in enumerate(params["layers"]):
            h = x @ layer["w_in"]
            for op in ops[i % len(ops)]:
                h = {"tanh": torch.tanh, "square": torch.square, "sin": torch.sin, "soft": lambda t: t.softmax(-1)}[op](
                    h
                )
            x = x + h @ layer["w_out"]
        return Mean.of((x - y).square())

    return loss


BLOCK_SPEED = Speed("test", {torch.float32: 1e12}, 1e11, 1e9, 3.0)


T, D = 512, 256


HEADS = AttentionConfig(D, heads=4, kv_heads=2, head_dim=64)


@dataclass(frozen=True)
class Block:
    """A scalar function of parameters and a batch, and their shapes."""

    loss: Callable[[Any, Any], torch.Tensor]
    specs: Any
    batch: dict[str, Aval]


def floats(*shape: int) -> Aval:
    return Aval(shape, torch.float32, torch.device("cpu"))


def ids(*shape: int) -> Aval:
    return Aval(shape, torch.int64, torch.device("cpu"))


def decoder_block(**ffn: Any) -> Block:
    cfg = DecoderConfig(64, D, layers=1, attention=HEADS, **ffn)

    def loss(params: Any, batch: Any) -> torch.Tensor:
        x_TD, positions = batch["x_TD"], batch["positions_T"]
        hidden_TD, _ = decoder.apply(params, x_TD, positions=positions, segments=batch["segments_T"], cfg=cfg)
        return hidden_TD.square().sum()

    return Block(loss, decoder.specs(cfg), {"x_TD": floats(T, D), "positions_T": ids(T), "segments_T": ids(T)})


def dit_block() -> Block:
    cfg = DitConfig(d_in=16, d_model=D, layers=1, heads=4, d_hidden=4 * D, d_text=64, time_features=32)
    batch = {"x_NP": floats(T, 16), "time_N": floats(T), "positions_AN": ids(3, T), "text_SC": floats(32, 64)}

    def loss(params: Any, batch: Any) -> torch.Tensor:
        given = {name: batch[name] for name in ("time_N", "positions_AN", "text_SC")}
        return dit.apply(params, batch["x_NP"], segments_N=None, cfg=cfg, **given).square().sum()

    return Block(loss, dit.specs(cfg), batch)


def vit_block() -> Block:
    cfg = StackConfig(D, layers=1, heads=4, d_hidden=4 * D, position_axes=2)
    batch = {"x_TD": floats(T, D), "positions_AT": ids(2, T), "segments_T": ids(T)}

    def loss(params: Any, batch: Any) -> torch.Tensor:
        segments_T, positions = batch["segments_T"], batch["positions_AT"]
        return encoder_stack.apply(params, batch["x_TD"], positions=positions, segments_T=segments_T, cfg=cfg).sum()

    return Block(loss, encoder_stack.specs(cfg), batch)


BLOCKS = {
    "dense": decoder_block(d_hidden=704),
    "experts": decoder_block(moe=MoEConfig(D, 128, experts=2, top_k=2)),
    "dit": dit_block(),
    "vit": vit_block(),
}


def planner_of(block: Block) -> Planner:
    params = tree.map(lambda s: floats(*s.shape), block.specs)
    module = ftrain.jit(ftrain.value_and_grad(block.loss)).lower(params, block.batch).graph
    return Planner(module, {}, OpTimes(BLOCK_SPEED, {}), Remat(budget=1))
