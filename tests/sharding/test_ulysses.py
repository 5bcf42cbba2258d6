"""Ulysses: heads for tokens and back, with as few key/value heads on the way as queries read."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ftrain.sharding import collectives
from ftrain.sharding.batch import TokenOrder
from ftrain.sharding.layout import Ulysses
from ftrain.sharding.mesh import Mesh
from ftrain.sharding.ulysses import Heads, repeated_kv_bytes, tokens_to_heads, ulysses_bytes
from tests.helpers.ranks import on_ranks
from tests.helpers.sequence_cases import difference, make_pack, on_mesh_of, on_one_device

HEADS = [(8, 8), (8, 4), (8, 2), (4, 1), (12, 3), (12, 6)]


@pytest.mark.parametrize("n", [2, 4])
@pytest.mark.parametrize(("H", "G"), HEADS)
@pytest.mark.parametrize(
    ("causal", "window", "lengths"),
    [(True, None, None), (True, None, (3, 13, 1, 20, 11)), (False, None, (30, 18)), (True, 5, (30, 18))],
)
def test_equals_attention_of_the_whole_pack(n, H, G, causal, window, lengths):
    pack, rule = make_pack(48, H, G, 4, lengths=lengths), {"causal": causal, "window": window}
    assert difference(on_mesh_of(pack, Ulysses(), n, **rule), on_one_device(pack, **rule)) < 1e-12


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-6), (torch.bfloat16, 1e-2)])
def test_in_lower_precision(dtype, tolerance):
    pack = make_pack(32, 8, 2, 8, lengths=(20, 12), dtype=dtype)
    assert difference(on_mesh_of(pack, Ulysses(), 4), on_one_device(pack)) < tolerance


def test_values_of_another_width_and_a_scale():
    pack = make_pack(32, 4, 2, 6, 3, lengths=(20, 12))
    assert difference(on_mesh_of(pack, Ulysses(), 4, scale=0.3), on_one_device(pack, scale=0.3)) < 1e-12


def test_tokens_in_the_zigzag_order_of_another_components_ring():
    pack = make_pack(32, 4, 2, 4, lengths=(20, 12))
    got = on_mesh_of(pack, Ulysses(), 4, order=TokenOrder(4, 2, zigzag=True))
    assert difference(got, on_one_device(pack)) < 1e-12


@settings(max_examples=200, deadline=None)
@given(st.integers(1, 4), st.integers(1, 6), st.integers(1, 8))
def test_every_rank_is_sent_the_heads_that_it_reads_and_no_rank_needs_more(each, G, R):
    heads = Heads(G * R, G, next(n for n in range(each, 0, -1) if G * R % n == 0))
    read = []
    for rank in range(heads.n):
        reads = {(rank * heads.queries + t) // R for t in range(heads.queries)}
        assert reads <= set(range(heads.start(rank), heads.start(rank) + heads.keys)) <= set(range(G))
        read.append(len(reads))
    assert heads.keys == max(read)


@pytest.mark.parametrize(("H", "G"), HEADS)
def test_bytes_are_those_of_the_messages(H, G, monkeypatch):
    n, T, K, V, sent = 4, 8, 6, 4, []
    plain = collectives._AllToAll.apply

    def counted(x, *rest):
        sent.append(x.numel() * x.element_size() * (n - 1) // n)
        return plain(x, *rest)

    monkeypatch.setattr(collectives._AllToAll, "apply", counted)
    on_mesh_of(make_pack(n * T, H, G, K, V), Ulysses(), n)
    assert len(sent) == 4  # one message there and one back, and their transposes
    assert sum(sent[:2]) == sum(sent[2:]) == ulysses_bytes(T, H, G, K, V, n, item=8)


@pytest.mark.parametrize(("H", "G", "n", "share"), [(8, 8, 4, 1), (8, 2, 4, 1), (16, 1, 8, 1), (12, 3, 4, 20 / 24)])
def test_bytes_next_to_repeated_key_heads(H, G, n, share):
    """Repeating only as far as ranks divide costs the same; where they do not divide it costs more."""
    mine, theirs = (f(64, H, G, 16, 16, n, item=2) for f in (ulysses_bytes, repeated_kv_bytes))
    assert mine == pytest.approx(share * theirs)


@pytest.mark.parametrize(("H", "G", "copies"), [(8, 2, 0), (12, 6, 2), (8, 8, 0)])
def test_heads_are_picked_by_rank_only_where_the_usual_map_does_not_hold(H, G, copies):
    mesh, heads, picked = Mesh(sequence=4, kind="virtual"), Heads(H, G, 4), []

    def local(q, k, v):
        out = tokens_to_heads(q, k, v, heads=heads, me=torch.tensor(1), group=mesh.group("sequence"))
        picked.append(sum(x.shape[1] == heads.queries != heads.keys for x in out[1:]))
        return list(out)

    pack = make_pack(8, H, G, 4)
    on_ranks(local, mesh, *([x] * 4 for x in pack[:3]))
    assert picked == [copies]


def test_a_wrong_transpose_is_noticed(monkeypatch):
    """Were the exchange its own transpose only up to the order of ranks, gradients would not agree."""
    right = collectives._AllToAll.backward

    def wrong(ctx, grad):
        return right(ctx, grad.roll(1, 0))

    monkeypatch.setattr(collectives._AllToAll, "backward", staticmethod(wrong))
    pack = make_pack(32, 4, 2, 4)
    got, wanted = on_mesh_of(pack, Ulysses(), 4), on_one_device(pack)
    assert difference(got[:1], wanted[:1]) < 1e-12
    assert difference(got[1:], wanted[1:]) > 0.1


def test_heads_that_do_not_divide():
    with pytest.raises(ValueError, match=r"foundation: 6 query heads .* 4 ranks .* Hybrid\(ulysses=2\), Ring\(\)"):
        on_mesh_of(make_pack(16, 6, 2, 4), Ulysses(), 4, component="foundation")
