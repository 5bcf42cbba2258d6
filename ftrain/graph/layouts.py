"""Real layouts against planned ones: at the first run each op's result must lie in memory as the plan says.

A plan is made of shape rules, and some of torch's rules give other strides than its kernels (the backward of `mse_loss`
on a transposed input). A later `view` would then fail and `as_strided` read other numbers. So the first run looks at
every result: one that lies otherwise is copied into the planned layout, there and in all later runs. A result of
another shape or dtype is a wrong shape rule, and refused by name.
"""

import operator
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, fx

from ftrain.graph.loop import is_loop, loop_body
from ftrain.graph.op_effects import Effect, effect_of
from ftrain.graph.sizes import has_static_layout
from ftrain.graph.torch_private import value_of
from ftrain.kernels.opaque import opaque_op
from ftrain.tree import typed_shape

_CHECK = "check_layout"
_CPU_ATTENTION = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default


@opaque_op(
    "to_layout(Tensor x, SymInt[] strides) -> Tensor",
    fake=lambda x, strides: torch.empty_strided(x.shape, strides, dtype=x.dtype, device=x.device),
)
def to_layout(x: Tensor, strides: Sequence[int]) -> Tensor:
    """A copy of a tensor of any shape with these strides (in elements), as one op."""
    return torch.empty_strided(x.shape, strides, dtype=x.dtype, device=x.device).copy_(x)


class _Plan(NamedTuple):
    op: str
    source: str
    value: Tensor
    sums: bool
    """Whether it is what torch's attention on a CPU keeps for its backward: of float64 older rules say float32."""


class LayoutCheck:
    """Checks in a graph that is about to run for the first time, and in the bodies of its loops.

    The graph then raises ValueError where a result has another shape or dtype than its shape rule said; a result with
    other strides is copied. `settle` ends the check.
    """

    def __init__(self, module: fx.GraphModule) -> None:
        """Puts the checks into the graph."""
        self._module = module
        self._plans: dict[str, _Plan] = {}
        self._found: set[str] = set()
        self._inside = {n.name: LayoutCheck(loop_body(n)) for n in module.graph.nodes if is_loop(n)}
        setattr(module, _CHECK, _Function(self._look))
        for node in list(module.graph.nodes):
            if _is_checked(node):
                source = str(node.meta.get("source"))
                self._plans[node.name] = _Plan(str(node.target), source, node.meta["val"], _is_sums(node))
                with module.graph.inserting_after(node):
                    check = module.graph.call_module(_CHECK, (node, node.name))
                node.replace_all_uses_with(check, delete_user_cb=lambda user, check=check: user is not check)
        module.recompile()

    def settle(self) -> None:
        """Take the checks out, and leave a copy where one is needed."""
        graph = self._module.graph
        for check in [n for n in graph.nodes if n.op == "call_module" and n.target == _CHECK]:
            node = check.args[0]
            assert isinstance(node, fx.Node)
            check.replace_all_uses_with(node)
            graph.erase_node(check)
        delattr(self._module, _CHECK)
        for inner in self._inside.values():
            inner.settle()
        _copy_results(self._module, self._found)

    def repair(self, module: fx.GraphModule) -> None:
        """Copy the same results in another copy of the graph, as far as it has these nodes."""
        for node in module.graph.nodes:
            if is_loop(node) and node.name in self._inside:
                self._inside[node.name].repair(loop_body(node))
        _copy_results(module, self._found)

    def _look(self, value: Tensor, name: str) -> Tensor:
        plan = self._plans[name]
        if value.shape != plan.value.shape or (value.dtype != plan.value.dtype and not plan.sums):
            raise ValueError(
                f"{plan.source}: {plan.op} returned {typed_shape(value)} where its shape rule says "
                f"{typed_shape(plan.value)}: correct the op's fake implementation (register_fake)"
            )
        if lies_as(value, plan.value):
            return value
        self._found.add(name)
        return to_layout(value, plan.value.stride())


def _copy_results(module: fx.GraphModule, names: set[str]) -> None:
    """Copy the results of the nodes of these names into the planned layout; no value changes."""
    for node in [n for n in module.graph.nodes if n.name in names]:
        with module.graph.inserting_after(node):
            copy = module.graph.call_function(to_layout, (node, list(node.meta["val"].stride())))
        copy.meta.update(node.meta)
        copy.meta["val"] = value_of(copy)
        node.replace_all_uses_with(copy, delete_user_cb=lambda user, copy=copy: user is not copy)
    module.recompile()


def views_as_reshapes(module: fx.GraphModule) -> None:
    """Let views copy where the real layout does not allow one, for graphs that run without a check."""
    aten = torch.ops.aten
    for node in module.graph.nodes:
        if node.op == "call_function" and node.target in (aten.view.default, aten._unsafe_view.default):
            node.target = aten.reshape.default
    module.recompile()


class _Function(torch.nn.Module):
    """A function in the place of a submodule."""

    def __init__(self, function: Callable[..., Tensor]) -> None:
        super().__init__()
        self.function = function

    def forward(self, *inputs: object) -> Tensor:
        return self.function(*inputs)


def _is_sums(node: fx.Node) -> bool:
    source = node.args[0] if node.target is operator.getitem else None
    return isinstance(source, fx.Node) and source.target is _CPU_ATTENTION and bool(node.args[1] == 1)


def _is_checked(node: fx.Node) -> bool:
    """A result with a known layout that is memory of its own or a view of a value: not what is written in place."""
    value = node.meta.get("val")
    if node.op != "call_function" or not isinstance(value, Tensor) or effect_of(node) is Effect.WRITES:
        return False
    if not has_static_layout(value):
        return False
    if value.dtype == torch.uint8 and not value.numel():
        return False  # a workspace between an op and its backward, whose size no rule knows
    return all(stride > 0 for stride, size in zip(value.stride(), value.shape, strict=True) if size > 1)


def lies_as(value: Tensor, planned: Tensor) -> bool:
    """True for equal strides where they matter: not of dims of one element, nor of empty tensors. Shapes are equal."""
    pairs = zip(value.stride(), planned.stride(), planned.shape, strict=True)
    return planned.numel() == 0 or all(a == b or size == 1 for a, b, size in pairs)


def lies_plainly(value: Tensor) -> bool:
    """True for a tensor of any shape whose memory holds its values in rows: contiguous, and no lazy conjugate or
    negative (`x.conj()`, the `imag` of one).
    """
    return value.is_contiguous() and not (value.is_conj() or value.is_neg())


def laid_plainly(value: Tensor) -> Tensor:
    """The tensor itself, of any shape, or a copy that lies plainly (see `lies_plainly`)."""
    return value.resolve_conj().resolve_neg().contiguous()
