"""`check`: a bridged model against the plain module in float64, on one device and on meshes."""

import pytest
import torch

import ftrain
from ftrain.bridge import check, from_module, from_transformers
from ftrain.sharding import Layout, Mesh, Plan

transformers = pytest.importorskip("transformers", minversion="5")

SIZES = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 4}


def llama():
    return from_transformers(transformers.LlamaConfig(vocab_size=61, num_key_value_heads=2, **SIZES))


def pack():
    tokens = torch.randint(0, 61, (24,), generator=torch.Generator().manual_seed(0))
    segments = torch.tensor([0] * 12 + [1] * 7 + [2] * 5)
    labels = torch.where(segments == torch.cat([segments[1:], segments.new_tensor([9])]), tokens.roll(-1), -100)
    places = torch.cat([torch.arange(12), torch.arange(7), torch.arange(5)])
    return {"tokens": tokens, "segments": segments, "labels": labels, "positions": places}


PLANS = [None, Plan(Mesh(shard=2, kind="virtual"), Layout()), Plan(Mesh(sequence=2, kind="virtual"), Layout())]


@pytest.mark.parametrize("plan", PLANS, ids=["one device", "shard", "sequence"])
def test_a_model_that_is_right(plan):
    found = check(llama(), pack(), plan=plan)
    assert found.equal, str(found)
    assert len(found.rows) == 22
    assert str(found).startswith("LlamaForCausalLM of transformers, ")


def test_a_model_that_is_wrong_is_shown_with_the_farthest_first():
    model = llama()
    from dataclasses import replace

    wrong = replace(model, loss=lambda params, batch: model.loss(params, {**batch, "segments": batch["segments"] * 0}))
    found = check(wrong, pack())
    assert not found.equal
    assert "NOT equal" in str(found)
    assert "differs" in str(found).splitlines()[1]


class Padded(torch.nn.Module):
    """Attention over rows of other lengths, dropout, statistics of the batch, and experts chosen by the data."""

    def __init__(self):
        super().__init__()
        self.table, self.heads = torch.nn.Embedding(9, 4), torch.nn.MultiheadAttention(4, 2, 0.1, batch_first=True)
        self.gate, self.norm = torch.nn.Linear(4, 2), torch.nn.BatchNorm1d(4)
        self.experts = torch.nn.ModuleList(torch.nn.Linear(4, 4) for _ in range(2))

    def forward(self, tokens, mask):
        x = self.table(tokens)
        h = (x + self.heads(x, x, x, key_padding_mask=~mask)[0]).mean(1)
        weights, out = self.gate(h).softmax(-1), torch.zeros_like(h)
        for e, expert in enumerate(self.experts):
            (t,) = torch.where(weights.argmax(-1) == e)
            out.index_add_(0, t, expert(h[t]) * weights[t, e, None])
        return self.norm(out)


@pytest.mark.parametrize("plan", [None, Plan(Mesh(shard=2, kind="virtual"))], ids=["one device", "two ranks"])
def test_a_module_of_ones_own_equals_itself(plan):
    torch.manual_seed(0)
    model = from_module(Padded(), lambda out, batch: ftrain.Mean.of((out - batch["y"]).square()))
    lengths = torch.tensor([5, 3, 4, 1])
    batch = {"tokens": torch.arange(20).view(4, 5) % 9, "mask": torch.arange(5) < lengths[:, None]}
    batch["y"] = torch.randn(4, 4)
    found = check(model, batch, plan=plan)
    assert found.equal, str(found)


def test_a_module_without_a_loss_has_nothing_to_compare():
    with pytest.raises(ValueError, match="has no plain module"):
        check(from_module(torch.nn.Linear(2, 2)), {})
