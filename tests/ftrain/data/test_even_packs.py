"""Packs of one step are alike in what encoders compute of their media and in what the decoder does, at once."""

import numpy as np
import pytest

from ftrain.data.even_packs import even_plan, evened
from ftrain.data.layout import PackLayout, Stream
from ftrain.data.packing import Packing, plan_packs
from ftrain.data.row_plan import RowGroup

PACKS, TOKENS = 16, 4096


def stream(seed, groups=600):
    """Lengths, of which a part of the groups has films, and costs of a decoder and an encoder."""
    rng = np.random.default_rng(seed)
    text_N = np.exp(rng.normal(4.5, 0.8, groups)).astype(np.int64).clip(8, 1000)
    media_N = np.where(rng.random(groups) < 0.6, np.exp(rng.normal(5.5, 0.8, groups)), 0).astype(np.int64).clip(0, 2000)
    lengths_N = text_N + media_N
    return lengths_N, np.stack([lengths_N * (1 + lengths_N / 20_000), media_N * (1 + media_N / 3000)], 1)


def heights(pack_N, costs_NK):
    sums_PK = np.stack([costs_NK[pack_N == pack].sum(0) for pack in range(PACKS)])
    return sums_PK.max(0) / sums_PK.mean(0) - 1


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_both_costs_are_even_and_packs_are_full(seed):
    lengths_N, costs_NK = stream(seed)
    first = plan_packs(lengths_N, costs_NK[:, 0], tokens=TOKENS, packs=PACKS)
    late_N = np.zeros(len(lengths_N), bool)
    late_N[5] = first.pack_N[5] >= 0
    plan = even_plan(first, lengths_N, costs_NK, late_N)
    assert heights(first.pack_N, costs_NK)[1] > 0.1
    assert (heights(plan.pack_N, costs_NK) < 0.05).all()
    assert plan.tokens_P.max() <= TOKENS
    assert plan.tokens_P.sum() > 0.98 * TOKENS * PACKS
    assert plan.pack_N[0] >= 0
    assert not late_N[5] or plan.pack_N[5] >= 0
    for pack in range(PACKS):
        assert plan.tokens_P[pack] == lengths_N[plan.pack_N == pack].sum()


def test_what_cannot_be_evener_stays():
    lengths_N, alone = np.array([4, 4]), np.array([0, 1])
    assert evened(alone, lengths_N, np.array([[4.0, 9], [4, 0]]), tokens=4, packs=2).tolist() == [0, 1]
    assert evened(np.array([0, 0]), lengths_N, np.ones((2, 2)), tokens=8, packs=1).tolist() == [0, 0]


def test_an_encoder_counts_pieces_that_stand_side_by_side():
    tokens_n = np.array([7, 7, 1, 7, 2, 2, 7])
    assert Stream(7, 1, dict, quadratic=0.5).seen(tokens_n) == (4 + 0.5 * (4 + 1 + 1), 2)
    assert Stream(7, 1, dict, piece=1).seen(tokens_n) == (4, 1)
    assert Stream(9, 1, dict, quadratic=0.5).seen(tokens_n) == (0, 0)


def test_the_layout_of_packs_with_media_is_even():
    lengths_N, costs_NK = stream(3)
    rows = [RowGroup(int(n), 0, (int(s),), 1, float(s)) for n, s in zip(lengths_N, costs_NK[:, 1], strict=True)]
    packing = Packing(TOKENS, ranks=PACKS)
    plan = PackLayout((Stream(7, 1, dict),)).plan(rows, costs_NK[:, 0], np.zeros(len(rows), np.int64), packing)
    assert (heights(plan.pack_N, costs_NK) < 0.05).all()
    assert plan.shape.media[0] >= max(costs_NK[plan.pack_N == pack, 1].sum() for pack in range(PACKS))
