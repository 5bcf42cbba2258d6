"""Captured tensors and views of them: nothing is written over them, and equal memory is known to be equal."""

import pytest
import torch

import ftrain
from ftrain.graph.aliasing import storage

VIEWS = {
    "a slice of all": lambda k: k[:9],
    "a slice": lambda k: torch.cat([k[:4], k[4:]]) * k[:9],
    "a view": lambda k: k.view(3, 3).view(9),
    "parts": lambda k: k.view(3, 3).unbind()[1].repeat(3) * k[:9],
    "itself twice": lambda k: k * k[:9],
}


@pytest.mark.parametrize("view", VIEWS.values(), ids=VIEWS)
@pytest.mark.parametrize("micro_batches", [0, 3])
def test_a_captured_tensor_is_the_same_after_every_call(view, micro_batches):
    scale = torch.linspace(1.0, 2.0, 9, dtype=torch.float64)

    def loss(w, x):
        flat = (w * x).square()
        return ftrain.Mean((flat * view(scale)).sum(), torch.tensor(9.0))

    plain = ftrain.value_and_grad(ftrain.accumulate(loss, micro_batches, stacked=True) if micro_batches else loss)
    x = torch.randn(3, 9, dtype=torch.float64) if micro_batches else torch.randn(9, dtype=torch.float64)
    w, before = torch.randn(9, dtype=torch.float64), scale.clone()
    expected, step = plain(w, x), ftrain.jit(plain)
    for _ in range(3):
        torch.testing.assert_close(step(w, x), expected, rtol=0, atol=1e-12)
        assert torch.equal(scale, before)


def test_memory_of_captured_tensors_is_that_of_the_real_ones():
    table = torch.arange(12.0)
    low, high, bits = table[:6], table[6:].view(2, 3), table.view(torch.int32)

    def step(x):
        return low.view(2, 3) * high + x * table[1:7].view(2, 3) + high.sum() + bits[0]

    compiled = ftrain.jit(step).lower(torch.ones(2, 3))
    memory = {n.name: storage(n) for n in compiled.graph.graph.nodes if n.op == "get_attr" or "view" in n.name}
    assert len(memory) > 4
    assert len(set(memory.values())) == 1
    assert torch.equal(ftrain.jit(step)(torch.ones(2, 3)), step(torch.ones(2, 3)))


def test_the_parts_of_a_captured_lazy_conjugate_are_read():
    lazy = torch.complex(torch.arange(3.0), torch.ones(3)).conj()
    assert torch.equal(ftrain.jit(lambda x: lazy.imag * x)(torch.ones(3)), lazy.imag)
