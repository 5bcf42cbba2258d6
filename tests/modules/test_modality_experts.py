"""A router for each modality over shared experts: each token goes by its own, and nothing else differs from experts.

Legend: T tokens, M modalities.
"""

from dataclasses import replace

import pytest
import torch

import ftrain
from ftrain.modules import decoder, moe, spec
from ftrain.modules.attention import AttentionConfig
from ftrain.modules.block import Context
from ftrain.modules.decoder import DecoderConfig
from ftrain.modules.layers import moe_block
from ftrain.modules.modality_experts import modality_experts
from ftrain.modules.moe import MoEConfig
from ftrain.sharding import Layout, Mesh
from tests.helpers import mesh_models

CFG = MoEConfig(8, 12, experts=8, top_k=2, shared_experts=1)
KIND_T = torch.arange(40) % 3


def rows():
    return torch.randn(40, 8, generator=torch.Generator().manual_seed(0))


def block():
    return modality_experts(CFG, KIND_T, modalities=3)


def params():
    return ftrain.init(block().specs(1.0), ftrain.key(0))


def plain(tree, modality):
    """The experts with the router of one modality."""
    rest = {name: leaf for name, leaf in tree.items() if name != "w_routers_MDE"}
    return {**rest, "w_router_DE": tree["w_routers_MDE"][modality]}


@pytest.mark.parametrize("valid_T", [None, torch.arange(40) < 30], ids=["all", "some"])
def test_a_token_goes_by_the_router_of_its_modality(valid_T):
    at = Context(torch.arange(40), valid_T=valid_T)
    found = block().apply(params(), rows(), at)
    for modality in range(3):
        alone = Context(
            torch.arange(40), valid_T=(modality == KIND_T) if valid_T is None else valid_T & (modality == KIND_T)
        )
        wanted = moe_block(CFG).apply(plain(params(), modality), rows(), alone)
        torch.testing.assert_close(found[modality == KIND_T], wanted[modality == KIND_T])
        for ours, theirs in zip(at.stats[modality], alone.stats[0], strict=True):
            torch.testing.assert_close(ours, theirs)


def test_a_router_learns_of_its_own_tokens_alone():
    leaves = spec.map_with_paths(lambda _, x: x.requires_grad_(), params())
    out_TD = block().apply(leaves, rows(), Context(torch.arange(40)))
    out_TD[KIND_T == 1].square().sum().backward()
    assert leaves["w_routers_MDE"].grad.abs().sum((1, 2)).gt(0).tolist() == [False, True, False]
    assert leaves["w_gate_EDF"].grad.abs().sum() > 0


def composed():
    """A decoder of such layers, its tokens' modalities in the batch."""
    heads = AttentionConfig(8, heads=2, kv_heads=2, head_dim=4)
    base = DecoderConfig(61, 8, layers=2, attention=heads, moe=CFG)

    def cfg(kind_T):
        return replace(base, pattern=(decoder.layer_with(base, mlp=modality_experts(CFG, kind_T, modalities=3)),))

    def loss(params, batch):
        own = cfg(batch["tokens_T"] % 3)
        hidden_TD, stats = decoder.apply(
            params, batch["tokens_T"], positions=batch["positions_T"], segments=batch["segments_T"], cfg=own
        )
        assert stats.router.load_E.shape == (6, 8)
        terms = {"text": decoder.loss(params, hidden_TD, batch["labels_T"], own), "even": moe.aux_loss(stats.router)}
        return ftrain.weighted_sum(terms, {"even": 0.1}), terms

    return mesh_models.Model(decoder.specs(cfg(KIND_T)), loss, lambda packs: mesh_models.text_batch(61, packs), {})


@pytest.mark.exhaustive
@pytest.mark.parametrize("mesh", [{"shard": 2, "expert": 2}, {"shard": 2, "sequence": 2, "expert": 4}], ids=str)
def test_a_mesh_divides_tokens_and_experts(mesh):
    case = composed()
    plan = mesh_models.plan_for(case, Mesh(**mesh, kind="virtual"), Layout())
    value, gradients = mesh_models.compare(case, plan, dtype=torch.float64)
    assert value < 1e-12
    assert gradients < 1e-10


@pytest.mark.parametrize("change", [{"balance": "bias"}, {"router_bias": True}], ids=str)
def test_what_is_not_here_is_refused(change):
    with pytest.raises(ValueError, match="routers by modality are balanced by a loss and have no bias"):
        modality_experts(replace(CFG, **change), KIND_T, modalities=3)
