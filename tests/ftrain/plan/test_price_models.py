"""What prices of whole models say: nothing is allocated, links matter, packs do not see each other."""

from dataclasses import replace

import pytest

from experiments.decoder_plan import DecoderWorkload
from ftrain.analysis.cluster import cluster
from ftrain.modules.attention import AttentionConfig
from ftrain.modules.decoder import DecoderConfig
from ftrain.plan.cost import price
from ftrain.plan.space import Candidate

HEADS = AttentionConfig(2048, heads=16, kv_heads=4, head_dim=128)
DENSE = DecoderConfig(vocab=32_768, d_model=2048, layers=1, attention=HEADS, d_hidden=8192)
H100 = cluster("h100")


def workload(cfg, **changes):
    return DecoderWorkload("small", cfg, **{"tokens": 8192, "packs": 16, "segmented": False, **changes})


def test_nothing_is_allocated():
    """A model of 400 billion weights on 1,024 GPUs, in a process of a few GB."""
    heads = AttentionConfig(16384, heads=128, kv_heads=8, head_dim=128)
    large = DecoderConfig(vocab=128_256, d_model=16384, layers=126, attention=heads, d_hidden=53248)
    found = price(workload(large, packs=1024), Candidate(1, 1024, 1, 1, None, 1, "layer"), H100)
    assert found.state == pytest.approx(405e9 * 12 / 1024, rel=0.02)  # float32 weights and two moments


def test_slower_links_make_slower_steps():
    candidate = Candidate(1, 16, 1, 1, None, 1, "none")
    fast, slow = (price(workload(DENSE), candidate, replace(H100, network=rate)) for rate in (50e9, 5e8))
    assert fast.compute == pytest.approx(slow.compute, rel=0.05)  # joining small messages copies them
    assert slow.seconds > 5 * fast.seconds
    assert slow.exposed > 0.8 * slow.seconds > fast.exposed


def test_packs_of_one_rank_do_not_see_each_other():
    """A rank with four packs computes four squares, not one of sixteen times the size."""
    candidate = Candidate(1, 4, 1, 1, None, 1, "none")
    one, four = (price(workload(DENSE, tokens=t, packs=p), candidate, H100) for t, p in ((32768, 4), (8192, 16)))
    assert four.compute < one.compute
    assert four.peak == pytest.approx(one.peak, rel=0.01)
