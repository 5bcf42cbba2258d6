"""What the server of rank processes has done before it forks any: imports, and a first trace, which imports more.

Ranks inherit both. A process that begins with neither spends seconds of a core on them.
"""

import torch

import ftrain
import ftrain.checkpoint
import ftrain.hf
import ftrain.run.session
import ftrain.sharding.processes
from ftrain import tree
from ftrain.sharding import Mesh
from tests.helpers.mesh_models import mixture, plan_for

__all__: list[str] = []


def _trace_once() -> None:
    """Trace a step of one rank. Nothing is computed."""
    model = mixture(layers=1)
    params = tree.map(ftrain.Aval.of, model.params(torch.float32))
    mesh = Mesh(shard=2, expert=2, kind="virtual")
    ftrain.jit(model.step, plan=plan_for(model, mesh), specs=model.specs).lower(params, model.batch(2))


torch.set_num_threads(1)
if torch.version.cuda is None:  # with a CUDA build autograd may start threads, and then no process can be forked
    _trace_once()
