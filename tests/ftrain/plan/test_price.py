"""A layout priced from a few layers costs what the whole model does, and nothing is allocated for it."""

import functools
import itertools
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from experiments.decoder_plan import DecoderWorkload
from ftrain.analysis.cluster import cluster
from ftrain.analysis.simulate import Tally
from ftrain.modules.attention import AttentionConfig
from ftrain.modules.decoder import DecoderConfig
from ftrain.modules.moe import MoEConfig
from ftrain.plan.cost import Layer, Terms, count, extend, priced
from ftrain.plan.estimate import estimate, kinds_of, weights_on
from ftrain.plan.lowering import draft
from ftrain.plan.space import Candidate
from ftrain.sharding import Ring, Ulysses

HEADS = AttentionConfig(2048, heads=16, kv_heads=4, head_dim=128)
DENSE = DecoderConfig(vocab=32_768, d_model=2048, layers=4, attention=HEADS, d_hidden=8192)
EXPERTS = MoEConfig(2048, 1024, experts=16, top_k=2)
MOE = replace(DENSE, moe=EXPERTS)
H100 = cluster("h100")
CASES = {
    "dense, Ulysses": (DENSE, Candidate(2, 4, 2, 1, Ulysses(), 1, "none")),
    "dense, FSDP, recompute": (DENSE, Candidate(1, 16, 1, 1, None, 1, "layer")),
    "experts, ring, recompute": (MOE, Candidate(1, 8, 2, 1, Ring(), 1, "layer")),
}
SHARED = "dense, FSDP, recompute"
"""The case that has nothing of its own."""


def of_the_suite(*names):
    """Cases of a test: each costs seconds, so the one that has nothing of its own is exhaustive."""
    return pytest.mark.parametrize(
        "case", [pytest.param(name, marks=[pytest.mark.exhaustive] if name == SHARED else []) for name in names]
    )


def workload(cfg, **changes):
    return DecoderWorkload("small", cfg, **{"tokens": 8192, "packs": 16, "segmented": False, **changes})


@functools.cache
def terms(case, layers):
    cfg, candidate = CASES[case]
    return count(drafted(cfg, candidate, layers), spare=None)


def drafted(cfg, candidate, layers):
    share = 1 / candidate.packs_at_once(workload(cfg).model_shape)
    return draft(workload(cfg).make({"layers": layers}, candidate), candidate, H100, attention_share=share)


@of_the_suite(*CASES)
def test_a_few_layers_tell_the_price_of_all(case):
    cfg, candidate = CASES[case]
    extended = extend(terms(case, 2), Layer(terms(case, 2), terms(case, 3)), cfg.layers - 2)
    few, whole = (priced(t, candidate, workload(cfg).model_shape, H100) for t in (extended, terms(case, cfg.layers)))
    for figure in ("compute", "communication", "state"):
        assert getattr(few, figure) == pytest.approx(getattr(whole, figure), rel=0.02), figure
    assert few.sent == pytest.approx(whole.sent, rel=0.02)
    # what the schedule does is not a sum over layers: how far ahead it gathers, what it finds to hide messages behind
    assert few.seconds == pytest.approx(whole.seconds, rel=0.05)
    assert few.peak == pytest.approx(whole.peak, rel=0.06)


@of_the_suite("dense, Ulysses", "dense, FSDP, recompute")
def test_memory_is_a_line_before_communication_is_hidden(case):
    found = extend(terms(case, 2), Layer(terms(case, 2), terms(case, 3)), 2)
    assert max(found.plain.values()) == pytest.approx(max(terms(case, 4).plain.values()), rel=0.005)


def test_shares_of_the_peak():
    """MFU is of the model's FLOPs, not of the program's; without causal masks attention counts twice."""
    case = "experts, ring, recompute"
    cfg, candidate = CASES[case]
    model, p = workload(cfg).model_shape, priced(terms(case, 4), candidate, workload(cfg).model_shape, H100)
    assert p.tokens_per_second * p.seconds * candidate.ranks == pytest.approx(model.tokens * model.packs)
    assert p.mfu * H100.bf16 == pytest.approx(p.tokens_per_second * (model.weight_flops + model.attention_flops / 2))
    assert p.mfu_full * H100.bf16 == pytest.approx(p.tokens_per_second * (model.weight_flops + model.attention_flops))
    assert p.seconds >= p.compute


@pytest.mark.parametrize(
    "case",
    [pytest.param(case, marks=[] if case == "experts, ring, recompute" else pytest.mark.exhaustive) for case in CASES],
)
def test_memory_to_spare_never_makes_a_step_longer(case):
    """Within a percent: orders are compared before their ops are fused."""
    cfg, candidate = CASES[case]
    one = drafted(cfg, candidate, 3)
    found = [count(one, spare=spare) for spare in (0, 2**28, 2**30, 2**34)]
    steps = [t.tally.step for t in found]
    assert all(after <= 1.01 * before for before, after in itertools.pairwise(steps))


def test_a_step_is_as_long_as_its_busiest_link():
    """A schedule of few layers may find more to hide messages behind than there is."""
    case = "dense, Ulysses"
    cfg, candidate = CASES[case]
    found = terms(case, 2)
    slow = replace(found, tally=replace(found.tally, links={"network": 1e9}))
    assert priced(slow, candidate, workload(cfg).model_shape, H100).seconds == 1e3


@given(st.integers(1, 100), *[st.floats(0, 1e6)] * 3)
def test_extension_is_a_line(layers, start, each, other):
    def line(n):
        t = start + n * each
        plain = {("forward", ""): t, ("backward", ""): other}
        return Terms(Tally(t, t, other, 0.0), {"x": t}, t, plain, {kind: size + 1 for kind, size in plain.items()})

    found, expected = extend(line(2), Layer(line(2), line(3)), layers), line(2 + layers)
    assert found.peaks == pytest.approx(expected.peaks, rel=1e-6, abs=1e-3)
    assert found.inputs == pytest.approx(expected.inputs, rel=1e-6, abs=1e-3)
    assert found.tally.step == pytest.approx(expected.tally.step, rel=1e-6, abs=1e-3)


@of_the_suite(*CASES)
def test_an_estimate_has_the_state_and_less_than_all_memory_and_time(case):
    cfg, candidate = CASES[case]
    this = workload(cfg)
    weights = weights_on(kinds_of(this, candidate), this.make(this.stacks, candidate).plan(candidate))
    guess = estimate(candidate, weights, this.model_shape, H100)
    whole = priced(terms(case, cfg.layers), candidate, this.model_shape, H100)
    assert weights.state == pytest.approx(whole.state, rel=0.01)
    assert guess.memory < whole.peak
    assert whole.seconds / 4 < guess.seconds < 1.05 * whole.seconds
