"""The decoder equals transformers' Llama, Qwen2, Qwen3 and Qwen3-MoE for the same weights: loss, gradients, packing."""

import pytest
import torch

pytest.importorskip("transformers")

import transformers

from ftrain.modules import decoder, moe, spec
from ftrain.modules.moe import MoEConfig
from tests.helpers.hf_decoders import FAMILIES, D, T, V, build, converted


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
