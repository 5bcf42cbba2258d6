"""Modules that a user brings, on a mesh: equal to eager code on one device in float64, or a sentence."""

import pytest
import torch
from torch.func import functional_call

import ftrain
from ftrain import Mean, tree
from ftrain.modules import spec
from ftrain.sharding import Layout, Mesh, Plan
from tests.helpers.foreign_modules import MODULES
from tests.helpers.foreign_steps import assert_equal

ON_MESH = (
    "linear", "mlp", "activations", "softplus", "layer norm", "rms norm", "instance norm", "weight norm", "orthogonal",
    "conv1d", "conv2d", "squeeze and excitation", "unet", "embedding", "tied", "lstm", "attention", "encoder layer",
    "transformer", "a cache of angles", "top-k experts", "batch norm in evaluation",
)  # fmt: skip
SHARD, REPLICATE = Mesh(shard=2, kind="virtual"), Mesh(replicate=2, kind="virtual")


def three_steps(module, params, batch, run):
    """Gradient descent with a norm of the user's own, on the mean over rows of what the module returns."""

    def step(params, batch):
        def loss(params, batch):
            out = functional_call(module, params, (batch["x"],))
            return Mean(out.square().sum() + 0.3 * out.sum(), torch.full((), float(out.numel()), dtype=out.dtype))

        value, grads = ftrain.value_and_grad(loss)(params, batch)
        size = torch.stack([g.square().sum() for g in grads.values()]).sum().sqrt()
        return tree.map(lambda p, g: p - 0.1 * g / (1 + size), params, grads), value

    jitted, results = run(step), []
    for _ in range(3):
        params, value = jitted(params, {"x": batch})
        results.append((params, value))
    return results


def prepared(name):
    module, make = MODULES[name]
    module.double().eval()  # torch's own random numbers are not those of one device
    torch.manual_seed(1)
    batch = make()
    params = {name: p.detach().clone() for name, p in module.named_parameters()}
    return module, params, batch.double() if batch.is_floating_point() else batch


@pytest.mark.parametrize("mesh", [SHARD, pytest.param(REPLICATE, marks=pytest.mark.exhaustive)], ids=str)
@pytest.mark.parametrize("name", ON_MESH)
def test_a_module_trains_on_a_mesh_as_on_one_device(name, mesh):
    module, params, batch = prepared(name)
    expected = three_steps(module, params, batch, lambda step: step)
    plan = Plan(mesh, Layout())
    found = three_steps(module, params, batch, lambda step: ftrain.jit(step, plan=plan, specs=spec.of(params)))
    assert_equal(found, expected, str(mesh))


def test_statistics_of_one_ranks_share_are_refused():
    module, params, batch = prepared("batch norm without statistics")
    plan = Plan(SHARD, Layout())
    with pytest.raises(ValueError, match=r"batch_norm at .*tests.* mixes rows of the batch"):
        three_steps(module, params, batch, lambda step: ftrain.jit(step, plan=plan, specs=spec.of(params)))
