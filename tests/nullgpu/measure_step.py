"""Run one case of `steps.py` on the null device and answer what it did: `python measure_step.py CASE_AS_JSON`."""

import json
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from case import Case
from device_log import read, reset
from on_null_device import say
from steps import jitted, training_of

import ftrain
from experiments.bench.card.packs import on_device

WARM_CALLS = 5
"""Calls until a step is in its steady state: compiled, captured, its memory taken."""


def measured(case: Case) -> dict[str, Any]:
    """Of one call in the steady state: launches, host waits, peak bytes beside the plan; of all calls: captures."""
    training = training_of(case)
    step = jitted(training, case)
    state = training.init(ftrain.key(0, device="cuda"))
    batch = on_device(training.batch, "cuda")
    plan = step.lower(state, batch).memory()
    reset()
    for _ in range(WARM_CALLS):
        state, _metrics = step(state, batch)
    torch.cuda.synchronize()
    captures = read().captures()
    reset()
    torch.cuda.reset_peak_memory_stats()
    before, requested = torch.cuda.memory_allocated(), torch.cuda.memory_stats()["requested_bytes.all.current"]
    with host_syncs() as syncs:
        state, _metrics = step(state, batch)
    log = read()
    return {
        "planned": plan.peak,
        "planned_at": plan.peak_node,
        "measured": torch.cuda.max_memory_allocated() - before,
        "requested": torch.cuda.memory_stats()["requested_bytes.all.peak"] - requested,
        "reserved": torch.cuda.max_memory_reserved(),
        "launches": log.launches(),
        "kernels": log.kernels(),
        "copies": log.copies(),
        "host_waits": log.host_waits(),
        "allocations": log.allocations(),
        "syncs": syncs,
        "captures": captures,
        "missing": log.of("MISSING"),
        "traces": step.traces,
    }


@contextmanager
def host_syncs() -> Iterator[list[str]]:
    """The places, `file:line`, at which torch knows that it waits for the device: filled in at the end of the block."""
    found: list[str] = []
    with warnings.catch_warnings(record=True) as recorded:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        try:
            yield found
        finally:
            torch.cuda.set_sync_debug_mode("default")
    waiting = [w for w in recorded if "called a synchronizing CUDA operation" in str(w.message)]
    found += [f"{w.filename}:{w.lineno}" for w in waiting]


if __name__ == "__main__":
    say(measured(Case(**json.loads(sys.argv[1]))))
