"""The planner beside all plans of one real block of each model family, with ops joined to few groups.

A group is an op with its views, and with its neighbours where there are too many; small ones stay kept. Every set of
groups is priced by the walk that the planner uses, liveness included, so the least price over all sets is exact for
plans that take whole groups. The planner, which may take single tensors, must not be more than 3% above it.
"""

import itertools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch

import ftrain
from ftrain import Aval, tree
from ftrain.analysis.op_times import OpTimes, Speed
from ftrain.modules import decoder, dit, encoder_stack
from ftrain.modules.attention import AttentionConfig
from ftrain.modules.decoder import DecoderConfig
from ftrain.modules.dit import DitConfig
from ftrain.modules.encoder_stack import StackConfig
from ftrain.modules.moe import MoEConfig
from ftrain.remat.planner import Planner
from ftrain.remat.policy import Remat

SPEED = Speed("test", {torch.float32: 1e12}, 1e11, 1e9, 3.0)
MOST = 11  # groups: 2,048 plans
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
    return Planner(module, {}, OpTimes(SPEED, {}), Remat(budget=1))


def groups_of(planner: Planner) -> list[frozenset[int]]:
    """At most `MOST` groups of the nodes that may be made again."""
    bytes_of = {v: size for v, us, size in planner.choices.candidates if us > 0}
    group_of = {v: v for v in bytes_of}
    for v, us, _ in planner.choices.candidates:
        sources = [u for u in planner.model.steps[v].reads if u in group_of]
        if us == 0 and sources:  # a view, or a part of a result
            group_of[v] = group_of[sources[0]]
    members: dict[int, set[int]] = {}
    for v, owner in group_of.items():
        members.setdefault(owner, set()).add(v)
    floor = max(bytes_of.values()) / 50
    members = {owner: found for owner, found in members.items() if bytes_of[owner] >= floor}
    sizes = {owner: bytes_of[owner] for owner in members}
    while len(members) > MOST:
        small = min(members, key=lambda g: (sizes[g], g))
        target = _neighbour(planner, members, small)
        members[target] |= members.pop(small)
        sizes[target] += sizes.pop(small)
    return [frozenset(found) for found in members.values()]


def _neighbour(planner: Planner, members: dict[int, set[int]], group: int) -> int:
    """The smallest group that reads this one or that it reads; else the next."""
    steps = planner.model.steps
    reads = {u for v in members[group] for u in steps[v].reads}
    near = [
        g
        for g, found in members.items()
        if g != group and (found & reads or any(u in members[group] for v in found for u in steps[v].reads))
    ]
    return min(near or [g for g in members if g != group], key=lambda g: (len(members[g]), g))


@pytest.mark.parametrize("family", BLOCKS)
def test_a_real_block_costs_no_more_than_the_best_plan(family):
    planner = planner_of(BLOCKS[family])
    groups = groups_of(planner)
    assert 5 <= len(groups) <= MOST
    plans = [
        planner._priced(frozenset().union(*chosen))
        for n in range(len(groups) + 1)
        for chosen in itertools.combinations(groups, n)
    ]
    smallest, nothing = min(p.peak for p in plans), planner.at_rate(0.0).peak
    assert smallest < nothing
    for share in (0.1, 0.25, 0.5, 0.75):
        peak = int(smallest + share * (nothing - smallest))
        least = min(p.microseconds for p in plans if p.peak <= peak)
        choice = planner.within(peak)
        assert choice.peak <= peak
        assert choice.microseconds <= 1.03 * least, f"{share}: {choice.microseconds} for {least}"
