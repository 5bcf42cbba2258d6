"""`ftrain plan --check`: the best layouts run for a few steps on the devices of this run, and prediction is compared
with measurement.

The prediction is repeated for these devices, with the time of each op measured by itself (`profile_nodes`) and of
messages between these ranks. One process per rank: started by torchrun, or alone for a single rank.
"""

import os
import statistics
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from typing import NamedTuple

import torch
import torch.distributed as dist
from rich.console import Console
from rich.table import Table

from ftrain import tree
from ftrain.analysis.cluster import GIB
from ftrain.analysis.meter import measure_peak
from ftrain.analysis.op_times import speed_of
from ftrain.kernels.random import key
from ftrain.plan.cost import Price, price
from ftrain.plan.local_machine import local_cluster, local_device, world_size
from ftrain.plan.space import Candidate
from ftrain.plan.workload import Workload
from ftrain.profile.nodes import profile_nodes
from ftrain.step.api import Step, make_step

_STEPS = 5
_TIMEOUT = timedelta(seconds=1800)  # while one rank searches the others wait


class Checked(NamedTuple):
    """A layout's seconds per step and peak bytes of a rank, predicted for this machine and measured on it. Of all ranks
    the slowest and the fullest count.
    """

    candidate: Candidate
    predicted_seconds: float
    seconds: float
    predicted_peak: float
    peak: float


def check_best(prices: Sequence[Price], workload: Workload, *, console: Console) -> list[Checked]:
    """Run the layout of each of `prices` for a few steps and print the table to `console`; on several ranks all call
    this, within `processes`. Returns a `Checked` per layout.

    ValueError if a layout is not for this run's number of ranks, or the workload does not say how to make its state.
    """
    world = world_size()
    for p in prices:
        if p.candidate.ranks != world:
            raise ValueError(
                f"--check runs on this run's {world} rank{'s' if world > 1 else ''}, but the layout is for "
                f"{p.candidate.ranks}: search with --gpus {world}, or start {p.candidate.ranks} with torchrun "
                f"(torchrun --nproc-per-node {p.candidate.ranks} -m ftrain.cli.main plan ...)"
            )
    device = local_device()
    found = [check(p.candidate, workload, device) for p in prices]
    console.print(table_of(found, speed_of(device).name))
    return found


def table_of(found: Sequence[Checked], machine: str) -> Table:
    """The table of predicted and measured values. `machine`: its name."""
    table = Table(title=f"predicted for {machine} and measured on it", title_justify="left")
    for name in ("layout", "step ms, predicted", "measured", "ratio", "peak GiB, predicted", "measured", "ratio"):
        table.add_column(name, justify="left" if name == "layout" else "right")
    for c in found:
        times = (f"{c.predicted_seconds * 1e3:.1f}", f"{c.seconds * 1e3:.1f}", f"{c.predicted_seconds / c.seconds:.2f}")
        peaks = (f"{c.predicted_peak / GIB:.3f}", f"{c.peak / GIB:.3f}", f"{c.predicted_peak / c.peak:.2f}")
        table.add_row(str(c.candidate), *times, *peaks)
    return table


@contextmanager
def processes() -> Iterator[None]:
    """Within the block the process group of a run that torchrun started is open. Does nothing where there is one
    already, or for a single rank.
    """
    if dist.is_initialized() or world_size() == 1:
        yield
        return
    if torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
    dist.init_process_group("nccl" if torch.cuda.is_available() else "gloo", timeout=_TIMEOUT)
    try:
        yield
    finally:
        dist.destroy_process_group()


def check(candidate: Candidate, workload: Workload, device: torch.device) -> Checked:
    """Predict and measure the layout `candidate` on `device`, with a fresh state and a batch of zeros. The ops' times
    are remembered on disk.

    ValueError if the workload does not say how to make its state.
    """
    work = workload.make(workload.stacks, candidate)
    if work.init is None:
        raise ValueError(
            f"--check: {workload.name} does not say how to make its state: give its WorkloadStep an `init`"
        )
    many = candidate.ranks > 1
    step = make_step(
        work.step,
        plan=work.plan(candidate, kind="process") if many else None,
        specs=work.specs if many else None,
        remat=candidate.recompute,
        precision=work.precision,
        donate="state" if work.donate else None,
    )
    state = step.init(work.init, key(0, device=device))
    batch = step.share(tree.map(lambda a: torch.zeros(a.shape, dtype=a.dtype, device=device), work.batch))
    profile_nodes(step, state, batch, repeats=2, remember=True)
    predicted = price(workload, candidate, local_cluster(device))
    seconds, peak = measured(step, state, batch, device)
    return Checked(candidate, predicted.seconds, _most(seconds), predicted.peak, _most(peak))


def measured(step: Step, state: object, batch: object, device: torch.device) -> tuple[float, float]:
    """The median seconds of a step on this rank, and the most bytes that it holds, arguments included.

    `state` and `batch`: its arguments; the state is consumed. `device`: where they are.
    """
    state, _ = step(state, batch)
    seconds = []
    for _ in range(_STEPS):
        _wait(device)
        began = time.perf_counter()
        state, _ = step(state, batch)
        _wait(device)
        seconds.append(time.perf_counter() - began)
    held = sum(x.to_local().nbytes if hasattr(x, "to_local") else x.nbytes for x in tree.leaves([state, batch]))
    box = [state]
    del state
    peak = held + measure_peak(lambda: step(box.pop(), batch)).peak
    return statistics.median(seconds), float(peak)


def _most(value: float) -> float:
    """The largest value of all ranks. All ranks call this together."""
    if not dist.is_initialized():
        return value
    device = "cuda" if dist.get_backend() == "nccl" else "cpu"
    found = torch.tensor(value, dtype=torch.float64, device=device)
    dist.all_reduce(found, dist.ReduceOp.MAX)
    return float(found)


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
