"""Wan is searched on paper: its workload, at any size, on any layout, without memory."""

from pathlib import Path

import pytest

from experiments.wan_plan import WanWorkload, forward_flops
from ftrain.analysis.cluster import cluster
from ftrain.analysis.meter import measure_peak
from ftrain.cli.plan import load_workload
from ftrain.modules.families.wan_config import config
from ftrain.plan.cost import count
from ftrain.plan.lowering import draft
from ftrain.plan.space import Candidate
from tests.helpers.tiny_wan import TINY

FILE = Path(__file__).resolve().parents[2] / "experiments/wan_plan.py"


def test_the_experiment_offers_every_published_size():
    workload = load_workload(FILE, 75_600, 1)
    assert (workload.name, workload.model_shape.heads, workload.stacks) == ("Wan 2.1-t2v-14b", 40, {"layers": 40})
    shape = workload.model_shape
    # three forward passes of a clip of 81 frames of 720 x 1280, with all of attention
    assert (shape.weight_flops + shape.attention_flops) * 75_600 == pytest.approx(19.570e15, rel=1e-4)
    assert not shape.causal
    assert load_workload(FILE, 32_760, 8, "2.2-ti2v-5b").model_shape.d_model == 3072
    with pytest.raises(ValueError, match="--size 1b is not one of "):
        load_workload(FILE, 1024, 1, "1b")


def test_a_layout_is_counted_and_nothing_is_allocated():
    cfg = config({**TINY, "num_layers": 1})
    workload = WanWorkload("tiny", cfg, tokens=64 * 1024, packs=2)
    found = []
    candidate = Candidate(1, 2, 1, 1, None, 1, "none")

    def counted():
        found.append(count(draft(workload.make({"layers": 1}, candidate), candidate, cluster("h100")), spare=None))

    assert measure_peak(counted).peak < 1e6
    assert max(found[0].peaks.values()) > 1e8
    products, attention = forward_flops(cfg, workload.tokens)
    assert attention > products
