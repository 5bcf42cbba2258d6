"""How well a step runs on many ranks: lockstep against one device, hidden communication, bytes against the formulas.

    python experiments/bench/parallel.py [--json FILE]

(a) The main job's default step on 8 virtual ranks against one device, alternating, medians. (b) Two gloo processes whose
messages take as long as on a slowed link (each wait sleeps until its message would have arrived): communication that
compute waits for, with the scheduling pass and without. (c) Bytes that a rank sends, counted from the graph, beside the
formulas, and for Ulysses with grouped queries beside an exchange that repeats key/value heads.
"""

import os
import statistics
import sys
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
from experiments.bench.table import Row, print_table, row, write_json
from experiments.omni import job
from modules import decoder
from modules.attention import AttentionConfig
from modules.decoder import DecoderConfig
from modules.moe import MoEConfig
from sharding import Layout, Mesh, Plan
from sharding.experts import expert_bytes
from sharding.ulysses import repeated_kv_bytes, ulysses_bytes


@dataclass(frozen=True)
class Options:
    """What to measure."""

    json: Path | None = None
    """Where the rows go as JSON."""
    rounds: int = 5
    """Alternating rounds of (a) and (b)."""
    ranks: int = 8
    """Virtual ranks of (a)."""


def main(options: Options) -> int:
    """Print the table; 1 if a goal is missed."""
    torch.set_num_threads(1)
    rows = [*byte_rows(), lockstep_row(options), *overlap_rows(options)]
    print_table(rows, "parallel")
    if options.json is not None:
        write_json(rows, options.json)
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
        mesh=mesh, **quiet,
    )  # fmt: skip


def model_of_overlap() -> DecoderConfig:
    """Layers whose parameters take about as long on the slowed link as their products on one core."""
    heads = AttentionConfig(256, heads=8, kv_heads=4, head_dim=32)
    experts = MoEConfig(256, 256, experts=8, top_k=2, shared_experts=1)
    return DecoderConfig(2048, 256, layers=4, attention=heads, moe=experts)


def overlap_step(mesh: Mesh, *, scheduled: bool) -> tuple[ftrain.Step, Any, Any]:
    """The step, and what makes its state and batch."""
    cfg = model_of_overlap()

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
    jitted = ftrain.jit(step, plan=Plan(mesh, Layout()), donate="state", overlap=scheduled)
    return jitted, init, batch


def overlap_rows(options: Options) -> list[Row]:
    """Exposed communication on two real processes with and without the pass."""
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(29500 + os.getpid() % 2000), OMP_NUM_THREADS="1")
    with mp.Manager() as manager:
        found = manager.dict()
        mp.spawn(_overlap_rank, args=(options.rounds, found), nprocs=2)
        results = dict(found)
    exposed = {name: max(0.0, results[name] - results["free"]) for name in ("with", "without")}
    return [
        row(
            "exposed communication, with the pass over without",
            exposed["with"] / max(exposed["without"], 1e-9),
            "x",
            goal=0.35,
            peer=f"{exposed['without'] * 1e3:.0f} ms of a step of {results['without'] * 1e3:.0f} ms without",
            how="2 gloo processes, shard 2 x expert 2, a link slowed to the speed at which all messages take as long as"
            " all compute; exposed = step - step with a free link, alternating, medians",
        )
    ]


def _overlap_rank(rank: int, rounds: int, found: Any) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", rank=rank, world_size=2)
    mesh = Mesh(1, 2, 1, 2)
    steps = {name: overlap_step(mesh, scheduled=name == "with") for name in ("with", "without")}
    states = {name: step.init(init, ftrain.key(0)) for name, (step, init, _) in steps.items()}
    free, slow = SlowLink(0.0, float("inf")), None
    times: dict[str, list[float]] = {"with": [], "without": [], "free": []}
    for round_ in range(rounds + 2):
        for name in ("free", "with", "without"):
            step, _, batch = steps["with" if name == "free" else name]
            link = free if name == "free" or slow is None else slow
            key = "with" if name == "free" else name
            dist.barrier()
            began = time.perf_counter()
            states[key], _ = run_over(link, step, states[key], step.share(batch))
            if round_ >= 2:
                times[name].append(time.perf_counter() - began)
            elif name == "free" and round_ == 1:
                sent = sum(step.lower(states[key], step.share(batch)).bytes_moved().values())
                box = [SlowLink(100e-6, sent / (time.perf_counter() - began))]
                dist.broadcast_object_list(box, src=0)
                slow = box[0]
    if rank == 0:
        found.update({name: statistics.median(t) for name, t in times.items()})
    dist.destroy_process_group()


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
    rows.append(
        row("Ulysses with 2 key/value heads on 4 ranks over repeating them to every query head", per_layer / repeated,
            "x", goal=1.0, peer="1.0", how="bytes of one layer's forward exchanges")  # fmt: skip
    )
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
