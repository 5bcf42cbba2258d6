"""All that a script needs to train on its ranks, in one block: the same file alone and under torchrun.

    with ftrain.run.session(shard=8) as run:
        plan = run.plan()
        step = ftrain.jit(train_step, plan=plan, specs=specs, donate="state")
        checkpoints = run.checkpointer("runs/1", specs=specs)
        ...
        for n in run.steps(done, 1000):
            state, metrics = step(state, run.share(batch_at(n)))

What is opened is closed in the reverse order, whether the block ends, raises on one rank or is stopped by a signal.
"""

import os
import signal
import threading
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from types import FrameType, MappingProxyType
from typing import Any, Literal

import torch
import torch.distributed as dist

from ftrain import tree
from ftrain.checkpoint import Checkpointer, Ranks, Retention
from ftrain.checkpoint.retention import KEEP_ALL
from ftrain.resilience.launcher import launcher_heard
from ftrain.resilience.signals import EXIT_RESUMABLE, SIGNALS, StopRequest
from ftrain.resilience.watchdog import Watchdog
from ftrain.run.peers import PeerRanks, began_step
from ftrain.run.ranks import MeshFlags, any_rank, asked_of_ranks, open_mesh
from ftrain.sharding import Layout, Mesh, Plan
from ftrain.sharding.batch import BatchRule
from ftrain.sharding.joint_calls import joint_call
from ftrain.step.mesh_arguments import MeshArguments
from ftrain.trace.spmd import Placements


class Run:
    """This process within a run; made by `session`.

    - `mesh`: of the run. `device`: of this process.
    - `rank` and `world`: which of how many processes this is. `is_first`: whether it is the one that prints and writes.
    - `stopping`: whether a signal has reached any rank.
    - `is_last`: whether the current step of `steps` is the last one, by its number or since the run is stopping.
    """

    def __init__(self, mesh: Mesh, device: torch.device, opened: ExitStack, watchdog: Watchdog | None) -> None:
        self.mesh, self.device = mesh, device
        self.rank = dist.get_rank() if dist.is_initialized() else 0
        self.world = dist.get_world_size() if dist.is_initialized() else 1
        self.stopping = self.is_last = False
        self._opened, self._watchdog = opened, watchdog
        self._plans: list[Plan] = []
        self._without_rules = Plan(mesh)
        self._shares: dict[Plan, MeshArguments] = {}
        self._stop, self._stepping = StopRequest(), False

    @property
    def is_first(self) -> bool:
        """Whether this process prints and writes."""
        return self.rank == 0

    def print(self, *values: Any) -> None:
        """`print`, on rank 0 only."""
        if self.is_first:
            print(*values, flush=True)

    def plan(
        self,
        default: Layout = Layout(),  # noqa: B008  # frozen
        *,
        components: Mapping[str, Layout] = MappingProxyType({}),
        batch: Mapping[str, BatchRule] = MappingProxyType({}),
    ) -> Plan:
        """A `ftrain.Plan` of the run's mesh. `default`, `components` and `batch` are those of `Plan`, and so are the
        errors.
        """
        plan = Plan(self.mesh, default, components=components, batch=batch)
        self._plans.append(plan)
        return plan

    def share(self, batch: Any, *, plan: Plan | None = None) -> Any:
        """This process's share of the whole mesh's batch, on `device`; all of it where it is the only process.

        `plan`: by whose rules the batch is divided. Default: the one that `run.plan` made, or a plan without rules
        before. Its rules must match the first batch; of a later one a modality may be absent. ValueError where
        `run.plan` made several, for a rule that matches nothing, and for a batch that does not divide.
        """
        if plan is None:
            if len(self._plans) > 1:
                raise ValueError(
                    f"run.share: run.plan made {len(self._plans)} plans; say which: share(batch, plan=...)"
                )
            plan = self._plans[0] if self._plans else self._without_rules
        if plan not in self._shares:
            self._shares[plan] = MeshArguments(plan, Placements(plan), "batch")
        leaves, treedef = tree.flatten(batch)
        own = self._shares[plan].share(tree.paths(batch), leaves)
        moved = [leaf.to(self.device) if isinstance(leaf, torch.Tensor) else leaf for leaf in own]
        return tree.unflatten(treedef, moved)

    def checkpointer(
        self, folder: str | Path, *, keep: Retention = KEEP_ALL, specs: Any = None, background: bool = True
    ) -> Checkpointer:
        """A `Checkpointer` of all ranks for `folder`, which is closed at the end of the block after its last save.
        `keep`, `specs` and `background` are those of `Checkpointer`, and so are the errors.
        """
        made = Checkpointer(folder, keep=keep, specs=specs, background=background, ranks=Ranks.of_run())
        return self._opened.enter_context(made)

    def steps(self, done: int, last: int) -> Iterator[int]:
        """The numbers of the steps from `done + 1` to `last`; fewer where a signal asks the run to stop.

        SIGTERM, SIGINT or SIGUSR1 on any rank lets all of them run one more step, for which `is_last` is True: save
        there. The watchdog is told when a step ends. All ranks iterate alike.
        """
        asked = lambda: any_rank(self._stop.requested)  # noqa: E731  # before the first step the answer is read at once
        self._stepping = True
        try:
            for number in range(done + 1, last + 1):
                joint_call(began_step(number))
                self.stopping = self.stopping or asked()
                self.is_last = self.stopping or number == last
                asked = asked_of_ranks(lambda: self._stop.requested)
                yield number
                if self._watchdog is not None:
                    self._watchdog.step_ended(number)
                if self.stopping:
                    return
        finally:
            self._stepping = self.is_last = False

    def _receive(self, number: int, frame: FrameType | None) -> None:
        """The signal handler: between steps a request, anywhere else the end of the block."""
        self._stop.receive(number, frame)
        if not self._stepping:
            raise SystemExit(EXIT_RESUMABLE)


@contextmanager
def session(
    *,
    replicate: int = 1,
    shard: int | None = None,
    sequence: int = 1,
    expert: int = 1,
    kind: Literal["process", "virtual"] = "process",
    device: torch.device | str | None = None,
    timeout: float = 600.0,
    stacks: str | Path | None = None,
    hang_seconds: float = 300.0,
) -> Iterator[Run]:
    """Within the block the ranks of this run work together; yields this process's `Run`.

    Under torchrun each process is a rank. Alone, this process is the only one, or with `kind="virtual"` all of them in
    lockstep. When the block ends, all ranks leave it together. Where one raises, it keeps its error, and the others end
    with its message and exit code 1, wherever they wait. A signal ends `run.steps` on all ranks, and so does the end of
    torchrun; the block then raises SystemExit with code 75 (0 for Ctrl-C); outside of `run.steps` it ends the block at
    once. Where ranks wait for each other since one has left the block, skipped a step or saved alone, all end with exit
    code 1 and say so. After a failure, saves that were in progress may be lost; the last complete one is kept.

    - `replicate`, `shard`, `sequence`, `expert`: sizes of the mesh (`ftrain.Mesh`); `shard=None` takes all the ranks
      that the others leave.
    - `kind`: "virtual" is for one process alone.
    - `device`: of each process; default: its CUDA device where there is one, else the CPU.
    - `timeout`: seconds after which a collective that has not ended stops the run.
    - `stacks`: a folder. When no step of `run.steps` ends for `hang_seconds`, all ranks write their stacks into it, and
      the run ends with code 76. None: nothing watches.
    - `hang_seconds`: see `stacks`; the first step, which is compiled, has half an hour.

    ValueError for sizes that do not fit the number of processes, with what would fit, for an unknown `kind`, and
    outside of the main thread.

    >>> import ftrain
    >>> with ftrain.run.session(shard=2, kind="virtual") as run:
    ...     print(run.world, run.mesh.size, list(run.steps(0, 3)))
    1 2 [1, 2, 3]
    """
    if threading.current_thread() is not threading.main_thread():
        raise ValueError(
            "ftrain.run.session handles signals, which Python delivers to the main thread alone: enter it there"
        )
    where = _device(device)
    flags = MeshFlags(replicate=replicate, shard=shard, sequence=sequence, expert=expert, timeout=timeout)
    with _mesh(flags, kind, where) as mesh, ExitStack() as opened:
        peers = PeerRanks()
        before: dict[signal.Signals, Any] = {}
        try:
            watchdog = opened.enter_context(Watchdog(Path(stacks), seconds=hang_seconds)) if stacks else None
            run = Run(mesh, where, opened, watchdog)
            before = {number: signal.signal(number, run._receive) for number in SIGNALS}
            opened.enter_context(launcher_heard())
            yield run
            joint_call("left the session")
            interrupted = run.stopping and any_rank(run._stop.signal == signal.SIGINT)
            opened.close()
            peers.finished()
        except BaseException as error:
            peers.failed(error)
            raise
        finally:
            for number, handler in before.items():
                signal.signal(number, signal.SIG_DFL if handler is None else handler)
    if run.stopping:
        raise SystemExit(0 if interrupted else EXIT_RESUMABLE)


@contextmanager
def _mesh(flags: MeshFlags, kind: str, device: torch.device) -> Iterator[Mesh]:
    if kind not in ("process", "virtual"):
        raise ValueError(f"session(kind={kind!r}) is not one of 'process', 'virtual'")
    ranks = flags.replicate * (flags.shard or 1) * flags.sequence
    if "RANK" in os.environ:
        if kind == "virtual":
            raise ValueError("session(kind='virtual') runs all ranks in one process, and torchrun started several")
    elif kind == "process" and ranks > 1:
        raise ValueError(
            f"a session of {ranks} ranks needs as many processes: start the script with torchrun --nproc-per-node "
            f"{ranks}, or take session(..., kind='virtual') for all of them in lockstep in this one"
        )
    with open_mesh(flags, device) as mesh:
        yield mesh if mesh is not None else Mesh(expert=flags.expert, kind=kind)  # type: ignore[arg-type]


def _device(device: torch.device | str | None) -> torch.device:
    found = torch.device(device if device is not None else "cuda" if torch.cuda.is_available() else "cpu")
    if found.type == "cuda" and found.index is None:
        return torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
    return found
