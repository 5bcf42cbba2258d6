"""A lower bound of what a layout costs, without a trace: which layouts are worth tracing, and which cannot fit.

Time: products at the cluster's efficiency, and messages of parameters, attention and experts by formula. Memory: the
state of a rank, and what recompute must keep. Both leave out much that a trace counts; only the order is used.
"""

import math
import re
from collections.abc import Container, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from ftrain import tree
from ftrain.analysis.cluster import Cluster
from ftrain.modules.spec import ParamSpec
from ftrain.plan.space import Candidate, ModelShape
from ftrain.plan.workload import Workload
from ftrain.sharding.experts import expert_bytes
from ftrain.sharding.layout import Hybrid, Ring, Ulysses
from ftrain.sharding.link import sent_bytes
from ftrain.sharding.mesh import Mesh
from ftrain.sharding.placement import Placement
from ftrain.sharding.plan import Plan
from ftrain.sharding.ulysses import ulysses_bytes

_HALF = 2  # bytes of a number in bfloat16
_PRODUCTS = 20.0  # microseconds that a product takes on an H100 per MB of its result


class Kind(NamedTuple):
    """Parameters of one shape and meaning: an example, their number, and the bytes of training state per element."""

    spec: ParamSpec
    path: str
    number: int
    state: float


class Weights(NamedTuple):
    """Parameters on one mesh: the placement of each kind and the number of such parameters, and the bytes of a rank's
    state.
    """

    placements: tuple[tuple[Placement, int], ...]
    state: float


@dataclass(frozen=True)
class Estimate:
    """Seconds of a step and bytes of memory, approximately at least."""

    seconds: float
    memory: float


def kinds_of(workload: Workload, candidate: Candidate) -> list[Kind]:
    """The model's parameters by kind. They are the same for every layout; `candidate` is only needed to make the
    step.
    """
    work = workload.make(workload.stacks, candidate)
    specs = dict(zip(tree.paths(work.specs), tree.leaves(work.specs), strict=True))
    state = dict.fromkeys(specs, 0)
    for path, leaf in zip(tree.paths(work.state), tree.leaves(work.state), strict=True):
        owner = _owner(path, specs)
        if owner is not None:
            state[owner] += leaf.dtype.itemsize
    found: dict[tuple[tuple[int, ...], tuple[str | None, ...], str], Kind] = {}
    for path, spec in specs.items():
        key = (spec.shape, spec.axes, re.sub(r"\d+", "N", path))
        number = found[key].number + 1 if key in found else 1
        found[key] = Kind(spec, path, number, state[path])
    return list(found.values())


def weights_on(kinds: Sequence[Kind], plan: Plan) -> Weights:
    """The model's parameters and state on the mesh of a plan."""
    placed = [(plan.placement(kind.path, kind.spec), kind) for kind in kinds]
    state = sum(math.prod(p.local_shape) * kind.state * kind.number for p, kind in placed)
    return Weights(tuple((p, kind.number) for p, kind in placed), state)


def estimate(candidate: Candidate, weights: Weights, model: ModelShape, cluster: Cluster) -> Estimate:
    """A rough lower bound of the seconds and bytes of the layout `candidate` on a cluster. `weights`: on its mesh;
    `model`: whose step it is.
    """
    mesh, micro = candidate.mesh(), candidate.micro_batches
    recomputed = _recomputed_share(candidate.remat)
    tokens = candidate.local_tokens(model)
    shares = cluster.efficiency
    attention = model.attention_flops / (2 if model.causal else 1)
    products = model.weight_flops / shares.matmul + attention / shares.attention
    compute = tokens * products * (1 + recomputed / 3) / cluster.bf16
    parameters = 1e-6 * sum(n * _parameter_microseconds(p, mesh, cluster) for p, n in weights.placements)
    exchanges = (
        1e-6 * model.layers * (1 + recomputed / 2) * _layer_microseconds(candidate, mesh, tokens, model, cluster)
    )
    seconds = micro * (max(compute, parameters) + exchanges)
    return Estimate(seconds, weights.state + _kept(candidate, tokens, model, micro, weights))


def _recomputed_share(remat: str | float) -> float:
    """The share of the forward that is computed twice."""
    if isinstance(remat, str):
        return 0.0 if remat == "none" else 1.0
    return 0.4 if remat < _PRODUCTS else 1.0


def _parameter_microseconds(placement: Placement, mesh: Mesh, cluster: Cluster) -> float:
    """Gathers for forward and backward in bfloat16 and a reduce-scatter in float32; sums over copies; no latency.
    Microseconds.
    """
    found = 0.0
    piece = math.prod(placement.local_shape)
    for split in placement.splits:
        if split.gathered:
            gather = 2 * sent_bytes("all_gather", _HALF * piece, split.size)
            scatter = sent_bytes("reduce_scatter", 4 * piece * split.size, split.size)
            found += _bytes_only("all_gather", gather, mesh, split.axes, cluster)
            found += _bytes_only("reduce_scatter", scatter, mesh, split.axes, cluster)
    if placement.copies:
        ranks = math.prod(mesh.axis_size(a) for a in placement.copies)
        found += _bytes_only("all_reduce", sent_bytes("all_reduce", 4 * piece, ranks), mesh, placement.copies, cluster)
    return found


def _layer_microseconds(candidate: Candidate, mesh: Mesh, tokens: int, model: ModelShape, cluster: Cluster) -> float:
    """Microseconds of the exchanges of attention and experts of one layer, forward and backward."""
    found = 0.0
    way, K = candidate.attention, model.head_dim
    if way is not None:
        inner = {Ulysses: candidate.sequence, Ring: 1}.get(type(way)) or (way.ulysses if isinstance(way, Hybrid) else 1)
        ring = candidate.sequence // inner
        if inner > 1:
            sent = 2 * ulysses_bytes(tokens, model.heads, model.kv_heads, K, K, inner, item=_HALF)
            found += cluster.microseconds("all_to_all", sent, mesh, (f"ulysses:{inner}",))
        if ring > 1:
            keys = 2 * tokens * inner * max(1, model.kv_heads // inner) * K * _HALF
            hidden = 3  # keys and values in the forward, and with their gradients in the backward
            found += 0.5 * cluster.microseconds("shift_ranks", hidden * keys * (ring - 1), mesh, (f"ring:{inner}",))
    if candidate.expert > 1:
        sent = expert_bytes(tokens, model.top_k, model.d_model, candidate.expert, _HALF)
        found += cluster.microseconds("all_to_all", sent, mesh, ("expert",))
    return found


def _kept(candidate: Candidate, tokens: int, model: ModelShape, micro: int, weights: Weights) -> float:
    """Bytes of residuals between layers; without recompute, of what products read and return; with micro-batches, of
    sums of gradients.
    """
    per_token = model.layers * model.d_model * _HALF
    products = model.weight_flops / 6 / model.layers / model.d_model**2  # each as wide as the model, in one layer
    read = 6 + 2 * model.top_k  # norms, attention's q, k, v and result; inputs and results of experts
    times = products + read if candidate.remat == "none" else 1.0
    pieces = sum(n * math.prod(p.local_shape) for p, n in weights.placements)
    return times * tokens * per_token + (4 * pieces if micro > 1 else 0)


def _bytes_only(kind: str, sent: float, mesh: Mesh, axes: tuple[str, ...], cluster: Cluster) -> float:
    return cluster.microseconds(kind, sent, mesh, axes) - cluster.microseconds(kind, 0, mesh, axes)


def _owner(path: str, parameters: Container[str]) -> str | None:
    """The parameter whose path is the end of a leaf's path."""
    parts = path.split(".")
    names = (".".join(parts[i:]) for i in range(len(parts)))
    return next((name for name in names if name in parameters), None)
