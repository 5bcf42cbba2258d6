"""Every legal layout is generated once, and what is not legal is said with its reason."""

from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ftrain.plan.space import (
    Candidate,
    ModelShape,
    Space,
    as_dict,
    divisors,
    from_dict,
    grouped,
    layouts,
)
from ftrain.sharding import Hybrid, Layout, Mesh, Plan, Ring, Ulysses

SHAPE = ModelShape(
    tokens=4096, packs=64, layers=4, d_model=64, heads=8, kv_heads=2, head_dim=8, weight_flops=1.0, attention_flops=1.0
)
MOE = replace(SHAPE, experts=16, top_k=2)


def test_two_ranks_of_a_dense_model():
    found, rejected = layouts(2, replace(SHAPE, packs=2), Space(remats=("none",)))
    assert [str(c) for c in found] == [
        "replicate 1 x shard 1 x sequence 2 ulysses, remat none",
        "replicate 1 x shard 1 x sequence 2 ulysses, 2 micro-batches, remat none",
        "replicate 1 x shard 1 x sequence 2 ring, remat none",
        "replicate 1 x shard 1 x sequence 2 ring, 2 micro-batches, remat none",
        "replicate 1 x shard 2 x sequence 1, remat none",
        "replicate 2 x shard 1 x sequence 1, remat none",
    ]
    assert rejected == []


@settings(deadline=None)
@given(st.sampled_from([1, 2, 6, 8, 12, 16]), st.sampled_from([SHAPE, MOE]))
def test_each_is_legal_and_there_once(ranks, model):
    found, _ = layouts(ranks, model)
    assert len(set(found)) == len(found)
    for c in found:
        assert c.replicate * c.shard * c.sequence == c.ranks == ranks
        assert c.packs_at_once(model) * c.micro_batches * c.replicate * c.shard == model.packs
        assert c.local_tokens(model) * ranks * c.micro_batches == model.tokens * model.packs
        assert Plan(c.mesh(), c.layout).mesh == Mesh(c.replicate, c.shard, c.sequence, c.expert, "fake")
        assert (c.attention is None) == (c.sequence == 1)


@settings(deadline=None)
@given(st.sampled_from([4, 8, 16]))
def test_nothing_legal_is_left_out(ranks):
    """Counted by a plain loop over all combinations."""
    found, _ = layouts(ranks, MOE, Space(remats=("none",), rings=False))
    expected = set()
    for r in range(1, ranks + 1):
        for d in range(1, ranks + 1):
            for s in range(1, ranks + 1):
                for e in range(1, ranks + 1):
                    for m in range(1, 65):
                        fits = r * d * s == ranks and (d * s) % e == 0 and 16 % e == 0 and 64 % (r * d * m) == 0
                        if fits and (s == 1 or 8 % s == 0):
                            expected.add((r, d, s, e, m))
    assert {(c.replicate, c.shard, c.sequence, c.expert, c.micro_batches) for c in found} == expected


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"heads": 6}, "6 query heads do not divide over 4 ranks of Ulysses"),
        ({"tokens": 4094}, "a pack of 4094 tokens does not divide into 4 chunks"),
        ({"packs": 2}, "2 packs in a step are fewer than replicate x shard = 4 data ranks"),
        ({"packs": 6}, "6 packs in a step do not divide over replicate x shard = 4 data ranks"),
        ({"experts": 6, "top_k": 2}, "6 experts do not divide over 4 ranks"),
    ],
)
def test_reasons(change, reason):
    _, rejected = layouts(4, replace(SHAPE, **change))
    assert reason in {r.reason for r in rejected}
    assert all(r.number > 0 for r in rejected)


def test_rejections_with_one_reason_are_joined():
    _, rejected = layouts(16, replace(SHAPE, packs=8))
    rows = list(grouped(rejected))
    assert len({r.reason for r in rows}) == len(rows)
    assert sum(r.number for r in rows) == sum(r.number for r in rejected)


@pytest.mark.parametrize("attention", [None, Ulysses(), Ring(), Hybrid(2)], ids=str)
@pytest.mark.parametrize("remat", ["layer", 200.0])
def test_a_layout_is_plain_data_and_back(attention, remat):
    candidate = Candidate(1, 2, 4, 8, attention, 2, remat)
    assert from_dict(as_dict(candidate)) == candidate
    assert candidate.layout == Layout(sequence=attention or Ulysses())


@pytest.mark.parametrize(
    ("change", "message"),
    [({"attention": "spiral"}, "'spiral' is not 'ulysses'"), ({"depth": 3}, r"a layout has the keys .*got .*depth")],
)
def test_bad_data_is_named(change, message):
    with pytest.raises(ValueError, match=message):
        from_dict({**as_dict(Candidate(1, 2, 4, 8, Ring(), 2, "none")), **change})


@given(st.integers(1, 3000))
def test_divisors(n):
    assert divisors(n) == [i for i in range(1, n + 1) if n % i == 0]
    assert divisors(0) == []
