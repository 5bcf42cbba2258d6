"""Micro-batches: the gradients of one big batch, from a graph that does not grow."""

import pytest
import torch

from ftrain import tree
from ftrain.analysis.flops import graph_cost
from ftrain.graph.loop import is_loop, loop_body
from ftrain.kernels.mean import Mean, share, sum_over_batch, weighted_sum
from ftrain.kernels.random import key
from ftrain.modules import moe
from ftrain.modules.spec import init
from ftrain.plan.jit import jit
from ftrain.trace.accumulate import accumulate
from ftrain.trace.grad import grad, value_and_grad
from tests.helpers.momentum_steps import momentum_state, momentum_step, stack_batch, stack_loss, stack_params

either_way = pytest.mark.parametrize("run", [lambda f: f, jit], ids=["eager", "jit"])


def stack(batch, n):
    return tree.map(lambda x: x.reshape(n, -1, *x.shape[1:]), batch)


def masked_losses(params, batch):
    """Two means whose counts differ from row to row, and aux sums."""
    x, y, mask = batch
    for layer in params["layers"]:
        x = torch.tanh(x @ layer["w"] + layer["b"]) + x
    squares = (x - y).square().mean(-1)
    first = Mean((squares * mask).sum(), mask.sum())
    second = Mean((x.abs().mean(-1) * (1 - mask)).sum(), (1 - mask).sum())
    return weighted_sum({"a": first, "b": second}, {"b": 0.3}), {"a": first, "rows": mask.sum()}


def masked_batch():
    x, y = stack_batch(12)
    return x, y, torch.tensor([1.0, 1, 1, 1, 1, 0, 0, 0, 1, 0, 0, 0])


def assert_close(a, b):
    for path, x, y in zip(tree.paths(a), tree.leaves(a), tree.leaves(b), strict=True):
        torch.testing.assert_close(x, y, msg=lambda m, path=path: f"{path}: {m}")


@either_way
@pytest.mark.parametrize("n", [1, 3, 4, 12])
def test_micro_batches_with_unequal_counts_equal_one_batch(run, n):
    params, batch = stack_params(), masked_batch()
    expected = value_and_grad(masked_losses, has_aux=True)(params, batch)
    loss = accumulate(masked_losses, n, has_aux=True)
    assert_close(run(value_and_grad(loss, has_aux=True))(params, batch), expected)
    assert_close(run(lambda p, b: loss(p, b)[0].value())(params, batch), expected[0][0])
    assert_close(run(grad(loss, has_aux=True))(params, batch)[0], expected[1])


@either_way
def test_micro_batches_may_be_stacked_already(run):
    params, batch = stack_params(), masked_batch()
    expected = value_and_grad(masked_losses, has_aux=True)(params, batch)
    loss = accumulate(masked_losses, 3, has_aux=True, stacked=True)
    assert_close(run(value_and_grad(loss, has_aux=True))(params, stack(batch, 3)), expected)


def balanced_loss(params, x):
    """A loss whose constants are sums over the batch, of which the second is computed from the first."""
    x = torch.tanh(x @ params["w"])
    mean_D = share(sum_over_batch(x.detach().sum(0)), sum_over_batch(torch.ones_like(x[:, 0]).sum()))
    spread = sum_over_batch((x.detach() - mean_D).square().sum()).sqrt()
    load_D = sum_over_batch((x > mean_D).sum(0).to(x.dtype))
    return Mean((x * load_D / spread).sum(), torch.ones_like(x[:, 0]).sum())


@either_way
@pytest.mark.parametrize("n", [1, 2, 4])
def test_sums_over_the_batch_are_those_of_the_whole_batch(run, n):
    params, x = {"w": torch.randn(3, 3, dtype=torch.float64)}, torch.randn(8, 3, dtype=torch.float64)
    x = x + torch.arange(8)[:, None]  # micro-batches that differ
    loss = accumulate(balanced_loss, n)
    assert_close(run(value_and_grad(loss))(params, x), value_and_grad(balanced_loss)(params, x))
    assert_close(run(lambda p, b: loss(p, b).value())(params, x), balanced_loss(params, x).value())


@either_way
@pytest.mark.parametrize("score", ["softmax", "sigmoid"])
def test_the_balance_loss_of_experts_is_that_of_the_whole_batch(run, score):
    cfg = moe.MoEConfig(8, 6, experts=4, top_k=2, score=score)
    params = init(moe.specs(cfg), key(1))
    x = torch.randn(32, 8) + 2 * torch.randn(4, 8).repeat_interleave(8, 0)

    def loss(params, x):
        out, stats = moe.apply(params, x, cfg=cfg)
        return weighted_sum({"out": Mean.of(out.square()), "balance": moe.aux_loss(stats)}, {"balance": 0.1})

    expected = value_and_grad(loss)(params, x)
    assert_close(run(value_and_grad(accumulate(loss, 4)))(params, x), expected)


def test_sums_cost_a_loop_only_where_they_are_asked_for():
    params, x = {"w": torch.randn(3, 3)}, torch.randn(8, 3)
    loops = {}
    for name, loss in (("plain", stack_free_loss), ("sums", balanced_loss)):
        graph = jit(grad(accumulate(loss, 4))).lower(params, x).graph
        loops[name] = sum(is_loop(n) for n in graph.graph.nodes)
    # two for the sums, of which the second needs the first, one for the counts, one for the gradients
    assert loops == {"plain": 2, "sums": 4}


def stack_free_loss(params, x):
    return Mean.of((x @ params["w"]).square())


@either_way
def test_a_sum_that_depends_on_the_parameters_is_refused(run):
    def loss(params, x):
        return Mean(sum_over_batch((x @ params["w"]).sum()).square(), torch.tensor(1))

    with pytest.raises(ValueError, match=r"call 1 of sum_over_batch.*depends on the parameters.*detach it"):
        run(grad(accumulate(loss, 2)))({"w": torch.ones(3, 3)}, torch.ones(8, 3))


@either_way
def test_all_rows_masked_is_harmless(run):
    def loss(params, batch):
        x, mask = batch
        return Mean(((x @ params["w"]).sum(-1) * mask).sum(), mask.sum())

    value, grads = run(value_and_grad(accumulate(loss, 2)))({"w": torch.ones(3, 3)}, (torch.ones(8, 3), torch.zeros(8)))
    assert value.item() == 0
    assert grads["w"].abs().sum() == 0


def nodes_in(module):
    return sum(1 + (nodes_in(loop_body(n)) if is_loop(n) else 0) for n in module.graph.nodes)


def test_the_graph_does_not_grow_with_the_number():
    counts = set()
    for n in (2, 8):
        step = jit(momentum_step(accumulate(stack_loss, n)), donate="state")
        compiled = step.lower(momentum_state(stack_params()), stack_batch(8))
        counts.add(nodes_in(compiled.graph))
    assert len(counts) == 1


def test_counting_computes_no_layers():
    params, batch = stack_params(), masked_batch()
    step = jit(value_and_grad(accumulate(masked_losses, 3, has_aux=True), has_aux=True))
    counting, computing = [n for n in step.lower(params, batch).graph.graph.nodes if is_loop(n)]
    assert graph_cost(loop_body(counting)).flops == 0
    assert graph_cost(loop_body(computing)).flops > 0


def test_flops_are_those_of_one_batch():
    params, batch = stack_params(), stack_batch(8)
    whole = jit(grad(stack_loss)).lower(params, batch).cost().flops
    parts = jit(grad(accumulate(stack_loss, 4))).lower(params, batch).cost().flops
    assert parts == whole


@either_way
def test_losses_may_close_over_tensors_of_the_step(run):
    def step(params, batch, temperature):
        scale = temperature * 2

        def loss(params, batch):
            return Mean.of((batch @ params["w"] * scale).square())

        return value_and_grad(accumulate(loss, 2))(params, batch)

    arguments = {"w": torch.randn(3, 3)}, torch.randn(8, 3), torch.tensor(1.5)
    expected = value_and_grad(lambda p, b: Mean.of((b @ p["w"] * 3).square()))(arguments[0], arguments[1])
    assert_close(run(step)(*arguments), expected)


@either_way
def test_losses_may_write_into_temporaries(run):
    def loss(params, x):
        hidden = x @ params["w"]
        hidden += 1
        return Mean.of(hidden.square_())

    params, x = {"w": torch.randn(3, 3)}, torch.randn(8, 3)
    expected = value_and_grad(lambda p, x: Mean.of((x @ p["w"] + 1).square()))(params, x)
    assert_close(run(value_and_grad(accumulate(loss, 2)))(params, x), expected)


def test_a_step_around_a_loop_may_write_into_temporaries():
    def step(params, x):
        grads = grad(accumulate(lambda p, x: Mean.of((x @ p["w"]).square()), 2))(params, x)
        total = torch.zeros_like(grads["w"])
        total += grads["w"]
        return total

    params, x = {"w": torch.randn(3, 3)}, torch.randn(8, 3)
    compiled = jit(step).lower(params, x)
    assert sum(is_loop(n) for n in compiled.graph.graph.nodes) == 2
    assert_close(jit(step)(params, x), step(params, x))


def test_writing_into_the_batch_names_the_leaf():
    def loss(params, batch):
        batch["x"].add_(1)
        return Mean.of(batch["x"] @ params["w"])

    with pytest.raises(ValueError, match=r"writes into its input 'batch\.x'.*test_accumulate\.py"):
        jit(lambda params, batch: grad(accumulate(loss, 2))(params, batch))(
            {"w": torch.ones(3, 3)}, {"x": torch.ones(8, 3)}
        )


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: accumulate(stack_loss, 0), "micro_batches must be at least 1, not 0"),
        (
            lambda: grad(accumulate(stack_loss, 3))(stack_params(), stack_batch(8)),
            r"over 3 micro-batches: batch leaf '0' of shape \[8, 16\] does not divide: dim 0 must be a multiple of 3",
        ),
        (
            lambda: grad(accumulate(stack_loss, 3, stacked=True))(stack_params(), stack_batch(8)),
            r"over 3 stacked micro-batches: batch leaf '0' has shape \(8, 16\); its first dim must be 3",
        ),
        (lambda: grad(accumulate(lambda p, b: b.sum(), 2))({"w": torch.ones(1)}, torch.ones(2, 3)), "must be a Mean"),
        (lambda: grad(accumulate(stack_loss, 2), argnums=1)(stack_params(), stack_batch(2)), "in its first argument"),
        (lambda: grad(accumulate(stack_loss, 2), has_aux=True)(stack_params(), stack_batch(2)), "made with .False"),
    ],
)
def test_mistakes_get_a_clear_error(make, words):
    with pytest.raises(ValueError, match=words):
        make()


@pytest.mark.parametrize("count", [lambda x: torch.tensor(9.0), lambda x: torch.full((), 9.0)])
def test_a_count_may_be_a_constant_in_a_dtype_of_its_own(count):
    def loss(w, x):
        return Mean((w * x).square().sum(), count(x))

    w, x = torch.randn(9, dtype=torch.float64), torch.randn(3, 9, dtype=torch.float64)
    step = value_and_grad(accumulate(loss, 3))
    for found, expected in zip(jit(step)(w, x), step(w, x), strict=True):
        torch.testing.assert_close(found, expected)
    torch.testing.assert_close(jit(accumulate(loss, 3))(w, x).value(), accumulate(loss, 3)(w, x).value())
