"""How well a step runs on many ranks: lockstep against one device, hidden communication, bytes against formulas.

    python -m experiments.bench.parallel [--json FILE]

(a) The main job's default step on 8 virtual ranks against one device, alternating, medians. (b) Two gloo processes
whose messages take as long as on a slowed link (each wait sleeps until its message would have arrived): communication
that compute waits for, with the scheduling pass and without. (c) Bytes that a rank sends, counted from the graph,
beside the formulas, and for Ulysses with grouped queries beside an exchange that repeats key/value heads.
"""

import os
import statistics
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
import tyro

import ftrain
from experiments.bench.slow_link import SlowLink, run_over
from experiments.bench.table import Row, publish, row
from experiments.omni import job
from ftrain.modules import decoder
from ftrain.modules.attention import AttentionConfig
from ftrain.modules.decoder import DecoderConfig
from ftrain.modules.moe import MoEConfig
from ftrain.sharding import Layout, Mesh, Plan
from ftrain.sharding.experts import expert_bytes
from ftrain.sharding.link import Link
from ftrain.sharding.ulysses import repeated_kv_bytes, ulysses_bytes


@dataclass(frozen=True)
class Options:
    """What to measure."""

    json: Path | None = None
    """Where the rows go as JSON."""
    rounds: int = 5
    """Alternating rounds of (a) and (b)."""
    ranks: int = 8
    """Virtual ranks of (a)."""
    load: float = 0.5
    """How long all messages of (b) take, over how long all compute takes."""


def main(options: Options) -> int:
    """Print the table; 1 if a goal is missed."""
    torch.set_num_threads(1)
    rows = [*byte_rows(), lockstep_row(options), *overlap_rows(options)]
    publish(rows, "parallel", options.json)
    return int(any(r.ok is False for r in rows))


def lockstep_row(options: Options) -> Row:
    """The main job's step in lockstep on many ranks over that on one device."""
    mesh = Mesh(1, options.ranks // 2, 2, 2, "virtual")
    one, many = (_omni_job(m) for m in (None, mesh))
    batch = many.batches.at(0)
    state = one.fresh_state(lambda text: None)
    steps = {"one": one.step, "many": many.step}
    times: dict[str, list[float]] = {name: [] for name in steps}
    states = {name: ftrain.tree.map(torch.clone, state) for name in steps}
    for _ in range(options.rounds + 1):
        for name, step in steps.items():
            began = time.perf_counter()
            states[name], metrics = step(states[name], batch)
            float(metrics["loss"])
            times[name].append(time.perf_counter() - began)
    seconds = {name: statistics.median(t[1:]) for name, t in times.items()}
    return row(
        f"lockstep, {options.ranks} ranks ({mesh})",
        seconds["many"] / seconds["one"],
        "x one device",
        goal=6.0,
        peer=f"{seconds['one'] * 1e3:.0f} ms on one device",
        how="the main job's default step on the same batch and state, alternating, medians",
    )


def _omni_job(mesh: Mesh | None) -> job.Job:
    quiet = {"say": lambda text: None}
    return job.make(
        size="tiny", steps=100, tokenizer_steps=5, seed=0, device=torch.device("cpu"), backend="auto", remat="none",
        precision=ftrain.Precision(), mesh=mesh, **quiet,
    )  # fmt: skip


def overlap_models() -> dict[str, tuple[DecoderConfig, dict[str, int], Layout]]:
    """Models of (b), the mesh of each, and its layout."""
    heads = AttentionConfig(256, heads=8, kv_heads=8, head_dim=32)
    dense = DecoderConfig(512, 256, layers=8, attention=heads, d_hidden=704)
    experts = MoEConfig(256, 256, experts=8, top_k=2, shared_experts=2)
    mixture = DecoderConfig(512, 256, layers=6, attention=heads, moe=experts)
    return {
        "FSDP": (dense, {"shard": 2}, Layout()),
        "experts, in 2 parts": (mixture, {"shard": 2, "expert": 2}, Layout(expert_chunks=2)),
    }


def overlap_step(cfg: DecoderConfig, plan: Plan, *, scheduled: bool) -> tuple[ftrain.Step, Any, Any]:
    """The step, and what makes its state and batch."""

    def loss_fn(params: Any, batch: Any) -> Any:
        hidden_TD, _ = decoder.apply(
            params, batch["tokens_T"], positions=batch["positions_T"], segments=batch["segments_T"], cfg=cfg
        )
        return decoder.loss(params, hidden_TD, batch["labels_T"], cfg)

    tx = ftrain.optim.sgd(1e-3)

    def step(state: Any, batch: Any) -> Any:
        loss, grads = ftrain.value_and_grad(loss_fn)(state.params, batch)
        return state.apply(tx, grads), {"loss": loss}

    def init(key: Any) -> Any:
        return ftrain.TrainState.create(ftrain.init(decoder.specs(cfg), key), tx)

    tokens = 2048
    batch = {
        "tokens_T": torch.arange(tokens) * 7 % cfg.vocab,
        "positions_T": torch.arange(tokens) % 256,
        "segments_T": torch.arange(tokens) // 256,
        "labels_T": torch.arange(tokens) * 11 % cfg.vocab,
    }
    return ftrain.jit(step, plan=plan, donate="state", overlap=scheduled), init, batch


def overlap_rows(options: Options) -> list[Row]:
    """Exposed communication on two real processes with and without the pass."""
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(29500 + os.getpid() % 2000), OMP_NUM_THREADS="1")
    rows = []
    for name in overlap_models():
        with mp.Manager() as manager, tempfile.TemporaryDirectory() as cache:
            os.environ["FTRAIN_CACHE"] = cache
            found = manager.dict()
            mp.spawn(_overlap_rank, args=(name, options, found), nprocs=2)
            times = dict(found)
        exposed = {way: max(0.0, times[way] - times[f"{way}, free"]) for way in ("with", "without")}
        rows.append(
            row(
                f"exposed communication, with the pass over without: {name}",
                exposed["with"] / max(exposed["without"], 1e-9),
                "x",
                goal=0.35,
                peer=f"{exposed['with'] * 1e3:.0f} of {exposed['without'] * 1e3:.0f} ms",
                how=f"2 gloo processes on a link so slow that all messages take {options.load:g} x compute (a step "
                f"of {times['free'] * 1e3:.0f} ms); exposed = step - the same on a free link, alternating, medians",
            )
        )
    return rows


def _overlap_rank(rank: int, name: str, options: Options, found: Any) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", rank=rank, world_size=2)
    cfg, sizes, layout = overlap_models()[name]
    slow = _slowed(cfg, sizes, layout, options.load)
    links = {"": slow, ", free": SlowLink(0.0, float("inf"))}
    plan = Plan(Mesh(**sizes), layout, link=Link(slow.latency * 1e6, slow.bandwidth))
    steps = {way: overlap_step(cfg, plan, scheduled=way == "with") for way in ("with", "without")}
    states = {way: step.init(init, ftrain.key(0)) for way, (step, init, _) in steps.items()}
    times: dict[str, list[float]] = {}
    for _ in range(options.rounds + 1):
        for way, (step, _, batch) in steps.items():
            for label, link in links.items():
                dist.barrier()
                began = time.perf_counter()
                states[way], _ = run_over(link, step, states[way], step.share(batch))
                times.setdefault(way + label, []).append(time.perf_counter() - began)
    if rank == 0:
        found.update({key: statistics.median(t[1:]) for key, t in times.items()})
        found["free"] = found["with, free"]
    dist.destroy_process_group()


def _slowed(cfg: DecoderConfig, sizes: dict[str, int], layout: Layout, load: float) -> SlowLink:
    """The link on which all messages of a step take `load` times the step on a free one; equal on both ranks.

    Times of ops are remembered on the way, for the plans of later steps.
    """
    step, init, batch = overlap_step(cfg, Plan(Mesh(**sizes), layout), scheduled=False)
    state, mine = step.init(init, ftrain.key(0)), step.share(batch)
    free = SlowLink(0.0, float("inf"))
    for _ in range(3):
        began = time.perf_counter()
        state, _ = run_over(free, step, state, mine)
        seconds = time.perf_counter() - began
    ftrain.profile_nodes(step, state, mine, remember=True)
    compiled = step.lower(state, mine)
    sent, messages = sum(compiled.bytes_moved().values()), len(compiled.schedule().messages)
    latency = 100e-6
    box = [SlowLink(latency, sent / max(1e-3, load * seconds - messages * latency))]
    dist.broadcast_object_list(box, src=0)
    return box[0]


def byte_rows() -> list[Row]:
    """Counted bytes over the formulas: 1 is equal."""
    heads = AttentionConfig(64, heads=8, kv_heads=2, head_dim=8)
    cfg = DecoderConfig(256, 64, layers=2, attention=heads, d_hidden=128)
    tokens, item = 64, 4
    experts = DecoderConfig(256, 64, layers=2, attention=heads, moe=MoEConfig(64, 32, experts=8, top_k=2))
    n = 4
    fsdp = _bytes(cfg, Mesh(1, n, kind="fake"), tokens * n)
    elements = sum(s.elements for s in ftrain.tree.leaves(decoder.specs(cfg)))
    ulysses = _bytes(cfg, Mesh(1, 1, n, kind="fake"), tokens * n)
    moved = _bytes(experts, Mesh(1, n, 1, n, kind="fake"), tokens * n)
    per_layer = ulysses_bytes(tokens, 8, 2, 8, 8, n, item=item)
    repeated = repeated_kv_bytes(tokens, 8, 2, 8, 8, n, item=item)
    rows = [
        _equal("FSDP: 3 x parameters x bytes x (n-1)/n", fsdp, ("fsdp_gather", "fsdp_gather.T"),
               3 * elements * item * (n - 1) // n),
        _equal("Ulysses: exchanges of q, k, v and the output", ulysses, ("ulysses", "ulysses.T"),
               2 * cfg.layers * per_layer),
        _equal("experts: 4 x k x T x D x bytes x (n-1)/n", moved,
               ("expert_dispatch", "expert_dispatch.T", "expert_combine", "expert_combine.T"),
               experts.layers * expert_bytes(tokens, 2, 64, n, item)),
    ]  # fmt: skip
    name = "Ulysses with 8 query and 2 key/value heads on 4 ranks, over repeating key/value heads"
    rows.append(row(name, per_layer / repeated, "x", goal=1.0, how="bytes of one layer's forward exchanges"))
    odd = ulysses_bytes(tokens, 12, 3, 8, 8, n, item=item) / repeated_kv_bytes(tokens, 12, 3, 8, 8, n, item=item)
    how = "where VeOmni refuses: heads repeated to every query head"
    rows.append(row("the same with 12 and 3 heads", odd, "x", goal=1.0, how=how))
    return rows


def _bytes(cfg: DecoderConfig, mesh: Mesh, tokens: int) -> dict[str, int]:
    def loss_fn(params: Any, batch: Any) -> Any:
        hidden_TD, _ = decoder.apply(
            params, batch["tokens_T"], positions=batch["tokens_T"], segments=batch["tokens_T"], cfg=cfg
        )
        return decoder.loss(params, hidden_TD, batch["tokens_T"], cfg)

    specs = decoder.specs(cfg)
    step = ftrain.jit(ftrain.value_and_grad(loss_fn), plan=Plan(mesh, Layout()), specs=specs)
    params = ftrain.tree.map(lambda s: ftrain.Aval(s.shape, s.dtype, torch.device("cpu")), specs)
    batch = {"tokens_T": ftrain.Aval((tokens,), torch.int64, torch.device("cpu"))}
    return step.lower(params, batch).bytes_moved()


def _equal(name: str, found: dict[str, int], purposes: tuple[str, ...], formula: int) -> Row:
    counted = sum(found.get(p, 0) for p in purposes)
    ratio = counted / formula
    return row(name, ratio, "x formula", goal=1.0, peer=formula, how=f"{counted} bytes counted in the graph")


if __name__ == "__main__":
    sys.exit(main(tyro.cli(Options)))
