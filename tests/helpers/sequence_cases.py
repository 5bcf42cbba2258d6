"""Attention over a pack that ranks share, next to the plain kernel on the whole pack: values and gradients."""

from functools import partial
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


def differentiated(function, q, k, v, sinks, grad):
    """Output and gradients of `function(q, k, v)`, or of `function(q, k, v, sinks_H=sinks)`."""
    leaves = [x.detach().requires_grad_() for x in (q, k, v, sinks) if x is not None]
    out = function(*leaves[:3], **({} if sinks is None else {"sinks_H": leaves[3]}))
    return [out.detach(), *torch.autograd.grad(out, leaves, grad)]


def on_one_device(pack, *, sinks=None, **rule):
    """A `Result`; with `sinks` (`[H]`) a tuple with the gradient of these at the end."""
    found = differentiated(partial(attention, segments_T=pack.segments, **rule), *pack[:3], sinks, pack.grad)
    return Result(*found) if sinks is None else tuple(found)


def on_mesh_of(pack, how, n, *, order=None, mesh=None, sinks=None, **rule):
    """The same on `n` ranks in lockstep; the gradient of the sinks is the sum over the ranks."""
    order = order_of(how, n) if order is None else order
    mesh = Mesh(sequence=n, kind="virtual") if mesh is None else mesh

    def local(q, k, v, grad, *rest):
        rest = list(rest)
        own_sinks = None if sinks is None else rest.pop()
        segments_T = rest.pop() if rest else None
        how_ = {"how": how, "mesh": mesh, "order": order}
        return differentiated(
            partial(sequence_attention, segments_T=segments_T, **how_, **rule), q, k, v, own_sinks, grad
        )

    per_rank = [shares(x, order, mesh) for x in pack if x is not None]
    with torch.enable_grad():
        results = on_ranks(local, mesh, *per_rank, *([] if sinks is None else [[sinks] * mesh.size]))
    columns = [list(parts) for parts in zip(*results, strict=True)]
    whole = [join_tokens(parts, 0, order) for parts in columns[:4]]
    return Result(*whole) if sinks is None else (*whole, torch.stack(columns[4]).sum(0))


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
