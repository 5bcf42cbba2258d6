"""Experts that loop over those that got tokens, in a traced step.

Legend: T tokens, D model width, E experts.
"""

import pytest
import torch
from torch import nn
from torch.func import functional_call

import ftrain
from ftrain.bridge.hit_experts import MOST, EveryExpert


class LoopExperts(nn.Module):
    """As transformers writes them: only experts with tokens are computed, and one index more is that of no expert."""

    def __init__(self, number=3):
        super().__init__()
        self.num_experts = number
        self.w_EDD = nn.Parameter(torch.randn(number, 4, 4, generator=torch.Generator().manual_seed(0)))

    def forward(self, x_TD, expert_T):
        out_TD = torch.zeros_like(x_TD)
        mask_ET = nn.functional.one_hot(expert_T, num_classes=self.num_experts + 1).T
        hit = torch.greater(mask_ET.sum(-1), 0).nonzero()
        for index in hit:
            (token_N,) = torch.where(mask_ET[index[0]])
            if token_N.numel() == 0:
                continue
            out_TD.index_add_(0, token_N, x_TD[token_N] @ self.w_EDD[index[0]])
        return out_TD


class CountedExperts(LoopExperts):
    def forward(self, x_TD, expert_T):
        return x_TD * len((nn.functional.one_hot(expert_T).sum(0) > 0).nonzero())


def loss(module, params, batch):
    with EveryExpert():
        out_TD = functional_call(module, params, (batch["x"], batch["expert"]))
    return ftrain.Mean.of(out_TD.square())


def batch():
    return {"x": torch.randn(5, 4, generator=torch.Generator().manual_seed(1)), "expert": torch.tensor([2, 0, 2, 2, 0])}


def test_all_experts_are_gone_over_and_one_without_tokens_adds_nothing():
    module = LoopExperts()
    params = {"w_EDD": module.w_EDD.detach().clone()}
    step = ftrain.jit(lambda params, batch: ftrain.value_and_grad(lambda p: loss(module, p, batch))(params))
    value, grads = step(params, batch())
    plain = module(batch()["x"], batch()["expert"]).square().mean()
    plain.backward()
    torch.testing.assert_close(value, plain.detach())
    torch.testing.assert_close(grads["w_EDD"], module.w_EDD.grad)
    other = {**batch(), "expert": torch.tensor([1, 1, 1, 1, 1])}  # the same program
    torch.testing.assert_close(step(params, other)[0], module(other["x"], other["expert"]).square().mean().detach())


def test_other_uses_and_very_many_experts_are_refused():
    with pytest.raises(ValueError, match=r"test_hit_experts.py:\d+ .*are counted"):
        loss(CountedExperts(), {}, batch())
    with pytest.raises(ValueError, match=f"a loop over {MOST + 1} experts.*at most {MOST}"):
        loss(LoopExperts(MOST + 1), {}, batch())
