"""The speed and memory of this machine's devices. Speeds are measured, except that of the link to the host."""

import os
import re
import statistics
import time
from collections.abc import Callable

import torch

# Bytes/s of copies between pinned memory and the card, each direction, by the beginning of a word of the card's name;
# the first that fits counts (a GB200 is no B200: its link is another one). The interfaces are those of NVIDIA's data
# sheets (PCIe 5 x16: 63 GB/s, PCIe 4 x16: 31.5, PCIe 3 x16: 15.8, NVLink-C2C of a GH200: 450). Copies reach 76% to 87%
# of PCIe (packet headers, flow control); for C2C we assume 78%. A machine may have fewer lanes or share them: then give
# Remat(offload=...) a number.
_HOST_LINKS = {
    "GH200": 350e9, "H100": 55e9, "H200": 55e9, "H20": 55e9, "B200": 55e9,
    "A100": 25e9, "A800": 25e9, "A10": 25e9, "A40": 25e9, "L4": 25e9, "L40": 25e9, "RTX 30": 25e9, "RTX 40": 25e9,
    "RTX 50": 50e9, "V100": 12e9, "T4": 12e9,
}  # fmt: skip
_SIDE = 1024
_ROUNDS = 9


def peak_flops(device: torch.device, dtype: torch.dtype = torch.float32) -> float:
    """FLOP/s of a compute-bound matrix product on `device` in `dtype`, measured: the median of a few rounds.

    The denominator of MFU. The matrices hold random numbers, because a GPU multiplies ones up to 13% faster (fewer bits
    flip). On CUDA the matrices are larger, to keep the tensor cores busy; they take at most 384 MiB.

    >>> import torch
    >>> from ftrain.analysis.hardware import peak_flops
    >>> peak_flops(torch.device("cpu")) > 1e8
    True
    """
    side = _SIDE if device.type == "cpu" else (8 if dtype.itemsize <= 2 else 4) * _SIDE
    generator = torch.Generator(device).manual_seed(0)
    a, b = (torch.randn(side, side, dtype=dtype, device=device, generator=generator) for _ in range(2))
    out = torch.empty_like(a)
    return 2 * side**3 / _seconds(lambda: torch.mm(a, b, out=out), device)


def copy_bandwidth(device: torch.device) -> float:
    """Bytes/s, read plus written, of a copy too large for the caches, measured: the median of a few rounds.

    It takes 512 MiB on CUDA (small beside a training state that may be there already) and 128 MiB on a CPU.

    >>> import torch
    >>> from ftrain.analysis.hardware import copy_bandwidth
    >>> copy_bandwidth(torch.device("cpu")) > 1e7
    True
    """
    source = torch.ones((64 if device.type == "cuda" else 16) << 20, dtype=torch.float32, device=device)
    target = torch.empty_like(source)
    return 2 * source.nbytes / _seconds(lambda: target.copy_(source), device, repeats=4)


def _seconds(work: Callable[[], object], device: torch.device, *, repeats: int = 1) -> float:
    """Seconds of one `work()`: the median over rounds of `repeats` calls each, after one round to warm up."""

    def one_round() -> float:
        _wait(device)
        started = time.perf_counter()
        for _ in range(repeats):
            work()
        _wait(device)
        return (time.perf_counter() - started) / repeats

    one_round()
    return statistics.median(one_round() for _ in range(_ROUNDS))


def host_bandwidth(device: torch.device) -> float | None:
    """Bytes/s between a card and pinned host memory, in each direction; None for a CPU and for cards not listed."""
    if device.type != "cuda":
        return None
    name = torch.cuda.get_device_name(device)
    return next((speed for part, speed in _HOST_LINKS.items() if re.search(rf"\b{part}", name)), None)


def free_bytes(device: torch.device) -> int:
    """Bytes that can still be allocated on a device.

    For a card: its free memory and what torch's allocator has reserved and not handed out. For a CPU: the free memory
    of the machine. ValueError if `device` is a card and this machine has none.
    """
    if device.type == "cuda":
        _require_card(device)
        kept = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + kept
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_AVPHYS_PAGES")


def device_bytes(device: torch.device) -> int:
    """Bytes of all memory of a card, or of the machine for a CPU.

    ValueError if `device` is a card and this machine has none.

    >>> import torch
    >>> from ftrain.analysis.hardware import device_bytes, free_bytes
    >>> cpu = torch.device("cpu")
    >>> 0 < free_bytes(cpu) <= device_bytes(cpu)
    True
    """
    if device.type == "cuda":
        _require_card(device)
        return torch.cuda.get_device_properties(device).total_memory
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def _require_card(device: torch.device) -> None:
    if not torch.cuda.is_available():
        raise ValueError(
            f"this machine has no {device}, so its memory is not known: give a budget in bytes, e.g. '60GiB'"
        )


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
