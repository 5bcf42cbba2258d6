"""Measured memory: the peak bytes of a call, from the counters and events of the allocator."""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch.autograd.profiler import profile


class PeakBytes(NamedTuple):
    """Bytes allocated by a call, beyond those allocated before it.

    `peak`: the most at any time. `kept`: those left after the call: its result, and whatever else it did not free.
    """

    peak: int
    kept: int


class CardBytes(NamedTuple):
    """`PeakBytes` on CUDA, and `reserved`: the most bytes that the allocator had reserved during the call, beyond
    those that were allocated before it. Blocks that were cached before the call count.
    """

    peak: int
    kept: int
    reserved: int


def measure_peak(function: Callable[[], Any]) -> PeakBytes:
    """Call `function()` once and measure the bytes that it allocates.

    If the process uses CUDA, the counters of the caching allocator are read; else the events of the CPU allocator.
    Workspace of ops counts. Memory that libraries take past torch's allocator (scratch of oneDNN and MKL, the stack)
    does not. Call the function once before, so that tracing and caches of the first call are not measured.

    >>> import torch
    >>> from ftrain.analysis.meter import measure_peak
    >>> x = torch.ones(1000)  # 4,000 bytes
    >>> measure_peak(lambda: (x + x).exp())
    PeakBytes(peak=8000, kept=4000)
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
    """The CPU allocator's events during one call of `function()`, in order of time, in bytes.

    Allocations are positive, frees negative. The result of the call is not freed.
    """
    with profile(use_kineto=True, profile_memory=True) as recorded:
        result = function()
    del result
    return [event.nbytes() for event in _memory_events(recorded)]


def _memory_events(recorded: Any) -> list[Any]:
    """The profiler's raw memory events. They are private to torch; only this function reads them."""
    events = recorded.kineto_results.events()
    return sorted((e for e in events if e.name() == "[memory]"), key=lambda e: e.start_ns())


def measure_card(function: Callable[[], Any]) -> CardBytes:
    """Call `function()` once and measure the bytes that it allocates and reserves on the current CUDA device.

    Call the function once before, as for `measure_peak`. To exclude blocks that other work left in the allocator's
    cache, call `torch.cuda.empty_cache()` first.
    """
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    result = function()
    torch.cuda.synchronize()
    peak, after = torch.cuda.max_memory_allocated(), torch.cuda.memory_allocated()
    del result
    return CardBytes(peak - before, after - before, torch.cuda.max_memory_reserved() - before)
