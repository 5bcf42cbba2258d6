"""The sharded forms of the primitives (`ftrain.kernels.primitive`), as one rank of a mesh computes them."""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from ftrain.graph.source import user_source
from ftrain.kernels import random
from ftrain.kernels.attention import attention
from ftrain.kernels.experts import FFN, dropped_rows, experts
from ftrain.kernels.random import Window
from ftrain.modules import spec as specs_of
from ftrain.sharding import exchange, matrices, shards
from ftrain.sharding.experts import dropped_rows_sharded, experts_sharded
from ftrain.sharding.layout import CapacityFactor
from ftrain.sharding.mesh import Mesh
from ftrain.sharding.pack_heads import divide_heads_sharded, join_heads_sharded, own_heads_sharded
from ftrain.sharding.placement import Placement
from ftrain.sharding.sequence_attention import gather_tokens, pack_documents, sequence_attention
from ftrain.sharding.spmd import purpose
from ftrain.sharding.whole_rows import whole_rows_sharded
from ftrain.trace.refusals import Untraceable
from ftrain.trace.spmd import ShardedTrace, batch_sum, spread_of


def bindings(trace: ShardedTrace) -> dict[str, Callable[..., Any]]:
    """By the name of a primitive, the function that computes it on the rank that `trace` is for.

    Pass the result to `ftrain.kernels.primitive.bind`. Each function has the arguments, shapes and errors of its
    primitive; that of `require_documents_alone` raises ValueError where ranks share a sequence.
    """
    mesh, order = trace.plan.mesh, trace.plan.order
    rows: dict[str, Callable[..., Any]] = {
        "sum_over_batch": lambda x: batch_sum(x, mesh),
        "whole_rows": partial(whole_rows_sharded, mesh=mesh, order=order),
        "require_documents_alone": lambda: _require_documents_alone(mesh),
        "attention": lambda *tensors, **options: _attention(trace, *tensors, **options),
        "experts": lambda *args, **options: _experts(trace, *args, **options),
        "moe_dropped": lambda expert_TK, w_gate_EDF: _dropped(trace, expert_TK, w_gate_EDF),
        "parameter": lambda *args, **options: _parameter(trace, *args, **options),
        "sum_over_shards": lambda values_N, leaves: _sum_over_shards(trace, values_N, leaves),
        "whole_leaf": lambda piece, leaf: _whole_leaf(trace, piece, leaf),
        "piece_of_leaf": lambda whole, leaf: _piece_of_leaf(trace, whole, leaf),
        "mean_over_leaf": lambda x, dims, leaf: _mean_over_leaf(trace, x, dims, leaf),
        "each_matrix": lambda *args, **options: _each_matrix(trace, *args, **options),
        "bits_of_leaf": lambda key, leaf: _bits_of_leaf(trace, key, leaf),
        "whole_shape": lambda leaf: trace.placement(leaf).shape,
    }
    if mesh.size > 1:
        rows["draw_over_batch"] = partial(exchange.draw_over_batch_sharded, mesh=mesh, order=order)
    if mesh.sequence > 1:
        rows["merge"] = lambda *tensors, backend="auto": exchange.merge_rows_sharded(*tensors, mesh=mesh, order=order)
        rows["take"] = partial(exchange.take_rows_sharded, mesh=mesh, order=order)
        rows["following"] = partial(exchange.following_sharded, mesh=mesh, order=order)
        rows["pack_index"] = partial(exchange.pack_index_sharded, mesh=mesh, order=order)
        rows["pack_rows"] = lambda x_T: gather_tokens(x_T, mesh, order, purpose="pack_rows")
        rows["divide_heads"] = partial(divide_heads_sharded, mesh=mesh, order=order)
        rows["join_heads"] = partial(join_heads_sharded, mesh=mesh, order=order)
        rows["own_heads"] = partial(own_heads_sharded, mesh=mesh)
        rows["pack_tokens"] = lambda tokens: tokens * mesh.sequence
    return rows


def _require_documents_alone(mesh: Mesh) -> None:
    if mesh.sequence > 1:
        raise Untraceable(
            f"{user_source()}: within_documents on a sequence axis of {mesh.sequence}, whose ranks share a document: "
            "gather what it reads (ftrain.whole_rows), or put it into a Block with a cache, which gets the whole pack"
        )


def _attention(trace: ShardedTrace, q_THK: Tensor, k_SGK: Tensor, v_SGV: Tensor, **options: Any) -> Tensor:
    mesh = trace.plan.mesh
    trace.note_documents(options.get("segments_T"), options.get("kv_segments_S"))
    component = trace.component(q_THK, k_SGK)
    how = trace.plan.layout(component).sequence
    if how is None or mesh.sequence == 1:
        return attention.local(q_THK, k_SGK, v_SGV, **options)  # type: ignore[attr-defined]
    order = trace.plan.order
    return sequence_attention(
        q_THK,
        k_SGK,
        v_SGV,
        how=how,
        mesh=mesh,
        order=order,
        component=component,
        documents_of=lambda ids_T: trace.pack(ids_T, lambda: pack_documents(ids_T, mesh=mesh, order=order)),
        **options,
    )


def _experts(
    trace: ShardedTrace,
    x_TD: Tensor,
    expert_TK: Tensor,
    weights_TK: Tensor,
    leaves: Sequence[Tensor],
    ffn: FFN,
    **options: Any,
) -> Tensor:
    mesh = trace.plan.mesh
    layout = trace.plan.layout(trace.component(*leaves))
    divided = any("expert" in spread_of(trace, leaf).axes for leaf in leaves)
    if layout.experts is None or mesh.expert == 1 or not divided:
        return experts.local(x_TD, expert_TK, weights_TK, leaves, ffn, **options)  # type: ignore[attr-defined]
    given = (x_TD, expert_TK, weights_TK, leaves, ffn)
    return experts_sharded(*given, how=layout.experts, mesh=mesh, chunks=layout.expert_chunks, **options)


def _dropped(trace: ShardedTrace, expert_TK: Tensor, w_gate_LDF: Tensor) -> Tensor:
    mesh = trace.plan.mesh
    layout = trace.plan.layout(trace.component(w_gate_LDF))
    if not isinstance(layout.experts, CapacityFactor) or mesh.expert == 1:
        return dropped_rows.local(expert_TK, w_gate_LDF)  # type: ignore[attr-defined]
    whole = w_gate_LDF.shape[0] * mesh.expert
    return dropped_rows_sharded(expert_TK, experts=whole, how=layout.experts, chunks=layout.expert_chunks)


def _parameter(trace: ShardedTrace, spec: specs_of.ParamSpec, key: Tensor, path: str, window: Any = None) -> Tensor:
    """This rank's piece of a new parameter. Only the random numbers of the piece are drawn."""
    assert window is None, "the plan chooses the window"
    placement = trace.plan.placement(path, spec)
    trace.placements.register(path, placement)
    starts = placement.starts()
    window = Window(starts, placement.local_shape)
    piece = specs_of.init_leaf.local(spec, key, path, window=window)  # type: ignore[attr-defined]
    for split in placement.splits:
        full = placement.shape[split.dim]
        if full % split.size:
            piece = shards.fill_padding(piece, split.dim, starts[split.dim], full, 0)
    layout = trace.plan.layout(path)
    piece = piece if layout.dtype is None else piece.to(getattr(torch, layout.dtype))
    trace.note_piece(piece, placement, path)
    return piece


def _sum_over_shards(trace: ShardedTrace, values_N: Tensor, leaves: Sequence[Tensor]) -> Tensor:
    placements = [trace.placement(leaf) for leaf in leaves]
    with purpose("optimizer"):
        total_N = shards.sum_over_shards(values_N, placements, trace.plan.mesh)
    trace.note_piece(total_N, Placement(tuple(total_N.shape)), of=leaves)
    return total_N


def _whole_leaf(trace: ShardedTrace, piece: Tensor, leaf: Tensor) -> Tensor:
    placement = trace.placement(leaf)
    with purpose("optimizer"):
        whole = shards.whole_of(piece, placement, trace.plan.mesh)
    trace.note_use(whole, "", placement)
    return whole


def _piece_of_leaf(trace: ShardedTrace, whole: Tensor, leaf: Tensor) -> Tensor:
    placement = trace.placement(leaf)
    with purpose("optimizer"):
        piece = shards.piece_of(whole, placement)
    trace.note_piece(piece, placement, of=(whole, leaf))
    return piece


def _mean_over_leaf(trace: ShardedTrace, x: Tensor, dims: Sequence[int], leaf: Tensor) -> Tensor:
    placement = trace.placement_of_piece(x) or trace.placement(leaf)
    with purpose("optimizer"):
        mean = shards.mean_over(x, dims, placement, trace.plan.mesh)
    sizes = tuple(1 if d in dims else n for d, n in enumerate(placement.shape))
    splits = tuple(s for s in placement.splits if s.dim not in dims)
    trace.note_piece(mean, Placement(sizes, splits, placement.copies), of=(x, leaf))
    return mean


def _each_matrix(
    trace: ShardedTrace, work: matrices.Work, pieces: Sequence[Tensor], leaves: Sequence[Tensor], **options: Any
) -> list[Tensor]:
    arrays = [trace.array_of(leaf) for leaf in leaves]
    placements = [trace.placement(leaf) if a is None else a[1] for a, leaf in zip(arrays, leaves, strict=True)]
    with purpose("optimizer"):
        found = matrices.each_matrix(work, pieces, placements, trace.plan.mesh, **options)
    for result, piece, leaf, placement in zip(found, pieces, leaves, placements, strict=True):
        trace.note_piece(result, placement, of=(piece, leaf))
    return found


def _bits_of_leaf(trace: ShardedTrace, key: Tensor, leaf: Tensor) -> Tensor:
    placement = trace.placement(leaf)
    window = Window(placement.starts(), placement.local_shape)
    words = random.bits(key, placement.shape, window=window)
    trace.note_piece(words, placement, of=(key, leaf))
    return words
