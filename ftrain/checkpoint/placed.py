"""A state divided by a plan before it is restored, by what the manifest says of the model's parameters."""

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from ftrain import tree
from ftrain.checkpoint.manifest import Parameter
from ftrain.modules.spec import leaves_with_paths
from ftrain.sharding.plan import Plan
from ftrain.step.process_arrays import ProcessArrays
from ftrain.trace.spmd import Placements


def parameters_of(specs: Any) -> dict[str, Parameter]:
    """Shape and logical axes of each parameter of a tree of `ParamSpec`s, by path; of None none."""
    if specs is None:
        return {}
    return {path: Parameter(tuple(spec.shape), tuple(spec.axes)) for path, spec in leaves_with_paths(specs)}


def placed(abstract_state: Any, plan: Plan, parameters: Mapping[str, Parameter], shown: str) -> Any:
    """What this process holds of a state of whole leaves by a plan, without memory: DTensors on a mesh of processes,
    elsewhere the state itself.

    ValueError if the checkpoint `shown` does not know its parameters.
    """
    if not parameters:
        raise ValueError(
            f"{shown} does not tell the logical axes of its parameters: save with Checkpointer(..., specs=...), or "
            "restore into step.abstract(state) instead of giving a plan"
        )
    leaves, treedef = tree.flatten(abstract_state)
    kinds = (leaf.device.type for leaf in leaves if isinstance(leaf, Tensor))
    device = next((kind for kind in kinds if kind not in ("meta", "cpu")), "cpu")
    arrays = ProcessArrays(plan.mesh, Placements(plan, plan.placements(dict(parameters))))
    return tree.unflatten(treedef, arrays.abstract(tree.paths(abstract_state), leaves, device))
