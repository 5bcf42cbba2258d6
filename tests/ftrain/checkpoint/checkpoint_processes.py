"""Several gloo processes that save together, for the tests of this folder."""

import socket
import time
from datetime import timedelta

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from sharding.processes import DeviceMeshes, to_dtensor


def run(function, world, *args):
    """`function(rank, *args, found)` in `world` processes; what they put into the dictionary `found`."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    # Forked from a server that has imported torch once.
    mp.set_forkserver_preload(["torch.distributed.tensor", "ftrain.checkpoint", "sharding.processes"])
    with mp.get_context("forkserver").Manager() as manager:
        found = manager.dict()
        context = mp.start_processes(
            _process, args=(function, world, port, args, found), nprocs=world, join=False, start_method="forkserver"
        )
        deadline = time.monotonic() + 60
        while not context.join(timeout=1):
            assert time.monotonic() < deadline, "the processes hang"
        return dict(found)


def _process(rank, function, world, port, args, found):
    torch.set_num_threads(1)
    address = f"tcp://127.0.0.1:{port}"
    dist.init_process_group("gloo", init_method=address, rank=rank, world_size=world, timeout=timedelta(seconds=30))
    function(rank, *args, found)
    dist.destroy_process_group()


def on_mesh(whole, placements, mesh, rank, device="cpu"):
    """What a rank holds of whole leaves by name: DTensors where a placement divides them. On "meta": its shape."""
    meshes = DeviceMeshes(mesh, "cpu")
    return {
        name: to_dtensor(placement.shard(whole[name], mesh, rank).to(device), placement, mesh, rank, meshes)
        for name, placement in placements.items()
    }
