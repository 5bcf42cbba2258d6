"""Attention of a plan's component over the sequence axis: who gathers what, cross attention, errors."""

from functools import partial

import pytest
import torch

from ftrain.kernels.attention import attention
from ftrain.kernels.attention_sinks import add_sinks
from ftrain.sharding import ring
from ftrain.sharding import sequence_attention as module
from ftrain.sharding.batch import TokenOrder, join_tokens
from ftrain.sharding.layout import Hybrid, Ring, Ulysses
from ftrain.sharding.mesh import Mesh
from ftrain.sharding.sequence_attention import from_pack_order, pack_documents, sequence_attention, to_pack_order
from tests.helpers.ranks import on_ranks
from tests.helpers.sequence_cases import (
    difference,
    differentiated,
    make_pack,
    on_mesh_of,
    on_one_device,
    order_of,
    shares,
)


def sinks_of(heads):
    return torch.randn(heads, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


ALL = [Ulysses(), Ring(), Ring(zigzag=False), Hybrid(2), Hybrid(2, zigzag=False)]


@pytest.mark.parametrize("how", ALL)
def test_packs_of_several_data_ranks_do_not_mix(how):
    mesh = Mesh(shard=2, sequence=4, kind="virtual")
    whole = make_pack(96, 4, 2, 4, lengths=(20, 28, 30, 18))
    got = on_mesh_of(whole, how, 4, mesh=mesh)
    halves = [on_one_device(type(whole)(*(x[part] for x in whole))) for part in (slice(48), slice(48, 96))]
    wanted = [torch.cat(both) for both in zip(*halves, strict=True)]
    assert difference(got, wanted) < 1e-12


@pytest.mark.parametrize("how", ALL)
def test_a_sequence_axis_of_one_is_the_plain_kernel(how):
    pack = make_pack(16, 4, 2, 4, lengths=(10, 6))
    got = on_mesh_of(pack, how, 1, order=TokenOrder())
    assert all(torch.equal(a, b) for a, b in zip(got, on_one_device(pack), strict=True))


@pytest.mark.parametrize("how", ALL)
def test_the_reference_backend(how):
    pack = make_pack(32, 4, 2, 4, lengths=(20, 12))
    assert difference(on_mesh_of(pack, how, 4, backend="reference", window=9), on_one_device(pack, window=9)) < 1e-12


@pytest.mark.parametrize("how", ALL)
@pytest.mark.parametrize(
    ("heads", "V", "options"),
    [((4, 2), 4, {}), ((8, 8), 4, {"window": 9}), ((12, 3), 4, {"causal": False}), ((4, 1), 3, {"softcap": 0.7})],
)
def test_sinks(how, heads, V, options):
    pack, sinks = make_pack(48, *heads, 4, V, lengths=(3, 13, 1, 20, 11)), sinks_of(heads[0])
    got, wanted = on_mesh_of(pack, how, 4, sinks=sinks, **options), on_one_device(pack, sinks=sinks, **options)
    assert difference(got, wanted) < 1e-12


@pytest.mark.parametrize("how", ALL)
@pytest.mark.parametrize("options", [{}, {"window": 9}, {"causal": False}, {"backend": "reference"}], ids=str)
def test_capped_scores(how, options):
    """The cap is far below the largest score."""
    pack = make_pack(48, 4, 2, 4, lengths=(3, 13, 1, 20, 11))
    got, wanted = (f(softcap=0.7, **options) for f in (partial(on_mesh_of, pack, how, 4), partial(on_one_device, pack)))
    assert difference(got, wanted) < 1e-12


@pytest.mark.parametrize("how", ALL)
def test_sinks_of_the_reference_backend(how):
    pack, sinks = make_pack(32, 4, 2, 4, lengths=(20, 12)), sinks_of(4)
    got = on_mesh_of(pack, how, 4, backend="reference", sinks=sinks)
    assert difference(got, on_one_device(pack, sinks=sinks)) < 1e-12


@pytest.mark.parametrize("how", [Ulysses(), Ring()])
def test_sinks_in_half_precision(how):
    pack, sinks = make_pack(32, 4, 2, 8, lengths=(20, 12), dtype=torch.bfloat16), sinks_of(4)
    assert difference(on_mesh_of(pack, how, 4, sinks=sinks), on_one_device(pack, sinks=sinks)) < 1e-2


def test_a_sink_that_enters_at_each_step_of_a_ring_is_noticed(monkeypatch):
    """The planted bug: each block of keys brings the sink along."""
    plain = ring.ring_forward

    def wrong(q, *rest):
        out, lse = plain(q, *rest)
        return add_sinks(out, lse, lse.new_zeros(4))

    pack, sinks = make_pack(32, 4, 2, 4), sinks_of(4)
    monkeypatch.setattr(ring, "ring_forward", wrong)
    assert difference(on_mesh_of(pack, Ring(), 4, sinks=sinks), on_one_device(pack, sinks=sinks)) > 0.1


@pytest.mark.parametrize("how", ALL)
def test_segments_are_gathered_once_for_all_layers(how, monkeypatch):
    gathered, plain = [], module.all_gather

    def counted(x, group, *, purpose):
        gathered.append(purpose)
        return plain(x, group, purpose=purpose)

    monkeypatch.setattr(module, "all_gather", counted)
    mesh, order = Mesh(sequence=4, kind="virtual"), order_of(how, 4)
    pack = make_pack(32, 4, 2, 4, lengths=(20, 12))

    def local(q, k, v, segments_T):
        documents, x = pack_documents(segments_T, mesh=mesh, order=order), q
        layout = {"how": how, "mesh": mesh, "order": order, "documents_of": lambda _: documents}
        for _ in range(3):
            x = sequence_attention(x, k, v, segments_T=segments_T, **layout)
        return x

    got = on_ranks(local, mesh, *(shares(x, order, mesh) for x in (*pack[:3], pack.segments)))
    wanted = pack.q
    for _ in range(3):
        wanted = attention(wanted, pack.k, pack.v, segments_T=pack.segments)
    torch.testing.assert_close(join_tokens([x for (x,) in got], 0, order), wanted, rtol=1e-12, atol=1e-12)
    assert gathered == ["segments"]


@pytest.mark.parametrize("how", [Ulysses(), Ring(), Hybrid(2)])
@pytest.mark.parametrize(("causal", "window"), [(False, None), (True, None), (False, 4), (True, 4)])
@pytest.mark.parametrize("sinks", [None, sinks_of(4)], ids=["no sinks", "sinks"])
def test_keys_of_another_pack(how, causal, window, sinks):
    """Document 1 has no keys, document 5 no queries."""
    mesh, order = Mesh(sequence=4, kind="virtual"), order_of(how, 4)
    queries, keys = make_pack(32, 4, 2, 4, lengths=(9, 3, 20), ids=(0, 1, 2)), make_pack(16, 4, 2, 4)
    kv_segments = torch.tensor((0, 2, 5)).repeat_interleave(torch.tensor((2, 11, 3)))
    rule = {"causal": causal, "window": window}

    def local(q, k, v, grad, segments, kv_segments, *own_sinks):
        how_ = {"how": how, "mesh": mesh, "order": order, "segments_T": segments, "kv_segments_S": kv_segments}
        function = partial(sequence_attention, **how_, **rule)
        return differentiated(function, q, k, v, own_sinks[0] if own_sinks else None, grad)

    tensors = (queries.q, keys.k, keys.v, queries.grad)
    with torch.enable_grad():
        per_rank = (shares(x, order, mesh) for x in (*tensors, queries.segments, kv_segments))
        got = on_ranks(local, mesh, *per_rank, *([] if sinks is None else [[sinks] * 4]))
    whole = {"segments_T": queries.segments, "kv_segments_S": kv_segments}
    wanted = differentiated(partial(attention, **whole, **rule), *tensors[:3], sinks, tensors[3])
    columns = [list(x) for x in zip(*got, strict=True)]
    joined = [join_tokens(x, 0, order) for x in columns[:4]] + [sum(x) for x in columns[4:]]
    assert difference(joined, wanted) < 1e-12


@pytest.mark.parametrize("order", [TokenOrder(4), TokenOrder(4, 4, True), TokenOrder(4, 2, True), TokenOrder(4, 2)])
def test_pack_order_and_back(order):
    held = order.order(48)
    assert torch.equal(to_pack_order(held, order), torch.arange(48))
    assert torch.equal(from_pack_order(torch.arange(48), order), held)


def test_a_second_derivative_through_the_reference():
    mesh, order = Mesh(sequence=2, kind="virtual"), order_of(Ring(), 2)
    pack = make_pack(8, 2, 2, 4)

    def twice(function, q):
        leaf = q.detach().requires_grad_()
        (first,) = torch.autograd.grad(function(leaf).square().sum(), leaf, create_graph=True)
        return torch.autograd.grad(first.square().sum(), leaf)[0]

    def local(q, k, v):
        how = {"how": Ring(), "mesh": mesh, "order": order, "backend": "reference"}
        return twice(lambda leaf: sequence_attention(leaf, k, v, **how), q)

    with torch.enable_grad():
        got = on_ranks(local, mesh, *(shares(x, order, mesh) for x in pack[:3]))
        wanted = twice(lambda leaf: attention(leaf, pack.k, pack.v, backend="reference"), pack.q)
    torch.testing.assert_close(join_tokens([x for (x,) in got], 0, order), wanted, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"order": TokenOrder(2)}, r"vision: the tokens are dealt to 2 ranks, but sequence=4"),
        ({"how": Hybrid(2), "order": TokenOrder(4, 4, True)}, r"vision: .* ring of 2, .* ring of 4; .* Ulysses\(\)"),
        ({"how": Hybrid(3)}, r"sequence=4 is not divisible by 3"),
        ({"window": 0}, r"vision: window=0 must be at least 1"),
        ({"backend": "flash"}, r"backend='flash' does not run on cpu"),
        ({"k": torch.zeros(4, 3, 4)}, r"vision: .* multiple of key/value heads .* q \[4, 4, 4\], k \[4, 3, 4\]"),
        ({"k": torch.zeros(5, 4, 4), "v": torch.zeros(5, 4, 4)}, r"vision: .* need kv_segments_S"),
        ({"k": torch.zeros(4, 4)}, r"vision wants q \[T, H, K\]"),
        ({"v": torch.zeros(4, 4, 4, dtype=torch.float64)}, r"vision: .* one floating dtype; .* v torch.float64"),
        ({"segments_T": torch.zeros(4)}, r"vision: segments_T must be int64 \[4\], not torch.float32 \[4\]"),
        ({"kv_segments_S": torch.zeros(4, dtype=torch.int64)}, r"needs segments_T"),
        ({"softcap": -1.0}, r"vision: softcap=-1.0 must be positive"),
        ({"sinks_H": torch.zeros(3)}, r"vision: sinks_H must be floating \[4\] on cpu"),
    ],
)
def test_what_does_not_fit(change, message):
    x = torch.zeros(4, 4, 4)
    options = {"how": Ring(), "mesh": Mesh(sequence=4, kind="fake"), "order": TokenOrder(4, 4), **change}
    q, k, v = x, options.pop("k", x), options.pop("v", x)
    if k.shape[1] == 3:
        v = torch.zeros(4, 3, 4)
    with pytest.raises(ValueError, match=message):
        sequence_attention(q, k, v, component="vision", **options)
