"""Attention where the ranks of the sequence axis share the tokens of a pack: Ulysses, ring, or one inside the other.

T tokens of a rank, P tokens of the pack, S key/value tokens of a rank (T but for cross attention), H query heads, G
key/value heads, K head dim, V value dim.
"""

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from ftrain.kernels.attention import BACKENDS, attention, check_softcap
from ftrain.kernels.attention_sinks import check_sinks
from ftrain.kernels.backend import choose_backend, device_type
from ftrain.kernels.documents import Documents, Segments, document_index, ids_of, index_of_offsets
from ftrain.sharding.batch import TokenOrder
from ftrain.sharding.collectives import all_gather
from ftrain.sharding.layout import Hybrid, Ring, Ulysses
from ftrain.sharding.mesh import Group, Mesh
from ftrain.sharding.ring import RingRule, ring_attention
from ftrain.sharding.spmd import axis_index
from ftrain.sharding.ulysses import check_heads, heads_to_tokens, own_heads, tokens_to_heads


class PackDocuments(NamedTuple):
    """The documents of a whole pack, in its order: ids int64 `[P]`, and document numbers int64 `[P]` on the CPU."""

    ids_P: Tensor
    host_index_P: Tensor


def pack_documents(segments_T: Tensor, *, mesh: Mesh, order: TokenOrder) -> PackDocuments:
    """Document ids and numbers of the whole pack, gathered over the sequence axis. `segments_T`: this rank's ids,
    int64.
    """
    ids_P = gather_tokens(segments_T, mesh, order, purpose="segments")
    return PackDocuments(ids_P, document_index(ids_P).to("cpu"))


def sequence_attention(
    q_THK: Tensor,
    k_SGK: Tensor,
    v_SGV: Tensor,
    *,
    how: Ulysses | Ring | Hybrid,
    mesh: Mesh,
    order: TokenOrder,
    component: str = "",
    documents_of: Callable[[Tensor], PackDocuments] | None = None,
    segments_T: Segments | None = None,
    kv_segments_S: Segments | None = None,
    causal: bool = True,
    window: int | None = None,
    scale: float | None = None,
    sinks_H: Tensor | None = None,
    softcap: float | None = None,
    backend: str = "auto",
) -> Tensor:
    """`ftrain.kernels.attention.attention` of the whole pack, this rank's rows: `[T, H, V]` in the dtype of the
    queries.

    - `q_THK`, `k_SGK`, `v_SGV`, `segments_T`: this rank's share of the pack, in the `order` of its tokens; the rest as
      in `attention`. Of `Documents` the ids are this rank's share, and the offsets those of the whole pack.
    - `sinks_H`: of all query heads; the gradient is this rank's part of the sum over ranks.
    - `mesh`: the ranks, of which those of the sequence axis take part. `component`: what a message calls the attention.
    - `documents_of`: gives `pack_documents` of a tensor of ids; one that remembers spares the gather in all layers but
      the first. None gathers each time. Ulysses needs no gather where there are `Documents`.
    - `how`: Ulysses needs H divisible by its ranks, any G. A ring is exact for every rule, windows included; zigzag is
      in the order of the tokens, and balances causal work. Hybrid is Ulysses among neighbours and a ring across them.
    - With `kv_segments_S` the keys are this rank's share of another pack, in the same order: keys and values are
      gathered, whatever `how` is; with `causal` or a window the queries too, since a rule counts from a document's end.
    - The plain reference (`backend="reference"`, nested gradients) of a ring gathers the whole pack on each rank.

    ValueError names the component and what does not divide or fit, and a backend of another device. Sources: Jacobs et
    al., arXiv 2309.14509; Liu et al., arXiv 2310.01889; Fang and Zhao, arXiv 2405.07719.
    """
    documents_of = documents_of or partial(pack_documents, mesh=mesh, order=order)
    tensors = (q_THK, k_SGK, v_SGV)
    local = partial(
        attention.local,  # type: ignore[attr-defined]
        causal=causal,
        window=window,
        scale=scale,
        softcap=softcap,
        backend=backend,
    )
    whole_heads = partial(local, sinks_H=sinks_H)
    if mesh.sequence == 1:
        return whole_heads(*tensors, segments_T=segments_T, kv_segments_S=kv_segments_S)
    if kv_segments_S is not None:
        whole_rule = causal or window is not None
        return _cross_attention(*tensors, segments_T, kv_segments_S, mesh, order, documents_of, whole_rule, whole_heads)
    _check(*tensors, segments_T, window, component)
    check_sinks(sinks_H, q_THK, component or "attention")
    check_softcap(softcap, component or "attention")
    _check_order(how, mesh, order, component)
    inner, outer, place = _groups(how, mesh)
    heads = check_heads(q_THK.shape[1], k_SGK.shape[1], inner, mesh.sequence, component)
    fast = _fast_backend(backend, q_THK)
    if outer.size > 1 and not fast:
        return _gathered(*tensors, _whole(segments_T, documents_of), None, mesh, order, whole_heads)
    if inner.size > 1:
        me = axis_index(place[0])
        tensors = tokens_to_heads(*tensors, heads=heads, me=me, group=inner)
        sinks_H = None if sinks_H is None else own_heads(sinks_H, heads=heads, me=me)
    if outer.size > 1:
        documents = None if segments_T is None else documents_of(ids_of(segments_T))
        scale = q_THK.shape[2] ** -0.5 if scale is None else float(scale)
        out = ring_attention(
            *tensors,
            me=axis_index(place[1]),
            host_index_P=None if documents is None else documents.host_index_P,
            rule=RingRule(outer, _is_zigzag(order), causal, window, scale, softcap),
            sinks_H=sinks_H,
        )
    else:
        whole = _whole(segments_T, documents_of)
        in_order = (to_pack_order(x, order) for x in tensors)
        out = from_pack_order(local(*in_order, segments_T=whole, sinks_H=sinks_H), order)
    return heads_to_tokens(out, group=inner) if inner.size > 1 else out


def _whole(segments_T: Segments | None, documents_of: Callable[[Tensor], PackDocuments]) -> Segments | None:
    """The documents of the whole pack: known, or gathered."""
    if segments_T is None or isinstance(segments_T, Documents):
        return segments_T
    return documents_of(segments_T).ids_P


def _inner(how: Ulysses | Ring | Hybrid, mesh: Mesh) -> int:
    """How many neighbours exchange heads."""
    if isinstance(how, Hybrid):
        return how.ulysses
    return 1 if isinstance(how, Ring) else mesh.sequence


def _groups(how: Ulysses | Ring | Hybrid, mesh: Mesh) -> tuple[Group, Group, tuple[str, str]]:
    """The ranks that exchange heads, the ranks that form the ring, and the axes on which a rank finds its places."""
    inner = _inner(how, mesh)
    if inner == mesh.sequence:
        return mesh.group("sequence"), Group("", 1), ("sequence", "")
    if inner == 1:
        return Group("", 1), mesh.group("sequence"), ("", "sequence")
    axes = (f"ulysses:{inner}", f"ring:{inner}")
    return mesh.group(axes[0]), mesh.group(axes[1]), axes


def _fast_backend(backend: str, q_THK: Tensor) -> bool:
    """True for the opaque ops, False for the reference; ValueError for a backend of another device."""
    chosen = choose_backend(backend, q_THK.device, BACKENDS)
    if chosen != "reference" and BACKENDS.get(device_type(q_THK)) != chosen:
        raise ValueError(f"attention: backend={chosen!r} does not run on {q_THK.device}; use backend='auto'")
    return chosen != "reference"


def _check_order(how: Ulysses | Ring | Hybrid, mesh: Mesh, order: TokenOrder, component: str) -> None:
    """A ring knows its members' tokens by the order alone, so a zigzag order must be that of this very ring."""
    name = component or "attention"
    if order.ranks != mesh.sequence:
        raise ValueError(f"{name}: the tokens are dealt to {order.ranks} ranks, but sequence={mesh.sequence}")
    ring = mesh.axis_size(f"ring:{_inner(how, mesh)}")
    if ring > 1 and _is_zigzag(order) and order.ring != ring:
        raise ValueError(
            f"{name}: {how} is a ring of {ring}, but the tokens are in zigzag order over a ring of {order.ring}; give "
            "all components the same Ring or Hybrid, or this one Ulysses()"
        )


def _check(
    q_THK: Tensor, k_TGK: Tensor, v_TGV: Tensor, segments_T: Segments | None, window: int | None, component: str
) -> None:
    """What `attention` would find wrong, before anything is sent."""
    name, shapes = component or "attention", f"q {[*q_THK.shape]}, k {[*k_TGK.shape]}, v {[*v_TGV.shape]}"
    if not q_THK.dim() == k_TGK.dim() == v_TGV.dim() == 3 or k_TGK.shape[:2] != v_TGV.shape[:2]:
        raise ValueError(f"{name} wants q [T, H, K], k [T, G, K], v [T, G, V]; got {shapes}")
    if q_THK.shape[::2] != k_TGK.shape[::2] or k_TGK.shape[1] == 0 or q_THK.shape[1] % k_TGK.shape[1]:
        raise ValueError(
            f"{name}: q and k must share tokens and head dim, query heads must be a multiple of key/value heads "
            f"(keys of another length need kv_segments_S); got {shapes}"
        )
    if not q_THK.dtype == k_TGK.dtype == v_TGV.dtype or not q_THK.is_floating_point():
        dtypes = f"q {q_THK.dtype}, k {k_TGK.dtype}, v {v_TGV.dtype}"
        raise ValueError(f"{name}: q, k and v must have one floating dtype; got {dtypes}")
    if window is not None and window < 1:
        raise ValueError(f"{name}: window={window} must be at least 1 (a query sees itself), or None")
    ids_T = None if segments_T is None else ids_of(segments_T)
    if ids_T is not None and (ids_T.shape != q_THK.shape[:1] or ids_T.dtype != torch.int64):
        got = f"{ids_T.dtype} {[*ids_T.shape]}"
        raise ValueError(f"{name}: segments_T must be int64 [{q_THK.shape[0]}], not {got}")


def _cross_attention(
    q_THK: Tensor,
    k_SGK: Tensor,
    v_SGV: Tensor,
    segments_T: Segments | None,
    kv_segments_S: Segments,
    mesh: Mesh,
    order: TokenOrder,
    documents_of: Callable[[Tensor], PackDocuments],
    whole_rule: bool,
    local: Callable[..., Tensor],
) -> Tensor:
    """`whole_rule`: who is seen depends on where the queries of other ranks end."""
    if segments_T is None:
        raise ValueError("attention: kv_segments_S needs segments_T, whose ids it refers to")
    keys = _whole(kv_segments_S, documents_of)
    if whole_rule:
        return _gathered(q_THK, k_SGK, v_SGV, _whole(segments_T, documents_of), keys, mesh, order, local)
    k_PGK, v_PGV = _gather_keys(k_SGK, v_SGV, mesh, order)
    own = segments_T
    if isinstance(segments_T, Documents) and isinstance(kv_segments_S, Documents):
        own, keys = _of_share(segments_T, kv_segments_S, q_THK.shape[0], k_PGK.shape[0], mesh, order)
    return local(q_THK, k_PGK, v_PGV, segments_T=own, kv_segments_S=keys)


def _of_share(
    documents: Documents, kv_documents: Documents, T: int, S: int, mesh: Mesh, order: TokenOrder
) -> tuple[Segments, Segments]:
    """The documents of this rank's T queries, and those of all S keys. In zigzag order a rank may hold two runs of a
    document, so there they are told by their numbers, as ids."""
    if _is_zigzag(order):
        number_P = from_pack_order(index_of_offsets(documents.offsets_N, T * mesh.sequence), order)
        return _own_rows(number_P, T), index_of_offsets(kv_documents.offsets_N, S)
    offsets_N = (documents.offsets_N - axis_index("sequence") * T).clamp(0, T)
    return Documents(documents.ids_T, offsets_N, documents.longest), kv_documents


def _gathered(
    q_THK: Tensor,
    k_SGK: Tensor,
    v_SGV: Tensor,
    documents: Segments | None,
    keys: Segments | None,
    mesh: Mesh,
    order: TokenOrder,
    local: Callable[..., Tensor],
) -> Tensor:
    """The whole pack's attention on every rank, of which each keeps its rows."""
    q_PHK = gather_tokens(q_THK, mesh, order, purpose="sequence_gather")
    k_PGK, v_PGV = _gather_keys(k_SGK, v_SGV, mesh, order)
    out_PHV = local(q_PHK, k_PGK, v_PGV, segments_T=documents, kv_segments_S=keys)
    return _own_rows(from_pack_order(out_PHV, order), q_THK.shape[0])


def _own_rows(x_P: Tensor, T: int) -> Tensor:
    """This rank's T rows of the pack, which is in the order of the ranks."""
    mine_T = axis_index("sequence") * T + torch.arange(T)
    return x_P.index_select(0, mine_T.to(x_P.device))


def _gather_keys(k_SGK: Tensor, v_SGV: Tensor, mesh: Mesh, order: TokenOrder) -> tuple[Tensor, Tensor]:
    """Keys and values of the whole pack, in one message."""
    kv_PGC = gather_tokens(torch.cat([k_SGK, v_SGV], -1), mesh, order, purpose="sequence_gather")
    k_PGK, v_PGV = kv_PGC.split([k_SGK.shape[2], v_SGV.shape[2]], -1)
    return k_PGK, v_PGV


def gather_tokens(x_T: Tensor, mesh: Mesh, order: TokenOrder, *, purpose: str) -> Tensor:
    """The whole pack along dim 0, in its order, from this rank's share `x_T` (`[T, ...]`): `[P, ...]`, differentiable.

    `purpose`: what tables call the message.
    """
    return to_pack_order(all_gather(x_T, mesh.group("sequence"), purpose=purpose), order)


def to_pack_order(x_P: Tensor, order: TokenOrder) -> Tensor:
    """`x_P` (`[P, ...]`, any dtype) from the order in which ranks hold a pack's tokens to the pack's own order."""
    held = _held_chunks(order)
    return x_P if held is None else _rearranged(x_P, [held.index(chunk) for chunk in range(len(held))])


def from_pack_order(x_P: Tensor, order: TokenOrder) -> Tensor:
    """`x_P` (`[P, ...]`, any dtype) from the pack's own order to that in which ranks hold its tokens."""
    held = _held_chunks(order)
    return x_P if held is None else _rearranged(x_P, held)


def _held_chunks(order: TokenOrder) -> list[int] | None:
    """Which chunk of the pack stands at each chunk's place in the order of the ranks; None if they are consecutive."""
    if not _is_zigzag(order):
        return None
    return [chunk for i in range(order.ring) for chunk in (i, 2 * order.ring - 1 - i)]


def _is_zigzag(order: TokenOrder) -> bool:
    return order.zigzag and order.ring > 1


def _rearranged(x_P: Tensor, chunks: list[int]) -> Tensor:
    """Chunk `chunks[i]` at place `i`, by one copy, whose transpose is one too."""
    parts = x_P.unflatten(0, (len(chunks), -1)).unbind(0)
    return torch.cat([parts[chunk] for chunk in chunks])
