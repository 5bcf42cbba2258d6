"""The encoder stack: a layer by its definition, layers of one's own in its place, and what is refused."""

from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as nnf
from torch import Tensor

from ftrain.kernels import random
from ftrain.modules import attention, audio_encoder, encoder_stack, norm, spec, vision_encoder
from ftrain.modules.audio_encoder import AudioConfig
from ftrain.modules.block import Block, Context
from ftrain.modules.encoder_stack import StackConfig
from ftrain.modules.layers import attention_block, moe_block
from ftrain.modules.moe import MoEConfig
from ftrain.modules.spec import ParamSpec, fan_in
from ftrain.modules.vision_encoder import VisionConfig

D, F = 16, 24
CFG = StackConfig(D, layers=3, heads=2, d_hidden=F, position_axes=2)
LENGTHS = [5, 1, 3]
SEGMENTS = torch.repeat_interleave(torch.arange(3), torch.tensor(LENGTHS))
POSITIONS = random.randint(random.key(3), (2, 9), low=0, high=7)
ROWS = random.normal(random.key(4), (9, D), dtype=torch.float64)
EXACT = {"rtol": 1e-10, "atol": 1e-10}


def squared() -> Block:
    """`(x into)^2 out`, without an activation or a bias."""
    into = ParamSpec((D, F), ("embed", "mlp"), fan_in(D))
    return Block(
        lambda gain: {"into": into, "out": ParamSpec((F, D), ("mlp", "embed"), fan_in(F, gain=gain))},
        lambda params, x_TD, at: (x_TD @ params["into"]).square() @ params["out"],
    )


def parallel(cfg: StackConfig) -> Block:
    """A whole layer: attention and MLP read the same normed rows."""
    reads, maps = attention_block(cfg.attention), squared()

    def apply(params: Any, x_TD: Tensor, at: Context) -> Tensor:
        normed_TD = norm.apply(params["norm"], x_TD)
        return x_TD + at.run(reads, params["attention"], normed_TD) + at.run(maps, params["mlp"], normed_TD)

    return Block(lambda gain: {"norm": norm.specs(D), "attention": reads.specs(gain), "mlp": maps.specs(gain)}, apply)


OWN = replace(CFG, pattern=(None, encoder_stack.layer_with(CFG, mlp=squared()), parallel(CFG)))


def params_of(specs: Any) -> Any:
    """Float64, and nothing zero or one, so that every leaf counts."""
    noise = lambda path, leaf: 0.1 * random.normal(random.key(len(path)), leaf.shape, dtype=torch.float64)  # noqa: E731
    made = spec.init(specs, random.key(0))
    return spec.map_with_paths(lambda path, leaf: leaf.double() + noise(path, leaf), made)


def one_item(params: Any, x_TD: Tensor, positions: Tensor) -> Tensor:
    """Three layers of plain torch: the usual one, one with another MLP, and one whose parts stand side by side."""

    def layer_norm(p: Any, x: Tensor) -> Tensor:
        return nnf.layer_norm(x, (D,), p["weight_D"], p["bias_D"], eps=1e-6)

    def read(p: Any, x: Tensor) -> Tensor:
        q, k, v = attention.project(p, x, CFG.attention, attention.rope(positions, CFG.attention))
        scores = torch.einsum("thk,shk->hts", q, k) * (D // 2) ** -0.5
        return torch.einsum("hts,shk->thk", scores.softmax(-1), v).flatten(1) @ p["w_o_HKD"] + p["b_o_D"]

    def square(p: Any, x: Tensor) -> Tensor:
        return (x @ p["into"]).square() @ p["out"]

    usual, other, beside = params["layers"]
    x = x_TD + read(usual["attention"], layer_norm(usual["norm_attention"], x_TD))
    hidden = nnf.gelu(layer_norm(usual["norm_mlp"], x) @ usual["mlp"]["w_up_DF"] + usual["mlp"]["b_up_F"])
    x = x + hidden @ usual["mlp"]["w_down_FD"] + usual["mlp"]["b_down_D"]
    x = x + read(other["attention"], layer_norm(other["norm_attention"], x))
    x = x + square(other["mlp"], layer_norm(other["norm_mlp"], x))
    normed = nnf.rms_norm(x, (D,), beside["norm"]["weight_D"], eps=1e-6)
    x = x + read(beside["attention"], normed) + square(beside["mlp"], normed)
    return layer_norm(params["norm_out"], x)


def test_blocks_of_ones_own_compute_what_their_definitions_say_in_each_item() -> None:
    params = params_of(encoder_stack.specs(OWN))
    found = encoder_stack.apply(params, ROWS, positions=POSITIONS, segments_T=SEGMENTS, cfg=OWN)
    items = zip(ROWS.split(LENGTHS), POSITIONS.split(LENGTHS, 1), strict=True)
    torch.testing.assert_close(found, torch.cat([one_item(params, *item) for item in items]), **EXACT)


def test_the_pattern_goes_round_and_its_last_weights_begin_as_small_as_the_usual_ones() -> None:
    layers = encoder_stack.specs(replace(OWN, layers=5))["layers"]
    assert [sorted(layer) for layer in layers[2:]] == [
        ["attention", "mlp", "norm"],
        ["attention", "mlp", "norm_attention", "norm_mlp"],
        ["attention", "mlp", "norm_attention", "norm_mlp"],
    ]
    assert ["into" in layer["mlp"] for layer in layers] == [False, True, True, False, True]
    assert layers[1]["mlp"]["out"].init.std == pytest.approx((F * 10) ** -0.5)


def test_vision_and_audio_encoders_take_a_pattern() -> None:
    vision, audio = VisionConfig(D, layers=2, heads=2, d_out=8), AudioConfig(D, layers=2, heads=2, d_out=8)
    for encoder, cfg in ((vision_encoder, vision), (audio_encoder, audio)):
        own = replace(cfg, pattern=(None, encoder_stack.layer_with(cfg.stack, mlp=squared())))
        usual, other = encoder.specs(own)["stack"]["layers"]
        assert sorted(usual["mlp"]) == ["b_down_D", "b_up_F", "w_down_FD", "w_up_DF"]
        assert sorted(other["mlp"]) == ["into", "out"]


def test_what_an_encoder_cannot_do_with_a_block_is_said() -> None:
    experts = encoder_stack.layer_with(CFG, mlp=moe_block(MoEConfig(D, 4, experts=4, top_k=2)))
    with pytest.raises(ValueError, match=r"StackConfig: a block of pattern has routers, whose statistics only a decod"):
        replace(CFG, pattern=(experts,))
    with pytest.raises(ValueError, match=r"layers=0, .* must be at least 1"):
        replace(CFG, layers=0)
    cfg = replace(CFG, layers=2, pattern=(None, Block(lambda gain: {}, lambda params, x_TD, at: x_TD.float())))
    with pytest.raises(ValueError, match=r"layer 1 makes torch\.float32 rows of torch\.float64"):
        encoder_stack.apply(
            params_of(encoder_stack.specs(cfg)), ROWS, positions=POSITIONS, segments_T=SEGMENTS, cfg=cfg
        )
