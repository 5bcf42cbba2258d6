"""CUDA's caching allocator: its settings, and the memory that it reserves beyond what it hands out.

A memory plan counts the bytes that the allocator hands out (`allocated`). A card is full when the bytes that the
allocator has taken from the driver (`reserved`) reach its size. The difference is fragmentation: parts of blocks that
fit no request. Expandable segments are blocks that grow by mapping pages; with them there is little fragmentation.

Measured with torch 2.11 on a mixture-of-experts decoder (30b-a3b, 2 layers, 8k and 16k tokens, 29.5 and 34.5 GiB
allocated): reserved memory was 28% and 21% above allocated memory, with expandable segments 4.5% and 3.7%. Other steps
differ, so figures derived from these are estimates.
"""

import os
import warnings
from collections.abc import Mapping, MutableMapping

import torch

NAMES = ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF")
"""The environment variables that configure torch's allocator. The first that is set counts; the second is older."""

SETTING = "expandable_segments:True"
"""The value of these variables that turns expandable segments on."""

CUBLAS_WORKSPACE = 32 << 20
"""Bytes that cuBLAS keeps, from the first product on, for each stream with products (8 MiB before Hopper)."""

_OVER = {True: 1.04, False: 1.25}


def prefer_expandable_segments(environ: MutableMapping[str, str] = os.environ) -> None:
    """Turn expandable segments on in `environ`, unless the user has configured the allocator.

    Call it at the start of a program: it has no effect once CUDA is initialized.
    """
    if not any(name in environ for name in NAMES):
        environ[NAMES[0]] = SETTING


def has_expandable_segments(environ: Mapping[str, str] = os.environ) -> bool:
    """True if `environ` turns expandable segments on."""
    setting = next((environ[name] for name in NAMES if name in environ), "")
    return SETTING.lower() in setting.replace(" ", "").lower()


def reserved_over_allocated() -> float:
    """An estimate of the bytes that the allocator reserves for each byte that it hands out at the peak."""
    return _OVER[has_expandable_segments()]


def warn_without_expandable_segments(device: torch.device) -> None:
    """Warn, for a CUDA device without expandable segments, what that costs and which variable turns them on."""
    if device.type == "cuda" and not has_expandable_segments():
        warnings.warn(
            "CUDA's allocator runs without expandable segments: it may reserve a quarter more memory than a step needs "
            f"(21% to 28% measured, with them 4%). Before the program starts: export {NAMES[0]}={SETTING}",
            stacklevel=2,
        )


def allocator_state(device: torch.device) -> str:
    """A sentence on a card's memory: total, free, reserved, allocated and peak, in GiB. Empty without CUDA in use."""
    if device.type != "cuda" or not torch.cuda.is_initialized():
        return ""
    free, total = torch.cuda.mem_get_info(device)
    allocated, reserved = torch.cuda.memory_allocated(device), torch.cuda.memory_reserved(device)
    most = torch.cuda.max_memory_allocated(device)
    text = (
        f"the card has {_gib(total)}, {_gib(free)} of it free; torch's allocator has reserved {_gib(reserved)} and "
        f"handed out {_gib(allocated)} (at most {_gib(most)}): {_gib(reserved - allocated)} are in parts of blocks "
        "that fit no request"
    )
    return text if has_expandable_segments() else f"{text}. There are fewer with {NAMES[0]}={SETTING}"


def _gib(size: int) -> str:
    return f"{size / 2**30:.2f} GiB"
