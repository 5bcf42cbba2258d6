"""The decoder equals transformers' Llama, Qwen2, Qwen3 and Qwen3-MoE for the same weights: loss, gradients, packing."""

import dataclasses

import pytest
import torch

from ftrain.kernels.rope import Llama3Scaling
from ftrain.modules import decoder, moe, spec
from ftrain.modules.attention import AttentionConfig
from ftrain.modules.decoder import DecoderConfig
from ftrain.modules.moe import MoEConfig

transformers = pytest.importorskip("transformers")

V, D, F, T = 99, 48, 80, 40
COMMON = {
    "vocab_size": V,
    "hidden_size": D,
    "intermediate_size": F,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "rms_norm_eps": 1e-5,
    "pad_token_id": 0,
    "rope_parameters": {"rope_type": "default", "rope_theta": 5000.0},
}
EXPERTS = {"num_experts": 6, "num_experts_per_tok": 2, "moe_intermediate_size": 20, "output_router_logits": True}
ATTENTION = AttentionConfig(D, heads=4, kv_heads=2, head_dim=12, rope_base=5000.0, norm_eps=1e-5)
BASE = DecoderConfig(vocab=V, d_model=D, layers=3, attention=ATTENTION, d_hidden=F, norm_eps=1e-5)
QWEN3 = dataclasses.replace(ATTENTION, head_dim=16, qk_norm=True)
MOE = MoEConfig(D, 20, experts=6, top_k=2)
WEIGHTS, BIASES = ("DHK", "DGK", "DGK", "HKD"), ("HK", "GK", "GK")

LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}

FAMILIES = {
    "llama": ("Llama", {}, BASE),
    "llama-tied": ("Llama", {"tie_word_embeddings": True}, dataclasses.replace(BASE, tie_embeddings=True)),
    "llama-3.1": (
        "Llama",
        {"rope_parameters": {"rope_theta": 5000.0, **LLAMA3}},
        dataclasses.replace(
            BASE, attention=dataclasses.replace(ATTENTION, rope_scaling=Llama3Scaling(8.0, 1.0, 4.0, 32))
        ),
    ),
    "mistral": (
        "Mistral",
        {"sliding_window": 5},
        dataclasses.replace(BASE, attention=dataclasses.replace(ATTENTION, window=5)),
    ),
    "qwen2": ("Qwen2", {}, dataclasses.replace(BASE, attention=dataclasses.replace(ATTENTION, bias=True))),
    "qwen3": ("Qwen3", {"head_dim": 16}, dataclasses.replace(BASE, attention=QWEN3)),
    "qwen3-moe": (
        "Qwen3Moe",
        {"head_dim": 16, "norm_topk_prob": True, **EXPERTS},
        dataclasses.replace(BASE, attention=QWEN3, moe=MOE),
    ),
    "qwen3-moe-unnormalised": (
        "Qwen3Moe",
        {"head_dim": 16, "norm_topk_prob": False, "mlp_only_layers": [0], **EXPERTS},
        dataclasses.replace(BASE, attention=QWEN3, moe=dataclasses.replace(MOE, normalize=False), dense_layers=1),
    ),
}


def build(family):
    """A transformers model with random weights everywhere (biases and norms too), and our configuration."""
    name, options, cfg = FAMILIES[family]
    config = getattr(transformers, f"{name}Config")(**{**COMMON, **options})
    model = getattr(transformers, f"{name}ForCausalLM")._from_config(config, attn_implementation="eager")
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for path, param in model.named_parameters():
            centre = 1.0 if "norm" in path else 0.0
            param.copy_(centre + torch.randn(param.shape, generator=generator) * 0.15)
    return model.float().train(), cfg


def converted(weights, cfg):
    """Our tree of parameters from transformers' named tensors (or their gradients): weights are transposed."""

    def linear(name):
        return weights[f"{name}.weight"].T

    def attention(at):
        tree = {f"w_{x}_{dims}": linear(f"{at}.{x}_proj") for x, dims in zip("qkvo", WEIGHTS, strict=True)}
        if cfg.attention.bias:
            tree |= {f"b_{x}_{dims}": weights[f"{at}.{x}_proj.bias"] for x, dims in zip("qkv", BIASES, strict=True)}
        if cfg.attention.qk_norm:
            tree |= {f"{x}_norm_K": weights[f"{at}.{x}_norm.weight"] for x in "qk"}
        return tree

    def layer(i):
        at = f"model.layers.{i}"
        tree = {
            "attention_norm": {"weight_D": weights[f"{at}.input_layernorm.weight"]},
            "attention": attention(f"{at}.self_attn"),
            "mlp_norm": {"weight_D": weights[f"{at}.post_attention_layernorm.weight"]},
        }
        if not cfg.has_experts(i):
            names = {"w_gate_DF": "gate_proj", "w_up_DF": "up_proj", "w_down_FD": "down_proj"}
            return tree | {"mlp": {ours: linear(f"{at}.mlp.{theirs}") for ours, theirs in names.items()}}
        gate_EFD, up_EFD = weights[f"{at}.mlp.experts.gate_up_proj"].chunk(2, dim=1)
        experts = {
            "w_router_DE": linear(f"{at}.mlp.gate"),
            "w_gate_EDF": gate_EFD.mT,
            "w_up_EDF": up_EFD.mT,
            "w_down_EFD": weights[f"{at}.mlp.experts.down_proj"].mT,
        }
        return tree | {"moe": experts}

    tree = {
        "embedding": {"table_VD": weights["model.embed_tokens.weight"]},
        "layers": [layer(i) for i in range(cfg.layers)],
        "norm": {"weight_D": weights["model.norm.weight"]},
    }
    return tree if cfg.tie_embeddings else {**tree, "head": {"w_DV": linear("lm_head")}}


def documents(*lengths):
    """Tokens, positions and segments of packed documents."""
    tokens = torch.randint(1, V, (sum(lengths),), generator=torch.Generator().manual_seed(1))
    positions = torch.cat([torch.arange(n) for n in lengths])
    return tokens, positions, torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths))


def their_loss(model, tokens, positions, segments):
    labels = tokens.clone()
    labels[positions == 0] = -100  # transformers shifts: a document's first token is nobody's label
    out = model(tokens[None], position_ids=positions[None], labels=labels[None], use_cache=False)
    return out.loss


def our_loss(params, cfg, tokens, positions, segments):
    hidden, stats = decoder.apply(params, tokens, positions=positions, segments=segments, cfg=cfg)
    loss = decoder.loss(params, hidden, decoder.next_token_labels(tokens, segments), cfg).value()
    if stats.router is not None:
        loss = loss + cfg.moe.aux_coefficient * moe.aux_loss(moe.pool(stats.router)).value()
    return loss


@pytest.mark.parametrize("lengths", [(T,), (17, 1, 14, 8)], ids=["single", "packed"])
@pytest.mark.parametrize("family", FAMILIES)
def test_loss_and_gradients_equal_those_of_transformers(family, lengths):
    model, cfg = build(family)
    batch = documents(*lengths)
    params = spec.map_with_paths(lambda _, leaf: leaf.detach().clone(), converted(dict(model.named_parameters()), cfg))
    spec.check(params, decoder.specs(cfg))

    expected = their_loss(model, *batch)
    expected.backward()
    grads, loss = torch.func.grad_and_value(our_loss)(params, cfg, *batch)

    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)
    theirs = converted({path: param.grad for path, param in model.named_parameters()}, cfg)
    largest = max(grad.norm().item() for _, grad in spec.leaves_with_paths(theirs))
    for (path, ours), (_, want) in zip(spec.leaves_with_paths(grads), spec.leaves_with_paths(theirs), strict=True):
        # Key biases have no gradient but rounding: an error counts relative to at least 1e-3 of the largest gradient.
        error = (ours - want).norm().item() / max(want.norm().item(), 1e-3 * largest)
        assert error < 1e-4, f"{path}: relative error {error:.1e}"


@pytest.mark.parametrize("family", ["llama", "llama-tied", "qwen3-moe"])
def test_logits_equal_those_of_transformers(family):
    model, cfg = build(family)
    tokens, positions, segments = documents(T)
    params = converted({path: param.detach() for path, param in model.named_parameters()}, cfg)
    hidden, _ = decoder.apply(params, tokens, positions=positions, segments=segments, cfg=cfg)
    with torch.no_grad():
        theirs = model(tokens[None], use_cache=False).logits[0]
    torch.testing.assert_close(decoder.logits(params, hidden, cfg), theirs, rtol=1e-4, atol=1e-4)


def test_sigmoid_router_with_biases_equals_that_of_deepseek_v3():
    theirs = pytest.importorskip("transformers.models.deepseek_v3.modeling_deepseek_v3").DeepseekV3TopkRouter(
        transformers.DeepseekV3Config(
            hidden_size=D,
            n_routed_experts=8,
            num_experts_per_tok=3,
            n_group=1,
            topk_group=1,
            norm_topk_prob=True,
            routed_scaling_factor=2.5,
        )
    )
    cfg = MoEConfig(D, 20, experts=8, top_k=3, score="sigmoid", scale=2.5, balance="bias")
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        theirs.weight.copy_(torch.randn(8, D, generator=generator) * 0.2)
        theirs.e_score_correction_bias.copy_(torch.randn(8, generator=generator) * 0.3)
        x_TD = torch.randn(T, D, generator=generator)
        _, their_weights_TK, their_expert_TK = theirs(x_TD)
        expert_TK, weights_TK, _ = moe.route(theirs.weight.T, x_TD, cfg=cfg, bias_E=theirs.e_score_correction_bias)

    def dense(expert_TK, weights_TK):  # their choice is not sorted
        return torch.zeros(T, 8).scatter(1, expert_TK, weights_TK)

    torch.testing.assert_close(dense(expert_TK, weights_TK), dense(their_expert_TK, their_weights_TK))
