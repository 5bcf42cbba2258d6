"""A traced step as text, an op a line, by which the ranks of a mesh tell that they trace the same one."""

import re
from collections.abc import Iterator, Sequence

from torch import Tensor, fx

from ftrain.graph.loop import with_bodies
from ftrain.graph.torch_private import FakeTensor
from ftrain.sharding.bits import hash_bits
from ftrain.sharding.programs import compare_programs

_ADDRESS = re.compile(r" at 0x[0-9a-f]+")  # of Python functions, which each process has elsewhere


def program_lines(module: fx.GraphModule, options: str) -> list[str]:
    """The lines of a trace before its passes: its `options`, and each op with its arguments; of a constant its bits.

    No line has a path of the machine, or what one process has otherwise than another.
    """
    return [
        options,
        *(line for body in with_bodies(module) for node in body.graph.nodes for line in _lines(body, node)),
    ]


def require_one_program(lines: Sequence[str]) -> None:
    """ValueError, on all ranks, where ranks have traced different steps. All processes call this together."""
    differs = compare_programs(lines)
    if differs is not None:
        first, other = (line[:200] or "nothing more" for line in (differs.of_first, differs.of_rank))
        raise ValueError(
            f"ranks 0 and {differs.rank} trace different steps: rank 0 has {first!r} and rank {differs.rank} has "
            f"{other!r}; options, branches and numbers of Python must be the same on all ranks: choose by torch.where, "
            "or give what differs as the batch"
        )


def _lines(module: fx.GraphModule, node: fx.Node) -> Iterator[str]:
    constant = getattr(module, str(node.target), None) if node.op == "get_attr" else None
    if isinstance(constant, Tensor) and not isinstance(constant, FakeTensor):
        yield f"{node.name} = {tuple(constant.shape)} {constant.dtype} {int(hash_bits(constant)):x}"
    else:
        source = node.meta.get("source")
        at = "" if source is None else f" at line {source.line} of {source.function}"
        yield _ADDRESS.sub("", f"{node.name} = {node.target}{node.args} {node.kwargs or ''}{at}")
