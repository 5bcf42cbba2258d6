"""Random in-place fills of tensors that are not contiguous: each element gets the number that eager code gives it.

`x.bernoulli_()` fills `x` in the order of its memory, so a transposed tensor or a slice gets its numbers in another
order, and from another routine, than a contiguous one. The pure forms of torch's fills ignore strides. Where it
matters, this file replaces them by ops that fill new memory with the same strides.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, fx

from ftrain.graph.layouts import to_layout
from ftrain.graph.sizes import has_static_layout
from ftrain.kernels.opaque import opaque_op

_aten = torch.ops.aten

FILLS_LIKE = "fills_like"
"""The key of a node's meta that holds the fake tensor that eager code fills there."""


def _fill(name: str, arguments: str, fill: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """An op `(x, strides, *arguments)` that fills a new tensor with `x`'s shape and dtype and these strides."""

    def new(x: Tensor, strides: Sequence[int], *arguments: Any, generator: torch.Generator | None = None) -> Tensor:
        return torch.empty_strided(x.shape, strides, dtype=x.dtype, device=x.device)

    def run(x: Tensor, strides: Sequence[int], *arguments: Any, generator: torch.Generator | None = None) -> Tensor:
        return fill(new(x, strides), *arguments, generator=generator)

    schema = f"fill_{name}(Tensor x, SymInt[] strides{arguments}, *, Generator? generator=None) -> Tensor"
    return opaque_op(schema, fake=new, random=True)(run)


_FILLS = {
    _aten.bernoulli.p: _fill("bernoulli", ", float p", _aten.bernoulli_.float),
    _aten.bernoulli.Tensor: _fill("bernoulli_each", ", Tensor p", _aten.bernoulli_.Tensor),
    _aten.uniform.default: _fill("uniform", ", float low=0., float high=1.", _aten.uniform_.default),
    _aten.normal_functional.default: _fill("normal", ", float mean=0., float std=1.", _aten.normal_.default),
    _aten.random.default: _fill("random", "", _aten.random_.default),
    _aten.random.to: _fill("random_below", ", int high", _aten.random_.to),
    getattr(_aten.random, "from"): _fill("random_between", ", int low, int? high", getattr(_aten.random_, "from")),
    _aten.log_normal.default: _fill("log_normal", ", float mean=1., float std=2.", _aten.log_normal_.default),
    _aten.exponential.default: _fill("exponential", ", float rate=1.", _aten.exponential_.default),
    _aten.geometric.default: _fill("geometric", ", float p", _aten.geometric_.default),
    _aten.cauchy.default: _fill("cauchy", ", float median=0., float sigma=1.", _aten.cauchy_.default),
}
_UNNAMEABLE = getattr(_aten.random, "from")
"""`random.from` cannot be written in Python: `from` is a keyword."""


def note_fill(node: fx.Node) -> None:
    """Record the tensor that an in-place op writes, in `meta`. To be called before functionalization."""
    written = node.args[0] if node.args else None
    if isinstance(written, fx.Node) and isinstance(written.meta.get("val"), Tensor):
        node.meta[FILLS_LIKE] = written.meta["val"]


def fill_as_eager(module: fx.GraphModule) -> None:
    """Replace, in place, random fills of tensors that are not contiguous by ops that draw as eager code does.

    To be called after functionalization, on nodes marked by `note_fill`. ValueError, with the user's line, for such a
    tensor whose size depends on data.
    """
    for node in list(module.graph.nodes):
        eager = node.meta.pop(FILLS_LIKE, None)
        fill = _FILLS.get(node.target)
        if fill is None or eager is None or _is_plain(node, eager):
            continue
        _require_numbers(node, eager)
        x, *rest = node.args
        with module.graph.inserting_before(node):
            drawn = module.graph.call_function(fill, (x, list(eager.stride()), *rest), node.kwargs)
            drawn.meta.update(node.meta, val=eager.new_empty_strided(eager.shape, eager.stride()))
            laid = module.graph.call_function(to_layout, (drawn, list(node.meta["val"].stride())))
            laid.meta.update(node.meta)
        node.replace_all_uses_with(laid)
        module.graph.erase_node(node)
    module.recompile()


def _is_plain(node: fx.Node, eager: Tensor) -> bool:
    if node.target is _UNNAMEABLE:
        return False
    return _lies_in_rows(eager) and _lies_in_rows(node.args[0].meta["val"])  # type: ignore[union-attr]


def _lies_in_rows(value: Tensor) -> bool:
    if has_static_layout(value):
        return value.is_contiguous()
    return list(map(str, value.stride())) == list(map(str, value.new_empty(value.shape).stride()))


def _require_numbers(node: fx.Node, eager: Tensor) -> None:
    if not has_static_layout(eager):
        raise ValueError(
            f"{node.meta.get('source')}: the step draws random numbers into a tensor whose size depends on data and "
            "which is not contiguous: draw into a contiguous one, e.g. torch.rand(x.shape)"
        )
