"""How long a save blocks the training loop, how fast it reaches the disk and comes back, and what memory it takes.

    python -m experiments.bench.checkpoint [--json FILE] [--mib 1500]

On one process and on two (gloo; every array divided on dim 0), alternating rounds, the median of each side: saves of
`ftrain.checkpoint` behind the steps and not, torch.distributed.checkpoint (sync, async by thread and by process, each
with one stager that keeps its memory), and plain large sequential writes with fsync and reads of as many bytes. A save
begun before a few steps of a training loop tells what it costs them. Ratios are taken within a round, and their medians
count: the disk of a shared machine drifts.
"""

import os
import random
import shutil
import socket
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
import tyro

from experiments.bench.checkpoint_loop import STEPS, Loop
from experiments.bench.checkpoint_peers import Dcp, plain_read, plain_write
from experiments.bench.table import Row, publish, row
from ftrain import tree
from ftrain.checkpoint import Checkpointer, Ranks, Retention, Storage
from ftrain.sharding.mesh import Mesh
from ftrain.sharding.placement import place
from ftrain.sharding.processes import DeviceMeshes, to_dtensor


@dataclass(frozen=True)
class Options:
    """What to measure."""

    json: Path | None = None
    """Where the rows go as JSON."""
    mib: int = 1500
    """Bytes of the whole state."""
    rounds: int = 5
    """Rounds that count; one before them does not."""
    processes: tuple[int, ...] = (1, 2)
    """How many processes save together."""
    saves: int = 20
    """Saves after which memory may not have grown."""
    folder: Path | None = None
    """Where to write; the default is a temporary folder."""


Times = dict[str, float]

_LOOP_STEP = 1000
_BLOCKED = "; in a training loop: what the call takes, and what the step after it waits for the copy"
_LOST = f"; {STEPS} steps on one core with a save begun before them, less the same without"


def main(options: Options) -> int:
    """Print the table; 1 if a goal is missed."""
    rows = []
    for world in options.processes:
        rows += rows_of(measured(options, world), world, options)
    publish(rows, "checkpoint", options.json)
    return int(any(r.ok is False for r in rows))


def rows_of(found: dict[str, list[float]], world: int, options: Options) -> list[Row]:
    """The rows for one number of processes."""
    where = f"{world} process{'es' if world > 1 else ''}"
    how = f"{options.mib} MiB of state, {where}, medians of {options.rounds} alternating rounds, slowest rank"
    gb = options.mib * 2**20 / 1e9
    middle = {name: statistics.median(values) for name, values in found.items()}
    ms = {name: f"{seconds * 1e3:.0f} ms" for name, seconds in middle.items()}

    def ratio(name: str, a: str, b: str, goal: float | None, note: str = "") -> Row:
        value = statistics.median(x / y for x, y in zip(found[a], found[b], strict=True))
        return row(f"{where}: {name}", value, "x", goal=goal, peer=f"{ms[a]} to {ms[b]}", how=f"{how}{note}")

    best = min(("dcp thread", "dcp process"), key=lambda kind: middle[f"{kind}, blocked"])
    cheapest = min(("dcp thread", "dcp process"), key=lambda kind: middle[f"{kind}, lost"])
    return [
        ratio("blocked by an async save, over a sync save", "async, blocked", "sync", 0.05, _BLOCKED),
        ratio(f"blocked by an async save, over DCP's best async ({best})", "async, blocked", f"{best}, blocked", 0.7,
              _BLOCKED),
        ratio("blocked by an async save, over one copy of the memory", "async, blocked", "copy", None, _BLOCKED),
        ratio(f"lost by a training loop to an async save, over DCP's best async ({cheapest})", "async, lost",
              f"{cheapest}, lost", None, _LOST),
        ratio("lost by a training loop to an async save, over a sync save", "async, lost", "sync", None, _LOST),
        ratio("a sync save, over a plain write and fsync", "sync", "plain write", 1.25),
        ratio("an async save until it is on the disk, over a plain write and fsync", "async", "plain write", 1.25),
        ratio("an async save until it is on the disk, over DCP sync", "async", "dcp sync", None),
        ratio("an async save until it is on the disk, over DCP async thread", "async", "dcp thread", None),
        ratio("an async save until it is on the disk, over DCP async process", "async", "dcp process", None),
        ratio("restore, over a plain read", "restore, cold", "read, cold", 1.25, "; page cache dropped before"),
        ratio("restore, over DCP load", "restore, cold", "dcp load, cold", None, "; page cache dropped before"),
        ratio("restore from the page cache, over a plain read", "restore", "read", None),
        ratio("checksums: an async save with them, over one without", "async", "async, no checksum", None),
        ratio("checksums: a restore with them, over one without", "restore", "restore, no checksum", None),
        row(f"{where}: throughput of an async save", gb / middle["async"], "GB/s", how=how),
        row(f"{where}: throughput of a restore, cold", gb / middle["restore, cold"], "GB/s", how=how),
        row(f"{where}: extra memory of async saves, over the local state", middle["memory, save"], "x", goal=1.02,
            how="peak of resident memory over that before the first save, spare memory included; one copy, and 2% for "
            "all else"),
        row(f"{where}: extra memory of a restore into donated leaves", middle["memory, restore"], "x",
            how="peak of resident memory over that before, over the local state"),
        row(f"{where}: growth over {options.saves} saves, over the local state", middle["growth"], "x", goal=0.01,
            how=f"resident memory after save {options.saves} over that after save 2"),
    ]  # fmt: skip


def measured(options: Options, world: int) -> dict[str, list[float]]:
    """All figures of `world` processes: seconds by round, and ratios of memory."""
    root = Path(tempfile.mkdtemp(prefix="checkpoint-bench-", dir=options.folder))
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    try:
        with mp.Manager() as manager:
            found = manager.dict()
            mp.spawn(_rank, args=(options, world, port, root, found), nprocs=world)
            return dict(found)
    finally:
        shutil.rmtree(root)


def _rank(rank: int, options: Options, world: int, port: int, root: Path, found: Any) -> None:
    torch.set_num_threads(max(1, (os.cpu_count() or 1) // world))
    # For the processes that DCP makes.
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=world)
    state = make_state(options.mib, world, rank)
    memory = _memory(options, state, root)
    if rank == 0:
        print(f"{world} processes, memory over the local state: {memory}", file=sys.stderr)
    times = _times(options, state, root, rank)
    if rank == 0:
        found.update(**times, **{name: [value] for name, value in memory.items()})
    dist.barrier()
    dist.destroy_process_group()


def make_state(mib: int, world: int, rank: int) -> dict[str, Any]:
    """Parameters and two moments, fp32, 20 arrays each; on several ranks divided on dim 0."""
    rows = max(world, mib * 2**20 // 4 // 60 // 1024)
    mesh, meshes = Mesh(1, world), DeviceMeshes(Mesh(1, world), "cpu")
    placement = place((rows, 1024), ("embed", "mlp"), mesh=mesh, parameters=("shard",), experts=False)

    def array(seed: int) -> torch.Tensor:
        numbers = torch.Generator().manual_seed(seed * world + rank)
        return to_dtensor(torch.randn(placement.local_shape, generator=numbers), placement, mesh, rank, meshes)

    moments = {name: {f"w{i}": array(20 + 20 * j + i) for i in range(20)} for j, name in enumerate(("mu", "nu"))}
    return {"params": {f"w{i}": array(i) for i in range(20)}, "opt_state": moments, "step": torch.tensor(7)}


def _local(state: Any) -> list[torch.Tensor]:
    return [leaf.to_local() if hasattr(leaf, "to_local") else leaf for leaf in tree.leaves(state)]


def _memory(options: Options, state: Any, root: Path) -> Times:
    """Peaks of resident memory over the local state's bytes; the largest of all ranks."""
    size = sum(t.nbytes for t in _local(state))
    with Checkpointer(root / "memory", ranks=Ranks.of_run(), keep=Retention(last=1)) as checkpoints:
        before = _resident(reset=True)
        checkpoints.reserve(state)
        for step in (1, 2):
            checkpoints.save(state, step)
        checkpoints.wait()
        peak, settled = _peak() - before, _resident()
        for step in range(3, options.saves + 1):
            checkpoints.save(state, step)
        checkpoints.wait()
        growth = _resident() - settled
    before = _resident(reset=True)
    checkpoints.restore(state, donate=True)
    restored = _peak() - before
    shutil.rmtree(root / "memory", ignore_errors=True)
    names = ("memory, save", "growth", "memory, restore")
    return {name: _slowest(value / size) for name, value in zip(names, (peak, growth, restored), strict=True)}


def _resident(*, reset: bool = False) -> int:
    if reset:
        Path("/proc/self/clear_refs").write_text("5")
    return _status("VmRSS")


def _peak() -> int:
    return _status("VmHWM")


def _status(name: str) -> int:
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(name))
    return int(line.split()[1]) * 1024


def _slowest(value: float) -> float:
    box = torch.tensor(value, dtype=torch.float64)
    dist.all_reduce(box, op=dist.ReduceOp.MAX)
    return float(box)


class _Clock:
    """Times by name, of the slowest rank; every measurement begins together, on a quiet disk."""

    def __init__(self) -> None:
        self.times: dict[str, list[float]] = {}

    def note(self, name: str, seconds: float) -> None:
        """A measurement of another clock."""
        self.times.setdefault(name, []).append(_slowest(seconds))

    def time(self, name: str, function: Callable[[], Any], *, begun: float | None = None) -> float:
        if begun is None:
            os.sync()
            dist.barrier()
            begun = time.perf_counter()
        function()
        self.note(name, time.perf_counter() - begun)
        return begun


def _times(options: Options, state: Any, root: Path, rank: int) -> dict[str, list[float]]:
    bench = _Cases(state, root, rank)
    for number in range(options.rounds + 1):
        bench.number = number
        # In another order each time, equal on all ranks: after much writing a disk may be slowed down for a while.
        cases = bench.cases()
        for case in random.Random(number).sample(cases, len(cases)):
            case()
        _clear(root)
        if rank == 0:
            took = ", ".join(f"{name} {times[-1]:.2f}" for name, times in bench.clock.times.items())
            print(f"round {number} of {options.rounds}, seconds: {took}", file=sys.stderr)
    bench.close()
    return {name: times[1:] for name, times in bench.clock.times.items()}


class _Cases:
    """What is measured in each round; each case writes, and reads what it wrote."""

    def __init__(self, state: Any, root: Path, rank: int) -> None:
        self.number, self.clock = 0, _Clock()
        self._root, self._plain = root, root / f"plain{rank}"
        self._loop = Loop(state, Mesh(1, dist.get_world_size()))
        self._spare = [torch.zeros_like(t) for t in _local(state)]
        self._sync = Checkpointer(root / "sync", ranks=Ranks.of_run(), background=False)
        self._ours = Checkpointer(root / "ours", ranks=Ranks.of_run())
        self._bare = Checkpointer(root / "bare", ranks=Ranks.of_run(), storage=Storage(checksum=False))
        self._dcp = Dcp()
        for checkpoints in (self._ours, self._bare):
            checkpoints.reserve(state)

    def cases(self) -> list[Callable[[], None]]:
        """The cases of a round."""
        return [
            self._plain_files, self._synchronous, partial(self._background, "", self._ours),
            partial(self._background, ", no checksum", self._bare), partial(self._dcp_async, "thread"),
            partial(self._dcp_async, "process"), self._dcp_sync, self._loops,
        ]  # fmt: skip

    def close(self) -> None:
        for checkpoints in (self._sync, self._ours, self._bare):
            checkpoints.close()
        self._dcp.close()

    def _plain_files(self) -> None:
        self.clock.time("copy", partial(_copy, self._state, self._spare))
        self.clock.time("plain write", partial(plain_write, self._plain, self._spare))
        self.clock.time("read", partial(plain_read, self._plain, self._spare))
        _forget(self._root)
        self.clock.time("read, cold", partial(plain_read, self._plain, self._spare))

    def _synchronous(self) -> None:
        self.clock.time("sync", partial(self._sync.save, self._state, self.number))

    def _background(self, name: str, checkpoints: Checkpointer) -> None:
        begun = self.clock.time(f"async{name}, returned", partial(checkpoints.save, self._state, self.number))
        self.clock.time(f"async{name}", checkpoints.wait, begun=begun)
        self.clock.time(f"restore{name}", partial(checkpoints.restore, self._state, donate=True))
        _forget(self._root)
        self.clock.time(f"restore{name}, cold", partial(checkpoints.restore, self._state, donate=True))

    def _dcp_async(self, kind: str) -> None:
        begun = self.clock.time(f"dcp {kind}, returned", partial(self._dcp.begin, self._state, self._root, kind))
        self.clock.time(f"dcp {kind}", self._dcp.wait, begun=begun)

    def _loops(self) -> None:
        """The training loop with a save of each kind, and before and after these alone."""
        alone = [self._looped(lambda state: None)]
        lost = {"async": self._looped(lambda state: self._ours.save(state, _LOOP_STEP + self.number))}
        self._ours.wait()
        blocked = {"async": self._ours.blocked}
        for kind in ("thread", "process"):
            lost[f"dcp {kind}"] = self._looped(partial(self._begin_dcp, kind))
            self._dcp.wait()
            blocked[f"dcp {kind}"] = self._dcp.blocked
        alone.append(self._looped(lambda state: None))
        for name, seconds in lost.items():
            self.clock.note(f"{name}, blocked", blocked[name])
            self.clock.note(f"{name}, lost", seconds - statistics.mean(alone))
        self.clock.note("loop", statistics.mean(alone))

    def _begin_dcp(self, kind: str, state: Any) -> None:
        self._dcp.begin(state, self._root / "dcp loop", kind)

    def _looped(self, begin: Callable[[Any], Any]) -> float:
        os.sync()
        dist.barrier()
        return self._loop.run(begin)

    @property
    def _state(self) -> Any:
        return self._loop.state

    def _dcp_sync(self) -> None:
        self.clock.time("dcp sync", partial(self._dcp.save, self._state, self._root))
        _forget(self._root)
        self.clock.time("dcp load, cold", partial(self._dcp.load, self._state, self._root))


def _copy(state: Any, spare: list[torch.Tensor]) -> None:
    for mine, theirs in zip(spare, _local(state), strict=True):
        mine.copy_(theirs)


def _forget(root: Path) -> None:
    """Drop the files below `root` from the page cache."""
    dist.barrier()
    os.sync()
    for path in (p for p in root.rglob("*") if p.is_file()):
        descriptor = os.open(path, os.O_RDONLY)
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(descriptor)


def _clear(root: Path) -> None:
    """Remove what a round has written, so that no disk fills up and every save is one into an empty folder."""
    dist.barrier()
    if dist.get_rank() == 0:
        for path in [*root.glob("*/global_step_*"), *root.glob("dcp*")]:
            shutil.rmtree(path)
    dist.barrier()


if __name__ == "__main__":
    sys.exit(main(tyro.cli(Options)))
