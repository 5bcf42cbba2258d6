"""Derivatives mean what `torch.func`'s mean, eagerly and under jit."""

import pytest
import torch

from ftrain import Mesh, Plan, tree
from ftrain.kernels.mean import Mean, weighted_sum
from ftrain.modules import spec
from ftrain.plan.jit import jit
from ftrain.trace.grad import grad, value_and_grad
from tests.helpers.momentum_steps import assert_same_bits, stack_batch, stack_loss, stack_params

either_way = pytest.mark.parametrize("run", [lambda f: f, jit], ids=["eager", "jit"])


def cubic(params, x):
    return (params["a"] * x).pow(3).sum() + params["b"].sum()


def cubic_params():
    return {"a": torch.tensor([1.0, 2.0]), "b": torch.tensor([3.0]), "unused": torch.ones(2)}


@either_way
def test_value_and_gradient(run):
    params, x = cubic_params(), torch.tensor([0.5, 2.0])
    value, grads = run(value_and_grad(cubic))(params, x)
    expected, expected_value = torch.func.grad_and_value(cubic)(params, x)
    assert torch.equal(value, expected_value)
    assert_same_bits(grads, expected)
    assert_same_bits(run(grad(cubic))(params, x), expected)
    assert grads["unused"].tolist() == [0, 0]


def test_jit_gives_the_bits_of_eager():
    params, batch = stack_params(), stack_batch()
    assert_same_bits(jit(value_and_grad(stack_loss))(params, batch), value_and_grad(stack_loss)(params, batch))


@either_way
def test_several_arguments(run):
    x, y = torch.tensor(2.0), torch.tensor(5.0)
    value, (by_x, by_y) = run(value_and_grad(lambda x, y: x * x * y, argnums=(0, 1)))(x, y)
    assert (value.item(), by_x.item(), by_y.item()) == (20, 20, 4)
    assert run(grad(lambda x, y: x * x * y, argnums=1))(x, y).item() == 4


@either_way
def test_aux(run):
    def loss(p):
        return (p["w"] ** 2).sum(), {"norm": p["w"].abs().sum(), "doubled": p["w"] * 2}

    (value, aux), grads = run(value_and_grad(loss, has_aux=True))({"w": torch.tensor([1.0, -2.0])})
    assert value.item() == 5
    assert_same_bits(aux, {"norm": torch.tensor(3.0), "doubled": torch.tensor([2.0, -4.0])})
    assert grads["w"].tolist() == [2, -4]
    assert not any(leaf.requires_grad for leaf in tree.leaves((value, aux, grads)))
    only, aux = run(grad(loss, has_aux=True))({"w": torch.tensor([1.0, -2.0])})
    assert only["w"].tolist() == [2, -4]
    assert aux["norm"].item() == 3


@either_way
def test_means_and_weighted_sums(run):
    def loss(w, x):
        terms = {"a": Mean.of(w * x), "b": Mean((w * 3).sum(), torch.tensor(6.0))}
        return weighted_sum(terms, {"b": 2.0})

    value, by_w = run(value_and_grad(loss))(torch.tensor(2.0), torch.tensor([1.0, 3.0]))
    assert (value.item(), by_w.item()) == (2 * 2 + 2 * 6 / 6, 2 + 2 * 3 / 6)


@either_way
def test_a_count_of_zero_is_harmless(run):
    def loss(w, mask):
        return Mean((w * mask).sum(), mask.sum())

    value, by_w = run(value_and_grad(loss))(torch.ones(3), torch.zeros(3))
    assert value.item() == 0
    assert by_w.tolist() == [0, 0, 0]


@either_way
def test_a_loss_without_parameters_has_zero_gradients(run):
    value, grads = run(value_and_grad(lambda p, x: x.sum()))({"w": torch.ones(2)}, torch.ones(3))
    assert value.item() == 3
    assert grads["w"].tolist() == [0, 0]


@either_way
def test_gradients_of_each_sample(run):
    params, (x, y) = stack_params(), stack_batch()
    one = grad(lambda p, x, y: stack_loss(p, (x[None], y[None])))
    each = run(lambda p, x, y: torch.func.vmap(one, in_dims=(None, 0, 0))(p, x, y))(params, x, y)
    for i in (0, 5):
        alone = one(params, x[i], y[i])
        for a, b in zip(tree.leaves(each), tree.leaves(alone), strict=True):
            torch.testing.assert_close(a[i], b)


@either_way
def test_hessian_vector_products_both_ways(run):
    a = torch.randn(4, 4, dtype=torch.float64)
    f = lambda x: (x @ a @ x) ** 2  # noqa: E731
    x, v = torch.randn(4, dtype=torch.float64), torch.randn(4, dtype=torch.float64)
    forward_over_reverse = run(lambda x, v: torch.func.jvp(grad(f), (x,), (v,))[1])(x, v)
    reverse_over_reverse = run(grad(lambda x, v: (grad(f)(x) * v).sum()))(x, v)
    expected = torch.autograd.functional.hessian(f, x) @ v
    torch.testing.assert_close(forward_over_reverse, expected)
    torch.testing.assert_close(reverse_over_reverse, expected)


@either_way
def test_nested_gradients(run):
    third = grad(grad(grad(lambda x: x**4)))
    assert run(third)(torch.tensor(2.0)).item() == 48


@either_way
def test_a_gradient_step_inside_a_loss(run):
    """As in meta-learning: the outer gradient goes through the inner one."""

    def outer(w, x):
        inner = grad(lambda w: (w * x - 1) ** 2)(w)
        return (w - 0.1 * inner) ** 2

    w, x = torch.tensor(2.0, dtype=torch.float64), torch.tensor(3.0, dtype=torch.float64)
    step = 2 - 0.1 * 2 * (2 * 3 - 1) * 3
    torch.testing.assert_close(run(grad(outer))(w, x).item(), 2 * step * (1 - 0.1 * 2 * 9))


@pytest.mark.parametrize(
    ("leaf", "what"), [(torch.tensor([1]), "dtype torch.int64"), (torch.tensor(True), "dtype torch.bool"), (3, "int")]
)
def test_leaves_without_gradient_are_named(leaf, what):
    with pytest.raises(ValueError, match=rf"argument 0, leaf 'a\.1' is {what}.*keep it in another argument"):
        grad(lambda p: p["a"][0].sum())({"a": [torch.ones(1), leaf]})


@pytest.mark.parametrize("loss", [lambda x: x, lambda x: x.sum().item(), lambda x: (x.sum(), x)])
def test_a_loss_that_is_no_scalar_is_refused(loss):
    with pytest.raises(ValueError, match="the loss must be a scalar tensor, a Mean or a WeightedSum"):
        grad(loss)(torch.ones(2))


def test_the_graph_of_a_step_holds_no_second_derivative():
    compiled = jit(value_and_grad(cubic)).lower(cubic_params(), torch.ones(2))
    assert len([n for n in compiled.graph.graph.nodes if n.op == "call_function"]) <= 20


@pytest.mark.parametrize("depends", [False, True])
@either_way
def test_aux_that_depends_on_no_parameter_is_the_same_tensor(run, depends):
    """So that what the step does to it in place afterwards is seen in both, as with `torch.func`."""

    def step(w, x):
        kept = x.flip(0).clone()
        loss = lambda w: (x.sum() + (w * x).sum() if depends else x.sum(), (kept, w * kept))  # noqa: E731
        (_, aux), _ = value_and_grad(loss, has_aux=True)(w)
        kept.unsqueeze_(0).mul_(3)
        return aux

    same, made = run(step)(torch.tensor(2.0), torch.arange(3.0))
    assert same.tolist() == [[6.0, 3.0, 0.0]]
    assert made.tolist() == [4.0, 2.0, 0.0]


@pytest.mark.parametrize(
    ("loss", "words"),
    [
        (lambda p, b: Mean((p["w"] * b).sum(), 8), r"Mean\(count=8\) is int: a Mean has 0-d tensors"),
        (lambda p, b: Mean(3.0, 1.0), r"Mean\(total=3.0\) is float"),
        (lambda p, b: weighted_sum({"a": 3.0}, {}), "a term 3.0 of a weighted sum is float"),
        (lambda p, b: Mean.of(3.0), r"Mean.of\(3.0\): give a tensor"),
    ],
)
@pytest.mark.parametrize("ranks", [1, 2])
def test_a_mean_of_python_numbers_is_refused_by_name(loss, words, ranks):
    plan, params = Plan(Mesh(shard=ranks, kind="virtual")), {"w": torch.ones(())}
    with pytest.raises(ValueError, match=words):
        jit(grad(loss), plan=plan, specs=spec.of(params), batch="b")(params, torch.ones(8))


def test_a_metric_of_python_numbers_is_refused_on_a_mesh():
    plan = Plan(Mesh(shard=2, kind="virtual"))
    with pytest.raises(ValueError, match=r"Mean\(count=8\) is int"):
        jit(lambda batch: Mean(batch.sum(), 8), plan=plan)(torch.ones(8))
