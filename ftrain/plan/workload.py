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
    """A step to lower, and what its plan needs.

    - `step(state, batch)`: the plain function, with arguments of these names.
    - `state`, `batch`: abstract, of the whole mesh, as `ftrain.jit` takes them.
    - `specs`: of the parameters. `rules`, `components`: of its plan, see `ftrain.sharding.Plan`.
    - `precision`: as in `ftrain.jit`. `donate`: whether the state is donated.
    - `init(key)`: makes a state; only `ftrain plan --check` needs it.
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
        """The plan of a layout for this step, on a mesh of this kind. ValueError where the layout fits no mesh."""
        mesh = candidate.mesh(kind)
        return Plan(mesh, candidate.layout, batch=self.rules, components=self.components)


class Workload(Protocol):
    """A model and its step, as an experiment's `plan_for_search(tokens=..., packs=...)` returns it."""

    @property
    def name(self) -> str:
        """Its name in tables."""
        ...

    @property
    def model_shape(self) -> ModelShape:
        """The sizes that decide which layouts are legal."""
        ...

    @property
    def stacks(self) -> Mapping[str, int]:
        """The number of layers of each stack of equal layers, by name."""
        ...

    def make(self, depths: Mapping[str, int], candidate: Candidate) -> WorkloadStep:
        """The step with as many layers in each stack as `depths` says (at least 1), for the batch and the micro-batches
        of the layout `candidate`.

        It must only build functions and abstract values: nothing is allocated.
        """
        ...
