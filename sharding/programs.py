"""A check that all processes of a mesh trace one program: ranks with other branches or options compute another step."""

import hashlib
from collections.abc import Sequence
from itertools import zip_longest
from typing import NamedTuple

import torch
import torch.distributed as dist


class Difference(NamedTuple):
    """Rank 0 and the first `rank` with another program, and the first line of each that the other has not ("" behind
    its end).
    """

    rank: int
    of_first: str
    of_rank: str


def compare_programs(lines: Sequence[str]) -> Difference | None:
    """The first difference between the programs of the run's processes, None if all are alike.

    `lines`: what this process's program does, an op a line. All processes call this together. Only a hash of 8 bytes is
    exchanged while all are alike. None too where torch.distributed is not initialised: a plan made ahead.
    """
    if not dist.is_initialized():
        return None
    digest = hashlib.blake2b("\n".join(lines).encode(), digest_size=8).digest()
    own = torch.tensor([int.from_bytes(digest, "little", signed=True)])
    own = own.cuda() if dist.get_backend() == "nccl" else own
    found = [torch.empty_like(own) for _ in range(dist.get_world_size())]
    dist.all_gather(found, own)
    if all(torch.equal(other, found[0]) for other in found):
        return None
    programs = [list[str]() for _ in found]
    dist.all_gather_object(programs, list(lines))
    rank = next(r for r, program in enumerate(programs) if program != programs[0])
    return first_difference_of(programs[0], programs[rank], rank)


def first_difference_of(first: Sequence[str], other: Sequence[str], rank: int) -> Difference:
    """Where the program of `rank` parts from the first rank's.

    >>> from ftrain.sharding.programs import first_difference_of
    >>> first_difference_of(["x.sin()", "x.sum()"], ["x.sin()", "x.mean()"], 1)
    Difference(rank=1, of_first='x.sum()', of_rank='x.mean()')
    """
    pairs = zip_longest(first, other, fillvalue="")
    return Difference(rank, *next((a, b) for a, b in pairs if a != b))
