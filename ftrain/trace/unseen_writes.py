"""Refuses in-place ops of a loss for which torch would compute a wrong derivative in a trace.

After a write into a tensor, autograd regenerates each view of it from its base, to know the view's derivative. Under a
trace it calls the op that created the view again, and this op gets the base with its new shape: after `h.t_()`, a view
`v = h[:2]` that was taken before would get the derivative of columns. Also, autograd does not see writes into lists of
tensors.

What a loss computes with in the place of a parameter, gathered from its pieces or cast, is no parameter: a write into
it would be lost, and is refused too.
"""

import functools
import weakref
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from ftrain.graph.torch_memory import storage_id
from ftrain.trace.refusals import Untraceable


class UnseenWrites:
    """Checks the ops of losses before they run.

    `made`: weak references to the tensors of the trace. `source`: returns the user's current line.
    """

    def __init__(self, made: Sequence[weakref.ref[Tensor]], source: Callable[[], object]) -> None:
        self._made, self._source = made, source
        self._reshaped: dict[int, tuple[str, torch.UntypedStorage]] = {}
        """By identity of memory, where a view of it got another shape; the storage is held to keep the identity."""
        self._parameters: dict[int, tuple[str, torch.UntypedStorage]] = {}
        """By identity of memory, the paths of parameters of which it is a gathered or cast copy."""

    def note_copy(self, copy: Tensor, path: str) -> None:
        """A loss computes with `copy`, of any shape, in the place of the parameter at `path`."""
        self._parameters[storage_id(copy)] = path, copy.untyped_storage()

    def check(self, op: torch._ops.OpOverload, args: Sequence[Any]) -> None:
        """Untraceable, a ValueError, with the user's line, if `op(*args)` would make a gradient wrong."""
        if not op._schema.is_mutable:
            return
        if self._parameters:
            self._refuse_lost(op, args)
        if _writes_a_list(op):
            self._refuse_a_list(op, args)
        elif torch.Tag.inplace_view in op.tags:
            self._check_new_shape(op, args[0])
        elif self._reshaped:
            self._check_write(op, args)

    def _check_new_shape(self, op: torch._ops.OpOverload, written: Tensor) -> None:
        name = _name(op)
        if name == "detach_":
            return
        seen = self._has_views(written)
        if seen and written.requires_grad:
            raise Untraceable(
                f"{self._source()}: {name} changes the shape of a tensor within a loss while there are views of it, "
                f"which would get a wrong gradient: make a new tensor{_instead(name)}, or take the views afterwards"
            )
        if seen or written._is_view():
            self._reshaped[storage_id(written)] = f"{name} at {self._source()}", written.untyped_storage()

    def _has_views(self, base: Tensor) -> bool:
        return any(x is not None and x._base is base for x in (ref() for ref in self._made))

    def _check_write(self, op: torch._ops.OpOverload, args: Sequence[Any]) -> None:
        """ValueError for a write with a gradient into memory of which a view has got another shape."""
        tensors = [x for x in args if isinstance(x, Tensor)]
        before = self._reshaped.get(storage_id(tensors[0])) if tensors else None
        if before is not None and any(x.requires_grad for x in tensors):
            raise Untraceable(
                f"{self._source()}: {_name(op)} writes within a loss into a tensor that has views, one of which had "
                f"its shape changed in place ({before[0]}), so that gradients would be wrong: make a new value"
                f"{_instead(_name(op))}"
            )

    def _refuse_lost(self, op: torch._ops.OpOverload, args: Sequence[Any]) -> None:
        """Untraceable for a write into what stands for a parameter."""
        for argument, given in zip(op._schema.arguments, args, strict=False):
            written = isinstance(given, Tensor) and argument.alias_info is not None and argument.alias_info.is_write
            path = self._parameters.get(storage_id(given)) if written else None
            if path is not None:
                raise Untraceable(
                    f"{self._source()}: {_name(op)} writes into the parameter {path[0]!r}, of which a loss has a copy "
                    "(gathered from the ranks, or cast), so that it would be lost: a step is pure, so make a new "
                    "value, e.g. x = x + y, and change the parameter in the update"
                )

    def _refuse_a_list(self, op: torch._ops.OpOverload, args: Sequence[Any]) -> None:
        flat = [x for argument in args for x in (argument if isinstance(argument, list | tuple) else [argument])]
        if any(isinstance(x, Tensor) and x.requires_grad for x in flat):
            name = _name(op)
            raise Untraceable(
                f"{self._source()}: torch.{name} writes into a list of tensors within a loss, and views of them would "
                f"get a wrong gradient: write them one by one (x.{name.removeprefix('_foreach_')}(...)), or take "
                f"torch.{name.removesuffix('_')}, which writes nothing"
            )


@functools.cache
def _writes_a_list(op: torch._ops.OpOverload) -> bool:
    """True for an op that writes into the tensors of a list, like `torch._foreach_mul_`."""
    arguments = op._schema.arguments
    return any(a.alias_info is not None and a.alias_info.is_write and "List" in str(a.type) for a in arguments)


def _name(op: torch._ops.OpOverload) -> str:
    return op._schema.name.split("::")[1]


def _instead(name: str) -> str:
    """The fix for an in-place op in words: its pure method, if there is one."""
    pure = name.removesuffix("_")
    return f", e.g. x = x.{pure}(...)" if hasattr(Tensor, pure) else ""
