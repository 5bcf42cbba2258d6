"""Experts across ranks compute what experts on one device compute."""

import math

import pytest
import torch

from ftrain.graph.torch_private import new_fake_mode, trace_to_graph
from ftrain.kernels.experts import experts, swiglu_ffn
from ftrain.sharding.experts import dropped_rows_sharded, experts_sharded
from ftrain.sharding.layout import CapacityFactor, Dropless
from ftrain.sharding.mesh import Mesh
from ftrain.sharding.sizes import is_size
from ftrain.sharding.spmd import coordinates, on_mesh
from tests.helpers.expert_networks import biased, biased_shapes
from tests.helpers.ranks import on_ranks

E, D, F, T = 8, 6, 5, 12
MESHES = [Mesh(1, 2, 1, 2, "virtual"), Mesh(1, 4, 1, 4, "virtual"), Mesh(1, 2, 2, 2, "virtual")]


def random(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def swiglu():
    """Leaves and network, of a scale that it captures."""
    return (random(E, D, F, seed=1), random(E, D, F, seed=2), random(E, F, D, seed=3)), lambda _: swiglu_ffn


def with_biases():
    """The same of a network with biases, leaves of several forms and a norm."""
    return tuple(random(*shape, seed=6 + i) for i, shape in enumerate(biased_shapes(E, D, F))), biased


def scale():
    return random(D, seed=11)


def routing(mesh, top_k, kind):
    generator = torch.Generator().manual_seed(4)
    high = {"even": E, "one expert": 1, "first half": E // 2}[kind]
    return torch.randint(0, high, (T * mesh.size, top_k), generator=generator)


def differentiated(call, x, weight, scale, *leaves):
    """Output and gradients of x, of the weights of choices, of the captured scale and of the leaves."""
    tensors = [t.detach().requires_grad_() for t in (x, weight, scale, *leaves)]
    y = call(*tensors)
    found = torch.autograd.grad((y * y.detach().sin()).sum(), tensors, allow_unused=True)
    return [y.detach(), *(torch.zeros_like(t) if g is None else g for g, t in zip(found, tensors, strict=True))]


def sharded(mesh, x, expert, weight, how, chunks=1, network=swiglu):
    """`differentiated` for every rank, and where its experts begin."""
    held, (leaves, ffn) = E // mesh.expert, network()
    slices = [mesh.coordinate(rank, "expert") * held for rank in range(mesh.size)]
    per_rank = [list(t.chunk(mesh.size)) for t in (x, expert, weight)]
    own = [[w[s : s + held].clone() for s in slices] for w in leaves]

    def step(x, expert, weight, scale, *leaves):
        def call(x, weight, scale, *leaves):
            return experts_sharded(x, expert, weight, leaves, ffn(scale), how=how, mesh=mesh, chunks=chunks)

        return differentiated(call, x, weight, scale, *leaves)

    return on_ranks(step, mesh, *per_rank, [scale()] * mesh.size, *own), slices


def whole(x, expert, weight, network=swiglu):
    leaves, ffn = network()
    call = lambda x, weight, scale, *leaves: experts(x, expert, weight, leaves, ffn(scale))  # noqa: E731
    return differentiated(call, x, weight, scale(), *leaves)


@pytest.mark.parametrize("mesh", MESHES, ids=str)
@pytest.mark.parametrize("kind", ["even", "one expert", "first half"])
@pytest.mark.parametrize(
    ("how", "chunks", "top_k"), [(Dropless(), 1, 2), (Dropless(), 3, 1), (CapacityFactor(16.0), 2, 3)], ids=str
)
@pytest.mark.parametrize("network", [swiglu, with_biases])
def test_values_and_gradients_equal_those_of_one_device(mesh, kind, how, chunks, top_k, network):
    x, expert, weight = random(T * mesh.size, D), routing(mesh, top_k, kind), random(T * mesh.size, top_k, seed=5)
    results, slices = sharded(mesh, x, expert, weight, how, chunks, network)
    expected = whole(x, expert, weight, network)
    for i in range(3):
        torch.testing.assert_close(torch.cat([r[i] for r in results]), expected[i], rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(sum(r[3] for r in results), expected[3], rtol=1e-12, atol=1e-12)
    held = E // mesh.expert
    for i in range(4, len(expected)):  # ranks with the same experts each have their tokens' share
        total = torch.zeros_like(expected[i])
        for rank, first in enumerate(slices):
            total[first : first + held] += results[rank][i]
        torch.testing.assert_close(total, expected[i], rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("network", [swiglu, with_biases])
def test_what_exceeds_the_capacity_counts_nothing(network):
    mesh = MESHES[0]
    x, expert, weight = random(T * 2, D), torch.zeros(T * 2, 1, dtype=torch.int64), random(T * 2, 1, seed=5)
    results, _ = sharded(mesh, x, expert, weight, CapacityFactor(E * 0.25), network=network)
    room = T // 4  # of the only expert that is named, on each rank
    expected = whole(x, expert, weight, network)
    for rank, result in enumerate(results):
        first = rank * T
        torch.testing.assert_close(result[0][:room], expected[0][first : first + room], rtol=1e-12, atol=1e-12)
        assert not result[0][room:].any()
        assert not result[1][room:].any()


@pytest.mark.parametrize("chunks", [1, 3])
def test_rows_beyond_the_capacity_are_counted(chunks):
    expert = routing(MESHES[0], 2, "first half")[:T]
    slots = T * 2 // chunks
    room = max(1, math.ceil(0.75 * slots / E))
    beyond = sum(max(0, n - room) for part in expert.chunk(chunks) for n in part.flatten().bincount().tolist())
    assert beyond > 0
    assert dropped_rows_sharded(expert, experts=E, how=CapacityFactor(0.75), chunks=chunks) == beyond


@pytest.mark.parametrize(("how", "reads"), [(Dropless(), 1), (CapacityFactor(2.0), 0)])
def test_the_host_reads_sizes_once_or_never(how, reads):
    mesh = MESHES[1]
    with new_fake_mode() as mode:
        inputs = [random(T, D), routing(mesh, 2, "even")[:T], random(T, 2), *(w[:2].clone() for w in swiglu()[0])]
        fakes = [mode.from_tensor(t) for t in (coordinates(mesh, 0), *inputs)]

        def local(at, *tensors):
            with on_mesh(mesh, at):
                return [experts_sharded(*tensors[:3], tensors[3:], swiglu_ffn, how=how, mesh=mesh)]

        graph = trace_to_graph(local, fakes).graph
    assert sum(is_size(n.target) for n in graph.nodes) == reads
    assert not any("_local_scalar_dense" in str(n.target) for n in graph.nodes)


def test_chunks_that_do_not_divide_are_refused():
    with pytest.raises(ValueError, match="expert_chunks=5 does not divide the 12 tokens"):
        sharded(MESHES[0], random(24, D), routing(MESHES[0], 1, "even"), random(24, 1), Dropless(), 5)
