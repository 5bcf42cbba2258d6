"""The small blocks (linear, embedding, norm, mlp, attention) against torch.nn and torch.nn.functional.

Legend: T tokens, D width, V vocabulary.
"""

import zlib

import pytest
import torch
import torch.nn.functional as F

from ftrain.kernels import random
from ftrain.modules import attention, embedding, linear, mlp, norm, spec
from ftrain.modules.attention import AttentionConfig
from ftrain.modules.mlp import MlpConfig

T, D = 12, 16
SEGMENTS = torch.tensor([0] * 5 + [1] * 4 + [2] * 3)
POSITIONS = torch.tensor([*range(5), *range(4), *range(3)])


def randomised(specs, seed=0):
    """Parameters without zeros and ones, so that a forgotten bias or norm weight shows."""

    def draw(path, leaf):
        return random.normal(random.fold_in(random.key(seed), zlib.crc32(path.encode())), leaf.shape, std=0.3)

    return spec.map_with_paths(draw, specs)


def inputs(*shape, seed=1):
    return random.normal(random.key(seed), shape)


@pytest.mark.parametrize("bias", [False, True])
def test_linear_is_that_of_torch_transposed(bias):
    params = randomised(linear.specs(D, 7, ("embed", "mlp"), bias=bias))
    torch.testing.assert_close(
        linear.apply(params, inputs(2, T, D)), F.linear(inputs(2, T, D), params["w"].T, params.get("b"))
    )


def test_linear_names_widths_that_do_not_fit():
    params = randomised(linear.specs(D, 7, ("embed", "mlp")))
    with pytest.raises(ValueError, match=r"\[3, 5\].*\[16, 7\]"):
        linear.apply(params, inputs(3, 5))


def test_embedding_takes_rows():
    params = randomised(embedding.specs(30, D))
    tokens_T = torch.tensor([3, 0, 29, 3])
    assert torch.equal(embedding.apply(params, tokens_T), params["table_VD"][tokens_T])


def test_norms_are_those_of_torch():
    rms, layer = randomised(norm.specs(D)), randomised(norm.specs(D, kind="layer"))
    x = inputs(T, D)
    torch.testing.assert_close(norm.apply(rms, x, eps=1e-5), F.rms_norm(x, (D,), rms["weight_D"], eps=1e-5))
    torch.testing.assert_close(
        norm.apply(layer, x, eps=1e-5), F.layer_norm(x, (D,), layer["weight_D"], layer["bias_D"], eps=1e-5)
    )


def test_an_unknown_norm_is_refused():
    with pytest.raises(ValueError, match="'batch' is not one of"):
        norm.specs(D, kind="batch")


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("kind", ["swiglu", "gelu", "gelu_tanh"])
def test_mlp_is_what_its_name_says(kind, bias):
    cfg = MlpConfig(D, 24, kind=kind, bias=bias)
    p = randomised(mlp.specs(cfg))
    x = inputs(T, D)

    up = x @ p["w_up_DF"] + p.get("b_up_F", 0)
    if kind == "swiglu":
        hidden = F.silu(x @ p["w_gate_DF"] + p.get("b_gate_F", 0)) * up
    else:
        hidden = F.gelu(up, approximate="tanh" if kind == "gelu_tanh" else "none")
    torch.testing.assert_close(mlp.apply(p, x, cfg=cfg), hidden @ p["w_down_FD"] + p.get("b_down_D", 0))


def test_an_unknown_mlp_is_refused():
    with pytest.raises(ValueError, match="'relu' is not one of swiglu"):
        MlpConfig(D, 24, kind="relu")


def attention_by_hand(p, x, cfg, mask):
    """Dense attention of one head at a time, in the order of the definition."""
    k_dim, group = cfg.head_dim, cfg.heads // cfg.kv_heads
    q, k, v = (x @ p[w] + p.get(b, 0) for w, b in [("w_q_DHK", "b_q_HK"), ("w_k_DGK", "b_k_GK"), ("w_v_DGK", "b_v_GK")])
    heads = []
    for h in range(cfg.heads):
        q_h, k_h, v_h = (m[:, i * k_dim : (i + 1) * k_dim] for m, i in [(q, h), (k, h // group), (v, h // group)])
        if cfg.qk_norm:
            q_h = F.rms_norm(q_h, (k_dim,), p["q_norm_K"], eps=cfg.norm_eps)
            k_h = F.rms_norm(k_h, (k_dim,), p["k_norm_K"], eps=cfg.norm_eps)
        scores = (q_h @ k_h.T / k_dim**0.5).masked_fill(~mask, float("-inf"))
        heads.append(scores.softmax(-1) @ v_h)
    return torch.cat(heads, -1) @ p["w_o_HKD"] + p.get("b_o_D", 0)


@pytest.mark.parametrize(
    "options",
    [{}, {"causal": False}, {"qk_norm": True}, {"bias": True, "out_bias": True}, {"window": 3}],
    ids=lambda o: ",".join(o) or "plain",
)
def test_attention_is_its_definition(options):
    cfg = AttentionConfig(D, heads=4, kv_heads=2, head_dim=6, rope_base=None, **options)
    params, x = randomised(attention.specs(cfg)), inputs(T, D)
    distance = torch.arange(T)[:, None] - torch.arange(T)
    mask = SEGMENTS[:, None] == SEGMENTS
    mask = mask & (distance >= 0) if cfg.causal else mask
    mask = mask & (distance < cfg.window) if cfg.window else mask
    out = attention.apply(params, x, cfg=cfg, segments_T=SEGMENTS, rope=attention.rope(POSITIONS, cfg))
    torch.testing.assert_close(out, attention_by_hand(params, x, cfg, mask))


def test_rotated_attention_sees_only_differences_of_positions():
    cfg = AttentionConfig(D, heads=4, kv_heads=2, head_dim=8)
    params, x = randomised(attention.specs(cfg)), inputs(T, D)

    def out(positions):
        return attention.apply(params, x, cfg=cfg, segments_T=SEGMENTS, rope=attention.rope(positions, cfg))

    torch.testing.assert_close(out(POSITIONS), out(POSITIONS + 100), rtol=1e-4, atol=1e-4)
    assert not torch.allclose(out(POSITIONS), out(POSITIONS * 2), atol=1e-2)


@pytest.mark.parametrize(
    ("options", "message"),
    [({"heads": 4, "kv_heads": 3}, "multiple of kv_heads=3"), ({"head_dim": 5}, "even head_dim, got 5")],
)
def test_heads_that_do_not_fit_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        AttentionConfig(**{"d_model": D, "heads": 4, "kv_heads": 2, "head_dim": 6, **options})


def test_a_forgotten_rope_table_is_an_error():
    cfg = AttentionConfig(D, heads=4, kv_heads=2, head_dim=6)
    with pytest.raises(ValueError, match="no rope table was given"):
        attention.apply(randomised(attention.specs(cfg)), inputs(T, D), cfg=cfg, segments_T=SEGMENTS, rope=None)
