"""Tensors outside the arguments: read at every call, never written or trained, and called what the user calls them."""

import functools

import pytest
import torch
from torch import nn
from torch.func import functional_call

import ftrain
from ftrain.trace.captured import captured_name, captured_tensors

weights = torch.ones(3)


def test_what_the_user_calls_them():
    model = nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3))
    table = {"rows": [torch.zeros(2)]}

    def step(x):
        return (lambda: model(x) * weights)() + table["rows"][0].sum()

    assert captured_name(step, model[1].running_mean) == "'model.1.running_mean' (float32[3])"
    assert captured_name(step, weights) == "'weights' (float32[3])"
    assert captured_name(functools.partial(step), table["rows"][0]) == "'table.rows.0' (float32[2])"
    assert captured_name(ftrain.value_and_grad(step), model[0].weight) == "'model.0.weight' (float32[3, 3])"
    assert captured_name(step, torch.ones(4)) == "a tensor (float32[4])"


def test_they_are_read_at_every_call():
    scale = torch.ones(3)
    step = ftrain.jit(lambda x: x * scale)
    step(torch.ones(3))
    scale.fill_(2)
    assert torch.equal(step(torch.ones(3)), torch.full((3,), 2.0))


def test_a_write_names_the_tensor_and_the_line():
    model, counter = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4)), torch.zeros(3)
    params = {n: p.detach() for n, p in model.named_parameters()}
    step = ftrain.value_and_grad(lambda p, x: functional_call(model, p, x).square().mean())
    with pytest.raises(ValueError, match=r"writes into 'model.1.num_batches_tracked'.*test_captured.py:\d+"):
        ftrain.jit(step)(params, torch.randn(8, 4))
    with pytest.raises(ValueError, match=r"writes into 'counter'.*keep it in the state"):
        ftrain.jit(lambda x: (counter.add_(x), x * 2)[1])(torch.ones(3))
    assert torch.equal(counter, torch.zeros(3))
    mean = torch.zeros(3)
    with pytest.raises(ValueError, match="writes into 'mean'"):  # which batch norm's schema hides
        ftrain.jit(lambda x: nn.functional.batch_norm(x, mean, torch.ones(3), training=True))(torch.randn(8, 3))


def test_weights_that_want_a_gradient_are_refused():
    head, x = nn.Linear(4, 4), torch.randn(2, 4)
    step = ftrain.value_and_grad(lambda w, x: head(x @ w).square().mean())
    with pytest.raises(ValueError, match=r"reads 'head.(weight|bias)'.*requires a gradient.*functional_call"):
        ftrain.jit(step)(torch.eye(4), x)
    expected = step(torch.eye(4), x)
    head.requires_grad_(False)
    torch.testing.assert_close(ftrain.jit(step)(torch.eye(4), x), expected)


def test_a_teacher_without_gradients_is_fine():
    teacher, x = nn.Linear(4, 4), torch.randn(2, 4)

    def loss(w, x):
        with torch.no_grad():
            target = teacher(x)
        return (x @ w - target).square().mean()

    torch.testing.assert_close(
        ftrain.jit(ftrain.value_and_grad(loss))(torch.eye(4), x), ftrain.value_and_grad(loss)(torch.eye(4), x)
    )


def test_the_graph_knows_them():
    table = torch.ones(3)
    compiled = ftrain.jit(lambda x: x * table + table).lower(torch.ones(3))
    assert [t is table for t in captured_tensors(compiled.graph).values()] == [True]


def test_what_is_computed_from_them_alone_is_written_like_any_temporary():
    table = torch.linspace(0, 1, 6).reshape(2, 3)

    def step(x):
        squares = table * table
        squares.copy_(squares + x)
        squares.view(3, 2)[1].mul_(x[0])
        return nn.functional.rms_norm(table, table.shape[-1:], table[0]) * squares

    x, before = torch.linspace(1, 2, 3), table.clone()
    torch.testing.assert_close(ftrain.jit(step)(x), step(x))
    assert torch.equal(table, before)


def in_part(table, x):
    table.view(-1)[1:].add_(1)


def in_a_piece(table, x):
    table.chunk(2)[1].copy_(x)


@pytest.mark.parametrize("write", [in_part, in_a_piece])
def test_a_write_through_a_view_is_one_too(write):
    table = torch.ones(2, 3)
    with pytest.raises(ValueError, match=r"writes into 'table' \(float32\[2, 3\]\).*test_captured.py:\d+ \(in_"):
        ftrain.jit(lambda x: (write(table, x), x + table)[1])(torch.ones(3))
    assert torch.equal(table, torch.ones(2, 3))


def test_they_may_be_results():
    table = torch.ones(3)
    found = ftrain.jit(lambda x: {"itself": table, "row": table[:2], "sum": x + table})(torch.ones(3))
    assert found["itself"] is table
    assert torch.equal(found["row"], torch.ones(2))
    assert torch.equal(found["sum"], torch.full((3,), 2.0))


def test_one_that_became_the_state_is_not_written_over():
    start = torch.ones(3)
    step = ftrain.jit(lambda w, x: {"w": start + 0 * w["w"] + x}, donate="w")
    first = ftrain.jit(lambda x: {"w": start})(torch.ones(3))
    with pytest.raises(ValueError, match=r"'start'.*which the step captures, share memory"):
        step(first, torch.ones(3))


def test_a_loop_and_what_follows_it_read_the_same_one():
    table = torch.linspace(0, 1, 3)
    loss = ftrain.accumulate(lambda w, x: ftrain.Mean((x * w * table).sum(), torch.tensor(2.0)), 2, stacked=True)

    def step(w, x):
        value, grads = ftrain.value_and_grad(loss)(w, x)
        squares = table * table
        squares.mul_(2)
        return value, grads, w * table, squares

    w, x = torch.ones(3), torch.ones(2, 3)
    torch.testing.assert_close(ftrain.jit(step)(w, x), step(w, x))
