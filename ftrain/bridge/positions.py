"""Where a model's own counting of positions begins: some tables of positions have rows before the first token's.

A model is traced with positions that count from zero and with none given; the rows of its tables that both read are
compared. Positions that a batch gives are shifted by the difference.
"""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, fx

from ftrain.bridge.proof import TOKENS
from ftrain.kernels.primitive import bind
from ftrain.trace.tracer import Traced, trace

Run = Callable[[Any, Mapping[str, Tensor]], Any]


def shift(run: Run, params: Any, tokens_T: Tensor, bound: Mapping[str, Callable[..., Any]]) -> int | None:
    """How much larger the model's own positions are than places from 0; None if they differ in another way.

    `run(params, batch)`: the model, with `batch["positions"]` or without. `tokens_T`: ids of an example. `bound`: what
    stands for the primitives.
    """
    place_T = torch.arange(TOKENS)
    with bind(bound):
        given = _rows_read(
            trace(run, (params, {"tokens": tokens_T, "positions": place_T}), ("params", "batch")), tokens_T
        )
        own = _rows_read(trace(run, (params, {"tokens": tokens_T}), ("params", "batch")), tokens_T)
    found = set[int]()
    for table in own.keys() & given.keys():
        apart = set((own[table].flatten() - given[table].flatten()).tolist())
        counts = torch.equal(given[table].flatten().diff(), place_T.diff())
        if not counts and apart != {0}:
            return None
        found |= apart if counts else set()
    return 0 if not found else found.pop() if len(found) == 1 else None


def _rows_read(traced: Traced, tokens_T: Tensor) -> dict[str, Tensor]:
    """For each table of parameters the rows that an embedding reads, where they follow from ids and places alone."""
    known = dict[fx.Node, Any]()
    paths = dict[fx.Node, str]()
    given = {"batch.tokens": tokens_T, "batch.positions": torch.arange(TOKENS)}
    found = dict[str, Tensor]()
    names = iter(traced.input_paths)
    for node in traced.module.graph.nodes:
        if node.op == "placeholder":
            paths[node] = next(names)
            if paths[node] in given:
                known[node] = given[paths[node]]
        elif node.op == "get_attr":
            known[node] = getattr(traced.module, str(node.target))
        elif node.op == "call_function":
            if "embedding" in str(node.target) and node.args[0] in paths and node.args[1] in known:
                found[paths[node.args[0]]] = known[node.args[1]]
            elif all(n in known for n in node.all_input_nodes) and isinstance(node.meta.get("val"), Tensor):
                args, kwargs = fx.map_arg((node.args, node.kwargs), lambda n: known[n])
                known[node] = node.target(*args, **kwargs)
    return found
