"""Experts on other ranks: rows of tokens go to the ranks that hold their experts, and come back.

Rank i of the expert axis (n ranks) holds experts `[i * E/n, (i + 1) * E/n)`. The weights of a token's experts are
applied on its own rank, in the same place as without expert parallelism, so both agree to rounding.

Legend: T tokens of this rank, K experts per token, N = T * K rows, E experts, L = E / n experts held here, R rows that
this rank receives, P parts, C slots for each expert, D model.
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ftrain.kernels.experts import FFN, experts_held, run_experts
from ftrain.kernels.moe import Dispatch, combine, moe_dispatch, permute_rows, restore_rows
from ftrain.sharding.collectives import all_to_all, all_to_all_rows
from ftrain.sharding.layout import CapacityFactor, Dropless
from ftrain.sharding.mesh import Group, Mesh
from ftrain.sharding.sizes import host_size
from ftrain.sharding.spmd import axis_index


def experts_sharded(
    x_TD: Tensor,
    expert_TK: Tensor,
    weights_TK: Tensor,
    leaves: Sequence[Tensor],
    ffn: FFN,
    *,
    how: Dropless | CapacityFactor,
    mesh: Mesh,
    chunks: int = 1,
    backend: str = "auto",
) -> Tensor:
    """`ftrain.kernels.experts.experts` where the expert axis divides the experts: `[T, D]` in the dtype of their rows.

    - `x_TD`, `expert_TK`, `weights_TK`: of this rank's tokens; `expert_TK` are numbers of experts of the whole model.
    - `leaves`, `[L, ...]` each: of this rank's experts. `ffn`, `backend`: as in `experts`; `ffn` is called once for
      each chunk.
    - `how`: `Dropless()` sends every row, and the host reads the sizes; `CapacityFactor(f)` has static sizes and drops
      rows.
    - `chunks`: parts in which tokens go, none of which waits for another.

    ValueError where `chunks` does not divide the tokens, and in the cases of `experts`.
    """
    tokens, held = x_TD.shape[0], experts_held(leaves)
    if tokens % chunks:
        raise ValueError(f"expert_chunks={chunks} does not divide the {tokens} tokens of a rank")
    parts = list(zip(*(t.chunk(chunks) for t in (x_TD, expert_TK, weights_TK)), strict=True))
    network = _Network(held, mesh.group("expert"), leaves, ffn, backend)
    if isinstance(how, CapacityFactor):
        outs = [_with_capacity(x, e, w, network, factor=how.factor) for x, e, w in parts]
    else:
        outs = _dropless(parts, network)
    return outs[0] if chunks == 1 else torch.cat(outs)


class _Network(NamedTuple):
    """This rank's experts: how many, the ranks that hold the others, and what they compute."""

    held: int
    group: Group
    leaves: Sequence[Tensor]
    ffn: FFN
    backend: str

    @property
    def experts(self) -> int:
        return self.held * self.group.size

    def dispatch(self, x_TD: Tensor, expert_TK: Tensor) -> tuple[Tensor, Dispatch]:
        return moe_dispatch(x_TD, expert_TK, num_experts=self.experts, backend=self.backend)

    def run(self, rows_RD: Tensor, offsets_L: Tensor, expert_R: Tensor) -> Tensor:
        return run_experts(rows_RD, offsets_L, expert_R, self.leaves, self.ffn)


def _dropless(parts: Sequence[tuple[Tensor, Tensor, Tensor]], network: _Network) -> list[Tensor]:
    """Every row is sent; the host reads the sizes of all parts' exchanges at once."""
    routed = [network.dispatch(x, expert) for x, expert, _ in parts]
    counts = [
        torch.diff(d.offsets_E, prepend=d.offsets_E.new_zeros(1)).long().view(-1, network.held) for _, d in routed
    ]
    send_nPL = torch.stack(counts, dim=1)
    receive_nPL = all_to_all(send_nPL, network.group, purpose="expert_counts")
    send_Pn, receive_Pn = torch.stack([send_nPL.sum(2).t(), receive_nPL.sum(2).t()]).to("cpu").unbind()
    outs = []
    for p, ((rows_ND, dispatch), (_, _, weights_TK)) in enumerate(zip(routed, parts, strict=True)):
        back_ND = _rows_to_experts(rows_ND, send_Pn[p], receive_Pn[p], receive_nPL[:, p], network)
        outs.append(combine(back_ND, weights_TK, dispatch, backend=network.backend))
    return outs


def _rows_to_experts(
    rows_ND: Tensor, send_n: Tensor, receive_n: Tensor, receive_nL: Tensor, network: _Network
) -> Tensor:
    """What the experts make of each row: rows in order of their experts go to those, and come back: `[N, D]`."""
    group = network.group
    total = host_size(receive_n.sum(), rows_ND.shape[0])
    got_RD = all_to_all_rows(rows_ND, send_n, receive_n, total, group, purpose="expert_dispatch")
    ids_nL = torch.arange(receive_nL.shape[1], device=rows_ND.device).repeat(group.size)
    expert_R = torch.repeat_interleave(ids_nL, receive_nL.flatten(), output_size=total)
    expert_R, order_R = torch.sort(expert_R, stable=True)
    offsets_L = receive_nL.sum(0).cumsum(0).to(torch.int32)
    out_RD = restore_rows(network.run(permute_rows(got_RD, order_R), offsets_L, expert_R), order_R)
    return all_to_all_rows(out_RD, receive_n, send_n, rows_ND.shape[0], group, purpose="expert_combine")


def _with_capacity(x_TD: Tensor, expert_TK: Tensor, weights_TK: Tensor, network: _Network, *, factor: float) -> Tensor:
    """Each expert gets C slots of each rank, the first rows that name it; the others count as zero. No host waits."""
    group, held, experts, slots = network.group, network.held, network.experts, expert_TK.numel()
    capacity = _capacity(factor, slots, experts)
    rows_ND, dispatch = network.dispatch(x_TD, expert_TK)
    ends_E = dispatch.offsets_E.long()
    begins_E = torch.cat([ends_E.new_zeros(1), ends_E[:-1]])
    # The row in slot c of expert e; a slot without a row reads row N, which is zero.
    slot_EC = begins_E[:, None] + torch.arange(capacity, device=x_TD.device)
    slot_EC = torch.where(slot_EC < ends_E[:, None], slot_EC, slots)
    padded = torch.cat([rows_ND, rows_ND.new_zeros(1, rows_ND.shape[1])])
    sent = padded.index_select(0, slot_EC.flatten()).view(group.size, held * capacity, -1)
    got = all_to_all(sent, group, purpose="expert_dispatch")
    by_expert = got.view(group.size, held, capacity, -1).transpose(0, 1).reshape(held * group.size * capacity, -1)
    offsets_L = torch.arange(1, held + 1, device=x_TD.device, dtype=torch.int32) * (group.size * capacity)
    # numbers of this rank's own experts: what is read by them is no part of what one device would read
    own_L = torch.arange(held, device=x_TD.device) + 0 * axis_index("expert")
    expert_R = own_L.repeat_interleave(group.size * capacity)
    out = network.run(by_expert, offsets_L, expert_R).view(held, group.size, capacity, -1).transpose(0, 1)
    back = all_to_all(out.reshape(group.size, held * capacity, -1), group, purpose="expert_combine")
    # Where each row's result is: slot `row - begin` of its expert; a dropped row reads a zero.
    expert_N = dispatch.expert_N.long()
    within_N = torch.arange(slots, device=x_TD.device) - begins_E[expert_N]
    place_N = torch.where(within_N < capacity, expert_N * capacity + within_N, experts * capacity)
    flat = back.reshape(experts * capacity, -1)
    rows_ND = torch.cat([flat, flat.new_zeros(1, flat.shape[1])]).index_select(0, place_N)
    return combine(rows_ND, weights_TK, dispatch, backend=network.backend)


def dropped_rows_sharded(expert_TK: Tensor, *, experts: int, how: CapacityFactor, chunks: int = 1) -> Tensor:
    """How many rows of this rank exceed the capacity of their experts, a float32 scalar; the host does not wait.

    `experts`: E. `chunks`: as in `experts_sharded`, each of which has a capacity of its own.
    """
    parts = expert_TK.reshape(chunks, -1)
    load_PE = parts.new_zeros(chunks, experts).scatter_add(1, parts, torch.ones_like(parts))
    return (load_PE - _capacity(how.factor, parts.shape[1], experts)).clamp(min=0).sum().float()


def _capacity(factor: float, slots: int, experts: int) -> int:
    """Slots that a rank has for each expert."""
    return max(1, math.ceil(factor * slots / experts))


def expert_bytes(tokens: int, top_k: int, d: int, ranks: int, itemsize: int) -> int:
    """Bytes that a rank sends for one layer of experts, forward and backward, at even load.

    `tokens`: of a rank. `top_k`: experts per token. `d`: model width. Rows go there and back, and both exchanges are
    transposed; 1/`ranks` of the rows stays on its rank.

    >>> from ftrain.sharding.experts import expert_bytes
    >>> expert_bytes(tokens=1024, top_k=8, d=2048, ranks=8, itemsize=2)
    117440512
    """
    return 4 * top_k * tokens * d * itemsize * (ranks - 1) // ranks
