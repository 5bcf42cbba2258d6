"""Small programs on the null device, each of which answers what the device wrote down: `device_probe.py NAME...`."""

import sys
from typing import Any

import torch
from device_log import Log, read, reset
from on_null_device import say

from ftrain.kernels.linear_cross_entropy import linear_cross_entropy


def devices() -> dict[str, Any]:
    """What torch is told of the cards."""
    found = torch.cuda.get_device_properties(0)
    return {
        "count": torch.cuda.device_count(),
        "name": found.name,
        "bytes": found.total_memory,
        "capability": torch.cuda.get_device_capability(),
        "driver sees": torch.cuda.mem_get_info()[1],
    }


def kernel() -> dict[str, Any]:
    """An elementwise op, then a product."""
    x = torch.empty(64, 64, device="cuda")
    log = _written(lambda: (x.exp(), x @ x))
    return {"launches": log.launches(), "kernels": log.kernels(), "waits": log.host_waits()}


def waits() -> dict[str, Any]:
    """Ways to make the host wait, and a copy from pinned memory, which does not."""
    x, pinned = torch.zeros(1 << 20, device="cuda"), torch.zeros(1 << 20, pin_memory=True)
    programs = {
        "item": lambda: x[0].item(),
        "to the host": lambda: x.cpu(),
        "from pageable memory": lambda: torch.zeros(1 << 20).to("cuda", non_blocking=True),
        "synchronize": torch.cuda.synchronize,
        "nonzero": lambda: x.nonzero(),
        "from pinned memory": lambda: x.copy_(pinned, non_blocking=True),
        "an op": lambda: x.exp(),
    }
    return {name: len(_written(program).host_waits()) for name, program in programs.items()}


def values() -> dict[str, Any]:
    """Copies are done, kernels are not."""
    x = torch.tensor([1.0, 2.0, 3.0]).cuda()
    return {"there and back": x.cpu().tolist(), "doubled": (2 * x).cpu().tolist()}


def memory() -> dict[str, Any]:
    """Of 80 GB, which cost the host nothing."""
    big = torch.empty(60 * 10**9, dtype=torch.uint8, device="cuda")
    free = torch.cuda.mem_get_info()[0]
    try:
        torch.empty(30 * 10**9, dtype=torch.uint8, device="cuda")
    except torch.cuda.OutOfMemoryError as error:
        return {"allocated": torch.cuda.memory_allocated(), "free": free, "error": str(error), "held": big.numel()}
    return {"allocated": torch.cuda.memory_allocated(), "free": free, "error": "", "held": big.numel()}


def convolution() -> dict[str, Any]:
    """In one and two dims, forward and backward, through cuDNN."""
    launches, missing = {}, list[str]()
    for dims, conv in ((1, torch.nn.Conv1d), (2, torch.nn.Conv2d)):
        layer = conv(8, 16, 3, padding=1, device="cuda", dtype=torch.bfloat16)
        x = torch.zeros(2, 8, *[32] * dims, device="cuda", dtype=torch.bfloat16, requires_grad=True)
        log = _written(lambda layer=layer, x=x: layer(x).sum().backward())
        launches[f"{dims}d"] = [line.split(" ")[1] for line in log.of("CUDNN")]
        missing += log.of("MISSING")
    return {"launches": launches, "missing": missing}


def capture() -> dict[str, Any]:
    """A graph of three ops, replayed."""
    x = torch.zeros(64, device="cuda")
    graph = torch.cuda.CUDAGraph()

    def whole() -> None:
        with torch.cuda.graph(graph):
            (x.exp() + 1).sum()

    log = _written(whole)
    return {"captures": log.captures(), "replay": _written(graph.replay).launches()}


def broken_capture() -> dict[str, Any]:
    """A graph in which the host asks for a value."""
    x = torch.zeros(64, device="cuda")
    error = ""

    def whole() -> None:
        with torch.cuda.graph(torch.cuda.CUDAGraph()):
            x.sum().item()

    reset()
    try:
        whole()
    except RuntimeError as raised:
        error = str(raised)
    return {"captures": read().captures(), "error": error}


def cross_entropy() -> dict[str, Any]:
    """Loss and gradients over a vocabulary as large as Qwen3's, of 8,192 tokens."""
    x_TD = torch.empty(8192, 2048, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    w_DV = torch.empty(2048, 151936, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    labels_T = torch.zeros(8192, dtype=torch.int64, device="cuda")
    log = _written(lambda: torch.autograd.grad(linear_cross_entropy(x_TD, w_DV, labels_T), (x_TD, w_DV)))
    return {"launches": log.launches(), "waits": log.host_waits()}


def _written(program: Any) -> Log:
    """What the device writes down while the program runs a second time; a capture runs once."""
    if program.__name__ != "whole":
        program()
    torch.cuda.synchronize()
    reset()
    program()
    return read()


TOGETHER = (devices, kernel, waits, values, memory, convolution, cross_entropy)
"""Programs that leave the process as it was."""

ALONE = (capture, broken_capture)

if __name__ == "__main__":
    say({program.__name__: program() for program in (*TOGETHER, *ALONE) if program.__name__ in sys.argv[1:]})
