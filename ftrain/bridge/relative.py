"""Numbers that a model adds to the scores of attention, found to depend on the distance between two tokens alone.

A model is traced with what it adds as the result; this is computed with random numbers in the place of parameters.

Legend: H heads, L queries, S keys.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, fx

from ftrain.bridge.attention import Weighed, weighing
from ftrain.trace.tracer import Traced, trace

_MOST = 50_000_000  # elements of a parameter that is filled to see what follows from it


def by_distance(run: Callable[[Any], Any], params: Any) -> str:
    """Why what `run(params)` adds to scores is not of distances alone, in words; empty if it is.

    Of attention within one sequence the numbers of a query may differ from those of another by their places in it; what
    is added to a query's scores as a whole makes no difference. Between two sequences there may be nothing but that.
    `params`: without memory. A cause is that the numbers cannot be followed, too.
    """
    names: list[str] = []

    def added(params: Any) -> list[Tensor]:
        found: dict[int, Tensor] = {}

        def noted(weighed: Weighed) -> Tensor:
            if weighed.bias is not None and id(weighed.bias) not in found:
                found[id(weighed.bias)] = weighed.bias
                names.append(type(weighed.module).__name__)
            return weighed.query.transpose(1, 2)[..., :1].expand(-1, -1, -1, weighed.value.shape[-1])

        with weighing(noted):
            run(params)
        return list(found.values())

    traced = trace(added, (params,), ("params",))
    values = _values(traced)
    if values is None:
        return f"the numbers that {names[0]} adds to scores do not follow from parameters and places"
    for name, value in zip(names, values, strict=True):
        if not _of_distances(value):
            return f"{name} adds numbers to scores by the place in the pack"
    return ""


def _of_distances(bias: Tensor) -> bool:
    """True for numbers `[..., L, S]` that are, but for one number of each query, of the distance of query and key."""
    length, keys = bias.shape[-2:]
    if length != keys:
        return torch.allclose(bias, bias[..., :1].expand_as(bias), atol=1e-6)
    apart = bias - bias.diagonal(dim1=-2, dim2=-1)[..., None]
    return torch.allclose(apart[..., 1:, 1:], apart[..., :-1, :-1], atol=1e-5)


def _values(traced: Traced) -> list[Tensor] | None:
    """The results, with random numbers in the place of floating inputs; None for what is too large to try."""
    graph, generator = traced.module.graph, torch.Generator().manual_seed(0)
    graph.eliminate_dead_code()
    known: dict[fx.Node, Any] = {}
    for node in graph.nodes:
        if node.op == "placeholder":
            if not node.users:
                continue
            value = node.meta["val"]
            if value.numel() > _MOST or not value.dtype.is_floating_point:
                return None
            known[node] = torch.randn(value.shape, generator=generator).to(value.dtype)
        elif node.op == "get_attr":
            known[node] = getattr(traced.module, str(node.target))
        elif node.op == "call_function":
            args, kwargs = fx.map_arg((node.args, node.kwargs), lambda n: known[n])
            known[node] = node.target(*args, **kwargs)
        elif node.op == "output":
            return [known[n] for n in node.args[0]]
    return []
