"""Leaves that do not lie row by row: equal to eager code, or refused where numbers depend on how they lie."""

import pytest
import torch
import torch.nn.functional as F

import ftrain

ALONG_MEMORY = {
    "a fill": lambda x: torch.empty_like(x).uniform_(),
    "rand_like": torch.rand_like,
    "dropout": lambda x: F.dropout(x, 0.5),
    "of a value": lambda x: F.dropout((x * 2).sin(), 0.5),
    "randint_like": lambda x: torch.randint_like(x, 100),
    "without replacement": lambda x: torch.multinomial(x.abs(), 3),
    "as_strided": lambda x: x.as_strided((4, 5), (5, 1)),
    "as_strided of a value": lambda x: (x + 1).as_strided((3,), (2,)),
}

BY_SHAPE = {
    "a product": lambda x: F.dropout(x @ x.t(), 0.5),
    "by shape": lambda x: torch.rand(x.shape) * x,
    "a sum": lambda x: F.dropout(x.sum(0), 0.5),
    "a copy": lambda x: F.dropout(x.clone(memory_format=torch.contiguous_format), 0.5),
    "views": lambda x: x.view(2, 2, 5).transpose(0, 2) * 2,
}

LEAVES = {
    "columns": lambda: torch.randn(5, 4).t(),
    "every second": lambda: torch.randn(4, 10)[:, ::2],
    "a slice": lambda: torch.randn(4, 9)[:, 2:7],
}


def drawn(step, x):
    torch.manual_seed(0)
    return step(x)


@pytest.mark.parametrize("fill", BY_SHAPE.values(), ids=BY_SHAPE)
@pytest.mark.parametrize("leaf", LEAVES.values(), ids=LEAVES)
def test_what_goes_by_shape_is_equal(fill, leaf):
    x = leaf()
    expected = drawn(fill, x.contiguous())
    assert torch.equal(drawn(ftrain.jit(fill), x), expected)


@pytest.mark.parametrize("fill", ALONG_MEMORY.values(), ids=ALONG_MEMORY)
def test_what_goes_along_memory_is_refused_with_leaf_and_line(fill):
    def step(state):
        return fill(state["turned"])

    x = LEAVES["columns"]()
    words = r"test_leaf_layouts.py:\d+ .*along the memory.*leaf 'state.turned' with strides \(1, 4\).*contiguous\(\)"
    with pytest.raises(ValueError, match=words):
        ftrain.jit(step)({"turned": x})
    rows = {"turned": x.contiguous()}
    assert torch.equal(drawn(ftrain.jit(step), rows), drawn(step, rows))


@pytest.mark.parametrize("leaf", [LEAVES["every second"], LEAVES["a slice"]])
def test_random_numbers_of_slices_are_equal(leaf):
    x = leaf()
    assert torch.equal(drawn(ftrain.jit(lambda x: F.dropout(x * 1, 0.5)), x), drawn(lambda x: F.dropout(x, 0.5), x))


def test_the_layout_of_each_call_counts():
    step = ftrain.jit(lambda x: torch.rand_like(x))
    rows = torch.randn(4, 5)
    step(rows)
    step(torch.randn(8, 5)[::2])
    with pytest.raises(ValueError, match=r"follows leaf 'x' with strides \(1, 4\)"):
        step(torch.randn(5, 4).t())
    assert step.traces == 1
    assert torch.equal(drawn(step, rows), drawn(torch.rand_like, rows))


def test_a_loop_over_turned_rows_is_refused():
    def loss(w, x):
        return ftrain.Mean.of(F.dropout(x, 0.5) @ w)

    step = ftrain.jit(ftrain.value_and_grad(ftrain.accumulate(loss, 2)))
    w, x = torch.randn(5), torch.randn(2, 5, 4).transpose(1, 2)
    step(w, x.contiguous())
    with pytest.raises(ValueError, match=r"aten.bernoulli.* along the memory.*leaf 'batch' with strides"):
        step(w, x)


def test_only_what_random_numbers_follow_is_worked_out():
    def step(state):
        return {"a": state["a"].t() @ state["a"], "b": F.dropout(state["b"], 0.5)}

    state = {"a": torch.randn(5, 4).t(), "b": torch.randn(3)}
    found = drawn(ftrain.jit(step), state)
    torch.testing.assert_close(found, drawn(step, state))
