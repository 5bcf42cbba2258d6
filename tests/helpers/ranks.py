"""Run a function of one rank's tensors on every rank of a virtual mesh: traced once, as a step is, run in lockstep."""

from collections.abc import Callable

from torch import Tensor

from ftrain.graph.torch_private import new_fake_mode, trace_to_graph
from ftrain.runtime.lockstep import lockstep_program
from ftrain.sharding.mesh import Mesh
from ftrain.sharding.spmd import coordinates, on_mesh
from ftrain.trace.provenance import recording


def on_ranks(function: Callable, mesh: Mesh, *per_rank: list[Tensor]) -> list[list[Tensor]]:
    """`function(*tensors_of_one_rank)` (returns a tensor or a list of tensors) for all ranks: a list of results each.

    Each of `per_rank` is a list with one tensor per rank, of equal shapes.
    """
    places = [coordinates(mesh, rank) for rank in range(mesh.size)]

    def local(coordinates_3: Tensor, *tensors: Tensor) -> list[Tensor]:
        with on_mesh(mesh, coordinates_3):
            out = function(*tensors)
        return [out] if isinstance(out, Tensor) else list(out)

    columns = [places, *per_rank]
    with new_fake_mode() as mode, recording():
        fakes = [mode.from_tensor(column[0].clone()) for column in columns]
        module = trace_to_graph(local, fakes)
    return lockstep_program(module, mesh)([[column[rank] for column in columns] for rank in range(mesh.size)])
