"""Names on disk: what a folder of checkpoints looks like, and which steps it holds.

    ROOT/latest_checkpointed_iteration.txt      the number of the last committed step
    ROOT/global_step_N/manifest.json            tree, shapes, dtypes, checksums; written last
    ROOT/global_step_N/model/                   leaves below `params`
    ROOT/global_step_N/optimizer/               leaves below `opt_state`
    ROOT/global_step_N/extra_state/             everything else: step, keys, data position
    ROOT/global_step_N/hf_ckpt/                 optional, safetensors for Hugging Face
    ROOT/global_step_N/PART/rank_R/d/           the data files that rank R of several wrote of a part
    ROOT/global_step_N.tmp-HEX/                 being written, or left by a crash
    ROOT/global_step_N.old-HEX/                 being deleted, or left by a crash
    ROOT/global_step_N.was-HEX/                 the version before, while the new one takes its name; left by a crash
                                                between the two renames it is still the step

The names are those of VeOmni. A step exists when its final name exists: the rename is the commit. (Object stores
cannot rename: see bucket.py.)
"""

import operator
import re
import secrets
import urllib.parse
from collections.abc import Iterable
from pathlib import Path
from typing import Any

LATEST = "latest_checkpointed_iteration.txt"
MANIFEST = "manifest.json"
PARTS = {"params": "model", "opt_state": "optimizer"}
OTHER_PART = "extra_state"
KEY_BYTES = 2**12
"""The longest name of a leaf, as `storage_key` gives it."""
FILE_BYTES = 255
"""The longest name of a file: without a database leaves are folders."""

MOST = 10**15
"""Steps are below this."""

_NUMBER = r"(0|[1-9][0-9]{0,14})"
_STEP = re.compile(rf"global_step_{_NUMBER}")
_POINTER = re.compile(r"\s*([0-9]{1,15})\s*")
_LEFTOVER = re.compile(r"(global_step_[0-9]+|latest_checkpointed_iteration\.txt)(\.(tmp|old|was)-[0-9a-f]+)+")
_REPLACED = re.compile(rf"global_step_{_NUMBER}\.was-[0-9a-f]+")
_DISCARDED = re.compile(r".*\.old-[0-9a-f]+")


def step_number(step: Any) -> int:
    """The number of a step as an int; ValueError for what is none, or one that no folder can have."""
    try:
        number = operator.index(step)
    except TypeError:
        number = -1
    if isinstance(step, bool) or not 0 <= number < MOST:
        raise ValueError(f"a step is a whole number from 0 to {MOST - 1}, not {step!r}")
    return number


def step_name(step: int) -> str:
    """The name of a committed step's folder."""
    return f"global_step_{step}"


def step_folder(root: Path, step: int) -> Path:
    """Where step `step` lives once it is committed."""
    return root / step_name(step)


def temporary(path: Path) -> Path:
    """A fresh name beside `path` for what is not committed yet."""
    return path.with_name(f"{path.name}.tmp-{secrets.token_hex(4)}")


def discarded(path: Path) -> Path:
    """A fresh name beside `path` for what is about to be deleted."""
    return path.with_name(f"{path.name}.old-{secrets.token_hex(4)}")


def put_aside(path: Path) -> Path:
    """A fresh name beside `path` for what is about to be replaced, and counts until it is."""
    return path.with_name(f"{path.name}.was-{secrets.token_hex(4)}")


def is_discarded(path: Path) -> bool:
    """Whether it has the name of something that is being deleted."""
    return _DISCARDED.fullmatch(path.name) is not None


def replaced(names: Iterable[str]) -> dict[int, str]:
    """Of the steps whose old version is put aside among these names: where."""
    return {int(found[1]): name for name in sorted(names) if (found := _REPLACED.fullmatch(name))}


def leftovers(root: Path) -> list[Path]:
    """What crashed or running saves and deletions have left in `root`."""
    entries = root.iterdir() if root.is_dir() else []
    return sorted(p for p in entries if _LEFTOVER.fullmatch(p.name))


def steps_of(names: Iterable[str]) -> list[int]:
    """The steps whose folders are among these names, ascending."""
    return sorted(int(found[1]) for name in names if (found := _STEP.fullmatch(name)))


def named_step(content: bytes) -> int | None:
    """The step that the content of `latest_checkpointed_iteration.txt` names; None for what names none."""
    found = _POINTER.fullmatch(content[:64].decode("ascii", errors="replace"))
    return int(found[1]) if found else None


def part_of(path: str) -> str:
    """The sub-folder for the leaf at this dotted path: `model`, `optimizer` or `extra_state`."""
    return PARTS.get(path.split(".", 1)[0], OTHER_PART)


def storage_key(path: str) -> str:
    """A leaf's name as one path component: letters, digits and `._-~` as they are, the rest as %XX of its UTF-8.

    UnicodeEncodeError for a name that UTF-8 does not have.

    >>> from ftrain.checkpoint.folders import storage_key
    >>> storage_key("params.layers.0.w"), storage_key("a/b c"), storage_key("..")
    ('params.layers.0.w', 'a%2Fb%20c', '%2E%2E')
    """
    key = urllib.parse.quote(path, safe="")
    return key.replace(".", "%2E") if key.strip(".") == "" else key
