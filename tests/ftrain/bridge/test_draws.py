"""Random numbers that a module draws in its own way: from a key, the same on a mesh, or refused."""

import copy

import pytest
import torch

import ftrain
from ftrain.bridge import from_transformers
from ftrain.bridge.draws import drawing
from ftrain.bridge.skeleton import flatten, nest
from ftrain.sharding import Layout, Mesh, Plan

transformers = pytest.importorskip("transformers", minversion="5")


def test_tensors_are_filled_from_the_key():
    with drawing(ftrain.key(1)):
        uniform, normal = torch.empty(4000).uniform_(2.0, to=4.0), torch.empty(4000).normal_(1.0, 3.0)
        waiting = torch.empty(4000).exponential_(0.5)
    assert 2.0 <= float(uniform.min()) < float(uniform.max()) < 4.0
    assert float(waiting.min()) >= 0.0
    torch.testing.assert_close(uniform.mean(), torch.tensor(3.0), rtol=0, atol=0.05)
    torch.testing.assert_close(torch.stack([normal.mean(), normal.std()]), torch.tensor([1.0, 3.0]), rtol=0, atol=0.2)
    torch.testing.assert_close(waiting.mean(), torch.tensor(2.0), rtol=0, atol=0.2)
    with drawing(ftrain.key(1)):
        assert torch.equal(uniform, torch.empty(4000).uniform_(2.0, to=4.0))


def test_what_cannot_be_drawn_is_refused_with_the_way_out():
    with pytest.raises(ValueError, match=r"exponential_ draws random numbers .* key=ftrain.key\(0\)"), drawing(None):
        torch.empty(3).exponential_()
    with pytest.raises(ValueError, match=r"multinomial draws .*pass the numbers in the batch"), drawing(ftrain.key(0)):
        torch.multinomial(torch.ones(3), 1)
    with pytest.raises(ValueError, match="seeds the random numbers of the process"), drawing(ftrain.key(0)):
        torch.manual_seed(torch.initial_seed() + 1)


def test_on_a_mesh_a_router_draws_what_the_plain_one_draws_from_the_key():
    config = transformers.PhimoeConfig(
        vocab_size=61, hidden_size=16, intermediate_size=8, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=1, num_local_experts=4, max_position_embeddings=32, input_jitter_noise=0.1, pad_token_id=0,
        bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    torch.manual_seed(0)
    module = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="eager").train()
    params = nest({name: p.detach().clone() for name, p in module.named_parameters()})
    model = from_transformers(copy.deepcopy(config))
    tokens_BL = torch.randint(3, 61, (4, 6), generator=torch.Generator().manual_seed(1))
    batch = {"tokens": tokens_BL, "labels": tokens_BL.roll(-1, 1)}
    with drawing(ftrain.key(4), 4, 6):
        logits_BLV = module(tokens_BL).logits
    loss = torch.nn.functional.cross_entropy(logits_BLV.flatten(0, 1), batch["labels"].flatten())
    loss.backward()

    plan, grad = Plan(Mesh(shard=2, kind="virtual"), Layout()), ftrain.value_and_grad(model.loss)

    def step(batch):
        run = ftrain.jit(lambda params, batch, key: grad(params, batch, key), plan=plan, specs=model.specs)
        return run(params, batch, ftrain.key(4))

    value, grads = step(batch)
    torch.testing.assert_close(value, loss.detach())
    for name, found in flatten(grads).items():
        torch.testing.assert_close(found, module.get_parameter(name).grad, rtol=1e-4, atol=1e-6)
    two = {name: x[:2] for name, x in batch.items()}  # a row a rank: its tokens, or places that all rows share
    with pytest.raises(ValueError, match="reads a whole array, and a rank holds a piece of it"):
        step(two)
