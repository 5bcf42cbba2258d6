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

The names are those of VeOmni. A step exists when its final name exists: the rename is the commit. (Object stores
cannot rename: see bucket.py.)
"""

import re
import secrets
from collections.abc import Iterable
from pathlib import Path

LATEST = "latest_checkpointed_iteration.txt"
MANIFEST = "manifest.json"
PARTS = {"params": "model", "opt_state": "optimizer"}
OTHER_PART = "extra_state"

_STEP = re.compile(r"global_step_(\d+)")
_LEFTOVER = re.compile(r"(global_step_\d+|latest_checkpointed_iteration\.txt)(\.(tmp|old)-[0-9a-f]+)+")


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


def leftovers(root: Path) -> list[Path]:
    """What crashed or running saves and deletions have left in `root`."""
    entries = root.iterdir() if root.is_dir() else []
    return sorted(p for p in entries if _LEFTOVER.fullmatch(p.name))


def steps_of(names: Iterable[str]) -> list[int]:
    """The steps whose folders are among these names, ascending."""
    return sorted(int(found[1]) for name in names if (found := _STEP.fullmatch(name)))


def named_step(text: str) -> int | None:
    """The step that the content of `latest_checkpointed_iteration.txt` names; None for what names none."""
    return int(text) if text.strip().isdecimal() else None


def part_of(path: str) -> str:
    """The sub-folder for the leaf at this dotted path: `model`, `optimizer` or `extra_state`."""
    return PARTS.get(path.split(".", 1)[0], OTHER_PART)
