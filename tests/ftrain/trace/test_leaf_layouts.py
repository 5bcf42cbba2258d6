"""Leaves that are not contiguous: equal to eager code, or refused where the results depend on the layout."""

import pytest
import torch
import torch.nn.functional as F

import ftrain

ALONG_MEMORY = {
    "a fill": lambda x: torch.empty_like(x).uniform_(),
    "rand_like": torch.rand_like,
    "dropout": lambda x: F.dropout(x, 0.5),
    "also as it lies": lambda x: F.dropout(x + x.contiguous(), 0.5),
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
    "like rows": lambda x: torch.randn_like(x, memory_format=torch.contiguous_format) * x,
    "made contiguous": lambda x: F.dropout(x.contiguous() * 2, 0.5),
    "as_strided of rows": lambda x: x.contiguous().as_strided((3,), (2,)),
    "a question about rows": lambda x: x * (2 if x.contiguous().is_contiguous() else 3),
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
    words = r"test_leaf_layouts.py:\d+ .*depends on the memory.*'state.turned' with strides \(1, 4\).*contiguous\(\)"
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
    with pytest.raises(ValueError, match=r"depends on the memory layout.*leaf 'x' with strides \(1, 4\)"):
        step(torch.randn(5, 4).t())
    assert step.traces == 1
    assert torch.equal(drawn(step, rows), drawn(torch.rand_like, rows))


def test_a_loop_over_turned_rows_is_refused():
    def loss(w, x):
        return ftrain.Mean.of(F.dropout(x, 0.5) @ w)

    step = ftrain.jit(ftrain.value_and_grad(ftrain.accumulate(loss, 2, stacked=True)))
    w, x = torch.randn(5), torch.randn(2, 5, 4).transpose(1, 2)
    step(w, x.contiguous())
    with pytest.raises(ValueError, match=r"aten.bernoulli.* depends on the memory layout.*leaf 'batch' with strides"):
        step(w, x)


def test_only_what_random_numbers_follow_is_worked_out():
    def step(state):
        return {"a": state["a"].t() @ state["a"], "b": F.dropout(state["b"], 0.5)}

    state = {"a": torch.randn(5, 4).t(), "b": torch.randn(3)}
    found = drawn(ftrain.jit(step), state)
    torch.testing.assert_close(found, drawn(step, state))


READS = {
    "is_contiguous": lambda x: x * 2 if x.is_contiguous() else x * 3,
    "stride": lambda x: x * x.stride(0),
    "of a value": lambda x: x * 2 if (x + 1).is_contiguous() else x * 3,
    "in a loss": lambda x: ftrain.grad(lambda w: (w * w.stride()[1]).sum())(x),
}


@pytest.mark.parametrize("read", READS.values(), ids=READS)
def test_what_python_reads_of_a_layout_is_right_or_refused(read):
    step, x = ftrain.jit(read), torch.randn(5, 4, dtype=torch.float64).t()
    words = r"test_leaf_layouts.py:\d+ .*reads the memory layout.*leaf 'x' with strides \(1, 4\).*leaf.contiguous\(\)"
    for _ in range(2):
        with pytest.raises(ValueError, match=words):
            step(x)
    torch.testing.assert_close(step(x.contiguous()), read(x.contiguous()), rtol=0, atol=0)


def test_a_memory_format_is_read_too():
    def read(x):
        return x * 2 if x.is_contiguous(memory_format=torch.channels_last) else x * 3

    x = torch.randn(2, 3, 4, 4, dtype=torch.float64)
    assert torch.equal(ftrain.jit(read)(x), read(x))
    with pytest.raises(ValueError, match=r"is_contiguous\(\) reads the memory layout of a tensor"):
        ftrain.jit(read)(x.to(memory_format=torch.channels_last))


def test_an_answer_that_is_the_same_is_no_matter():
    def read(x):
        product = x @ x.t()
        return product * 2 if product.is_contiguous() else product * 3

    x = torch.randn(5, 4, dtype=torch.float64).t()
    torch.testing.assert_close(ftrain.jit(read)(x), read(x), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("donate", [None, "state"])
def test_lazy_conjugates_come_and_go_as_arguments(donate):
    def step(state, batch):
        return state.conj() * 1j, (state.imag, batch.imag, batch.conj())

    jitted, lazy = ftrain.jit(step, donate=donate), torch.randn(3, dtype=torch.complex128).conj()
    ours, eager = lazy.resolve_conj().clone(), lazy
    for batch in (lazy, lazy.resolve_conj(), lazy):
        ours, found = jitted(ours.conj(), batch)
        eager, expected = step(eager.conj(), batch)
        for a, b in zip((ours, *found), (eager, *expected), strict=True):
            assert torch.equal(a, b)
