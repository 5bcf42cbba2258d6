"""How long does a new token take? Greedy generation here beside transformers' `generate`, on equal weights and prompts.

Both sides keep keys and values in a cache and run in one process, turn by turn, for prompts of one length (transformers
would pad others); the figures count only if all make the same tokens (in bfloat16, where one rounding sends the rest
another way: if most prompts begin with the same one). The third side is ours without a cache: the whole
pack with its room, run again for every token.
"""

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
import tyro
from torch import Tensor

from experiments.bench.hf_models import Shape, hf_model, our_config, our_parameters, with_experts
from experiments.bench.machine import device_title
from experiments.bench.table import Row, publish, row
from ftrain import Precision
from ftrain.kernels.documents import Documents
from ftrain.modules import decoder, spec
from ftrain.modules.decoder import DecoderConfig
from ftrain.modules.generation import generate_text
from ftrain.modules.omni import OmniModel
from ftrain.modules.packing import Text
from ftrain.trace.precision import Choice, precision_on

MOST = 0.75
"""Of the prompts: how many must begin with the same token in bfloat16."""


@dataclass(frozen=True)
class Options:
    """Command line of the bench."""

    device: Literal["cpu", "cuda"] = "cpu"
    """where the tokens are made; on CUDA models are larger"""
    precision: Choice = "auto"
    """in which dtype both sides compute; auto: bfloat16 on CUDA, float32 on a CPU"""
    json: Path | None = None
    """also write the rows to this file"""
    quick: bool = False
    """small models, few rounds: to see that it works, not to judge by"""
    rounds: int = 4
    """measured rounds of each side (after one that is not)"""
    prompts: int = 8
    """how many prompts are continued together"""
    length: int = 32
    """tokens of each prompt"""
    new: int = 64
    """new tokens of each prompt"""
    whole: int = 4
    """new tokens of the side without a cache, whose tokens all take the same time; its room is that of the others"""
    only: tuple[Literal["llama", "moe"], ...] = ("llama", "moe")
    """which families to run"""


@dataclass
class Side:
    """One way to generate: `run(prompts_BL)` gives the new tokens `[B, N]`; milliseconds per token of each round."""

    name: str
    run: Callable[[Tensor], Tensor]
    wall: list[float] = field(default_factory=list)
    cpu: list[float] = field(default_factory=list)


def main(options: Options) -> list[Row]:
    """Run the chosen families, print their rows, and write them."""
    rows: list[Row] = []
    for name in options.only:
        rows += compare(name, _shape(name, options), options)
    publish(rows, f"generation, {device_title(options.device)}", options.json)
    return rows


def _shape(family: str, options: Options) -> Shape:
    if options.quick:
        base = Shape(vocab=512, d_model=128, layers=2, heads=4, kv_heads=2, head_dim=32, d_hidden=352)
    elif options.device == "cuda":
        base = Shape(vocab=32_000, d_model=2048, layers=16, heads=16, kv_heads=4, head_dim=128, d_hidden=5632)
    else:
        base = Shape(vocab=8192, d_model=512, layers=8, heads=8, kv_heads=4, head_dim=64, d_hidden=1408)
    return base if family == "llama" else with_experts(base)


def compare(name: str, shape: Shape, options: Options) -> list[Row]:
    """Rows of one family: milliseconds per token of each side, and our share of the others'."""
    precision = precision_on(torch.device(options.device), options.precision)
    cached, theirs, whole = sides = _sides(shape, options, precision)
    same = True
    for i in range(options.rounds + 1):
        generator = torch.Generator().manual_seed(i)
        prompts_BL = torch.randint(0, shape.vocab, (options.prompts, options.length), generator=generator)
        made = [_measure(side, prompts_BL.to(options.device), kept=i > 0) for side in sides]
        same &= _agree(made[0], made[1], precision) and _agree(made[0][:, : options.whole], made[2], precision)
    what = (
        f"{name}: {spec.count(decoder.specs(our_config(shape))) / 1e6:.0f}M parameters, {precision.compute}, "
        f"{options.prompts} prompts of {options.length} tokens and {options.new} new ones of each; per step of one "
        f"token per prompt, prompts included; medians of {options.rounds} alternating rounds; peer: CPU time of the "
        "process"
    )
    rows = [
        row(f"{name}: a step, {s.name}", statistics.median(s.wall), "ms", peer=statistics.median(s.cpu), how=what)
        for s in sides
    ]
    return rows + [_share(name, cached, theirs, same, goal=1.0), _share(name, cached, whole, same, goal=None)]


def _agree(ours_BN: Tensor, others_BN: Tensor, precision: Precision) -> bool:
    """Whether two sides make the same tokens, as far as their dtype lets them."""
    if precision.compute == "float32":
        return torch.equal(ours_BN, others_BN)
    return float((ours_BN[:, 0] == others_BN[:, 0]).float().mean()) >= MOST


def _share(name: str, mine: Side, other: Side, same: bool, goal: float | None) -> Row:
    how = "ours with a cache / the other, median of the rounds' ratios (peer: all), valid only if the tokens agree"
    ratios = [a / b for a, b in zip(mine.wall, other.wall, strict=True)]
    peer = f"{min(ratios):.3g} to {max(ratios):.3g}"
    value, what = statistics.median(ratios), f"{name}: {mine.name} / {other.name}"
    return row(what, value, "x", goal=goal, peer=peer, valid=same, how=how)


def _measure(side: Side, prompts_BL: Tensor, *, kept: bool) -> Tensor:
    """The new tokens, on the host, so that a CUDA device is done."""
    wall, cpu = time.perf_counter(), time.process_time()
    made_BN = side.run(prompts_BL).cpu()
    if kept:
        side.wall.append(1e3 * (time.perf_counter() - wall) / made_BN.shape[1])
        side.cpu.append(1e3 * (time.process_time() - cpu) / made_BN.shape[1])
    return made_BN


def _sides(shape: Shape, options: Options, precision: Precision) -> Sequence[Side]:
    torch.manual_seed(0)
    model, cfg = hf_model(shape).eval(), our_config(shape)
    params = precision.cast(spec.map_with_paths(lambda _, x: x.to(options.device), our_parameters(model, cfg)))
    model.to(options.device, precision.dtype)
    return (
        Side("ftrain", lambda prompts_BL: _ours(params, prompts_BL, cfg, options.new)),
        Side("transformers", lambda prompts_BL: _theirs(model, prompts_BL, options.new)),
        Side("ftrain without a cache", lambda prompts_BL: _whole(params, prompts_BL, cfg, options.new, options.whole)),
    )


def _ours(params: Any, prompts_BL: Tensor, cfg: DecoderConfig, new: int) -> Tensor:
    prompts = [[Text(ids)] for ids in prompts_BL.tolist()]
    return torch.tensor(generate_text({"foundation": params}, prompts, model=OmniModel(cfg), max_new=new))


def _theirs(model: Any, prompts_BL: Tensor, new: int) -> Tensor:
    model.generation_config.eos_token_id = None
    seen = torch.ones_like(prompts_BL)
    out = model.generate(prompts_BL, attention_mask=seen, do_sample=False, max_new_tokens=new, use_cache=True)
    return out[:, prompts_BL.shape[1] :]


@torch.no_grad()
def _whole(params: Any, prompts_BL: Tensor, cfg: DecoderConfig, room: int, new: int) -> Tensor:
    """The first `new` tokens of `room`, each by a run over all tokens of all prompts with their room."""
    B, L = prompts_BL.shape
    tokens_BS = torch.cat([prompts_BL, prompts_BL.new_zeros(B, room)], dim=1)
    at_T = torch.arange(tokens_BS.numel(), device=tokens_BS.device)
    positions_T, documents = at_T % (L + room), Documents.of(at_T // (L + room), longest=L + room)
    for step in range(L, L + new):
        hidden_TD, _ = decoder.apply(params, tokens_BS.flatten(), positions=positions_T, segments=documents, cfg=cfg)
        newest_BD = hidden_TD.unflatten(0, (B, -1))[:, step - 1]
        tokens_BS[:, step] = decoder.logits(params, newest_BD, cfg).argmax(-1)
    return tokens_BS[:, L : L + new]


if __name__ == "__main__":
    main(tyro.cli(Options))
