"""Packs put together are the packs: for data ranks one after the other, for micro-batches in a new dim."""

import pytest
import torch

import ftrain
from ftrain import Mesh, Plan
from ftrain.kernels.documents import Documents
from ftrain.modules import decoder
from ftrain.modules.attention import AttentionConfig
from ftrain.modules.decoder import DecoderConfig
from ftrain.modules.packs import join_packs, stack_packs

CFG = DecoderConfig(29, 16, layers=1, attention=AttentionConfig(16, heads=2, kv_heads=1, head_dim=8), d_hidden=24)
PARAMS = ftrain.tree.map(torch.Tensor.double, ftrain.init(decoder.specs(CFG), ftrain.key(0)))


def pack(seed, lengths):
    random = torch.Generator().manual_seed(seed)
    ids = torch.arange(len(lengths)).repeat_interleave(torch.tensor(lengths))
    tokens = torch.randint(0, CFG.vocab, ids.shape, generator=random)
    return {
        "tokens": tokens,
        "positions": torch.cat([torch.arange(n) for n in lengths]),
        "segments": Documents.of(ids),
        "labels": decoder.next_token_labels(tokens, ids),
    }


PACKS = [pack(0, [7, 5, 4]), pack(1, [16]), pack(2, [1] * 12 + [4]), pack(3, [8, 8])]


def loss(params, batch):
    hidden, _ = decoder.apply(
        params, batch["tokens"], positions=batch["positions"], segments=batch["segments"], cfg=CFG
    )
    return decoder.loss(params, hidden, batch["labels"], CFG)


def one_by_one():
    means = [loss(PARAMS, p) for p in PACKS]
    return sum(m.total for m in means) / sum(m.count for m in means)


def test_the_loss_of_joined_packs_is_that_of_each():
    torch.testing.assert_close(ftrain.jit(loss)(PARAMS, join_packs(PACKS)).value(), one_by_one())


def test_the_loss_of_micro_batches_is_that_of_each():
    step = ftrain.jit(ftrain.value_and_grad(ftrain.accumulate(loss, micro_batches=4, stacked=True)))
    torch.testing.assert_close(step(PARAMS, stack_packs(PACKS))[0], one_by_one())


def test_joined_packs_are_a_batch_of_a_mesh():
    step = ftrain.jit(
        ftrain.value_and_grad(loss), plan=Plan(Mesh(shard=4, kind="virtual")), specs={"params": decoder.specs(CFG)}
    )
    torch.testing.assert_close(step(PARAMS, join_packs(PACKS))[0], one_by_one())


def test_packs_that_differ_are_named():
    with pytest.raises(ValueError, match=r"leaf 'tokens' has shapes .*\(16,\).* in different packs"):
        join_packs([PACKS[0], pack(0, [4])])
    with pytest.raises(ValueError, match=r"pack 1 has leaves \['tokens'\], and pack 0"):
        stack_packs([PACKS[0], {"tokens": PACKS[0]["tokens"]}])
