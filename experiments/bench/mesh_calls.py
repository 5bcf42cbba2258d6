"""What a call costs on a mesh of two processes beside one device's: steps that do nothing, of many leaves.

    python -m experiments.bench.mesh_calls [--json FILE]

Both steps run in turn in the same process, so that both see the same load.
"""

import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
import tyro

import ftrain
from experiments.bench.table import Row, publish, row
from ftrain.modules.spec import Constant, ParamSpec
from ftrain.sharding import Mesh, Plan

LEAVES = (400, 1500)
ROUNDS = 200


@dataclass(frozen=True)
class Options:
    """What to measure."""

    json: Path | None = None
    """Where the rows go as JSON."""


def main(options: Options) -> int:
    """Print the table; 1 if a goal is missed."""
    rows = call_rows()
    publish(rows, "mesh-calls", options.json)
    return int(any(r.ok is False for r in rows))


def call_rows() -> list[Row]:
    """Medians over rounds, on the first of the two ranks."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "times.pt"
        mp.spawn(_measure, args=(str(Path(folder) / "store"), str(file)), nprocs=2)
        times = torch.load(file)
    how = "wall time of a cached call with a donated state and no work, in turn in one process, medians"
    return [
        row(
            f"a call on a mesh of two processes, {leaves} leaves",
            mesh / one,
            "x one device",
            goal=1.3,
            peer=f"{one * 1e6:.0f} us on one device",
            how=how,
        )
        for leaves, (one, mesh) in times.items()
    ]


def _measure(rank: int, store: str, file: str) -> None:
    torch.set_num_threads(1)
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
    times = {leaves: _medians(leaves) for leaves in LEAVES}
    if rank == 0:
        torch.save(times, file)
    dist.barrier()
    dist.destroy_process_group()


def _medians(leaves: int) -> tuple[float, float]:
    """Seconds of a call on one device, and on the mesh."""
    specs = {f"leaf{i}": ParamSpec((8,), ("embed",), Constant(0.0)) for i in range(leaves)}
    mesh = ftrain.jit(_nothing, donate="state", plan=Plan(Mesh(shard=2)), specs=specs)
    one = ftrain.jit(_nothing, donate="state")
    batch = {"x": torch.zeros(3)}
    states = [step.init(lambda key: ftrain.init(specs, key), ftrain.key(0)) for step in (one, mesh)]
    walls: list[list[float]] = [[], []]
    for _ in range(ROUNDS):
        for i, step in enumerate((one, mesh)):
            took, states[i] = _timed(step, states[i], batch)
            walls[i].append(took)
    return statistics.median(walls[0][10:]), statistics.median(walls[1][10:])


def _nothing(state: Any, batch: Any) -> Any:
    return dict(state.items())


def _timed(step: Callable, state: Any, batch: Any) -> tuple[float, Any]:
    began = time.perf_counter()
    new = step(state, batch)
    return time.perf_counter() - began, new


if __name__ == "__main__":
    sys.exit(main(tyro.cli(Options)))
