"""Names on disk: what a folder of checkpoints looks like, and which steps it holds.

    ROOT/latest_checkpointed_iteration.txt      the number of the last committed step
    ROOT/global_step_N/manifest.json            tree, shapes, dtypes, checksums; written last
    ROOT/global_step_N/model/                   leaves below `params`
    ROOT/global_step_N/optimizer/               leaves below `opt_state`
    ROOT/global_step_N/extra_state/             everything else: step, keys, data position
    ROOT/global_step_N/hf_ckpt/                 optional, safetensors for Hugging Face
    ROOT/global_step_N.tmp-HEX/                 being written, or left by a crash
    ROOT/global_step_N.old-HEX/                 being deleted, or left by a crash

The names are those of VeOmni. A step exists when its final name exists: the rename is the commit.
"""

import re
import secrets
from pathlib import Path

LATEST = "latest_checkpointed_iteration.txt"
MANIFEST = "manifest.json"
PARTS = {"params": "model", "opt_state": "optimizer"}
OTHER_PART = "extra_state"

_STEP = re.compile(r"global_step_(\d+)")
_LEFTOVER = re.compile(r"(global_step_\d+|latest_checkpointed_iteration\.txt)(\.(tmp|old)-[0-9a-f]+)+")


def step_folder(root: Path, step: int) -> Path:
    """Where step `step` lives once it is committed."""
    return root / f"global_step_{step}"


def temporary(path: Path) -> Path:
    """A fresh name beside `path` for what is not committed yet."""
    return path.with_name(f"{path.name}.tmp-{secrets.token_hex(4)}")


def discarded(path: Path) -> Path:
    """A fresh name beside `path` for what is about to be deleted."""
    return path.with_name(f"{path.name}.old-{secrets.token_hex(4)}")


def leftovers(root: Path) -> list[Path]:
    """What crashed or running saves and deletions have left in `root`."""
    return sorted(p for p in _entries(root) if _LEFTOVER.fullmatch(p.name))


def steps(root: str | Path) -> list[int]:
    """The steps that `root` holds, ascending; empty when there is no such folder."""
    found = ((p, _STEP.fullmatch(p.name)) for p in _entries(Path(root)))
    return sorted(int(m[1]) for p, m in found if m and (p / MANIFEST).is_file())


def latest(root: str | Path) -> int | None:
    """The last committed step, or None when nothing was saved.

    It is the step that `latest_checkpointed_iteration.txt` names; where that file is missing or names a step that is
    not there (somebody moved it), the highest step that is.
    """
    here = steps(root)
    try:
        named = int((Path(root) / LATEST).read_text().strip())
    except (FileNotFoundError, NotADirectoryError, ValueError):
        named = -1
    return named if named in here else max(here, default=None)


def part_of(path: str) -> str:
    """The sub-folder for the leaf at this dotted path: `model`, `optimizer` or `extra_state`."""
    return PARTS.get(path.split(".", 1)[0], OTHER_PART)


def _entries(root: Path) -> list[Path]:
    return list(root.iterdir()) if root.is_dir() else []
