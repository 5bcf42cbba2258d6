"""Steps that a user brings, of the kinds that torch.func's tutorials, GANs, teachers and policies are made of."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.func import functional_call, grad, hessian, jacrev, jvp, stack_module_state, vmap

import ftrain
from ftrain import tree

from tests.helpers.foreign_steps import assert_equal  # isort: skip

D = 4


def params_of(module):
    return {k: v.detach().clone() for k, v in module.double().named_parameters()}


def sgd(params, grads, rate=0.1):
    return tree.map(lambda p, g: p - rate * g, params, grads)


MLP = nn.Sequential(nn.Linear(D, 8), nn.Tanh(), nn.Linear(8, D)).double()
NORMED = nn.Sequential(nn.Linear(D, 8), nn.BatchNorm1d(8), nn.Dropout(0.3), nn.Linear(8, D)).double()


def per_sample_gradients(state, x):
    one = lambda p, row: functional_call(MLP, p, (row[None],)).square().mean()  # noqa: E731
    grads = vmap(grad(one), (None, 0))(state, x)
    norms = torch.stack([g.flatten(1).norm(dim=1) for g in tree.leaves(grads)]).norm(dim=0)
    clipped = tree.map(lambda g: (g * (1 / norms.clamp(min=1)).view(-1, *[1] * (g.dim() - 1))).mean(0), grads)
    return sgd(state, clipped), {"norms": norms}


def meta_learning(state, x):
    def inner(p):
        return functional_call(MLP, p, (x,)).square().mean()

    def outer(p):
        return (functional_call(MLP, sgd(p, ftrain.grad(inner)(p)), (x * 2,)) - x).square().mean()

    value, grads = ftrain.value_and_grad(outer)(state)
    return sgd(state, grads), {"loss": value}


def gradient_penalty(state, x):
    def loss(p):
        score = lambda x: functional_call(MLP, p, (x,)).sum()  # noqa: E731
        return functional_call(MLP, p, (x,)).square().mean() + ftrain.grad(score)(x).norm(dim=1).sub(1).square().mean()

    value, grads = ftrain.value_and_grad(loss)(state)
    return sgd(state, grads), {"loss": value}


def curvature(state, x):
    loss = lambda p: functional_call(MLP, p, (x,)).square().mean()  # noqa: E731
    grads = ftrain.grad(loss)(state)
    _, product = jvp(grad(loss), (state,), (grads,))
    return sgd(state, product), {"jacobian": jacrev(lambda x: functional_call(MLP, state, (x,)).sum(0))(x)}


def newton(state, x):
    loss = lambda b: functional_call(MLP, {**state, "2.bias": b}, (x,)).square().mean()  # noqa: E731
    step = torch.linalg.solve(hessian(loss)(state["2.bias"]), grad(loss)(state["2.bias"]))
    return {**state, "2.bias": state["2.bias"] - step}, {}


def statistics_of_a_batch_norm(state, x):
    def loss(p):
        buffers = tree.map(torch.clone, state["buffers"])
        return functional_call(NORMED, (p, buffers), (x,)).square().mean(), buffers

    (value, buffers), grads = ftrain.value_and_grad(loss, has_aux=True)(state["params"])
    return {"params": sgd(state["params"], grads), "buffers": buffers}, {"loss": value}


def teacher_and_student(state, x):
    def loss(p):
        target = functional_call(MLP, state["teacher"], (x,))
        return F.kl_div(functional_call(MLP, p, (x,)).log_softmax(-1), target.softmax(-1), reduction="batchmean")

    value, grads = ftrain.value_and_grad(loss)(state["params"])
    params = sgd(state["params"], grads)
    return {"params": params, "teacher": tree.map(lambda t, p: t.lerp(p, 0.1), state["teacher"], params)}, {"l": value}


def adversaries(state, x):
    fake = lambda g: functional_call(MLP, g, (torch.randn_like(x),))  # noqa: E731
    judge = lambda d, x: functional_call(MLP, d, (x,)).mean()  # noqa: E731
    d_loss, d_grads = ftrain.value_and_grad(
        lambda d: F.softplus(judge(d, fake(state["g"]))) + F.softplus(-judge(d, x))
    )(state["d"])
    d = sgd(state["d"], d_grads)
    g_loss, g_grads = ftrain.value_and_grad(lambda g: F.softplus(-judge(d, fake(g))))(state["g"])
    return {"g": sgd(state["g"], g_grads), "d": d}, {"d": d_loss, "g": g_loss}


def policy(state, x):
    def loss(p):
        chances = torch.distributions.Categorical(logits=functional_call(MLP, p, (x,)), validate_args=False)
        actions = chances.sample()
        return -(chances.log_prob(actions) * (actions == 0)).mean() - 0.01 * chances.entropy().mean()

    value, grads = ftrain.value_and_grad(loss)(state)
    return sgd(state, grads), {"loss": value}


def contrast(state, x):
    def loss(p):
        a, b = (F.normalize(functional_call(MLP, p, (x + 0.1 * torch.randn_like(x),)), dim=-1) for _ in range(2))
        return F.cross_entropy(a @ b.T / 0.1, torch.arange(len(x)))

    value, grads = ftrain.value_and_grad(loss)(state)
    return sgd(state, grads), {"loss": value}


def variational(state, x):
    def loss(p):
        mean, log_scale = functional_call(MLP, p, (x,)).chunk(2, -1)
        z = mean + torch.randn_like(mean) * log_scale.exp()
        return (z - x[:, :2]).square().mean() + (mean.square() + (2 * log_scale).exp() - 2 * log_scale).mean()

    value, grads = ftrain.value_and_grad(loss)(state)
    return sgd(state, grads), {"loss": value}


def ensemble(state, x):
    each = lambda p: functional_call(MLP, p, (x,)).square().mean()  # noqa: E731
    grads, values = vmap(torch.func.grad_and_value(each))(state)
    return sgd(state, grads), {"losses": values}


def buffers_of(module):
    return {k: v.clone() for k, v in module.named_buffers()}


def two(*names):
    return lambda: {name: params_of(copy.deepcopy(MLP)) for name in names}


STEPS = {
    "per-sample gradients": (per_sample_gradients, lambda: params_of(MLP)),
    "meta-learning": (meta_learning, lambda: params_of(MLP)),
    "gradient penalty": (gradient_penalty, lambda: params_of(MLP)),
    "curvature": (curvature, lambda: params_of(MLP)),
    "newton": (newton, lambda: params_of(MLP)),
    "statistics of a batch norm": (
        statistics_of_a_batch_norm,
        lambda: {"params": params_of(NORMED), "buffers": buffers_of(NORMED)},
    ),
    "teacher and student": (teacher_and_student, two("params", "teacher")),
    "adversaries": (adversaries, two("g", "d")),
    "policy": (policy, lambda: params_of(MLP)),
    "contrast": (contrast, lambda: params_of(MLP)),
    "variational": (variational, lambda: params_of(MLP)),
    "ensemble": (
        ensemble,
        lambda: {k: v.detach().clone() for k, v in stack_module_state([MLP, copy.deepcopy(MLP)])[0].items()},
    ),
}


@pytest.mark.parametrize("name", STEPS)
def test_a_step_equals_eager(name):
    step, make = STEPS[name]
    torch.manual_seed(1)
    x = torch.randn(5, D, dtype=torch.float64)

    def results(run):
        state, found = make(), []
        torch.manual_seed(3)
        for _ in range(3):
            state, metrics = run(state, x)
            found.append(tree.map(torch.clone, (state, metrics)))
        return found

    expected = results(step)
    for options in ({}, {"donate": "state", "remat": "all"}):
        assert_equal(results(ftrain.jit(step, **options)), expected, f"{options}")
