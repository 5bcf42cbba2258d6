"""Measured memory: how many bytes a call really had alive at its peak, as the allocator saw it."""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch.autograd.profiler import profile


class PeakBytes(NamedTuple):
    """Bytes above what was alive before the call: the most at once (`peak`), and what is left after it (`kept`).

    `kept` counts the call's result (while the meter holds it) and whatever else the call did not free.
    """

    peak: int
    kept: int


class CardBytes(NamedTuple):
    """`PeakBytes` on CUDA, and what the card gave for them: the most that torch's allocator had `reserved` during the
    call beyond what it had handed out before. Blocks that were cached before the call count.
    """

    peak: int
    kept: int
    reserved: int


def measure_peak(function: Callable[[], Any]) -> PeakBytes:
    """Call `function()` once and measure the bytes that it allocates beyond those alive before.

    On CUDA (when the process has used it) from the caching allocator's own counters; else from the CPU allocator's
    events, so that what an op allocates for itself while it runs is counted. Buffers that libraries take past torch's
    allocator (oneDNN and MKL scratch, the stack) are not seen. Frees of older tensors do not lower the peak. Call the
    function once before, so that tracing and first-call caches are not measured.
    """
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        return PeakBytes(*measure_card(function)[:2])
    deltas = allocation_deltas(function)
    alive = peak = 0
    for delta in deltas:
        alive += delta
        peak = max(peak, alive)
    return PeakBytes(peak, alive)


def allocation_deltas(function: Callable[[], Any]) -> list[int]:
    """The CPU allocator's events of one call in order of time: bytes taken (positive) and given back (negative)."""
    with profile(use_kineto=True, profile_memory=True) as recorded:
        result = function()
    del result
    return [event.nbytes() for event in _memory_events(recorded)]


def _memory_events(recorded: Any) -> list[Any]:
    """The profiler's raw memory events: private, so this is the one place that knows them."""
    events = recorded.kineto_results.events()
    return sorted((e for e in events if e.name() == "[memory]"), key=lambda e: e.start_ns())


def measure_card(function: Callable[[], Any]) -> CardBytes:
    """Call `function()` once and measure what it allocates on the current CUDA device, and what is reserved for it.

    Call it once before, as for `measure_peak`. To leave out blocks that other work left in the cache, call
    `torch.cuda.empty_cache()` before.
    """
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    result = function()
    torch.cuda.synchronize()
    peak, after = torch.cuda.max_memory_allocated(), torch.cuda.memory_allocated()
    del result
    return CardBytes(peak - before, after - before, torch.cuda.max_memory_reserved() - before)
