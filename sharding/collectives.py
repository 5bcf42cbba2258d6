"""Differentiable collectives: each one's backward is its transpose, itself differentiable.

They are `torch.autograd.Function`s with `setup_context` (`torch.func` refuses anything else) around
`torch.ops._c10d_functional`: a start, and a wait that a scheduling pass may move. A group of one rank leaves no trace.
What a sum is for decides its transpose: `sum_of_parts` makes one number, the same on all ranks, of each rank's part, so
a part's gradient is the number's; `copy_to_ranks` is the converse.

Of all of them `group` is the ranks that take part (`ftrain.sharding.Mesh.group`; of the ops its name), and `purpose`,
or `why`, what tables call the message; that of a backward gets ".T" behind. All ranks of the group call them in one
order.

Legend: n ranks of the group, N rows.
"""

from typing import Any

import torch
from torch import Tensor

from ftrain.kernels.opaque import opaque_op
from ftrain.sharding.mesh import Group
from ftrain.sharding.private import rank_in_group
from ftrain.sharding.spmd import purpose

_c10d = torch.ops._c10d_functional


def all_gather(
    x_N: Tensor,
    group: Group,
    *,
    purpose: str,
    dim: int = 0,
    dtype: torch.dtype | None = None,
    reduce: torch.dtype | None = None,
) -> Tensor:
    """The ranks' pieces, cast to `dtype`, joined along `dim` in the group's order; its transpose is `reduce_scatter`.

    - `x_N`: this rank's piece, of any shape, equal on all ranks.
    - `dtype`: None for its own.
    - `reduce`: the dtype in which gradients are summed (default: the gradient's); the sum has the dtype of `x_N`.
    """
    dtype = x_N.dtype if dtype is None else dtype
    return x_N.to(dtype) if group.size == 1 else _AllGather.apply(x_N, group, dim, dtype, reduce, purpose)


def reduce_scatter(
    x_N: Tensor, group: Group, *, purpose: str, dim: int = 0, reduce: torch.dtype | None = None
) -> Tensor:
    """This rank's piece, along `dim`, of the sum over ranks, in the dtype of `x_N`; its transpose is `all_gather`.

    `x_N`: any shape, equal on all ranks; `dim` is divisible by n. `reduce`: the dtype in which the sum is made.
    """
    return x_N if group.size == 1 else _ReduceScatter.apply(x_N, group, dim, x_N.dtype, reduce, purpose)


def sum_of_parts(x: Tensor, group: Group, *, purpose: str) -> Tensor:
    """The sum over ranks, of the shape of `x` (any); the gradient of a part is that of the sum, which all ranks use
    alike.
    """
    return x if group.size == 1 else _SumOfParts.apply(x, group, purpose)


def copy_to_ranks(x: Tensor, group: Group, *, purpose: str, reduce: torch.dtype | None = None) -> Tensor:
    """x itself (of any shape), equal on all ranks and used by each on its own data: gradients are summed over ranks.

    `reduce`: the dtype in which they are summed (default: the gradient's); they keep their own dtype. `purpose`: what
    the message is for, in `compiled.bytes_moved()`.
    """
    return x if group.size == 1 else _CopyToRanks.apply(x, group, reduce, purpose)


def all_to_all(x_nN: Tensor, group: Group, *, purpose: str) -> Tensor:
    """`y[j] = x_of_rank_j[me]`: equal pieces of shape `[n, ...]`; it is its own transpose.

    ValueError if the leading dim is not the group's size.
    """
    if x_nN.shape[0] != group.size:
        raise ValueError(f"all_to_all: the leading dim of {list(x_nN.shape)} must be the group's size {group.size}")
    return x_nN if group.size == 1 else _AllToAll.apply(x_nN, group, purpose)


def permute(x: Tensor, group: Group, shift: int, *, purpose: str) -> Tensor:
    """The tensor of the rank `shift` positions before this one, around the ring, of the shape of `x` (any, equal on all
    ranks).

    Its transpose is the same with `-shift`.
    """
    return x if group.size == 1 or shift % group.size == 0 else _Permute.apply(x, group, shift, purpose)


def all_to_all_rows(
    x_ND: Tensor, send_n: Tensor, receive_n: Tensor, rows: Any, group: Group, *, purpose: str
) -> Tensor:
    """Rows in the order of their destinations, `send[j]` of them to rank j, to rows in the order of their origins: `[R,
    D]`.

    `send_n`, `receive_n`: int64 `[n]` on the CPU; `rows`: R, the sum of `receive_n`, an int or a symbolic one.
    Differentiable; the dtype of `x_ND`.
    """
    return x_ND if group.size == 1 else _AllToAllRows.apply(x_ND, send_n, receive_n, rows, group, purpose)


def wait(x: Tensor) -> Tensor:
    """The result of a started collective, `x` itself, complete on the current stream; its shape and dtype stay."""
    return _c10d.wait_tensor.default(x)


class _AllGather(torch.autograd.Function):
    @staticmethod
    def forward(x: Tensor, group: Group, dim: int, dtype: torch.dtype, reduce: torch.dtype | None, why: str) -> Tensor:
        return gather_pieces(x.to(dtype), group, dim, why)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        x, ctx.group, ctx.dim, _, ctx.reduce, ctx.why = inputs
        ctx.dtype = x.dtype

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        back = _ReduceScatter.apply(grad, ctx.group, ctx.dim, ctx.dtype, ctx.reduce, _transposed(ctx.why))
        return back, None, None, None, None, None


class _ReduceScatter(torch.autograd.Function):
    @staticmethod
    def forward(x: Tensor, group: Group, dim: int, dtype: torch.dtype, reduce: torch.dtype | None, why: str) -> Tensor:
        return scatter_sum(x, group, dim, reduce, why).to(dtype)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        x, ctx.group, ctx.dim, _, ctx.reduce, ctx.why = inputs
        ctx.dtype = x.dtype

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        back = _AllGather.apply(grad, ctx.group, ctx.dim, ctx.dtype, ctx.reduce, _transposed(ctx.why))
        return back, None, None, None, None, None


class _SumOfParts(torch.autograd.Function):
    @staticmethod
    def forward(x: Tensor, group: Group, why: str) -> Tensor:
        return sum_over(x, group, None, why)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        _, *ctx.how = inputs

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        return _CopyToRanks.apply(grad, ctx.how[0], None, _transposed(ctx.how[1])), None, None


class _CopyToRanks(torch.autograd.Function):
    @staticmethod
    def forward(x: Tensor, group: Group, reduce: torch.dtype | None, why: str) -> Tensor:
        return x.view_as(x)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        _, *ctx.how = inputs

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        group, reduce, why = ctx.how
        wide = grad if reduce is None else grad.to(reduce)
        return _SumOfParts.apply(wide, group, _transposed(why)).to(grad.dtype), None, None, None


class _AllToAll(torch.autograd.Function):
    @staticmethod
    def forward(x_nN: Tensor, group: Group, why: str) -> Tensor:
        flat = x_nN.contiguous().flatten()
        each = [flat.shape[0] // group.size] * group.size
        with purpose(why):
            return wait(_c10d.all_to_all_single.default(flat, each, each, group.name)).view(x_nN.shape)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        _, *ctx.how = inputs

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        return _AllToAll.apply(grad, ctx.how[0], _transposed(ctx.how[1])), None, None


class _Permute(torch.autograd.Function):
    @staticmethod
    def forward(x: Tensor, group: Group, shift: int, why: str) -> Tensor:
        with purpose(why):
            return wait(shift_ranks(x.contiguous(), shift % group.size, group.size, group.name))

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        _, *ctx.how = inputs

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        group, shift, why = ctx.how
        return _Permute.apply(grad, group, -shift, _transposed(why)), None, None, None


class _AllToAllRows(torch.autograd.Function):
    @staticmethod
    def forward(x_ND: Tensor, send_n: Tensor, receive_n: Tensor, rows: Any, group: Group, why: str) -> Tensor:
        with purpose(why):
            return wait(exchange_rows(x_ND.contiguous(), send_n, receive_n, rows, group.name))

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        x_ND, send_n, receive_n, _, ctx.group, ctx.why = inputs
        ctx.sent = x_ND.shape[0]
        ctx.save_for_backward(send_n, receive_n)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        send_n, receive_n = ctx.saved_tensors
        back = _AllToAllRows.apply(grad, receive_n, send_n, ctx.sent, ctx.group, _transposed(ctx.why))
        return back, None, None, None, None, None


def gather_pieces(x: Tensor, group: Group, dim: int, why: str) -> Tensor:
    """All ranks' pieces `x` (of one shape and dtype) joined along `dim`, in the group's order; without autograd."""
    first = x.movedim(dim, 0) if dim else x
    with purpose(why):
        whole = wait(gather_ranks(first.contiguous(), group.size, group.name))
    return whole.movedim(0, dim).contiguous() if dim else whole


def scatter_sum(x: Tensor, group: Group, dim: int, reduce: torch.dtype | None, why: str) -> Tensor:
    """This rank's piece along `dim` of the sum of the ranks' `x` (of one shape), summed and returned in `reduce`.

    `reduce` None is the dtype of `x`. Without autograd.
    """
    first = x.movedim(dim, 0) if dim else x
    wide = first.contiguous() if reduce is None else first.to(reduce).contiguous()
    with purpose(why):
        piece = wait(_c10d.reduce_scatter_tensor.default(wide, "sum", group.size, group.name))
    return piece.movedim(0, dim).contiguous() if dim else piece


def sum_over(x: Tensor, group: Group, reduce: torch.dtype | None, why: str) -> Tensor:
    """The sum of the ranks' `x` (of one shape), summed in `reduce` (None: its dtype), in the dtype of `x`; without
    autograd.
    """
    wide = x.contiguous() if reduce is None else x.to(reduce).contiguous()
    with purpose(why):
        return wait(_c10d.all_reduce.default(wide, "sum", group.name)).to(x.dtype)


@opaque_op(
    "gather_ranks(Tensor x, int size, str group) -> Tensor",
    fake=lambda x, size, group: x.new_empty(size * x.shape[0], *x.shape[1:]),
)
def gather_ranks(x: Tensor, size: int, group: str) -> Tensor:
    """Start to join the ranks' tensors (of one shape) along their first dim, `[size * x.shape[0], ...]`; `wait` for the
    result.

    The `out` form: torch 2.13's functional gather corrupts the heap on gloo when several are in flight. `size`: n.
    """
    out = x.new_empty(size * x.shape[0], *x.shape[1:])
    return _c10d.all_gather_into_tensor_out.default(x, size, group, out=out)


@opaque_op(
    "shift_ranks(Tensor x, int shift, int size, str group) -> Tensor",
    fake=lambda x, shift, size, group: x.new_empty(x.shape),
)
def shift_ranks(x: Tensor, shift: int, size: int, group: str) -> Tensor:
    """Start to send `x` (any shape, equal on all ranks) `shift` ranks on, and to receive as much; `wait` for the
    result.

    `size`: n.
    """
    me, flat = rank_in_group(group), x.flatten()
    send, receive = [0] * size, [0] * size
    send[(me + shift) % size] = receive[(me - shift) % size] = flat.shape[0]
    return _c10d.all_to_all_single.default(flat, receive, send, group).view(x.shape)


@opaque_op(
    "exchange_rows(Tensor x, Tensor send, Tensor receive, SymInt rows, str group) -> Tensor",
    fake=lambda x, send, receive, rows, group: x.new_empty(rows, *x.shape[1:]),
)
def exchange_rows(x_ND: Tensor, send_n: Tensor, receive_n: Tensor, rows: int, group: str) -> Tensor:
    """Start an uneven exchange of rows, `send_n[j]` of them to rank j; `[rows, D]` come back; `wait` for the result.

    `send_n`, `receive_n`: int64 `[n]` on the CPU. `rows`: the sum of `receive_n`.
    """
    del rows
    return _c10d.all_to_all_single.default(x_ND, receive_n.tolist(), send_n.tolist(), group)


def _transposed(why: str) -> str:
    """The purpose of a collective's transpose: named after it, and back again."""
    return why.removesuffix(".T") if why.endswith(".T") else why + ".T"
