"""Read a step's metrics after the next step was given to the null device: `python measure_late.py CASE_AS_JSON`."""

import json
import sys
from typing import Any

import torch
from case import Case
from device_log import read, reset
from on_null_device import say
from steps import jitted, training_of

import ftrain
from experiments.bench.card.packs import on_device
from ftrain.runtime.host_copy import HostCopy

WARM_CALLS = 5


def measured(case: Case) -> dict[str, Any]:
    """What the host waits for while it gives the step and the next one, and then while it reads, late and at once."""
    training = training_of(case)
    step = jitted(training, case)
    state = training.init(ftrain.key(0, device="cuda"))
    batch = on_device(training.batch, "cuda")
    for _ in range(WARM_CALLS):
        state, metrics = step(state, batch)
        HostCopy(metrics).read()
    torch.cuda.synchronize()
    reset()
    state, metrics = step(state, batch)
    coming = HostCopy(metrics)
    state, metrics = step(state, batch)
    given = read()
    reset()
    coming.read()
    late = read()
    reset()
    float(metrics["loss"])
    return {
        "given": given.host_waits(),
        "allocations": given.allocations(),
        "late": late.host_waits(),
        "at_once": read().host_waits(),
    }


if __name__ == "__main__":
    say(measured(Case(**json.loads(sys.argv[1]))))
