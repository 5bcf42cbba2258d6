"""Experts of any network: a loop over tokens, and transformers' own modules, values and gradients."""

import gc
import weakref
from functools import partial

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ftrain.kernels.experts import experts, experts_swiglu, swiglu_ffn
from ftrain.kernels.primitive import bind
from tests.helpers.expert_networks import biased, biased_row, biased_shapes, network_of

D, F = 3, 5


def random(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).requires_grad_()


def layer(T, K, E):
    """Tokens, weights of choices, a captured scale, leaves."""
    return random(T, D), random(T, K, seed=1), random(D, seed=2), *(random(*s, seed=3) for s in biased_shapes(E, D, F))


def token_by_token(x, expert, weights, scale, leaves):
    rows = [
        sum(weights[t, k] * biased_row(x[t], leaves, int(expert[t, k]), scale) for k in range(expert.shape[1]))
        for t in range(len(x))
    ]
    return torch.stack(rows)


@st.composite
def routings(draw):
    tokens, held = draw(st.integers(1, 9)), draw(st.integers(1, 6))
    choices = draw(st.integers(1, held))
    used = draw(st.lists(st.integers(0, held - 1), min_size=1, max_size=held))  # the others stay empty
    slots = draw(st.lists(st.sampled_from(used), min_size=tokens * choices, max_size=tokens * choices))
    dtype = draw(st.sampled_from([torch.int64, torch.int32]))
    return torch.tensor(slots, dtype=dtype).view(tokens, choices), held


@given(routings())
@settings(deadline=None, max_examples=40)
def test_any_routing_is_a_loop_over_tokens(routing):
    expert, held = routing
    tensors = layer(*expert.shape, held)
    x, weights, scale, *leaves = tensors
    found = experts(x, expert, weights, leaves, biased(scale))
    expected = token_by_token(x, expert, weights, scale, leaves)
    torch.testing.assert_close(found, expected)
    seed = torch.linspace(-1, 1, found.numel(), dtype=found.dtype).view_as(found)
    for got, want in zip(*(torch.autograd.grad(y, tensors, seed) for y in (found, expected)), strict=True):
        torch.testing.assert_close(got, want)


def test_no_tokens():
    x, weights, scale, *leaves = layer(0, 2, 4)
    out = experts(x, torch.zeros(0, 2, dtype=torch.int64), weights, leaves, biased(scale))
    assert out.shape == (0, D)
    assert all(not g.any() for g in torch.autograd.grad(out.sum(), leaves))


def test_the_network_is_told_which_expert_each_row_belongs_to():
    told = []

    def ffn(rows_ND, offsets_E, expert_N, leaves):
        told.append((rows_ND.flatten().tolist(), offsets_E, expert_N, leaves))
        return rows_ND

    x, leaf = torch.tensor([[1.0], [2.0], [3.0]]), torch.zeros(4, 2)
    experts(x, torch.tensor([[3, 0], [0, 1], [3, 3]]), torch.ones(3, 2), [leaf], ffn)
    ((rows, offsets, expert, leaves),) = told
    assert rows == [1.0, 2.0, 2.0, 1.0, 3.0, 3.0]
    assert (offsets.dtype, offsets.tolist()) == (torch.int32, [2, 3, 3, 6])
    assert (expert.dtype, expert.tolist()) == (torch.int64, [0, 0, 1, 3, 3, 3])
    assert leaves == (leaf,)


def test_swiglu_is_one_of_the_networks():
    x, weights, w_gate, w_up = random(6, D), random(6, 2, seed=1), random(4, D, F, seed=2), random(4, D, F, seed=3)
    expert, w_down = torch.tensor([[0, 1], [3, 0], [1, 1], [2, 3], [0, 0], [3, 2]]), random(4, F, D, seed=4)
    found = experts(x, expert, weights, (w_gate, w_up, w_down), swiglu_ffn)
    assert torch.equal(found, experts_swiglu(x, expert, weights, w_gate, w_up, w_down))


def test_the_width_of_a_result_may_be_another():
    out = experts(
        torch.ones(4, 2),
        torch.zeros(4, 1).long(),
        torch.ones(4, 1),
        [torch.ones(3)],
        lambda rows, *_: rows.repeat(1, 3),
    )
    assert out.shape == (4, 6)


def test_results_repeat_to_the_bit():
    x, weights, scale, *leaves = (t.detach().float().requires_grad_() for t in layer(500, 2, 8))
    expert = torch.randint(0, 8, (500, 2), generator=torch.Generator().manual_seed(0))
    once, again = (
        torch.autograd.grad(experts(x, expert, weights, leaves, biased(scale)).sum(), (x, weights, scale, *leaves))
        for _ in range(2)
    )
    assert all(torch.equal(a, b) for a, b in zip(once, again, strict=True))


def test_a_plan_can_rebind_the_experts():
    with bind({"experts": lambda x, *rest, **options: x}):
        assert experts_swiglu(torch.ones(1), *[torch.ones(1)] * 5).tolist() == [1.0]


def test_the_network_is_not_kept():
    class Network:
        def __call__(self, rows, offsets, expert, leaves):
            return rows * leaves[0].sum()

    network, leaf = Network(), torch.ones(2, 1, requires_grad=True)
    gone = weakref.ref(network)
    out = experts(torch.ones(2, 1), torch.tensor([[0], [1]]), torch.ones(2, 1), [leaf], network)
    del network
    gc.collect()
    assert gone() is None
    out.sum().backward()


def sizes(**fields):
    return {
        "hidden_size": 8,
        "intermediate_size": 6,
        "moe_intermediate_size": 6,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "num_key_value_heads": 2,
        **fields,
    }


def gpt_oss():
    from transformers.models.gpt_oss.modeling_gpt_oss import GptOssConfig, GptOssExperts

    return GptOssExperts(GptOssConfig(**sizes(num_local_experts=4)))


def mixtral():
    from transformers.models.mixtral.modeling_mixtral import MixtralConfig, MixtralExperts

    return MixtralExperts(MixtralConfig(**sizes(num_local_experts=4)))


def nemotron_h():
    from transformers.models.nemotron_h.modeling_nemotron_h import NemotronHConfig, NemotronHExperts

    return NemotronHExperts(NemotronHConfig(hidden_size=8, moe_intermediate_size=6, n_routed_experts=4))


def aria():
    from transformers.models.aria.modeling_aria import AriaExperts, AriaTextConfig

    return AriaExperts(AriaTextConfig(**sizes(moe_num_experts=4)))


def muse_spark():
    from transformers.models.muse_spark.modeling_muse_spark import MuseSparkExperts, MuseSparkTextConfig

    return MuseSparkExperts(MuseSparkTextConfig(**sizes(num_local_experts=4, moe_hidden_size=8)))


@pytest.mark.parametrize("make", [gpt_oss, mixtral, nemotron_h, aria, muse_spark])
def test_equals_the_module_of_transformers(make):
    pytest.importorskip("transformers")
    module = make().double()
    module.config._experts_implementation = "eager"
    for i, p in enumerate(module.parameters()):
        torch.nn.init.normal_(p, generator=torch.Generator().manual_seed(i))
    # MuseSpark's norm is float32
    tolerance = {"rtol": 1e-5, "atol": 1e-4} if module.has_post_expert_norm else {}
    names, ffn = network_of(module)
    leaves = [module.get_parameter(name) for name in names]
    x, weights = random(9, 8), random(9, 2, seed=1)
    expert = torch.stack([torch.randperm(4, generator=torch.Generator().manual_seed(t))[:2] for t in range(9)])
    found, expected = experts(x, expert, weights, leaves, ffn), module(x, expert, weights)
    torch.testing.assert_close(found, expected, **tolerance)
    seed = torch.linspace(-1, 1, found.numel(), dtype=found.dtype).view_as(found)
    tensors = (x, weights, *module.parameters())  # the norm's scale is captured
    for got, want in zip(*(torch.autograd.grad(y, tensors, seed) for y in (found, expected)), strict=True):
        torch.testing.assert_close(got, want, **tolerance)


CALL = partial(experts, torch.ones(2, 3), torch.tensor([[0], [1]]), torch.ones(2, 1))


@pytest.mark.parametrize(
    ("leaves", "ffn", "message"),
    [
        ([], lambda rows, *_: rows, "count the experts, one number for all; got no leaf"),
        ([torch.ones(2, 3), torch.ones(4, 3)], lambda rows, *_: rows, r"got \[2, 3\], \[4, 3\] .* 'expert'"),
        ([torch.ones(())], lambda rows, *_: rows, r"got \[\]"),
        ([torch.ones(2)], lambda rows, *_: rows[:1], r"rows \[2, 3\] that it was given, not \[1, 3\]"),
        ([torch.ones(2)], lambda rows, *_: rows.sum(1), r"not \[2\]"),
    ],
)
def test_what_does_not_fit_is_named(leaves, ffn, message):
    with pytest.raises(ValueError, match=message):
        CALL(leaves, ffn)
