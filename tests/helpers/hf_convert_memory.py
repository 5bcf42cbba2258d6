"""Converts a folder to a checkpoint and that back, and prints how many bytes memory grew in each direction.

Arguments: the folder in Hugging Face's format, the folder of checkpoints, the folder to write, the size of its files.
"""

import sys

from ftrain.cli import convert as _loaded_before_it_is_measured  # noqa: F401
from ftrain.cli.main import main


def resident(field: str) -> int:
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) * 1024 for line in file if line.startswith(field))


def measure(*arguments: str) -> int:
    before = resident("VmRSS:")
    with open("/proc/self/clear_refs", "w") as file:
        file.write("5")  # forget the peak so far
    code = main(["convert", *arguments])
    assert code == 0
    return resident("VmHWM:") - before


if __name__ == "__main__":
    theirs, run, back, shard = sys.argv[1:]
    print("grown in", measure("--from-hf", theirs, "--to", run))
    print("grown out", measure("--from-ckpt", run, "--to-hf", back, "--max-shard", shard))
