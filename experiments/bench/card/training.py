"""Whole training steps on the card: are they the CPU's, how fast are they, beside whom, and is the plan the peak?"""

import gc
import statistics
import time
from collections.abc import Callable
from functools import partial
from typing import Any, Literal

import torch
from torch.profiler import ProfilerActivity, profile

import ftrain
from experiments.bench.card.decoders import FAST, LARGE, SMALL, Size, stepping, training
from experiments.bench.card.telling import Ceilings, Stage, attempt, note
from experiments.bench.hf_models import hf_model
from experiments.bench.table import Row, row
from ftrain.analysis.meter import measure_peak
from ftrain.remat.policy import Remat

_STEPS = 6
_TOLERANCE = {"bfloat16": 3e-2, "float32": 1e-3}
"""How far a loss of about 6 may be from the CPU's after some steps."""
Kind = Literal["eager", "compiled", "liger"]


def _sizes(stage: Stage) -> dict[str, Size]:
    return SMALL if stage.tiny else FAST


def _each(parts: dict[str, Callable[[], Any]]) -> None:
    """Attempt the parts in order; each finds the memory empty."""
    for name, part in parts.items():
        attempt(name, part)
        gc.collect()
        torch.cuda.empty_cache()


def steps(stage: Stage) -> None:
    """The first losses of each backend and precision, against the CPU's in the same precision."""
    wanted = {(k, c): _losses(size, "cpu", "aten", c) for c in _TOLERANCE for k, size in SMALL.items()}
    note("losses on the CPU", {f"{kind}, {compute}": losses for (kind, compute), losses in wanted.items()})
    for backend in ("aten", "inductor", "cudagraph"):  # what compiles comes late
        for (kind, compute), losses in wanted.items():
            name = f"losses: {kind}, {compute}, {backend}"
            attempt(name, partial(_compare, name, SMALL[kind], backend, compute, losses))


def _losses(size: Size, device: str, backend: str, compute: str) -> list[float]:
    one = stepping(training(size, backend=backend, compute=compute, device=device))
    return [float(one()) for _ in range(_STEPS)]


def _compare(name: str, size: Size, backend: str, compute: str, wanted: list[float]) -> Row:
    began = time.perf_counter()
    found = _losses(size, "cuda", backend, compute)
    seconds = time.perf_counter() - began
    note(name, found)
    apart = max(abs(a - b) for a, b in zip(found, wanted, strict=True))
    how = f"the largest difference from the CPU's in {_STEPS} losses; peer: seconds of all, compiling included"
    return row(name, apart, "", goal=_TOLERANCE[compute], peer=seconds, valid=apart == apart, how=how)


def speed(stage: Stage) -> None:
    """Milliseconds, tokens per second and MFU of a step in bfloat16, op by op and then with Inductor."""
    ceilings, sizes = stage.ceilings, _sizes(stage)
    names = [(kind, backend) for backend in ("aten", "inductor") for kind in sizes]
    _each({f"{k}, {b}": partial(_ours, f"{k}, ftrain {b}", sizes[k], b, ceilings) for k, b in names})


def graph(stage: Stage) -> None:
    """The same as CUDA graphs: apart from the others, since a capture that fails spoils its process."""
    ceilings = stage.ceilings
    _each({k: partial(_ours, f"{k}, ftrain cudagraph", s, "cudagraph", ceilings) for k, s in _sizes(stage).items()})


def peers(stage: Stage) -> None:
    """transformers on the dense decoder's sizes: bfloat16 autocast over float32 weights, SDPA, fused AdamW, clip."""
    ceilings, size = stage.ceilings, _sizes(stage)["dense"]
    kinds: tuple[Kind, ...] = ("eager", "compiled", "liger")
    _each({k: partial(_theirs, f"dense, transformers {k}", size, k, ceilings) for k in kinds})


def _ours(name: str, size: Size, backend: str, ceilings: Ceilings) -> list[Row]:
    return _timed(name, stepping(training(size, backend=backend)), size, ceilings)


def _theirs(name: str, size: Size, kind: Kind, ceilings: Ceilings) -> list[Row]:
    if kind == "liger":
        from liger_kernel.transformers import apply_liger_kernel_to_llama

        apply_liger_kernel_to_llama()
    with torch.device("cuda"):
        model = hf_model(size.shape)
    forward = torch.compile(model) if kind == "compiled" else model
    optimizer = torch.optim.AdamW(model.parameters(), 3e-4, fused=True)
    ids_BL = torch.randint(0, size.shape.vocab, (size.documents, size.length), device="cuda")

    def one() -> Any:
        with torch.autocast("cuda", torch.bfloat16):
            loss = forward(input_ids=ids_BL, labels=ids_BL).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0, foreach=True)
        optimizer.step()
        optimizer.zero_grad()
        return loss

    return _timed(name, one, size, ceilings)


def _timed(name: str, one: Callable[[], Any], size: Size, ceilings: Ceilings) -> list[Row]:
    """Figures of a step that returns before the card is done."""
    began = time.perf_counter()
    for _ in range(3):
        one()
    torch.cuda.synchronize()
    first = time.perf_counter() - began
    torch.cuda.reset_peak_memory_stats()
    walls, hosts = [], []
    for _ in range(5):
        began = time.perf_counter()
        one()
        hosts.append(time.perf_counter() - began)
        torch.cuda.synchronize()
        walls.append(time.perf_counter() - began)
    wall, host = statistics.median(walls), statistics.median(hosts)
    floor = size.flops / ceilings.bfloat16
    how = f"{size.tokens} tokens in {size.documents} documents, bfloat16 over float32 weights, clip, AdamW; median of 5"
    mfu = f"{100 * floor / wall:.1f}% MFU"
    return [
        row(f"{name}: step", 1e3 * wall, "ms", peer=f"floor {1e3 * floor:.2f}, {mfu}", how=how),
        row(f"{name}: host", 1e3 * host, "ms", how="of a step: until the call returns"),
        row(f"{name}: rate", size.tokens / wall, "tokens/s", how=how),
        row(f"{name}: MFU", floor / wall, "", how="the step's FLOPs over what the card's best bfloat16 product does"),
        row(f"{name}: peak", torch.cuda.max_memory_allocated() / 2**30, "GiB", how="of the allocator, state included"),
        row(f"{name}: first three steps", first, "s", how="compiling and warm-up"),
    ]


def profiled(stage: Stage) -> None:
    """Where the time of a step goes: the heaviest kernels, and how much of the step the card is busy."""
    for kind, size in _sizes(stage).items():
        attempt(f"profile: {kind}", partial(_profile, kind, size))
        torch.cuda.empty_cache()


def _profile(kind: str, size: Size) -> list[Row]:
    one = stepping(training(size, backend="aten"))
    for _ in range(3):
        one()
    torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CUDA]) as seen:
        began = time.perf_counter()
        one()
        torch.cuda.synchronize()
        wall = time.perf_counter() - began
    events = sorted(seen.key_averages(), key=lambda e: -e.self_device_time_total)
    note(f"kernels: {kind}", [[e.key[:90], round(e.self_device_time_total / 1e3, 3), e.count] for e in events[:25]])
    busy = sum(e.self_device_time_total for e in events) / 1e6
    how = "one step op by op under the profiler; peer: milliseconds of the step"
    return [
        row(f"profile: {kind}, card is busy", 1e3 * busy, "ms", peer=1e3 * wall, how=how),
        row(f"profile: {kind}, launches", sum(e.count for e in events), "", how=how),
    ]


def memory(stage: Stage) -> None:
    """The planned peak against the allocator's, and what is reserved beside it."""
    sizes = SMALL if stage.tiny else LARGE
    offload = Remat(paths={"layers.*": "offload"})
    cases: dict[str, tuple[str, Remat | str | None]] = {
        "nothing recomputed": ("dense", None),
        "layers recomputed": ("dense", "layer"),
        "layers offloaded": ("dense", offload),
        "mixture of experts": ("moe", None),
    }
    _each({name: partial(_plan_and_peak, name, sizes[kind], remat) for name, (kind, remat) in cases.items()})


def _plan_and_peak(name: str, size: Size, remat: Remat | str | None) -> list[Row]:
    made = training(size, backend="aten", remat=remat)
    planned = made.step.lower(made.state, made.batch).memory().peak
    one = stepping(made)
    float(one())
    torch.cuda.empty_cache()
    began = time.perf_counter()
    peak = measure_peak(lambda: float(one())).peak
    seconds = time.perf_counter() - began
    held, reserved = torch.cuda.max_memory_allocated(), torch.cuda.max_memory_reserved()
    how = f"{size.tokens} tokens; of one step beyond its arguments; peer: the plan in MiB"
    return [
        row(
            f"memory, {name}: plan against peak", abs(planned / peak - 1), "", goal=0.02, peer=planned / 2**20, how=how
        ),
        row(f"memory, {name}: reserved over allocated", reserved / held, "x", how="by the caching allocator"),
        row(f"memory, {name}: step", 1e3 * seconds, "ms", how="one step, measured once"),
    ]


def op_times(stage: Stage) -> None:
    """The time of each op of the steps alone, into the folder of the results: `ftrain plan --op-times` takes it."""
    for kind, size in _sizes(stage).items():
        attempt(f"op times: {kind}", partial(_op_times, kind, size))
        torch.cuda.empty_cache()


def _op_times(kind: str, size: Size) -> Row:
    made = training(size, backend="aten")
    nodes = ftrain.profile_nodes(made.step, made.state, made.batch, repeats=2, remember=True)
    by_op: dict[str, float] = {}
    for node in nodes:
        by_op[node.op] = by_op.get(node.op, 0.0) + node.microseconds
    heaviest = sorted(by_op.items(), key=lambda item: -item[1])[:20]
    note(f"op times: {kind}", {op: round(us / 1e3, 3) for op, us in heaviest})
    total = sum(by_op.values()) / 1e3
    return row(f"op times: {kind}, sum", total, "ms", how="every op of a step by itself, in bfloat16; the least of 2")
