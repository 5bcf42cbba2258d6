"""What the card is and the most it can do: the ceilings that every later figure is a share of."""

import importlib.metadata
import os
import sys
import time
from dataclasses import asdict
from functools import partial

import torch

from experiments.bench.card.telling import Ceilings, Stage, attempt, milliseconds, note
from experiments.bench.table import Row, row

_PACKAGES = ("triton", "transformers", "optree", "tyro", "crc32c", "numpy", "liger-kernel", "flash-attn")
_LAUNCHES = 2000


def machine(stage: Stage) -> None:
    """Versions; products by dtype on random numbers; copies within the card and to the host; what a launch costs."""
    card = torch.cuda.get_device_properties(0)
    note("device", card.name)
    note("memory_bytes", card.total_memory)
    note("multiprocessors", card.multi_processor_count)
    note("torch", torch.__version__)
    note("python", sys.version.split()[0])
    note("cpus", os.cpu_count())
    note("packages", {name: _version(name) for name in _PACKAGES})
    note("ceilings", asdict(Ceilings.measured()))
    side = 1024 if stage.tiny else 8192
    for dtype in ("bfloat16", "float16", "float32"):
        attempt(f"product, {dtype}", partial(_product, side, dtype))
    attempt("product, tf32", partial(_product, side, "float32", tf32=True))
    attempt("copies", partial(_copies, 1 << (20 if stage.tiny else 28)))
    attempt("launch from the host", _launch_from_host)
    attempt("launch in a CUDA graph", _launch_in_graph)


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _product(side: int, dtype: str, *, tf32: bool = False) -> Row:
    a, b = (torch.randn(side, side, device="cuda").to(getattr(torch, dtype)) for _ in range(2))
    before = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = tf32
    rate = 2 * side**3 / milliseconds(lambda: a @ b) / 1e9
    torch.backends.cuda.matmul.allow_tf32 = before
    name = "tf32" if tf32 else dtype
    return row(f"product, {name}", rate, "TFLOP/s", how=f"[{side}, {side}] squared, random numbers, median of 10")


def _copies(elements: int) -> list[Row]:
    here, there = (torch.randn(elements, device="cuda") for _ in range(2))
    host = torch.empty(elements, pin_memory=True)
    how = f"{here.nbytes / 2**20:.0f} MiB, median of 10; within the card bytes read and written both count"
    moves = {
        "copy within the card": (2, lambda: there.copy_(here)),
        "copy from the host": (1, lambda: here.copy_(host, non_blocking=True)),
        "copy to the host": (1, lambda: host.copy_(here, non_blocking=True)),
    }
    return [row(name, n * here.nbytes / milliseconds(move) / 1e6, "GB/s", how=how) for name, (n, move) in moves.items()]


def _launch_from_host() -> Row:
    x = torch.zeros(1, device="cuda")
    torch.cuda.synchronize()
    began = time.perf_counter()
    for _ in range(_LAUNCHES):
        x.add_(1)
    value = (time.perf_counter() - began) / _LAUNCHES * 1e6
    torch.cuda.synchronize()
    return row("launch from the host", value, "us", how=f"host time of add_ on one number, mean of {_LAUNCHES}")


def _launch_in_graph() -> Row:
    x = torch.zeros(1, device="cuda")
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(200):
            x.add_(1)
    value = milliseconds(graph.replay) * 1e3 / 200
    return row("launch in a CUDA graph", value, "us", how="add_ on one number 200 times in a graph, per op")
