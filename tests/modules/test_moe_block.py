"""The mixture of experts against a loop over tokens, and its two ways of balancing.

Legend: T tokens, D width, E experts, K experts per token.
"""

import dataclasses
import zlib

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.fx.experimental.proxy_tensor import make_fx

from ftrain.kernels import random
from ftrain.kernels.primitive import bind
from ftrain.modules import moe, spec
from ftrain.modules.moe import MoEConfig

T, D = 24, 12
PLAIN = MoEConfig(D, 10, experts=6, top_k=2)


def params_of(cfg, seed=0):
    def draw(path, leaf):
        return random.normal(random.fold_in(random.key(seed), zlib.crc32(path.encode())), leaf.shape, std=0.4)

    return spec.map_with_paths(draw, moe.specs(cfg))


def inputs(seed=1):
    return random.normal(random.key(seed), (T, D))


def one_expert(x, gate, up, down):
    return (F.silu(x @ gate) * (x @ up)) @ down


def moe_by_hand(p, x, cfg, bias_E=None):
    """One token at a time, in the order of the definition: output, and tokens per expert."""
    out, load_E = [], torch.zeros(cfg.experts)
    for x_D in x:
        logits_E = x_D @ p["w_router_DE"]
        score_E = logits_E.softmax(-1) if cfg.score == "softmax" else logits_E.sigmoid()
        order = sorted(range(cfg.experts), key=lambda e: -(score_E[e] + (0 if bias_E is None else bias_E[e])).item())
        chosen = order[: cfg.top_k]
        load_E[chosen] += 1
        total = sum(score_E[e] for e in chosen) if cfg.normalize else 1.0
        y_D = torch.zeros(D)
        for e in chosen:
            expert = (p["w_gate_EDF"][e], p["w_up_EDF"][e], p["w_down_EFD"][e])
            y_D = y_D + cfg.scale * score_E[e] / total * one_expert(x_D, *expert)
        if cfg.shared_experts:
            y_D = y_D + one_expert(x_D, *(p["shared"][w] for w in ("w_gate_DF", "w_up_DF", "w_down_FD")))
        out.append(y_D)
    return torch.stack(out), load_E


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"normalize": False},
        {"score": "sigmoid", "scale": 2.5},
        {"score": "sigmoid", "normalize": False},
        {"shared_experts": 2},
        {"top_k": 6},
        {"top_k": 1, "experts": 1},
    ],
    ids=str,
)
def test_it_is_its_definition(options):
    cfg = dataclasses.replace(PLAIN, **options)
    params, x = params_of(cfg), inputs()
    out, stats = moe.apply(params, x, cfg=cfg)
    expected, load_E = moe_by_hand(params, x, cfg)
    torch.testing.assert_close(out, expected)
    assert torch.equal(stats.load_E, load_E)
    assert stats.count == T


def test_gradients_are_those_of_the_definition():
    cfg = dataclasses.replace(PLAIN, shared_experts=1)
    params, x = params_of(cfg), inputs()
    got = torch.func.grad(lambda p: moe.apply(p, x, cfg=cfg)[0].square().sum())(params)
    want = torch.func.grad(lambda p: moe_by_hand(p, x, cfg)[0].square().sum())(params)
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)


def test_shared_experts_are_one_wider_mlp():
    cfg = dataclasses.replace(PLAIN, shared_experts=3)
    assert moe.specs(cfg)["shared"]["w_up_DF"].shape == (D, 30)
    assert spec.count(moe.specs(cfg)) == spec.count(moe.specs(PLAIN)) + 3 * 3 * D * 10


def test_the_bias_moves_the_choice_but_not_the_weights():
    cfg = dataclasses.replace(PLAIN, score="sigmoid", balance="bias", normalize=False)
    params, x, bias_E = params_of(cfg), inputs(), torch.tensor([0.0, 10.0, 0.0, 0.0, 0.0, -10.0])
    out, stats = moe.apply(params, x, cfg=cfg, bias_E=bias_E)
    expected, load_E = moe_by_hand(params, x, cfg, bias_E)
    torch.testing.assert_close(out, expected)
    assert torch.equal(stats.load_E, load_E)
    assert load_E[1] == T
    assert load_E[5] == 0


def test_the_bias_has_no_gradient():
    cfg = dataclasses.replace(PLAIN, balance="bias")
    params = params_of(cfg)
    grad_E = torch.func.grad(lambda b: moe.apply(params, inputs(), cfg=cfg, bias_E=b)[0].sum())(torch.zeros(6))
    assert torch.equal(grad_E, torch.zeros(6))


@pytest.mark.parametrize(("balance", "bias_E"), [("bias", None), ("aux", torch.zeros(6))])
def test_a_bias_where_it_does_not_belong_is_an_error(balance, bias_E):
    cfg = dataclasses.replace(PLAIN, balance=balance)
    with pytest.raises(ValueError, match=f"balance='{balance}', but router_bias_E was"):
        moe.apply(params_of(cfg), inputs(), cfg=cfg, bias_E=bias_E)


def test_biases_exist_only_for_their_balance():
    assert moe.balance_specs(PLAIN) == {}
    assert moe.balance_specs(dataclasses.replace(PLAIN, balance="bias"))["router_bias_E"].shape == (6,)


def test_update_bias_steps_against_the_load():
    bias_E = moe.update_bias(torch.tensor([0.5, 0.0, 0.0, -0.5]), torch.tensor([9.0, 5.0, 1.0, 5.0]), rate=0.1)
    torch.testing.assert_close(bias_E, torch.tensor([0.4, 0.0, 0.1, -0.5]))


def test_the_bias_evens_out_the_load():
    cfg = dataclasses.replace(PLAIN, score="sigmoid", balance="bias")
    params, bias_E = params_of(cfg), torch.zeros(6)
    x = random.normal(random.key(2), (512, D)) + 0.5  # a mean that favours some experts

    def imbalance():
        load_E = moe.apply(params, x, cfg=cfg, bias_E=bias_E)[1].load_E
        return (load_E.max() / load_E.mean()).item()

    before = imbalance()
    for _ in range(200):
        bias_E = moe.update_bias(bias_E, moe.apply(params, x, cfg=cfg, bias_E=bias_E)[1].load_E, rate=0.01)
    assert before > 1.5
    assert imbalance() < 1.1


def aux_by_hand(probability_TE, expert_TK):
    experts = probability_TE.shape[1]
    share_E = F.one_hot(expert_TK, experts).sum(1).float().mean(0)
    return experts * (share_E * probability_TE.mean(0)).sum()


@pytest.mark.parametrize("score", ["softmax", "sigmoid"])
def test_aux_loss_is_that_of_switch_transformer(score):
    cfg = dataclasses.replace(PLAIN, score=score)
    params, x = params_of(cfg), inputs()
    expert_TK, _, stats = moe.route(params["w_router_DE"], x, cfg=cfg)
    logits_TE = x @ params["w_router_DE"]
    probability_TE = logits_TE.softmax(-1) if score == "softmax" else F.normalize(logits_TE.sigmoid(), p=1, dim=-1)
    torch.testing.assert_close(moe.aux_loss(stats).value(), aux_by_hand(probability_TE, expert_TK))


def test_aux_loss_of_an_even_load_is_top_k():
    even = moe.RouterStats(torch.full((6,), 8.0), torch.full((6,), 4.0), torch.tensor(24.0), torch.tensor(0.0))
    assert moe.aux_loss(even).value().item() == pytest.approx(2.0)


def test_aux_loss_over_ranks_is_that_of_the_whole_batch():
    """Two ranks whose `sum_over_batch` adds them up get the loss of one process that sees both."""
    params, x = params_of(PLAIN), inputs()
    whole = moe.aux_loss(moe.apply(params, x, cfg=PLAIN)[1])
    left, right = (moe.apply(params, half, cfg=PLAIN)[1] for half in (x[:10], x[10:]))
    both = moe.RouterStats(*(a + b for a, b in zip(left, right, strict=True)))

    def means_of(stats):
        reduced = {id(stats.load_E): both.load_E, id(stats.count): both.count}
        with bind({"sum_over_batch": lambda t: reduced[id(t)]}):
            return moe.aux_loss(stats)

    terms = [means_of(left), means_of(right)]
    total, count = (sum(parts) for parts in zip(*terms, strict=True))
    torch.testing.assert_close(total / count, whole.value())


def test_layers_average_and_pool_joins_them():
    stats = [moe.apply(params_of(PLAIN, seed), inputs(), cfg=PLAIN)[1] for seed in (0, 1)]
    stacked = moe.RouterStats(*(torch.stack(parts) for parts in zip(*stats, strict=True)))
    torch.testing.assert_close(
        moe.aux_loss(stacked).value(), sum(moe.aux_loss(s).value() for s in stats) / 2, rtol=1e-6, atol=0
    )
    pooled = moe.pool(stacked)
    assert torch.equal(pooled.load_E, stats[0].load_E + stats[1].load_E)
    assert pooled.count == 2 * T


def test_padding_that_holds_nan_is_not_counted():
    params, x = params_of(PLAIN), inputs()
    valid_T = torch.arange(T) < T - 4
    poisoned = torch.where(valid_T[:, None], x, torch.nan)
    stats = moe.apply(params, poisoned, cfg=PLAIN, valid_T=valid_T)[1]
    alone = moe.apply(params, x[: T - 4], cfg=PLAIN)[1]
    for got, expected in zip(stats, alone, strict=True):
        torch.testing.assert_close(got, expected)


@settings(max_examples=20, deadline=None)
@given(valid=st.lists(st.booleans(), min_size=T, max_size=T))
def test_padding_is_not_counted(valid):
    params, x, valid_T = params_of(PLAIN), inputs(), torch.tensor(valid)
    out, stats = moe.apply(params, x, cfg=PLAIN, valid_T=valid_T)
    _, kept = moe.apply(params, x[valid_T], cfg=PLAIN) if any(valid) else (None, None)
    torch.testing.assert_close(out, moe.apply(params, x, cfg=PLAIN)[0])
    assert stats.count == sum(valid)
    assert torch.isfinite(moe.aux_loss(stats).value())
    if kept is not None:
        assert torch.equal(stats.load_E, kept.load_E)
        torch.testing.assert_close(stats.probability_E, kept.probability_E)


def test_a_mask_of_the_wrong_length_is_an_error():
    with pytest.raises(ValueError, match=r"valid_T has shape \[3\], expected \[24\]"):
        moe.apply(params_of(PLAIN), inputs(), cfg=PLAIN, valid_T=torch.ones(3, dtype=torch.bool))


def test_the_router_works_in_float32():
    params, x = params_of(PLAIN), inputs()
    low = spec.map_with_paths(lambda _, leaf: leaf.bfloat16(), params)
    out, stats = moe.apply(low, x.bfloat16(), cfg=PLAIN)
    assert out.dtype == torch.bfloat16
    assert all(part.dtype == torch.float32 for part in stats)


def test_float64_stays_float64():
    """So that gradients can be checked against differences."""
    w_DE = params_of(PLAIN)["w_router_DE"].double().requires_grad_()
    x = inputs()[:4].double().requires_grad_()

    def weights_and_loss(w, x):
        _, weights_TK, stats = moe.route(w, x, cfg=PLAIN)
        return weights_TK, moe.aux_loss(stats).total

    assert torch.autograd.gradcheck(weights_and_loss, (w_DE, x))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"top_k": 7}, "top_k=7 must be between 1 and experts=6"),
        ({"score": "relu"}, "score='relu'"),
        ({"balance": "luck"}, "balance='luck'"),
    ],
)
def test_a_configuration_that_makes_no_sense_is_refused(options, message):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(PLAIN, **options)


def test_loss_and_gradient_trace_on_shapes_alone():
    cfg = dataclasses.replace(PLAIN, shared_experts=1)

    def step(params, x):
        def loss(p):
            out, stats = moe.apply(p, x, cfg=cfg)
            return out.square().mean() + moe.aux_loss(stats).value()

        return torch.func.grad_and_value(loss)(params)

    params, x = params_of(cfg), inputs()
    graph = make_fx(step, tracing_mode="fake")(params, x)
    torch.testing.assert_close(graph(params, x), step(params, x))


def test_no_tokens_are_no_load():
    params, x = params_of(PLAIN), inputs()[:0]
    out, stats = moe.apply(params, x, cfg=PLAIN)
    assert out.shape == x.shape
    assert stats.load_E.tolist() == [0.0] * PLAIN.experts
    assert moe.aux_loss(stats).value() == 0
