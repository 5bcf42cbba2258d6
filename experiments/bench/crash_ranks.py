"""Kill -9 processes that save together, one of them or all, at random moments of their saves."""

import contextlib
import multiprocessing
import os
import random
import shutil
import sys
import tempfile
import time
from collections.abc import Iterator
from datetime import timedelta
from multiprocessing.connection import wait as first_of
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from experiments.bench.crash_state import Crash, state_of, verified_step
from ftrain import tree
from ftrain.checkpoint import Checkpointer, Ranks, Retention, Storage
from ftrain.checkpoint.folders import leftovers
from ftrain.sharding.mesh import Mesh
from ftrain.sharding.placement import Placement, Split
from ftrain.sharding.processes import DeviceMeshes, to_dtensor

ENDED_BY_ITSELF = 3
"""What a rank ends with that has noticed that another one is gone."""

KINDS = ("all at once", "one, then the others", "one alone")
"""One then the others: as torchrun does when a rank dies. One alone: the others must notice, and end by themselves."""


def save_for_ever(rank: int, world: int, address: tuple[str, int, bool], root: str, config: Crash, pipe: Any) -> None:
    """A rank: resume, and save one step after another until killed; rank 0 tells from where, and when each begins."""
    torch.set_num_threads(1)
    host, port, hosting = address
    store = dist.TCPStore(host, port, world, is_master=hosting and rank == 0, timeout=timedelta(seconds=30))
    dist.init_process_group("gloo", store=store, rank=rank, world_size=world, timeout=timedelta(seconds=30))
    mesh = Mesh(shard=world)
    meshes = DeviceMeshes(mesh, "cpu")

    def divided(leaf: Any) -> Any:
        if not isinstance(leaf, torch.Tensor) or leaf.dim() == 0:
            return leaf
        placement = Placement(tuple(leaf.shape), (Split(0, ("shard",), world),))
        return to_dtensor(placement.shard(leaf, mesh, rank), placement, mesh, rank, meshes)

    keep, storage = Retention(last=2, every=50), Storage(database=config.database, chunk_bytes=2**20)
    try:
        with Checkpointer(root, keep=keep, storage=storage, ranks=Ranks.of_run()) as checkpoints:
            step = checkpoints.latest() or 0
            dist.barrier()  # every rank has seen it before the next is written
            if rank == 0:
                pipe.send(step)
            while True:
                step += 1
                state = tree.map(divided, state_of(step, config.mib))
                checkpoints.wait()
                if rank == 0:
                    pipe.send(step)
                checkpoints.save(state, step)
    except (RuntimeError, TimeoutError, dist.DistError, BrokenPipeError) as error:
        print(f"rank {rank} ends: {error}", file=sys.stderr, flush=True)
        os._exit(ENDED_BY_ITSELF)


def run_rank_kills(config: Crash, root: Path) -> Iterator[tuple[str, str]]:
    """Kill `config.kills` groups of `config.ranks` processes; yields the kind of each kill (of `KINDS`), and what it
    hit: "between saves" or "while writing". Every second group's store is rank 0's, the others' a launcher's.

    Raises:
        RuntimeError: a kill lost the latest step, or left it with other bits, or a rank ended with another error or
            did not notice for a minute that one was gone.
    """
    moments = random.Random(config.seed)
    reached = 0
    for kill in range(config.kills):
        kind = KINDS[kill % len(KINDS)]
        group = _Group(config, root, hosted=kill % 2 == 1)
        try:
            resumed, typical = group.wait_for_the_moment(moments)
            group.kill(kind, moments, typical)
        except (RuntimeError, EOFError) as error:
            raise RuntimeError(f"kill {kill} ({kind}): {error or 'a rank ended before'}; {group.said()}") from None
        finally:
            group.close()
        if resumed != reached:
            raise RuntimeError(f"kill {kill}: the ranks resumed from step {resumed}, and {reached} was the latest")
        hit = "while writing" if leftovers(root) else "between saves"
        reached = verified_step(root, reached, config.mib)
        yield kind, hit


class _Group:
    """Processes that save together. `hosted`: rank 0 holds the store through which they found each other."""

    def __init__(self, config: Crash, root: Path, *, hosted: bool) -> None:
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(["torch", "tyro", "torch.distributed.tensor", "ftrain.checkpoint"])
        self._folder = Path(tempfile.mkdtemp(prefix="crash-ranks-"))
        held = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
        address = ("127.0.0.1", held.port, hosted)
        self._store = None if hosted else held
        del held
        self._hear, tell = context.Pipe(duplex=False)
        self._processes = [
            context.Process(target=_logged, args=(self._folder, r, config.ranks, address, str(root), config, tell))
            for r in range(config.ranks)
        ]
        for process in self._processes:
            process.start()
        tell.close()

    def wait_for_the_moment(self, moments: random.Random) -> tuple[int, float]:
        """As `crash.wait_for_the_moment`: from which step they resumed, and the usual seconds of a save."""
        resumed = self._next()
        self._next()
        begun, more = time.perf_counter(), moments.randint(1, 3)
        for _ in range(more):
            self._next()
        typical = (time.perf_counter() - begun) / more
        time.sleep(moments.uniform(0.0, 1.1 * typical))
        return resumed, typical

    def _next(self) -> int:
        sentinels = [p.sentinel for p in self._processes]
        ready = first_of([self._hear, *sentinels], timeout=60)
        if self._hear not in ready:
            raise RuntimeError("a rank ended by itself" if ready else "no save began for a minute")
        return self._hear.recv()

    def kill(self, kind: str, moments: random.Random, typical: float) -> None:
        """Kill them in this way; all are gone when this returns."""
        first, *others = moments.sample(self._processes, len(self._processes))
        first.kill()
        if kind == "one alone":
            self._expect_ends(others)
        elif kind == "one, then the others":
            time.sleep(moments.uniform(0.0, 1.5 * typical))
        for process in others:
            process.kill()
        for process in self._processes:
            process.join()

    def _expect_ends(self, others: list[Any]) -> None:
        deadline = time.monotonic() + 60
        while any(p.exitcode is None for p in others) and time.monotonic() < deadline:
            with contextlib.suppress(EOFError):
                if self._hear.poll(0.1):  # nobody else reads what rank 0 tells
                    self._hear.recv()
        for process in others:
            if process.exitcode != ENDED_BY_ITSELF:
                raise RuntimeError(f"after one rank was killed another has exit code {process.exitcode}")

    def said(self) -> str:
        """The last line of each rank."""
        logs = sorted(self._folder.glob("*.log"))
        return "; ".join((log.read_text().strip().splitlines() or ["nothing"])[-1] for log in logs)

    def close(self) -> None:
        """End what is left."""
        for process in self._processes:
            process.kill()
            process.join()
        shutil.rmtree(self._folder)


def _logged(folder: Path, rank: int, *arguments: Any) -> None:
    with (folder / f"{rank}.log").open("w") as log:
        os.dup2(log.fileno(), sys.stderr.fileno())
        save_for_ever(rank, *arguments)
