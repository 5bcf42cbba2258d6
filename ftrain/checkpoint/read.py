"""Restore one checkpoint into the shape of an abstract state, checking all that is read."""

import hashlib
import time
from collections.abc import Collection, Iterable
from typing import Any

from torch import Tensor

from ftrain import tree
from ftrain.checkpoint import manifest as manifests
from ftrain.checkpoint.ages import latest
from ftrain.checkpoint.arrays import Piece
from ftrain.checkpoint.checked import read_checked
from ftrain.checkpoint.direct import DirectReader
from ftrain.checkpoint.dtypes import as_array, dtype_name
from ftrain.checkpoint.errors import DamagedCheckpoint
from ftrain.checkpoint.folders import step_number
from ftrain.checkpoint.leaf_buffer import LeafBuffer
from ftrain.checkpoint.leaves import Leaves, named_leaves
from ftrain.checkpoint.manifest import ArrayLeaf, Manifest, Scalar
from ftrain.checkpoint.open_store import StoreLike, open_store
from ftrain.checkpoint.placed import placed
from ftrain.checkpoint.store import HeldStep, Store, join
from ftrain.runtime.half_new import as_template
from ftrain.sharding.plan import Plan

_WINDOW_BYTES = 2**29
_TRIES = 8


def restore(
    abstract_state: Any,
    root: StoreLike,
    step: int | None = None,
    *,
    plan: Plan | None = None,
    partial: bool = False,
    donate: bool = False,
) -> Any:
    """The state saved at `step` (default: the latest) as a tree like `abstract_state`.

    Saved on any mesh, restored on any other: of each leaf this process reads the chunks that hold its own part. While
    another process saves the step again, what comes back is one version or the other. Of several processes each looks
    for the latest itself: give them the step, or use `Checkpointer`, whose rank 0 decides for all.

    Args:
        abstract_state: a tree whose tensors give shape, dtype and device (what is on `meta` comes back on the CPU);
            a DTensor comes back as one with the same placements, a `Window` as the tensor of that part; other leaves
            give the type. Only the values of `donate`d tensors are looked at.
        root: the folder that holds `global_step_N`, or its store (see `open_store`).
        plan: how to divide a state whose leaves are given whole, by the logical axes that the checkpoint has of its
            parameters (`Checkpointer(specs=...)`): on a mesh of processes they come back as DTensors. None: as given.
        partial: leaves that were saved but are not in `abstract_state` are left alone rather than an error.
        donate: contiguous CPU tensors of `abstract_state` (and DTensors of such) are overwritten and become leaves of
            the result, so that no second copy of the state is in memory. After an error they hold anything.

    Raises:
        DamagedCheckpoint: a file or leaf is missing, short or was changed; it is named.
        ValueError: there is no such step, or the saved leaves are not those of `abstract_state`, or it does not know
            the axes that a plan needs, or a newer ftrain wrote it.
        OSError: the folder cannot be read.

    >>> import tempfile, torch
    >>> from ftrain.checkpoint import restore, save
    >>> folder = tempfile.mkdtemp()
    >>> save({"params": {"w": torch.arange(4.0)}, "step": 10}, folder, 10)
    >>> like = {"params": {"w": torch.empty(4, device="meta")}, "step": 0}
    >>> restore(like, folder)
    {'params': {'w': tensor([0., 1., 2., 3.])}, 'step': 10}
    >>> restore({"params": {"w": torch.empty(4, device="meta")}}, folder, 10, partial=True)
    {'params': {'w': tensor([0., 1., 2., 3.])}}
    """
    return restore_version(abstract_state, open_store(root), step, plan=plan, partial=partial, donate=donate)


def version_of(store: Store, step: int | None) -> tuple[int, str]:
    """A step (None: the latest) and the hash of its manifest, by which `restore_version` knows it again."""
    with store.hold(existing(store, step)) as held:
        return held.step, _digest(held)


def await_version(store: Store, step: int, version: str, *, seconds: float) -> None:
    """Return when this process sees that version of a step; TimeoutError. A network file system may show its folders
    as they were up to a minute ago.
    """
    deadline = time.monotonic() + seconds
    while True:
        try:
            with store.hold(step) as held:
                if _digest(held) == version:
                    return
            seen = "another version of it"
        except (DamagedCheckpoint, OSError) as error:
            seen = str(error)
        if time.monotonic() > deadline:
            raise TimeoutError(
                f"rank 0 restores step {step} of {store.show()}, and this rank sees {seen}: all ranks must share one "
                "folder"
            )
        time.sleep(0.2)


def restore_version(
    abstract_state: Any,
    store: Store,
    step: int | None,
    *,
    version: str | None = None,
    plan: Plan | None = None,
    partial: bool = False,
    donate: bool = False,
) -> Any:
    """As `restore`, of the given `version` of the step alone (see `version_of`; None: of any).

    Raises:
        DamagedCheckpoint: a file is missing or was changed, or the step was replaced whenever it was read.
        ValueError, OSError: as `restore`.
    """
    abstract_state = tree.map(as_template, abstract_state)
    for _ in range(_TRIES):
        with store.hold(existing(store, step)) as held:
            if version is not None and _digest(held) != version:
                break
            try:
                found = _restored(abstract_state, held, plan=plan, partial=partial, donate=donate)
            except (DamagedCheckpoint, OSError):
                if not held.is_replaced():
                    raise
                continue
            if held.is_frozen or not held.is_replaced():
                return found
    raise DamagedCheckpoint(
        f"{store.show()} was written to whenever {'the latest step' if step is None else f'step {step}'} was read: "
        "restore when that save has ended"
    )


def _digest(held: HeldStep) -> str:
    return hashlib.sha256(held.manifest).hexdigest()


def _restored(abstract_state: Any, held: HeldStep, *, plan: Plan | None, partial: bool, donate: bool) -> Any:
    manifest = manifests.read(held)
    shown = held.show()
    if plan is not None:
        abstract_state = placed(abstract_state, plan, manifest.parameters, shown)
    wanted = named_leaves(abstract_state)
    saved: dict[str, ArrayLeaf | Scalar] = {**manifest.arrays, **manifest.scalars}
    _check_names(shown, list(wanted.tensors) + list(wanted.scalars), saved, partial)
    _check_leaves(shown, wanted, saved)
    check_files(held, manifest, {manifest.arrays[path].part for path in wanted.tensors})
    leaves = dict(zip(tree.paths(abstract_state), tree.flatten(abstract_state)[0], strict=True))
    buffers = {path: LeafBuffer(leaves[path], part, donate=donate) for path, part in wanted.tensors.items()}
    _read(held, manifest, wanted, buffers)
    values = [buffers[path].leaf() if path in buffers else manifest.scalars[path] for path in leaves]
    return tree.unflatten(tree.flatten(abstract_state)[1], values)


def existing(store: Store, step: int | None) -> int:
    """The step, or the latest; ValueError that lists what is there when it is not, or for what is no step."""
    wanted = latest(store) if step is None else step_number(step)
    if wanted is None:
        raise ValueError(f"{store.show()} holds no checkpoint: it has no folder global_step_N with a manifest")
    here = store.steps()
    if wanted not in here and not store.has(wanted):
        raise ValueError(f"{store.show()} holds no step {wanted}; it holds {', '.join(map(str, here)) or 'none'}")
    return wanted


def _check_names(folder: str, wanted: Iterable[str], saved: Iterable[str], partial: bool) -> None:
    wanted, saved = set(wanted), set(saved)
    lost = sorted(wanted - saved)
    if lost:
        near = tree.nearest(lost[0], sorted(saved - wanted))
        hint = f"; saved under the name {near!r}?" if near else ""
        raise ValueError(f"{folder} has no leaf {_few(lost)}{hint}")
    unused = sorted(saved - wanted)
    if unused and not partial:
        raise ValueError(
            f"{folder} holds {_few(unused)}, which the state to restore has not: "
            "add it to the state, or pass partial=True to leave it out"
        )


def _few(names: list[str]) -> str:
    return repr(names[0]) + (f" (nor {len(names) - 1} others)" if len(names) > 1 else "")


def _check_leaves(folder: str, wanted: Leaves, saved: dict[str, ArrayLeaf | Scalar]) -> None:
    for path, leaf in {**wanted.tensors, **wanted.scalars}.items():
        here, there = _kind(path, leaf, wanted), _kind(path, saved[path], wanted)
        if here != there:
            raise ValueError(
                f"{path!r} is {there} in {folder} but {here} in the state to restore: "
                "restore with the configuration it was saved with, and convert afterwards"
            )


def _kind(path: str, leaf: Any, wanted: Leaves) -> str:
    if isinstance(leaf, Tensor):
        layout = wanted.layouts.get(path)
        shape = leaf.shape if layout is None else layout.shape
        return f"{dtype_name(leaf.dtype, path)}{list(shape)}"
    if isinstance(leaf, ArrayLeaf):
        return f"{leaf.dtype}{list(leaf.shape)}"
    return f"of type {type(leaf).__name__}"


def check_files(held: HeldStep, manifest: Manifest, parts: Collection[str]) -> None:
    """Look at the files of some parts before tensorstore stumbles over them.

    Raises:
        DamagedCheckpoint: one is missing, short, changed, a link or a pipe, or cannot be read; it is named.
    """
    files = {name: record for name, record in manifest.files.items() if name.split("/", 1)[0] in parts}
    found = held.wrong(manifest.base, files, hashed=manifest.checksum)
    if found:
        raise DamagedCheckpoint(f"{held.show(join([manifest.base, found[0]]))} {found[1]}: restore another step")
    for part in sorted(parts):
        held.require_plain(join([manifest.base, part]))


def _read(held: HeldStep, manifest: Manifest, wanted: Leaves, buffers: dict[str, LeafBuffer]) -> None:
    """Read part by part, and within a part in windows, so that host copies of device tensors stay few."""
    context = held.context()
    with DirectReader(manifest, context) as direct:
        for window in _windows(wanted.tensors, manifest):
            pieces = {path: _pieces(path, wanted, buffers[path]) for path in window}
            leaves = {path: manifest.arrays[path] for path in window}
            name = join([manifest.base, manifest.arrays[window[0]].part])
            where, shown = held.kvstore(name), held.show(name)
            done = direct.read(where, held.files(name), leaves, pieces, shown)
            rest = {path: [] if path in done else pieces[path] for path in window}
            read_checked(where, leaves, rest, manifest, context, shown)
            for path in window:
                buffers[path].filled()


def _pieces(path: str, wanted: Leaves, buffer: LeafBuffer) -> list[Piece]:
    layout, host = wanted.layouts.get(path), buffer.host()
    start = tuple(first for first, _ in layout.mine) if layout else (0,) * host.ndim
    return [Piece(start, as_array(host))] if host.numel() else []


def _windows(wanted: dict[str, Tensor], manifest: Manifest) -> Iterable[list[str]]:
    """Leaves of one part, in order, of about `_WINDOW_BYTES` together or a single larger one."""
    window: list[str] = []
    size = 0
    for path in sorted(wanted, key=lambda path: manifest.arrays[path].part):
        other_part = bool(window) and manifest.arrays[window[0]].part != manifest.arrays[path].part
        if other_part or (window and size + wanted[path].nbytes > _WINDOW_BYTES):
            yield window
            window, size = [], 0
        window.append(path)
        size += wanted[path].nbytes
    if window:
        yield window
