"""Where a model's own counting of positions begins: some tables of positions have rows before the first token's.

A model is traced with positions that count from zero; if it reads a table by them, it is traced with none given too,
and the rows that both read are compared. Positions that a batch gives are shifted by the difference.
"""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, fx

from ftrain.trace.tracer import Traced


def shift(given: Traced, own: Callable[[], Traced], batch: Mapping[str, Tensor]) -> int | None:
    """How much larger the model's own positions are than places from 0; None if they differ in another way.

    `given`: the model's trace on `batch`, which has "positions" that count from 0. `own()`: its trace without them.
    """
    place_T = batch["positions"]
    by_place = {table: rows_T for table, rows_T in _rows_read(given, batch).items() if not _all_alike(rows_T)}
    if not by_place:
        return 0
    counted = _rows_read(own(), batch)
    found = set[int]()
    for table in counted.keys() & by_place.keys():
        apart = set((counted[table].flatten() - by_place[table].flatten()).tolist())
        counts = torch.equal(by_place[table].flatten().diff(), place_T.diff())
        if not counts and apart != {0}:
            return None
        found |= apart if counts else set()
    return 0 if not found else found.pop() if len(found) == 1 else None


def _all_alike(rows_T: Tensor) -> bool:
    """True for a table that is read by the ids of tokens, of which the example has one, or by a constant."""
    return bool((rows_T == rows_T.flatten()[0]).all())


def _rows_read(traced: Traced, batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """For each table of parameters the rows that an embedding reads, where they follow from ids and places alone."""
    known = dict[fx.Node, Any]()
    paths = dict[fx.Node, str]()
    given = {f"batch.{name}": x for name, x in batch.items()}
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
