"""How the tests of kernels measure memory."""

from collections.abc import Callable
from typing import NamedTuple

import pytest
from torch import Tensor
from torch.profiler import ProfilerActivity, profile


class Measured(NamedTuple):
    """`workspace`: peak bytes beyond what the call returns; `largest`: of a single allocation."""

    workspace: int
    largest: int


def measure_memory(call: Callable[[], Tensor | tuple[Tensor, ...]]) -> Measured:
    """Run `call` and add up what the allocator did meanwhile, as the profiler saw it."""
    call()
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True, acc_events=True) as prof:
        result = call()
    events = [e for e in prof.profiler.kineto_results.events() if e.name() == "[memory]"]
    sizes = [e.nbytes() for e in sorted(events, key=lambda e: e.start_ns())]
    assert sizes, "the profiler saw no allocation"
    held = peak = 0
    for size in sizes:
        held += size
        peak = max(peak, held)
    outputs = result if isinstance(result, tuple) else (result,)
    kept = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in outputs if t.numel()}
    return Measured(peak - sum(kept.values()), max(sizes))


@pytest.fixture(name="measure_memory")
def measure_memory_fixture() -> Callable[[Callable], Measured]:
    """The function `measure_memory`."""
    return measure_memory
