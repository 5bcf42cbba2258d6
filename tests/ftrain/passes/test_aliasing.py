"""Which nodes look at the same memory."""

import torch

from ftrain.graph.aliasing import readers_by_storage, storage
from tests.helpers.graphs import graph_of


def test_views_share_memory_and_readers_see_through_them():
    module = graph_of(lambda x: [x.t()[1:] + 1, x.sin()], torch.ones(3, 3))
    nodes = {n.name: n for n in module.graph.nodes}
    x, view, part = (nodes[name] for name in ("x_1", "t", "slice_1"))
    assert storage(x) == storage(view) == storage(part)
    assert storage(nodes["add"]) != storage(x)
    assert [n.name for n in readers_by_storage(module.graph)[storage(x)]] == ["t", "slice_1", "add", "sin"]


def test_nodes_with_several_values_have_no_single_memory():
    module = graph_of(lambda x: [*x.max(0)], torch.ones(3, 3))
    assert storage(next(n for n in module.graph.nodes if n.name.startswith("max"))) is None
