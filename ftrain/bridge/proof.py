"""Whether documents may share a pack: every op that a model runs on tokens is one that is known to keep them apart.

The model is traced once on a small pack. Ops of single tokens stand in the place of attention and experts, whose
primitives know of documents. Then each node is either rows of tokens, computed token by token, or it has nothing to do
with them. What reads other tokens (a convolution, a scan, a shift), and numbers by the place in the pack (a table of
positions read from its start), know nothing of documents.
"""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, fx

from ftrain.kernels.primitive import bind
from ftrain.trace.batch_kinds import SAME, Found, Kind, Kinds
from ftrain.trace.batch_rows import by_rule
from ftrain.trace.spread_ops import CONSTANTS, is_elementwise, tensor_of
from ftrain.trace.tracer import Traced, trace

TOKENS = 37
"""Tokens of the small pack: a size that is none of a model's."""


def packed(run: Callable[[Any, Mapping[str, Tensor]], Tensor], params: Any, batch: Mapping[str, Tensor]) -> Traced:
    """The trace of `run(params, batch)` with ops of single tokens in the place of attention and experts.

    `batch`: leaves with `TOKENS` rows along dim 0. `params`: tensors, which may be without memory.
    """
    with bind(ALONE):
        return trace(run, (params, dict(batch)), ("params", "batch"))


def mixing(traced: Traced) -> str:
    """Why the documents of a pack would not stay apart in what `packed` traced, in words; empty if they do."""
    graph = traced.module.graph
    graph.eliminate_dead_code()
    kinds = dict[fx.Node, Kind]()
    rows = {path for path in traced.input_paths if path.startswith("batch")}
    places = iter(traced.input_paths)
    for node in graph.nodes:
        if node.op == "placeholder":
            kinds[node] = Kind("rows", 0, "tokens") if next(places) in rows else SAME
        elif node.op == "call_function":
            found = _found(node, kinds)
            if isinstance(found, str):
                return found
            kinds[node] = found.kind
        elif node.op != "output":
            kinds[node] = SAME
    return ""


def _found(node: fx.Node, known: Mapping[fx.Node, Kind]) -> Found | str:
    kinds: Kinds = {n: known[n] for n in node.all_input_nodes}
    if not any(k.what == "rows" or k.partial for k in kinds.values()):
        return Found(SAME)
    if node.target in CONSTANTS:
        return Found(next(k for k in kinds.values() if k.what == "rows"))  # one number, at all places
    found = by_rule(node, kinds)
    if found.mixes or found.kind.what == "unknown":
        how = "reads other tokens" if found.mixes else "is not known to keep tokens apart"
        return f"{_name(node)} {how}{_line(node)}"
    if found.kind.what == "rows" and is_elementwise(node.target) and _by_place(node, kinds, found.kind):
        return f"{_name(node)} adds numbers by the place in the pack{_line(node)}"
    return found


def _by_place(node: fx.Node, kinds: Kinds, kind: Kind) -> bool:
    """True if a number of the result depends on its place: an input that is no rows has a number for each."""
    value = tensor_of(node)
    for source, of in kinds.items():
        own = tensor_of(source)
        if value is None or own is None or of.what == "rows":
            continue
        at = kind.dim - value.dim() + own.dim()
        if at >= 0 and own.shape[at] != 1:
            return True
    return False


def _name(node: fx.Node) -> str:
    return str(node.target).removeprefix("aten.").partition(".")[0]


def _line(node: fx.Node) -> str:
    source = node.meta.get("source")
    return "" if source is None else f" ({source})"


def _attention(q_THK: Tensor, k_SGK: Tensor, v_SGV: Tensor, **options: Any) -> Tensor:
    """Ops of single tokens with the shape and the rows of attention's result."""
    del options
    if len(q_THK) != len(k_SGK):
        raise ValueError("attention reads keys that are not the pack's tokens")
    return q_THK.sum(-1, keepdim=True) + k_SGK.sum((1, 2))[:, None, None] + v_SGV.sum(1, keepdim=True)


def _experts(x_TD: Tensor, expert_TK: Tensor, weights_TK: Tensor, *leaves: Any, **options: Any) -> Tensor:
    """Ops of single tokens with the shape and the rows of the experts' result."""
    del leaves, options
    return x_TD * (expert_TK.sum(-1, keepdim=True) + weights_TK.sum(-1, keepdim=True))


ALONE: Mapping[str, Callable[..., Any]] = {"attention": _attention, "experts": _experts}
"""What stands for the primitives that know of documents."""


def example() -> dict[str, Tensor]:
    """A small pack for the proof: ids, places and documents of `TOKENS` tokens; one document."""
    zeros_T = torch.zeros(TOKENS, dtype=torch.int64)
    return {"tokens": zeros_T + 5, "positions": torch.arange(TOKENS), "segments": zeros_T}
