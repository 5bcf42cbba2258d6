"""`ftrain check --model DIR --shard 2`: is a folder's model the same here as by itself, on one device and on a mesh?"""

from dataclasses import dataclass
from pathlib import Path

import torch

from ftrain.bridge import check, from_transformers
from ftrain.bridge.tasks import task_of
from ftrain.kernels import random
from ftrain.modules.spec import leaves_with_paths
from ftrain.sharding import Mesh, Plan


@dataclass(frozen=True)
class CheckOptions:
    """Compare the loss and every gradient of a folder's causal language model, bridged (as --native never trains it),
    with those of the plain module of transformers in float64. The exit code is 0 if they are equal, else 1."""

    model: Path
    """A folder in Hugging Face's format."""
    tokens: int = 96
    """Tokens of the batch: three documents of a third each."""
    replicate: int = 1
    """Ranks of a virtual mesh that have a copy each."""
    shard: int = 1
    """Ranks of a virtual mesh that divide parameters and batch."""
    sequence: int = 1
    """Ranks of a virtual mesh that share the tokens."""
    expert: int = 1
    """Slices of the experts on a virtual mesh."""
    tolerance: float = 1e-5
    """Of the loss, and of each gradient relative to its norm."""
    seed: int = 0
    """Of the tokens."""


def run(options: CheckOptions) -> int:
    """The command. ValueError for a folder without such a model, and sizes that do not fit the batch."""
    if task_of(options.model, media=False) != "causal_lm":
        raise ValueError(
            f"{options.model}: its model reads media among its tokens, which this does not compare: ftrain eval with "
            "--native never and with --native auto tells the loss of transformers' module and of the library's"
        )
    model = from_transformers(options.model)
    mesh = Mesh(
        replicate=options.replicate, shard=options.shard, sequence=options.sequence, expert=options.expert,
        kind="virtual",
    )  # fmt: skip
    ranks = options.replicate * options.shard
    length = options.tokens // 3
    if length < 2:
        raise ValueError(f"--tokens {options.tokens}: three documents need at least 2 tokens each")
    count = length * 3 * ranks
    tokens = random.randint(random.key(options.seed), (count,), low=0, high=_vocabulary(model.specs))
    segments = torch.arange(count) // length
    batch = {"tokens": tokens, "labels": tokens.roll(-1), "segments": segments}
    batch["labels"][torch.arange(1, count + 1) % length == 0] = -100
    batch["positions"] = torch.arange(count) % length
    found = check(model, batch, plan=Plan(mesh) if mesh.size > 1 else None, tolerance=options.tolerance)
    print(found)
    return 0 if found.equal else 1


def _vocabulary(specs: object) -> int:
    """Rows of the smallest table of tokens: ids below are known to all."""
    found = [spec.shape[spec.axes.index("vocab")] for _, spec in leaves_with_paths(specs) if "vocab" in spec.axes]
    if not found:
        raise ValueError("the model has no table of tokens: ftrain check is for language models")
    return min(found)


COMMANDS = {"check": (CheckOptions, run)}
