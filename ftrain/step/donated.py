"""Which leaves of a step's arguments its new state is written over, and how the results are put in order."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, TypeVar

from torch import fx

from ftrain import tree
from ftrain.trace.tracer import Aval, Traced, argument_paths

T = TypeVar("T")


@dataclass(frozen=True)
class Donation:
    """Which input memory takes which result.

    `outputs`: from the position of a graph input to that of the output which is written over it. `input_paths`: of all
    inputs; `results`: the number of outputs, those included.
    """

    outputs: Mapping[int, int]
    input_paths: Sequence[str]
    results: int

    @cached_property
    def slots(self) -> list[int]:
        """Positions of the inputs that are written over."""
        return list(self.outputs)

    @cached_property
    def paths(self) -> list[str]:
        """Paths of the inputs that are written over."""
        return [self.input_paths[slot] for slot in self.slots]

    def by_name(self, module: fx.GraphModule) -> dict[str, int]:
        """`outputs` with the names of the graph's placeholders as keys."""
        inputs = [n.name for n in module.graph.nodes if n.op == "placeholder"]
        return {inputs[slot]: output for slot, output in self.outputs.items()}

    def ordered(self, donated: list[T], others: list[T]) -> list[T]:
        """All results in order, from those in donated memory (in the order of `slots`) and the others."""
        found = donated + others
        return [found[i] for i in self._order]

    @cached_property
    def _order(self) -> list[int]:
        place = {self.outputs[slot]: i for i, slot in enumerate(self.slots)}
        others = iter(range(len(place), self.results))
        return [place[i] if i in place else next(others) for i in range(self.results)]


def match_donated(traced: Traced, argument: Any, name: str) -> Donation:
    """Which input leaf's memory takes which output leaf.

    The whole result, or one member of a tuple result, must have the tree structure of `argument`; `name` is the
    argument's. ValueError where none has, and where a new leaf has another shape or dtype than the old one.
    """
    marker = tree.unflatten(traced.output_tree, range(traced.output_tree.num_leaves))
    structure = tree.flatten(argument)[1]
    members = [marker, *marker] if isinstance(marker, tuple) and not hasattr(marker, "_fields") else [marker]
    found = next((m for m in members if tree.flatten(m)[1] == structure), None)
    if found is None:
        nearest = members[1] if len(members) > 1 else members[0]
        raise ValueError(
            f"donate={name!r}: no part of the result has its structure; return the new {name} with the same tree. "
            f"Differences to the result's first part: {tree.diff(argument, nearest)}"
        )
    tensor_index = {
        leaf: i for i, leaf in enumerate(i for i in tree.flatten(marker)[0] if i not in traced.static_outputs)
    }
    avals = dict(zip(traced.input_paths, traced.input_avals, strict=True))
    slots = {path: i for i, path in enumerate(traced.input_paths)}
    values = traced.module.graph.output_node().args[0]
    matched: dict[int, int] = {}
    for path, output in zip(argument_paths((argument,), [name]), tree.flatten(found)[0], strict=True):
        if path not in slots or output not in tensor_index:
            continue
        new = Aval.of(values[tensor_index[output]].meta["val"])  # type: ignore[index,union-attr]
        if (new.shape, new.dtype) != (avals[path].shape, avals[path].dtype):
            raise ValueError(
                f"donate={name!r}: leaf {path!r} is {avals[path]} and its new value is {new}: a step must keep shapes "
                "and dtypes of its state"
            )
        matched[slots[path]] = tensor_index[output]
    return Donation(matched, traced.input_paths, len(traced.output_paths))
