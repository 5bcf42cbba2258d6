"""What a search needs of an experiment: the shape of the model, and its step at any depth."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any, Protocol

from ftrain.plan.space import Candidate, ModelShape
from ftrain.sharding.batch import BatchRule
from ftrain.sharding.layout import Layout
from ftrain.sharding.plan import Plan
from ftrain.trace.precision import Precision


@dataclass(frozen=True)
class WorkloadStep:
    """A step to lower: `step(state, batch)`, its arguments so called, with abstract `state` and `batch` (of the whole
    mesh), as `ftrain.jit` takes them; `specs` of the parameters; `rules` and `components` of its plan. `init` makes a
    state from a key: only `ftrain plan --check` needs it.
    """

    step: Callable[[Any, Any], Any]
    state: Any
    batch: Any
    specs: Any
    rules: Mapping[str, BatchRule] = field(default_factory=lambda: MappingProxyType({}))
    components: Mapping[str, Layout] = field(default_factory=lambda: MappingProxyType({}))
    precision: Precision | None = None
    donate: bool = True
    init: Callable[[Any], Any] | None = None

    def plan(self, candidate: Candidate, *, kind: str = "fake") -> Plan:
        """The plan of a layout for this step."""
        mesh = candidate.mesh(kind)
        return Plan(mesh, candidate.layout, batch=self.rules, components=self.components)


class Workload(Protocol):
    """A model and its step, as an experiment's `plan_for_search(tokens=..., packs=...)` returns it.

    `stacks`: the number of layers of each stack of equal layers, by name. `make(depths, candidate)`: the step with so
    many layers in each stack (any number of at least 1), for the batch and the micro-batches of a layout. It must only
    build functions and abstract values: nothing is allocated.
    """

    @property
    def name(self) -> str:
        """What it is called in tables."""
        ...

    @property
    def model_shape(self) -> ModelShape:
        """What decides which layouts are legal."""
        ...

    @property
    def stacks(self) -> Mapping[str, int]:
        """Layers of each stack."""
        ...

    def make(self, depths: Mapping[str, int], candidate: Candidate) -> WorkloadStep:
        """The step to lower."""
        ...
