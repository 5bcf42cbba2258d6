"""What a bad step leaves in the run's folder for its replay: `replay/step_N/` with the batch and why it was bad.

`batch.safetensors` holds the batch's tensors by path; `about.json` step, position of the batch, loss, reason, other
leaves of the batch, and what the run left out until then.
"""

import json
import os
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from ftrain import tree
from ftrain.files.beneath import Folder
from ftrain.files.outside import JSON_BYTES, anything, check, mapped, number, parse, record, text, whole
from ftrain.resilience.skipped import ENTRIES, Skipped

FOLDER = "replay"
KEPT = 32
"""How many bad steps leave something behind; further ones leave nothing, so that a broken run fills no disk."""


_ABOUT = record(
    {
        "step": whole(1),
        "position": whole(),
        "loss": number(finite=False),
        "why": text(),
        "skipped": ENTRIES,
        "other_leaves": mapped(anything),
    }
)


@dataclass(frozen=True)
class FailureDump:
    """A bad step: the `position` of its batch in the order of the data, its `loss`, `why` it was bad, and what the run
    left out when it got there."""

    step: int
    position: int
    loss: float
    why: str
    skipped: Skipped


def write_failure_dump(run: Path, dump: FailureDump, batch: Any) -> Path | None:
    """Write the whole batch (not a rank's share) of a bad step; the folder, or None if there are too many already.

    A step that is run again after a rollback, and is bad again, replaces what it left before.

    Args:
        run: the run's folder.
        dump: about the step.
        batch: a tree of tensors of any device, and of leaves that JSON has.

    Raises:
        OSError: the disk is full, ...
        TypeError: a leaf of the batch is neither a tensor nor one that JSON has.

    >>> import pathlib, tempfile, torch
    >>> from ftrain.resilience.failure_dump import FailureDump, read_batch, read_failure_dump, write_failure_dump
    >>> from ftrain.resilience.skipped import Skipped
    >>> run, batch = pathlib.Path(tempfile.mkdtemp()), {"tokens": torch.arange(4)}
    >>> dump = FailureDump(step=3, position=2, loss=float("nan"), why="the loss is nan", skipped=Skipped())
    >>> write_failure_dump(run, dump, batch).relative_to(run).as_posix()
    'replay/step_3'
    >>> read_failure_dump(run, 3).why, read_batch(run, 3, like=batch)
    ('the loss is nan', {'tokens': tensor([0, 1, 2, 3])})
    """
    folder = _folder(run, dump.step)
    if not folder.exists() and len(list(folder.parent.glob("step_*"))) >= KEPT:
        return None
    new = folder.with_name(f".{folder.name}")
    shutil.rmtree(new, ignore_errors=True)
    new.mkdir(parents=True)
    leaves = dict(zip(tree.paths(batch), tree.leaves(batch), strict=True))
    tensors = {path: _plain(leaf) for path, leaf in leaves.items() if isinstance(leaf, Tensor)}
    save_file(tensors, new / "batch.safetensors")
    about = {
        **vars(dump),
        "skipped": dump.skipped.as_json(),
        "other_leaves": {path: leaf for path, leaf in leaves.items() if path not in tensors},
    }
    (new / "about.json").write_text(json.dumps(about, indent=1), encoding="utf-8")
    shutil.rmtree(folder, ignore_errors=True)
    os.replace(new, folder)
    return folder


def read_failure_dump(run: Path, step: int) -> FailureDump | None:
    """What the bad step left; None if it left nothing.

    Raises:
        ValueError: a file is not what was written, or is about another step or position; it is named.
        OSError: a file cannot be read.
    """
    try:
        about = _about(run, step)
    except (FileNotFoundError, NotADirectoryError):
        return None
    return FailureDump(
        step=about["step"],
        position=about["position"],
        loss=about["loss"],
        why=about["why"],
        skipped=Skipped.of_json(about["skipped"]),
    )


def read_batch(run: Path, step: int, *, like: Any) -> Any:
    """The batch that the bad step left, as a tree like `like`, its tensors on the devices of those in `like`.

    Raises:
        ValueError: it has other leaves, or leaves of another shape, dtype or type, or a file is not what was written.
        OSError: there is none (FileNotFoundError), or it cannot be read.
    """
    folder = _folder(run, step)
    others = _about(run, step)["other_leaves"]
    tensors = _tensors(run, folder / "batch.safetensors")
    for path in sorted(tensors.keys() & others.keys()):
        raise ValueError(f"{folder}: {path!r} is in batch.safetensors and in about.json: replay another step")
    found: dict[str, Any] = {**tensors, **others}
    leaves, treedef = tree.flatten(like)
    paths = tree.paths(like)
    if set(paths) != set(found):
        odd = sorted(set(paths) ^ set(found))
        raise ValueError(
            f"{folder}/batch.safetensors holds other leaves than a batch of this run has (as {odd[0]!r}): replay it "
            "with the code and the options that it was trained with"
        )
    for path, leaf in zip(paths, leaves, strict=True):
        if _kind(found[path]) != _kind(leaf):
            raise ValueError(
                f"{folder}: {path!r} is {_kind(found[path])}, and a batch of this run has {_kind(leaf)}: replay it "
                "with the code and the options that it was trained with"
            )
    placed = (
        found[path].to(leaf.device) if isinstance(leaf, Tensor) else found[path]
        for path, leaf in zip(paths, leaves, strict=True)
    )
    return tree.unflatten(treedef, placed)


def _about(run: Path, step: int) -> dict[str, Any]:
    file = _folder(run, step) / "about.json"
    with Folder(run) as opened:
        content = opened.read(file.relative_to(run).as_posix(), limit=JSON_BYTES)
    found = check(parse(content, str(file)), _ABOUT, str(file))
    if found["step"] != step:
        raise ValueError(f"{file} is about step {found['step']}, not step {step}: give the folder its own name again")
    position = Skipped.of_json(found["skipped"]).position(step)
    if found["position"] != position:
        raise ValueError(
            f"{file} has the position {found['position']}, and step {step} took the batch at position {position}: "
            "replay another step, or with --kept"
        )
    return found


def _kind(leaf: Any) -> str:
    if isinstance(leaf, Tensor):
        return f"{str(leaf.dtype).removeprefix('torch.')}{list(leaf.shape)}"
    name = type(leaf).__name__
    return f"{'an' if name[0] in 'aeiou' else 'a'} {name}"


def _tensors(run: Path, file: Path) -> dict[str, Tensor]:
    try:
        with Folder(run) as opened:
            opened.size(file.relative_to(run).as_posix())  # it is a regular file of this run
        return load_file(file)
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{file} is not what the run wrote ({error}): replay another step, or with --kept") from error


def _folder(run: Path, step: int) -> Path:
    return run / FOLDER / f"step_{step}"


def _plain(leaf: Tensor) -> Tensor:
    """In memory of its own: safetensors stores nothing twice, and refuses views."""
    return torch.clone(leaf.detach().cpu(), memory_format=torch.contiguous_format)
