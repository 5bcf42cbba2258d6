"""The diffusion transformer: times, documents, text, and a start that changes nothing."""

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as nnf
from torch import Tensor

from ftrain import key, tree
from ftrain.kernels.attention import attention as attend
from ftrain.modules import decoder, dit, linear, mlp, norm, spec
from ftrain.modules.block import Block, Context
from ftrain.modules.dit import DitConfig
from ftrain.modules.layers import attention_block, moe_block
from ftrain.modules.moe import MoEConfig
from ftrain.modules.spec import ParamSpec, fan_in

CFG = DitConfig(d_in=6, d_model=24, layers=2, heads=2, d_hidden=32, d_text=10, time_features=16)
LENGTHS, TEXTS = (5, 8, 3), (4, 1, 6)


def params(scale=0.3, cfg=CFG):
    """Every parameter random, so that gates are open."""
    generator = torch.Generator().manual_seed(0)
    draw = lambda p: torch.randn(p.shape, generator=generator, dtype=torch.float64) * scale  # noqa: E731
    return tree.map(draw, spec.init(dit.specs(cfg), key(0)))


def inputs(lengths=LENGTHS, texts=TEXTS):
    generator = torch.Generator().manual_seed(1)
    n, s = sum(lengths), sum(texts)
    segments = torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths))
    return torch.randn(n, CFG.d_in, generator=generator, dtype=torch.float64), {
        "time_N": torch.rand(len(lengths), generator=generator, dtype=torch.float64)[segments],
        "positions_AN": torch.randint(0, 9, (3, n), generator=generator),
        "segments_N": segments,
        "text_SC": torch.randn(s, CFG.d_text, generator=generator, dtype=torch.float64),
        "text_segments_S": torch.repeat_interleave(torch.arange(len(texts)), torch.tensor(texts)),
    }


def test_documents_do_not_see_each_other():
    x, given = inputs()
    whole = dit.apply(params(), x, cfg=CFG, **given)
    first = 0
    for number, length in enumerate(LENGTHS):
        rows, text = slice(first, first + length), given["text_segments_S"] == number
        alone = dit.apply(
            params(), x[rows], cfg=CFG, time_N=given["time_N"][rows], positions_AN=given["positions_AN"][:, rows],
            segments_N=None, text_SC=given["text_SC"][text], text_segments_S=None,
        )  # fmt: skip
        torch.testing.assert_close(whole[rows], alone, rtol=1e-10, atol=1e-10)
        first += length


def test_at_the_start_the_velocity_is_zero_and_gradients_reach_the_output():
    start = tree.map(lambda p: p.double(), spec.init(dit.specs(CFG), key(0)))
    x, given = inputs()
    leaves = tree.map(lambda p: p.requires_grad_(), start)
    velocity = dit.apply(leaves, x, cfg=CFG, **given)
    assert not velocity.any()
    loss = dit.flow_loss(velocity, x, torch.ones_like(x)).value()
    (grad,) = torch.autograd.grad(loss, leaves["out"]["w_DP"])
    assert grad.abs().sum() > 0


def test_every_parameter_has_a_gradient_once_gates_are_open():
    leaves = tree.map(lambda p: p.requires_grad_(), params())
    x, given = inputs()
    loss = dit.flow_loss(dit.apply(leaves, x, cfg=CFG, **given), x, torch.ones_like(x)).value()
    names = tree.paths(leaves)
    for name, grad in zip(names, torch.autograd.grad(loss, tree.leaves(leaves)), strict=True):
        if not name.endswith("key.b"):  # a constant added to all keys of a query changes no probability
            assert grad.abs().sum() > 1e-9, name


def test_the_modulation_is_what_the_formula_says():
    """One layer without attention's gate: `x + gate * mlp(norm(x) * (1 + scale) + shift)`."""
    cfg = DitConfig(d_in=6, d_model=24, layers=1, heads=2, d_hidden=32, time_features=16)
    tree_of = params(cfg=cfg)
    layer = tree_of["layers"][0]
    layer["table_6D"] = layer["table_6D"].clone()
    x, given = inputs()
    six = torch.randn(x.shape[0], 6, 24, dtype=torch.float64)
    six[:, 2] = -layer["table_6D"][2]
    h = torch.randn(x.shape[0], 24, dtype=torch.float64)
    at = dit.Conditions(given["positions_AN"], segments_T=given["segments_N"], time_N6D=six)
    got = dit.layer_block(cfg, 0).apply(layer, h, at)
    shift, scale, gate = (layer["table_6D"][i] + six[:, i] for i in (3, 4, 5))
    normed = (h - h.mean(-1, keepdim=True)) / (h.var(-1, unbiased=False, keepdim=True) + 1e-6).sqrt()
    hidden = torch.nn.functional.gelu(
        (normed * (1 + scale) + shift) @ layer["mlp"]["w_up_DF"] + layer["mlp"]["b_up_F"], approximate="tanh"
    )
    expected = h + gate * (hidden @ layer["mlp"]["w_down_FD"] + layer["mlp"]["b_down_D"])
    torch.testing.assert_close(got, expected, rtol=1e-10, atol=1e-10)


def test_times_become_cosines_and_sines_of_a_thousand_steps():
    found = dit.time_embedding(torch.tensor([0.0, 0.5], dtype=torch.float64), 4)
    low = math.exp(-math.log(10_000) / 2)
    expected = [[1, 1, 0, 0], [math.cos(500), math.cos(500 * low), math.sin(500), math.sin(500 * low)]]
    torch.testing.assert_close(found, torch.tensor(expected, dtype=torch.float64))


def test_the_loss_counts_valid_rows_only():
    velocity, data, noise = torch.zeros(3, 2), torch.zeros(3, 2), torch.tensor([[1.0, 1.0], [2.0, 2.0], [9.0, 9.0]])
    loss = dit.flow_loss(velocity, data, noise, torch.tensor([True, True, False]))
    assert (float(loss.total), float(loss.count)) == (10.0, 4.0)
    torch.testing.assert_close(dit.noised(data, noise, torch.tensor([0.0, 0.5, 1.0]))[1], torch.ones(2))


@pytest.mark.parametrize("masked", [False, True])
def test_the_loss_of_bfloat16_is_summed_in_float32(masked):
    """Of the same bfloat16 numbers, float64 gives the same loss: neither targets, nor squares, nor sums are rounded."""
    velocity, data, noise = (torch.randn(512, 16, generator=torch.manual_seed(i)).bfloat16() for i in range(3))
    valid_N = torch.arange(512) % 3 > 0 if masked else None
    found = dit.flow_loss(velocity, data, noise, valid_N)
    exact = dit.flow_loss(velocity.double(), data.double(), noise.double(), valid_N)
    assert found.total.dtype == torch.float32
    torch.testing.assert_close(found.value().double(), exact.value(), rtol=1e-6, atol=0)
    assert found.count == exact.count


def test_rows_that_are_not_valid_may_hold_nan():
    """Neither the loss nor the gradient multiplies by a mask."""
    velocity, data, noise = (torch.randn(6, 3) for _ in range(3))
    valid_N = torch.arange(6) < 4
    data[4:] = torch.nan
    grad, value = torch.func.grad_and_value(lambda v: dit.flow_loss(v, data, noise, valid_N).value())(velocity)
    alone = dit.flow_loss(velocity[:4], data[:4], noise[:4])
    torch.testing.assert_close(value, alone.value())
    assert grad.isfinite().all()
    assert not grad[4:].any()
    with pytest.raises(ValueError, match=r"valid_N is torch\.float32 \[6\], expected bool \[6\]"):
        dit.flow_loss(velocity, data, noise, valid_N.float())


@pytest.mark.parametrize(("arguments", "message"), [
    ({"heads": 5}, "d_model=24 must give heads=5 an even width"),
    ({"time_features": 15}, "time_features=15 must be even"),
])  # fmt: skip
def test_configurations_are_checked(arguments, message):
    with pytest.raises(ValueError, match=message):
        DitConfig(**{"d_in": 6, "d_model": 24, "layers": 1, "heads": 2, "d_hidden": 32, **arguments})


def test_text_must_be_given_exactly_where_the_model_reads_it():
    x, given = inputs()
    with pytest.raises(ValueError, match="d_text=10, but text was not given"):
        dit.apply(params(), x, cfg=CFG, **{**given, "text_SC": None})


def gated() -> Block:
    """`(x gate * x up) down`: an MLP without biases."""
    into = ParamSpec((24, 20), ("embed", "mlp"), fan_in(24))
    return Block(
        lambda gain: {"gate": into, "up": into, "down": ParamSpec((20, 24), ("mlp", "embed"), fan_in(20, gain=gain))},
        lambda p, x_ND, at: ((x_ND @ p["gate"]) * (x_ND @ p["up"])) @ p["down"],
    )


def usual_by_hand(cfg: DitConfig, ran: list[Any]) -> Block:
    """The built-in layer once more, as somebody outside would write it: with the time and the text of its context."""
    reads = attention_block(cfg.attention)

    def apply(p: Any, x: Tensor, at: Any) -> Tensor:
        ran.append(at)
        table = p["table_6D"] + at.time_N6D
        plain = lambda x, at: nnf.layer_norm(x, (24,), eps=1e-6) * (1 + table[:, at + 1]) + table[:, at]  # noqa: E731
        x = x + table[:, 2] * at.run(reads, p["attention"], plain(x, 0))
        q, k, v = (
            linear.apply(p["text"][name], rows).unflatten(-1, (2, 12))
            for name, rows in (
                ("query", norm.apply(p["text"]["norm"], x)), ("key", at.text.text_SC), ("value", at.text.text_SC)
            )
        )  # fmt: skip
        heard = attend(q, k, v, segments_T=at.text.segments_N, kv_segments_S=at.text.segments_S, causal=False)
        x = x + linear.apply(p["text"]["out"], heard.flatten(1))
        return x + table[:, 5] * mlp.apply(p["mlp"], plain(x, 3), cfg=cfg.mlp)

    return Block(lambda gain: dit.layer_with(cfg).specs(gain), apply)


def test_a_layer_of_ones_own_has_the_time_and_the_text() -> None:
    x, given = inputs()
    ran = list[Any]()
    own = replace(CFG, pattern=(None, usual_by_hand(CFG, ran)))
    torch.testing.assert_close(
        dit.apply(params(), x, cfg=own, **given), dit.apply(params(), x, cfg=CFG, **given), rtol=1e-10, atol=1e-10
    )
    assert len(ran) == 1


def test_an_mlp_and_an_attention_of_ones_own_are_modulated_and_gated() -> None:
    """Both against the formula: the MLP as above, the attention as rows that read their document."""
    still = Block(lambda gain: {"w": ParamSpec((24, 24), ("embed", "heads"), fan_in(24, gain=gain))}, reads_documents)
    plain = replace(CFG, layers=1, d_text=0)
    cfg = replace(plain, pattern=(dit.layer_with(plain, attention=still, mlp=gated()),))
    p = params(cfg=cfg)["layers"][0]
    assert sorted(p) == ["attention", "mlp", "table_6D"]
    x, given = inputs()
    h, six = torch.randn(len(x), 24, dtype=torch.float64), torch.randn(len(x), 6, 24, dtype=torch.float64)
    at = dit.Conditions(given["positions_AN"], segments_T=given["segments_N"], time_N6D=six)
    found = at.run_layer(dit.layer_block(cfg, 0), p, h, layer=0)
    shift_a, scale_a, gate_a, shift_m, scale_m, gate_m = (p["table_6D"] + six).unbind(1)
    normed = nnf.layer_norm(h, (24,), eps=1e-6) * (1 + scale_a) + shift_a
    same = given["segments_N"][:, None] == given["segments_N"]
    scores = (normed @ normed.T / 24**0.5).masked_fill(~same, -torch.inf)
    h = h + gate_a * (scores.softmax(-1) @ normed @ p["attention"]["w"])
    normed = nnf.layer_norm(h, (24,), eps=1e-6) * (1 + scale_m) + shift_m
    hidden = (normed @ p["mlp"]["gate"]) * (normed @ p["mlp"]["up"])
    torch.testing.assert_close(found, h + gate_m * (hidden @ p["mlp"]["down"]), rtol=1e-10, atol=1e-10)


def reads_documents(p: Any, x_ND: Tensor, at: Context) -> Tensor:
    return at.attend(x_ND[:, None], x_ND[:, None], x_ND[:, None], causal=False).flatten(1) @ p["w"]


def test_layers_of_another_stack_are_refused() -> None:
    experts = dit.layer_with(CFG, mlp=moe_block(MoEConfig(24, 4, experts=4, top_k=2)))
    with pytest.raises(ValueError, match=r"DitConfig: a block of pattern has routers, whose statistics only a decoder"):
        replace(CFG, pattern=(experts,))
    heads = replace(CFG.attention, causal=True)
    cfg = decoder.DecoderConfig(11, 24, layers=1, attention=heads, d_hidden=8, pattern=(dit.layer_with(CFG),))
    made, tokens = spec.init(decoder.specs(cfg), key(0)), torch.arange(3)
    with pytest.raises(ValueError, match=r"a layer of a diffusion transformer needs the time: run it by dit\.apply"):
        decoder.apply(made, tokens, positions=torch.arange(3).expand(3, 3), segments=None, cfg=cfg)
