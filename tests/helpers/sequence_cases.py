"""Attention over a pack that ranks share, next to the plain kernel on the whole pack: values and gradients."""

from typing import NamedTuple

import torch
from torch import Tensor

from ftrain.kernels.attention import attention
from ftrain.sharding.batch import TokenOrder, Tokens, join_tokens, share
from ftrain.sharding.layout import Hybrid, Ring
from ftrain.sharding.mesh import Mesh
from ftrain.sharding.sequence_attention import sequence_attention
from tests.helpers.ranks import on_ranks


class Result(NamedTuple):
    """Output and the gradients of q, k, v, on the whole pack, in its order."""

    out: Tensor
    dq: Tensor
    dk: Tensor
    dv: Tensor


class Pack(NamedTuple):
    """Queries, keys, values of a whole pack, the gradient of the output, and the ids of the documents, or None."""

    q: Tensor
    k: Tensor
    v: Tensor
    grad: Tensor
    segments: Tensor | None


def make_pack(tokens, H, G, K, V=None, *, lengths=None, ids=None, dtype=torch.float64):
    """Random numbers; `lengths`: of the documents, which are numbered unless `ids` names them."""
    generator = torch.Generator().manual_seed(0)
    V = K if V is None else V
    shapes = ((tokens, H, K), (tokens, G, K), (tokens, G, V), (tokens, H, V))
    tensors = [torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype) for shape in shapes]
    segments = None
    if lengths is not None:
        names = torch.tensor(range(len(lengths)) if ids is None else ids)
        segments = names.repeat_interleave(torch.tensor(lengths))
    return Pack(*tensors, segments)


def order_of(how, n, zigzag=True):
    """How a plan with this layout deals the tokens."""
    if isinstance(how, Ring):
        return TokenOrder(n, n, how.zigzag)
    if isinstance(how, Hybrid):
        return TokenOrder(n, n // how.ulysses, how.zigzag)
    return TokenOrder(n)


def on_one_device(pack, **rule):
    leaves = [x.detach().requires_grad_() for x in pack[:3]]
    out = attention(*leaves, segments_T=pack.segments, **rule)
    return Result(out.detach(), *torch.autograd.grad(out, leaves, pack.grad))


def on_mesh_of(pack, how, n, *, order=None, mesh=None, **rule):
    """The same on `n` ranks in lockstep."""
    order = order_of(how, n) if order is None else order
    mesh = Mesh(sequence=n, kind="virtual") if mesh is None else mesh

    def local(q, k, v, grad, *segments):
        leaves = [x.detach().requires_grad_() for x in (q, k, v)]
        segments_T = segments[0] if segments else None
        out = sequence_attention(*leaves, how=how, mesh=mesh, order=order, segments_T=segments_T, **rule)
        return [out.detach(), *torch.autograd.grad(out, leaves, grad)]

    with torch.enable_grad():
        results = on_ranks(local, mesh, *(shares(x, order, mesh) for x in pack if x is not None))
    return Result(*(join_tokens(list(parts), 0, order) for parts in zip(*results, strict=True)))


def shares(x, order, mesh):
    """Each rank's part of a tensor with an entry per token."""
    tokens = x.shape[0]
    return [
        share(x, Tokens(), path="x", tokens=tokens, order=order, mesh=mesh, rank=rank).contiguous()
        for rank in range(mesh.size)
    ]


def difference(got, wanted):
    """The largest difference of output and gradients, relative in norm (absolute where that is below 1)."""
    return max(float((a - b).norm() / b.norm().clamp(min=1)) for a, b in zip(got, wanted, strict=True))
