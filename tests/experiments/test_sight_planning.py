"""Models that see are searched on paper: at any published size, on any layout, without memory."""

from dataclasses import replace
from pathlib import Path

import pytest

from experiments.bench.plan_vs_published import PLANS
from experiments.sight_plan import PUBLISHED, SightWorkload, components, described
from ftrain.analysis.cluster import GIB, cluster
from ftrain.analysis.meter import measure_peak
from ftrain.cli.plan import load_workload
from ftrain.modules import spec, vision_language
from ftrain.modules.attention import AttentionConfig
from ftrain.modules.decoder import DecoderConfig
from ftrain.modules.pictures import MediaConfig
from ftrain.modules.vision_language import VisionLanguageConfig
from ftrain.modules.vision_tower import TowerConfig
from ftrain.plan.cost import count
from ftrain.plan.file import load_plan
from ftrain.plan.lowering import draft
from ftrain.plan.space import Candidate
from ftrain.sharding import Ulysses

FILE = Path(__file__).resolve().parents[2] / "experiments/sight_plan.py"
HEADS = AttentionConfig(64, heads=4, kv_heads=2, head_dim=16, rope_sections=(4, 2, 2))
TOWER = TowerConfig(32, layers=2, heads=2, d_hidden=64, d_out=64, window=4, full_layers=(1,))
TINY = VisionLanguageConfig(
    DecoderConfig(256, 64, layers=2, attention=HEADS, d_hidden=128), MediaConfig(TOWER, image=1, video=2)
)


def test_published_sizes_have_as_many_parameters_as_they_should():
    wanted = {
        "qwen2-vl-7b": 8_291_375_616,
        "qwen2-vl-72b": 73_405_560_320,
        "qwen2.5-vl-7b": 8_292_166_656,
        "qwen3-vl-30b-a3b": 31_070_754_032,
        "qwen3-vl-235b-a22b": 235_670_022_896,
        "qwen3.5-9b": 9_409_813_744,
        "qwen3.5-35b-a3b": 35_107_181_936,
        "qwen3-omni-30b-a3b": 31_719_205_488,
    }
    assert {size: spec.count(vision_language.specs(described(size))) for size in PUBLISHED} == wanted


def test_the_experiment_offers_them():
    workload = load_workload(FILE, 192 * 1024, 16, "qwen2-vl-7b")
    assert (workload.model_shape.heads, dict(workload.stacks)) == (28, {"text": 28, "vision": 32})
    with pytest.raises(ValueError, match="--size 1b is not one of qwen2-vl-7b, "):
        load_workload(FILE, 1024, 1, "1b")


def test_layers_that_differ_are_priced_by_the_turn():
    """Three delta nets and an attention are a turn of Qwen3.5."""
    workload = SightWorkload("hybrid", described("qwen3.5-9b"), tokens=1024, packs=1)
    assert dict(workload.stacks) == {"text": 8, "vision": 27}
    assert workload.model_shape.attention_flops == 12 * 1024 * 16 * 256 * 8
    found = [workload.shallow({"text": 1, "vision": 1}).text.own(i).specs(1.0)["attention"] for i in range(4)]
    assert ["conv_C1X" in layer for layer in found] == [True, True, True, False]


def test_a_layout_is_counted_and_nothing_is_allocated():
    workload, found = SightWorkload("tiny", TINY, tokens=64 * 1024, packs=2), []
    candidate = Candidate(1, 2, 1, 1, None, 1, "none")

    def counted():
        work = workload.make({"text": 1, "vision": 1}, candidate)
        found.append(count(draft(work, candidate, cluster("h100")), spare=None))

    assert measure_peak(counted).peak < 1e6
    assert max(found[0].peaks.values()) > 1e8
    whole = workload.shallow(workload.stacks)
    assert whole.media.tower == TOWER
    assert workload.shallow({"text": 1, "vision": 1}).media.tower.full_layers == ()


def test_parts_of_the_model_have_layouts_of_their_own():
    alone = Candidate(1, 4, 1, 4, None, 1, "none")
    within = replace(alone, sequence=2, attention=Ulysses())
    assert list(components(alone)) == ["vision"]
    assert components(within)["text.layers.*.attention"].parameters == ("sequence",)
    assert components(within)["vision"].sequence is None


@pytest.mark.parametrize("file", sorted(PLANS.glob("*.json")), ids=lambda file: file.stem)
def test_a_plan_that_was_found_fits_and_is_one_of_its_model(file):
    plan = load_plan(file)
    assert plan.workload in PUBLISHED
    assert plan.candidate.ranks == 128
    assert plan.predicted["peak_bytes"] < 0.95 * cluster(plan.cluster).memory < 76 * GIB
