"""What the device at hand can do, measured rather than looked up."""

import os
import time

import torch

_SIDE = 1024
_ROUNDS = 12


def peak_flops(device: torch.device, dtype: torch.dtype = torch.float32) -> float:
    """FLOP/s of a matrix product that is large enough to be compute bound: the best of a few rounds.

    The denominator of MFU. On CUDA the side is larger, so that the tensor cores are busy.
    """
    side = 8 * _SIDE if device.type == "cuda" else _SIDE
    a, b = (torch.ones(side, side, dtype=dtype, device=device) for _ in range(2))
    best = float("inf")
    for _ in range(_ROUNDS):
        _wait(device)
        started = time.perf_counter()
        a @ b
        _wait(device)
        best = min(best, time.perf_counter() - started)
    return 2 * side**3 / best


def copy_bandwidth(device: torch.device) -> float:
    """Bytes/s that a copy of a tensor too large for caches reads and writes: the best of a few rounds."""
    source = torch.ones(1 << (28 if device.type == "cuda" else 24), dtype=torch.float32, device=device)
    target = torch.empty_like(source)
    best = float("inf")
    for _ in range(_ROUNDS // 2):
        _wait(device)
        started = time.perf_counter()
        target.copy_(source)
        _wait(device)
        best = min(best, time.perf_counter() - started)
    return 2 * source.nbytes / best


def free_bytes(device: torch.device) -> int:
    """Memory that can still be allocated: of the card, or of the machine."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_AVPHYS_PAGES")


def device_bytes(device: torch.device) -> int:
    """All memory of the card, or of the machine."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
