"""What the device at hand can do, measured rather than looked up, but for its link to the host."""

import os
import re
import statistics
import time
from collections.abc import Callable

import torch

# Bytes/s of copies between pinned memory and the card, each direction, by the beginning of a word of the card's name;
# the first that fits counts (a GB200 is no B200: its link is another one). The interfaces are those of NVIDIA's data
# sheets (PCIe 5 x16: 63 GB/s, PCIe 4 x16: 31.5, PCIe 3 x16: 15.8, NVLink-C2C of a GH200: 450). Of PCIe copies get 76%
# to 87% (headers of packets, flow control), about 55 of 63; of C2C 78% is counted on. A machine may have fewer lanes or
# share them: then give Remat(offload=...) a number.
_HOST_LINKS = {
    "GH200": 350e9, "H100": 55e9, "H200": 55e9, "H20": 55e9, "B200": 55e9,
    "A100": 25e9, "A800": 25e9, "A10": 25e9, "A40": 25e9, "L4": 25e9, "L40": 25e9, "RTX 30": 25e9, "RTX 40": 25e9,
    "RTX 50": 50e9, "V100": 12e9, "T4": 12e9,
}  # fmt: skip
_SIDE = 1024
_ROUNDS = 9


def peak_flops(device: torch.device, dtype: torch.dtype = torch.float32) -> float:
    """FLOP/s of a matrix product that is large enough to be compute bound: the median of a few rounds.

    The denominator of MFU. Factors are random numbers: of ones a GPU makes products up to 13% faster, since fewer bits
    change. On CUDA the side is larger, so that the tensor cores are busy; at most 384 MiB are taken.
    """
    side = _SIDE if device.type == "cpu" else (8 if dtype.itemsize <= 2 else 4) * _SIDE
    generator = torch.Generator(device).manual_seed(0)
    a, b = (torch.randn(side, side, dtype=dtype, device=device, generator=generator) for _ in range(2))
    out = torch.empty_like(a)
    return 2 * side**3 / _seconds(lambda: torch.mm(a, b, out=out), device)


def copy_bandwidth(device: torch.device) -> float:
    """Bytes/s that a copy of a tensor too large for caches reads and writes: the median of a few rounds.

    On CUDA 512 MiB are taken: a state may lie there already.
    """
    source = torch.ones((64 if device.type == "cuda" else 16) << 20, dtype=torch.float32, device=device)
    target = torch.empty_like(source)
    return 2 * source.nbytes / _seconds(lambda: target.copy_(source), device, repeats=4)


def _seconds(work: Callable[[], object], device: torch.device, *, repeats: int = 1) -> float:
    """The median over rounds of so many `repeats`, for one of them; a round that warms up is left out."""

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
    """Bytes/s of a card's link to pinned memory of the host, each direction; None on a CPU, and of cards not listed."""
    if device.type != "cuda":
        return None
    name = torch.cuda.get_device_name(device)
    return next((speed for part, speed in _HOST_LINKS.items() if re.search(rf"\b{part}", name)), None)


def free_bytes(device: torch.device) -> int:
    """Memory that can still be allocated: of the card, with what torch's allocator keeps unused, or of the machine.

    ValueError of a card that is not here.
    """
    if device.type == "cuda":
        _require_card(device)
        kept = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + kept
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_AVPHYS_PAGES")


def device_bytes(device: torch.device) -> int:
    """All memory of the card, or of the machine. ValueError of a card that is not here."""
    if device.type == "cuda":
        _require_card(device)
        return torch.cuda.get_device_properties(device).total_memory
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def _require_card(device: torch.device) -> None:
    if not torch.cuda.is_available():
        raise ValueError(f"there is no {device} here whose memory could be asked: give a budget in bytes, e.g. '60GiB'")


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
