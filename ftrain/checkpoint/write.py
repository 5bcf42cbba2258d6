"""Commit one checkpoint: the data under a temporary name, synced, then the manifest, then the names that count."""

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from types import MappingProxyType
from typing import Any, TypeVar

from ftrain.checkpoint import manifest as manifests
from ftrain.checkpoint.ages import next_order
from ftrain.checkpoint.arrays import DEFAULT_STORAGE, Storage
from ftrain.checkpoint.clean import apply_retention
from ftrain.checkpoint.errors import SaveFailed
from ftrain.checkpoint.folders import step_number
from ftrain.checkpoint.leaves import Leaves, named_leaves
from ftrain.checkpoint.manifest import Manifest, Parameter
from ftrain.checkpoint.metrics import checked_metrics
from ftrain.checkpoint.open_store import StoreLike, open_store
from ftrain.checkpoint.placed import parameters_of
from ftrain.checkpoint.ranks import Ranks
from ftrain.checkpoint.report import Report
from ftrain.checkpoint.retention import KEEP_ALL, Retention
from ftrain.checkpoint.shard_writer import Work, Written, join_shards, write_shard
from ftrain.checkpoint.store import FileRecord, NewStep, Store
from ftrain.checkpoint.sums import joined

_Found = TypeVar("_Found")
NO_PARAMETERS: Mapping[str, Parameter] = MappingProxyType({})


def save(
    state: Any,
    root: StoreLike,
    step: int,
    *,
    metrics: Mapping[str, float] | None = None,
    storage: Storage = DEFAULT_STORAGE,
    specs: Any = None,
) -> None:
    """Save a tree as step `step` of `root` and return when it is on the disk, from one process.

    `Checkpointer` does so in background, and from many processes.

    Args:
        state: a tree of dense tensors of any shape and device, bool, int, float and str.
        root: the folder of checkpoints, made if need be, or its store (see `open_store`).
        step: a whole number from 0 to 10**15 - 1; a step that exists is replaced, when the new one is whole.
        metrics: numbers by name, kept in the manifest for `Retention(best=...)`.
        storage: how arrays are laid out.
        specs: of the model's parameters, as for `Checkpointer`.

    Raises:
        ValueError: a leaf, its name or a metric cannot be saved, `step` is no whole number, or another run writes into
            `root`.
        OSError: the disk is full, the folder is read-only, ...; what was saved before is untouched.

    >>> import tempfile, torch
    >>> from ftrain.checkpoint import save, steps
    >>> folder = tempfile.mkdtemp()
    >>> save({"w": torch.zeros(3), "epoch": 1}, folder, 10, metrics={"loss": 0.5})
    >>> steps(folder)
    [10]
    """
    step, leaves, store = step_number(step), named_leaves(state), open_store(root)
    metrics = checked_metrics(metrics)
    require_whole(leaves, Ranks())
    lock = store.lock()
    try:
        write_checkpoint(store, step, lambda: leaves, storage=storage, metrics=metrics, parameters=parameters_of(specs))
    finally:
        lock.release()


def require_whole(leaves: Leaves, ranks: Ranks) -> None:
    """Check that all of a state can be written from the given ranks.

    Raises:
        ValueError: one process alone is to save an array which is spread over ranks, or a `Window`; it is named.
    """
    if ranks.world == 1:
        for path, layout in leaves.layouts.items():
            if not layout.slices:
                raise ValueError(f"{path!r} is a Window, which has no values to save: save the tensor it describes")
            if len(layout.slices) != 1:
                raise ValueError(
                    f"{path!r} is spread over {len(layout.slices)} ranks and one saves: on all ranks use "
                    "Checkpointer(..., ranks=Ranks.of_run()), or gather it with .full_tensor() first"
                )


def write_checkpoint(
    store: Store,
    step: int,
    leaves: Callable[[], Leaves],
    *,
    storage: Storage,
    metrics: Mapping[str, float],
    parameters: Mapping[str, Parameter] = NO_PARAMETERS,
    keep: Retention = KEEP_ALL,
    good: bool = True,
    ranks: Ranks | None = None,
    round_number: int = 0,
) -> None:
    """Write the leaves as step `step`; when this returns, they survive a power cut. Rank 0 holds the store's lock.

    The order makes a step exist or not: data, sync, manifest, sync, and only then the step's name and `latest`. A
    crash leaves the previous `latest` and a folder with a temporary name. Of several `ranks` each writes its share
    below that one folder; when all are done rank 0 commits. An error on one is an error on all, with the rank's name.
    `leaves` is called once; an error in it is one of the rank. Tensors on the CPU that are contiguous are read where
    they lie. `metrics` are those of `checked_metrics`; `round_number` is that of `Ranks.next_round` for this save.

    Raises:
        SaveFailed: another rank has failed, or saves another state; it is named.
        ValueError: the state cannot be stored, so that no reader would take it.
        OSError: the disk is full, the folder is read-only, another rank's folder is not to be seen from here, ...
        RuntimeError, TimeoutError: a rank no longer answers, or does nothing.
    """
    ranks = ranks or Ranks()
    share = _Shard(leaves, storage, ranks)
    if ranks.rank == 0:
        _lead(share, store, _About(step, metrics, parameters, good), keep, round_number)
    else:
        _follow(share, store, step, round_number)


@dataclass(frozen=True)
class _Shard:
    """What a rank writes, and with whom."""

    leaves: Callable[[], Leaves]
    storage: Storage
    ranks: Ranks

    def write(self, new: NewStep) -> tuple[Work, Written]:
        """Write it; what all ranks write, and what this one has written."""
        work = Work.of(self.leaves(), self.storage, self.ranks.world)
        return work, write_shard(new, work, self.ranks.rank)


@dataclass(frozen=True)
class _About:
    """What the manifest says besides the leaves."""

    step: int
    metrics: Mapping[str, float]
    parameters: Mapping[str, Parameter]
    good: bool


def _lead(share: _Shard, store: Store, about: _About, keep: Retention, round_number: int) -> None:
    ranks = share.ranks
    new: NewStep | None = None
    try:
        new = _publishing(ranks, round_number, "begin", lambda: store.begin(about.step), told=lambda made: made.folder)
        written = _attempt(partial(share.write, new))
        reports = [Report.parse(ranks.wait_for(round_number, "done", rank)) for rank in range(1, ranks.world)]
        ranks.forget(round_number)
        if isinstance(written, BaseException):
            raise written
        work, own = written
        _require_same(work, reports)
        records = {name: record for report in reports for name, record in (report.files or {}).items()}
        files = join_shards(new, work, records)
        sums = joined(work.arrays, [own.sums, *(r.sums or {} for r in reports)]) if work.storage.checksum else {}
        manifest = _manifest(about, work, files, sums, base=new.base, order=next_order(store))
        new.commit(manifests.dumps(manifest))
    except BaseException as error:
        if new is not None:
            new.abort()
        ranks.publish(round_number, "end", Report.of(error).text())
        raise
    _publishing(ranks, round_number, "end", lambda: apply_retention(store, keep), told=str)


def _follow(share: _Shard, store: Store, step: int, round_number: int) -> None:
    ranks = share.ranks
    begun = _awaited(ranks, round_number, "begin")
    written = _attempt(lambda: share.write(store.begun(step, begun.folder)))
    if isinstance(written, BaseException):
        ranks.publish(round_number, "done", Report.of(written).text())
        raise written
    work, own = written
    report = Report(files=own.files, leaves=work.digest(), scalars=work.leaves.scalars, sums=own.sums)
    ranks.publish(round_number, "done", report.text())
    _awaited(ranks, round_number, "end")
    ranks.forget(round_number + 1)


def _publishing(
    ranks: Ranks, round_number: int, topic: str, function: Callable[[], _Found], *, told: Callable[[_Found], str]
) -> _Found:
    """Call a function of rank 0 and tell the others what it gave, as the text `told`, or why it failed."""
    try:
        found = function()
    except BaseException as error:
        ranks.publish(round_number, topic, Report.of(error).text())
        raise
    ranks.publish(round_number, topic, Report(folder=told(found)).text())
    return found


def _awaited(ranks: Ranks, round_number: int, topic: str) -> Report:
    report = Report.parse(ranks.wait_for(round_number, topic, 0))
    if report.error is not None:
        raise SaveFailed(report.error)
    return report


def _attempt(function: Callable[[], _Found]) -> _Found | BaseException:
    """What it gives, or its error, which is kept until the other ranks have been heard: they still write."""
    try:
        return function()
    except BaseException as error:
        return error


def _require_same(work: Work, reports: list[Report]) -> None:
    for rank, report in enumerate(reports, start=1):
        if report.error is not None:
            raise SaveFailed(f"rank {rank}: {report.error}")
    for rank, report in enumerate(reports, start=1):
        theirs, ours = report.scalars or {}, json.loads(json.dumps(work.leaves.scalars))
        other = [path for path in {**ours, **theirs} if repr(theirs.get(path)) != repr(ours.get(path))]
        if other:
            raise SaveFailed(
                f"rank {rank} saves {theirs.get(other[0])!r} as {other[0]!r} and rank 0 {ours.get(other[0])!r}: plain "
                "values must be equal on all ranks"
            )
        if report.leaves != work.digest():
            raise SaveFailed(f"rank {rank} saves other arrays than rank 0: all ranks must save one state")


def _manifest(
    about: _About,
    work: Work,
    files: Mapping[str, FileRecord],
    sums: Mapping[str, Sequence[int]],
    *,
    base: str,
    order: int,
) -> Manifest:
    return Manifest(
        step=about.step,
        database=work.storage.database,
        checksum=work.storage.checksum,
        arrays=work.arrays,
        scalars=work.leaves.scalars,
        metrics=dict(about.metrics),
        files=dict(files),
        base=base,
        parameters=dict(about.parameters),
        order=order,
        good=about.good,
        sums=dict(sums),
    )
