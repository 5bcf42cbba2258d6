"""`ftrain plan --check`: the best layouts run for a few steps on the devices at hand, beside what was predicted.

The prediction is made again for these devices, by what they are measured to do; one process per rank (torchrun), or a
single rank.
"""

import os
import statistics
import time
from collections.abc import Sequence
from typing import NamedTuple

import torch
from rich.console import Console
from rich.table import Table

from ftrain import jit, key, tree
from ftrain.hardware import device_bytes
from ftrain.meter import measure_peak
from ftrain.op_times import speed_of
from ftrain.search.cluster import GIB, Cluster, Efficiency
from ftrain.search.layouts import Candidate
from ftrain.search.price import Price, price
from ftrain.search.subject import Subject

_STEPS = 5


class Checked(NamedTuple):
    """A layout's seconds of a step and peak bytes, predicted for this machine and measured on it."""

    candidate: Candidate
    predicted_seconds: float
    seconds: float
    predicted_peak: float
    peak: float


def check_best(prices: Sequence[Price], subject: Subject, *, console: Console) -> list[Checked]:
    """Run each layout for a few steps and print the table. ValueError if it is not of this run's number of ranks."""
    world = int(os.environ.get("WORLD_SIZE", "1"))
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    for p in prices:
        if p.candidate.ranks != world:
            raise ValueError(
                f"--check runs on this run's {world} rank{'s' if world > 1 else ''}, but the layout is for "
                f"{p.candidate.ranks}: search with --gpus {world}, or start as many processes with torchrun"
            )
    machine = this_machine(device)
    found = [check(p.candidate, subject, device, machine) for p in prices]
    table = Table(title=f"predicted for {machine.name} and measured on it", title_justify="left")
    for name in ("layout", "step ms, predicted", "measured", "peak GiB, predicted", "measured"):
        table.add_column(name, justify="left" if name == "layout" else "right")
    for c in found:
        times = (f"{c.predicted_seconds * 1e3:.1f}", f"{c.seconds * 1e3:.1f}")
        table.add_row(str(c.candidate), *times, f"{c.predicted_peak / GIB:.3f}", f"{c.peak / GIB:.3f}")
    console.print(table)
    return found


def check(candidate: Candidate, subject: Subject, device: torch.device, machine: Cluster) -> Checked:
    """Predict and measure one layout, on a fresh state and a batch of zeros."""
    predicted = price(subject, candidate, machine)
    trial = subject.make(subject.stacks, candidate)
    many = candidate.ranks > 1
    step = jit(
        trial.step,
        plan=trial.plan(candidate, kind="process") if many else None,
        specs=trial.specs if many else None,
        remat=candidate.recompute,
        precision=trial.precision,
        donate="state" if trial.donate else None,
    )
    if trial.init is None:
        raise ValueError(f"--check: {subject.name} does not say how its state is made: give its Trial an `init`")
    state = step.init(trial.init, key(0, device=device))
    batch = step.share(tree.map(lambda a: torch.zeros(a.shape, dtype=a.dtype, device=device), trial.batch))
    state, _ = step(state, batch)
    seconds = []
    for _ in range(_STEPS):
        _wait(device)
        began = time.perf_counter()
        state, _ = step(state, batch)
        _wait(device)
        seconds.append(time.perf_counter() - began)
    box = [state]
    held = sum(x.to_local().nbytes if hasattr(x, "to_local") else x.nbytes for x in tree.leaves([state, batch]))
    del state
    peak = held + measure_peak(lambda: step(box.pop(), batch)).peak
    return Checked(candidate, predicted.seconds, statistics.median(seconds), predicted.peak, float(peak))


def this_machine(device: torch.device) -> Cluster:
    """The device at hand as a cluster of one node, by measured peaks, of which ops are taken to reach all."""
    speed = speed_of(device)
    flops = {torch.bfloat16: speed.flops_of(torch.bfloat16), **speed.flops}
    shares = Efficiency(matmul=0.9, attention=0.5, grouped=0.7, bandwidth=1.0, launch=speed.launch, fragmentation=1.0)
    ranks = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    return Cluster(
        speed.name, ranks, flops, device_bytes(device), speed.bandwidth, speed.host_link, 1e9, efficiency=shares
    )


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
