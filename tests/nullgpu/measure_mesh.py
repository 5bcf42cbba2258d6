"""Run one step on a mesh of processes over NCCL, a null device each, under torch.distributed.run.

`python -m torch.distributed.run --nproc-per-node 2 measure_mesh.py CASE_AS_JSON MESH_AS_JSON`; each rank answers.
"""

import json
import os
import sys
from typing import Any

import torch
import torch.distributed as dist
from case import Case
from device_log import read, reset
from measure_step import WARM_CALLS, host_syncs
from on_null_device import say
from steps import jitted, training_of

import ftrain
from experiments.bench.card.packs import on_device
from ftrain.sharding import Layout, Mesh, Plan


def measured(case: Case, mesh: Mesh) -> dict[str, Any]:
    """Of one call in the steady state, on this rank: messages in order, host waits, peak bytes beside the plan."""
    training = training_of(case, packs=mesh.replicate * mesh.shard)
    step = jitted(training, case, plan=Plan(mesh, default=Layout()), specs=training.specs)
    state = step.init(training.init, ftrain.key(0, device="cuda"))
    batch = on_device(step.share(training.batch), "cuda")
    plan = step.lower(state, batch).memory()
    for _ in range(WARM_CALLS):
        state, _metrics = step(state, batch)
    torch.cuda.synchronize()
    reset()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    with host_syncs() as syncs:
        state, _metrics = step(state, batch)
    log = read()
    return {
        "rank": dist.get_rank(),
        "planned": plan.peak,
        "measured": torch.cuda.max_memory_allocated() - before,
        "launches": log.launches(),
        "messages": log.messages(),
        "host_waits": log.host_waits(),
        "allocations": log.allocations(),
        "syncs": syncs,
        "missing": log.of("MISSING"),
    }


if __name__ == "__main__":
    torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    # Objects that ranks must agree on travel over gloo: NCCL moves nothing here.
    dist.init_process_group("cpu:gloo,cuda:nccl")
    found = measured(Case(**json.loads(sys.argv[1])), Mesh(**json.loads(sys.argv[2]), kind="process"))
    dist.barrier(dist.new_group(backend="gloo"))
    say(found)
