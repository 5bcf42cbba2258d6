"""Random numbers that a module draws in its own way: from a key, the same on a mesh, or refused."""

import pytest
import torch

import ftrain
from ftrain.bridge.draws import drawing
from ftrain.modules.spec import Constant, ParamSpec
from ftrain.sharding import Layout, Mesh, Plan


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


def routed(params, batch):
    """A router that draws for each token of rows `[B, L, D]`, as some of transformers' do (PhiMoE)."""
    x_BLD = batch["x"]
    with drawing(ftrain.key(4), *x_BLD.shape[:2]):
        scores_TE = x_BLD.flatten(0, 1) @ params["w"]
        drawn_TE = scores_TE - torch.empty_like(scores_TE).exponential_().log()
    return ftrain.Mean.of((drawn_TE.softmax(-1) * scores_TE).sum(-1))


def test_tokens_draw_on_a_mesh_what_they_draw_on_one_device():
    x_BLD = torch.randn(4, 6, 3, generator=torch.Generator().manual_seed(1))
    params = {"w": torch.randn(3, 5, generator=torch.Generator().manual_seed(2))}
    specs = {"w": ParamSpec((3, 5), ("embed", "mlp"), Constant(0.0))}
    plan = Plan(Mesh(shard=2, kind="virtual"), Layout())

    def step(batch):
        run = ftrain.jit(lambda params, batch: ftrain.value_and_grad(routed)(params, batch), plan=plan, specs=specs)
        return run(params, batch)

    value, grads = ftrain.value_and_grad(routed)(params, {"x": x_BLD})
    found, of_ranks = step({"x": x_BLD})
    torch.testing.assert_close(found, value)
    torch.testing.assert_close(of_ranks["w"], grads["w"])
    with pytest.raises(ValueError, match="reads a whole array, and a rank holds a piece of it"):
        step({"x": x_BLD[:2]})  # a row a rank: what is drawn may be for its tokens, or for places that all rows share
