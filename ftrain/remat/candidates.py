"""The choices of a recompute plan: the forward ops of a graph, the microseconds each takes, and the bytes it frees."""

from dataclasses import dataclass
from functools import cached_property

from torch import Tensor, fx

from ftrain.analysis.flops import is_view
from ftrain.analysis.op_times import OpTimes
from ftrain.analysis.pieces import storages_of
from ftrain.graph.layers import layer_of_node
from ftrain.graph.torch_memory import storage_id
from ftrain.remat.mincut import Item
from ftrain.remat.peak import PeakModel
from ftrain.remat.policy import Remat, is_forward, must_keep

_TILT = 0.004  # equal layers tie at one rate; a small slope over depth lets a rate stop between them


@dataclass
class Recomputable:
    """What may be recomputed of one graph. Nodes are known by their number in `model.nodes`."""

    module: fx.GraphModule
    model: PeakModel
    times: OpTimes
    remat: Remat

    @cached_property
    def microseconds(self) -> dict[int, float]:
        """How long each forward node takes, in microseconds."""
        return {i: self.times.microseconds(n) for i, n in enumerate(self.model.nodes) if is_forward(n)}

    @cached_property
    def candidates(self) -> list[tuple[int, float, int]]:
        """The nodes that may be recomputed: number, microseconds, bytes."""
        steps, nodes = self.model.steps, self.model.nodes
        return [
            (v, us, sum(size for _, size in steps[v].storages))
            for v, us in self.microseconds.items()
            if not self._stays(nodes[v])
        ]

    @cached_property
    def ops(self) -> list[frozenset[int]]:
        """The nodes that may be recomputed, grouped by op: each with its views and the parts of its result."""
        owner: dict[int, int] = {}
        found: dict[int, set[int]] = {}
        for v, us, _ in self.candidates:
            sources = [u for u in self.model.steps[v].reads if u in owner] if us == 0 else []
            owner[v] = owner[sources[0]] if sources else v
            found.setdefault(owner[v], set()).add(v)
        return [frozenset(nodes) for nodes in found.values()]

    def path_choice(self, v: int) -> str | None:
        """ "keep", "recompute" or "offload" where `Remat.paths` decide; None elsewhere."""
        return self.remat.choice_at(self.model.nodes[v].meta.get("path") or "")

    @cached_property
    def rates(self) -> tuple[float, float]:
        """The lowest and highest exchange rates that could matter, in microseconds per MB. Tiny tensors are left
        out.
        """
        _, items, _ = self.items
        whole = sum(i.bytes or 0 for i in items)
        rates = [
            i.microseconds / (i.bytes / 1e6)
            for i in items
            if i.bytes and i.bytes > whole / 1000 and i.microseconds is not None and i.microseconds > 0
        ]
        return (min(rates, default=1.0) / 2, 64 * max(rates, default=1.0))

    @cached_property
    def items(self) -> tuple[list[int], list[Item], list[int]]:
        """The forward nodes as items of a minimum cut: their numbers, the items, and the items that the backward
        reads.
        """
        nodes, index = self.model.nodes, self.model.index
        numbers = [i for i, n in enumerate(nodes) if is_forward(n)]
        place = {i: v for v, i in enumerate(numbers)}
        held = self._held_anyway
        layers = sorted({layer_of_node(nodes[i]) for i in numbers})
        depth = {layer: i / max(1, len(layers)) for i, layer in enumerate(layers)}
        items = []
        for i in numbers:
            node = nodes[i]
            tilt = 1 + _TILT * depth[layer_of_node(node)]
            size = self._bytes_to_keep(node, held)
            recompute = None if self._stays(node) else self.microseconds[i] * tilt
            reads = tuple(place[index[p]] for p in node.all_input_nodes if index[p] in place)
            items.append(Item(reads, 0 if size is None and recompute is None else size, recompute))
        wanted = [place[index[p]] for n in nodes if not is_forward(n) for p in n.all_input_nodes if index[p] in place]
        return numbers, items, sorted(set(wanted))

    @cached_property
    def _held_anyway(self) -> set[int]:
        """Memory that is alive in the backward whatever is chosen: arguments and results."""
        outputs = [n for n in self.module.graph.output_node().all_input_nodes if is_forward(n)]
        inputs = [n for n in self.model.nodes if n.op in ("placeholder", "get_attr")]
        return {s for n in [*outputs, *inputs] for s, _ in storages_of(n)}

    def _bytes_to_keep(self, node: fx.Node, held: set[int]) -> int | None:
        if self.remat.choice_at(node.meta.get("path") or "") == "recompute" and not must_keep(node):
            return None
        value = node.meta.get("val")
        if isinstance(value, list | tuple):
            return None
        if not isinstance(value, Tensor) or storage_id(value) in held:
            return 0
        source = node.all_input_nodes[0] if node.all_input_nodes else None
        if is_view(node) and source is not None and isinstance(source.meta.get("val"), Tensor):
            return None
        return int(storages_of(node)[0][1])

    def _stays(self, node: fx.Node) -> bool:
        """True for what is never recomputed: loops, sizes, what a layer hands to another one, and what a path says to
        keep.
        """
        choice = self.remat.choice_at(node.meta.get("path") or "")
        if must_keep(node) or choice == "keep":
            return True
        if choice == "recompute" or is_view(node):
            return False
        if choice == "offload":
            return True
        mine = layer_of_node(node)
        users = [layer_of_node(u) for u in node.users if is_forward(u)]
        return bool(mine) and any(layer and layer != mine for layer in users)
