"""Ring attention: blocks of keys go around, each query meets each key that it may see once."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ftrain.analysis.meter import measure_peak
from ftrain.sharding import ring
from ftrain.sharding.layout import Hybrid, Ring
from ftrain.sharding.mesh import Mesh
from ftrain.sharding.ring import ring_bytes
from ftrain.sharding.ring_block import Step, pairs, ring_forward, runs
from ftrain.sharding.ring_cost import FLOPS, WORKSPACE
from ftrain.sharding.sequence_attention import sequence_attention
from ftrain.sharding.spmd import current_purpose
from tests.helpers.ranks import on_ranks
from tests.helpers.sequence_cases import difference, make_pack, on_mesh_of, on_one_device, order_of, shares


@pytest.mark.parametrize("zigzag", [True, False])
@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize(
    ("n", "lengths", "window"),
    [
        (2, None, None),
        (2, (3, 13, 1, 20, 11), 5),
        (4, None, None),
        (4, None, 17),
        (4, (48,), 5),
        (4, (3, 13, 1, 20, 11), None),
        (4, (3, 13, 1, 20, 11), 1),
        (4, (24, 24), 17),
        (4, (1, 1, 1, 1, 1, 43), None),
    ],
)
def test_equals_attention_of_the_whole_pack(n, zigzag, lengths, causal, window):
    pack, rule = make_pack(48, 4, 2, 4, lengths=lengths), {"causal": causal, "window": window}
    assert difference(on_mesh_of(pack, Ring(zigzag), n, **rule), on_one_device(pack, **rule)) < 1e-12


@pytest.mark.parametrize(("H", "G"), [(8, 8), (4, 1), (3, 3), (12, 3)])
def test_any_number_of_heads(H, G):
    pack = make_pack(48, H, G, 4, lengths=(30, 18))
    assert difference(on_mesh_of(pack, Ring(), 4), on_one_device(pack)) < 1e-12


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-6), (torch.bfloat16, 1e-2)])
@pytest.mark.parametrize("window", [None, 9])
def test_in_lower_precision(dtype, tolerance, window):
    pack = make_pack(32, 4, 2, 8, lengths=(20, 12), dtype=dtype)
    assert difference(on_mesh_of(pack, Ring(), 4, window=window), on_one_device(pack, window=window)) < tolerance


@pytest.mark.parametrize("window", [None, 9])
def test_values_of_another_width_and_a_scale(window):
    pack, rule = make_pack(32, 4, 2, 6, 3, lengths=(20, 12)), {"scale": 0.3, "window": window}
    assert difference(on_mesh_of(pack, Ring(), 4, **rule), on_one_device(pack, **rule)) < 1e-12


def test_an_id_that_comes_again_is_another_document():
    pack = make_pack(48, 4, 2, 4, lengths=(10, 20, 18), ids=(7, 3, 7))
    assert difference(on_mesh_of(pack, Ring(), 4), on_one_device(pack)) < 1e-12


@pytest.mark.parametrize("u", [1, 2, 4])
@pytest.mark.parametrize("zigzag", [True, False])
@pytest.mark.parametrize(("H", "G"), [(4, 4), (8, 2), (4, 1), (12, 3)])
def test_ulysses_within_a_ring(u, zigzag, H, G):
    pack = make_pack(48, H, G, 4, lengths=(3, 13, 1, 20, 11))
    assert difference(on_mesh_of(pack, Hybrid(u, zigzag), 4), on_one_device(pack)) < 1e-12


def test_a_hybrid_of_more_ranks_than_heads():
    pack = make_pack(64, 2, 1, 4, lengths=(40, 24))
    assert difference(on_mesh_of(pack, Hybrid(2), 8), on_one_device(pack)) < 1e-12


@st.composite
def packs(draw):
    n, half = draw(st.integers(1, 5)), draw(st.integers(1, 5))
    changes = draw(st.lists(st.booleans(), min_size=2 * n * half, max_size=2 * n * half))
    index = torch.tensor([0, *changes[1:]]).cumsum(0)
    return n, 2 * half, draw(st.sampled_from([index, None]))


@settings(max_examples=150, deadline=None)
@given(packs(), st.booleans(), st.booleans(), st.one_of(st.none(), st.integers(1, 12)))
def test_every_query_meets_each_key_that_it_sees_once(pack, zigzag, causal, window):
    n, T, index = pack
    P = n * T
    far = torch.arange(P)[:, None] - torch.arange(P)
    local = torch.ones(P, P, dtype=torch.bool) if index is None else index[:, None] == index
    if causal:
        local &= far >= 0
    if window is not None:
        local &= far.abs() < window
    met = torch.zeros(P, P, dtype=torch.int64)
    for rank in range(n):
        for step in range(n):
            for q, k in pairs(rank, T, index, Step(step, n, zigzag, causal, window, 1.0)):
                block = local[q.in_pack, k.in_pack]
                met[q.in_pack, k.in_pack] += block
                if q.start != k.start:  # the rectangle knows no documents and no future: only the window may hide
                    assert block.any(1).all()
                    reach = P if window is None else window
                    assert torch.equal(block, far[q.in_pack, k.in_pack].abs() < reach)
    assert torch.equal(met, local.long())


@pytest.mark.parametrize("n", [2, 4, 8])
def test_zigzag_gives_all_ranks_equal_work_in_each_step(n):
    how = [Step(s, n, True, True, None, 1.0) for s in range(n)]
    work = [[sum(q.length * k.length for q, k in pairs(rank, 16, None, step)) for rank in range(n)] for step in how]
    assert all(len(set(of_ranks)) == 1 for of_ranks in work)


@pytest.mark.parametrize("how", [Ring(), Ring(zigzag=False), Hybrid(2)])
def test_runs_are_what_the_order_of_tokens_deals(how):
    order = order_of(how, 4)
    T = 48 // order.ring
    held = [range(r.start, r.start + r.length) for i in range(order.ring) for r in runs(i, T, order.ring, order.zigzag)]
    assert torch.equal(torch.tensor([p for r in held for p in r]), order.order(48))


def test_bytes_are_those_of_the_messages(monkeypatch):
    n, T, G, K, V, sent = 4, 8, 2, 4, 3, []
    plain = ring.send_on

    def counted(x, group, why):
        sent.append((why, x.numel() * x.element_size()))
        return plain(x, group, why)

    monkeypatch.setattr(ring, "send_on", counted)
    on_mesh_of(make_pack(n * T, 8, G, K, V, dtype=torch.float32), Ring(), n)
    bytes_of = [sum(size for why, size in sent if why == name) for name in ("ring", "ring.T")]
    assert tuple(bytes_of) == ring_bytes(T, G, K, V, n, item=4, gradient_item=4)


def test_gradients_that_go_the_wrong_way_are_noticed(monkeypatch):
    """The planted bug: in backward the ring turns against the direction in which it knows its members' places."""
    plain = ring.shift_ranks
    pack = make_pack(32, 4, 2, 4)

    def wrong(x, shift, size, group):
        return plain(x, -shift if current_purpose() == "ring.T" else shift, size, group)

    monkeypatch.setattr(ring, "shift_ranks", wrong)
    got, wanted = on_mesh_of(pack, Ring(), 4), on_one_device(pack)
    assert difference(got[:1], wanted[:1]) < 1e-12
    assert min(difference([a], [b]) for a, b in zip(got[1:], wanted[1:], strict=True)) > 0.1


def test_under_torch_func():
    pack, mesh = make_pack(32, 4, 2, 4, lengths=(20, 12)), Mesh(sequence=4, kind="virtual")
    order = order_of(Ring(), 4)

    def local(q, k, v, grad, segments_T):
        def loss(*qkv):
            how = {"how": Ring(), "mesh": mesh, "order": order}
            return (sequence_attention(*qkv, segments_T=segments_T, **how) * grad).sum()

        return list(torch.func.grad(loss, argnums=(0, 1, 2))(q, k, v))

    got = on_ranks(local, mesh, *(shares(x, order, mesh) for x in pack))
    wanted = on_mesh_of(pack, Ring(), 4)[1:]
    for rank in range(4):
        for mine, whole in zip(got[rank], wanted, strict=True):
            torch.testing.assert_close(mine, shares(whole, order, mesh)[rank], rtol=1e-12, atol=1e-12)


def test_no_second_derivative_of_the_fast_backend():
    mesh, order = Mesh(sequence=2, kind="virtual"), order_of(Ring(), 2)

    def local(q, k, v, _grad):
        leaf = q.detach().requires_grad_()
        out = sequence_attention(leaf, k, v, how=Ring(), mesh=mesh, order=order)
        (first,) = torch.autograd.grad(out.square().sum(), leaf, create_graph=True)
        return torch.autograd.grad(first.square().sum(), leaf)

    with torch.enable_grad(), pytest.raises(NotImplementedError, match="ring attention has no second derivative"):
        on_ranks(local, mesh, *(shares(x, order, mesh) for x in make_pack(8, 2, 2, 4)[:4]))


def test_members_with_an_odd_number_of_tokens():
    group = Mesh(sequence=2, kind="virtual").group("sequence")
    q = torch.zeros(3, 2, 4)
    rule = ring.RingRule(group, True, True, None, 0.5)
    with pytest.raises(ValueError, match=r"3 tokens .* multiple of 4 tokens, or use Ring\(zigzag=False\)"):
        ring.ring_attention(q, q, q, me=torch.tensor(0), host_index_P=None, rule=rule)


def step_arguments(T, H, G, K, V, dtype, rank, how):
    generator = torch.Generator().manual_seed(0)
    q, kv, grad = (torch.randn(s, generator=generator).to(dtype) for s in ((T, H, K), (T, G, K + V), (T, H, V)))
    me = torch.tensor(rank)
    out, lse = ring_forward(q, kv, None, None, None, me, *how._replace(step=0))
    return q, kv, grad, out, lse, me


@pytest.mark.parametrize(("dtype", "V"), [(torch.float32, 32), (torch.bfloat16, 16)])
@pytest.mark.parametrize("softcap", [None, 20.0])
@pytest.mark.parametrize(("zigzag", "window"), [(True, None), (False, None), (True, 64), (False, 300)])
def test_the_declared_workspace_bounds_the_measured(dtype, V, zigzag, window, softcap):
    ops, found = torch.ops.ftrain, {"forward": [], "backward": []}
    for step in range(2):
        how = Step(step, 2, zigzag, True, window, 0.2, softcap)
        for rank in range(2):
            q, kv, grad, out, lse, me = step_arguments(1024, 4, 2, 32, V, dtype, rank, how)
            forward = (q, kv, out if step else None, lse if step else None, None, me, *how)
            backward = (grad, q, kv, out.to(dtype), lse, None, me, *how)
            for name, op, given_ in (
                ("forward", ops.ring_forward.default, forward),
                ("backward", ops.ring_backward.default, backward),
            ):
                op(*given_)
                peak, kept = measure_peak(lambda op=op, given_=given_: op(*given_))
                found[name].append((peak - kept) / WORKSPACE[f"ftrain::ring_{name}"](*given_))
    for ratios in found.values():
        assert 0.3 < max(ratios) <= 1.01


@pytest.mark.parametrize("zigzag", [True, False])
@pytest.mark.parametrize("causal", [True, False])
def test_declared_flops_are_those_of_the_busiest_rank(zigzag, causal):
    T, H, G, K, V, n = 64, 4, 2, 8, 4, 4
    for step in range(n):
        how = Step(step, n, zigzag, causal, None, 1.0)
        q, kv, grad, out, lse, me = step_arguments(T, H, G, K, V, torch.float32, 0, how)
        met = []
        for rank in range(n):
            blocks = [(q_.length * k_.length, q_.start == k_.start) for q_, k_ in pairs(rank, T, None, how)]
            met.append(sum(size / 2 if causal and square else size for size, square in blocks))
        assert FLOPS["ftrain::ring_forward"](q, kv, out, lse, None, me, *how) == 2 * H * (K + V) * max(met)
        declared = FLOPS["ftrain::ring_backward"](grad, q, kv, out, lse, None, me, *how)
        assert declared == 2 * H * (3 * K + 2 * V) * max(met)
