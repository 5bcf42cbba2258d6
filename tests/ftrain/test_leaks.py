"""No tensor of a trace outlives it: modules are left as they were found, other keepers are refused by name."""

import dataclasses
import gc

import pytest
import torch
from torch import nn
from torch.func import functional_call

import ftrain
from ftrain.graph.torch_private import FakeTensor


class Caches(nn.Module):
    """Caches what it computes at its first call, in every way that modules do."""

    def __init__(self):
        super().__init__()
        self.inner = nn.Linear(3, 3)
        self.positions = None
        self.cached_length = 0
        self.by_length = {}
        self.register_buffer("mask", None)

    def forward(self, x):
        if self.cached_length < len(x):
            self.cached_length = len(x)
            self.positions = torch.arange(len(x))[:, None] / 10
            self.by_length[len(x)] = torch.ones(len(x), 1)
            self.mask = torch.zeros(len(x), 1)
            self.later = self.inner.weight.sum()
        return self.inner(x) + self.positions * self.by_length[len(x)] + self.mask


def test_a_module_that_caches_is_left_as_it_was():
    module, x = Caches(), torch.randn(4, 3)
    params = {k: v.detach() for k, v in module.named_parameters()}
    before = dict(vars(module))
    loss = lambda p, x: functional_call(module, p, (x,)).square().mean()  # noqa: E731
    ours, _ = ftrain.jit(ftrain.value_and_grad(loss))(params, x)
    assert vars(module) == before
    assert module.by_length == {}
    assert module.mask is None
    torch.testing.assert_close(ours, loss(params, x))
    assert not isinstance(module(x), FakeTensor)


def test_also_when_the_trace_fails():
    module, x = Caches(), torch.randn(4, 3)

    def step(x):
        module(x)
        raise KeyError("the user's own")

    with pytest.raises(KeyError, match="the user's own"):
        ftrain.jit(step)(x)
    assert module.positions is None


kept: list[torch.Tensor] = []


def keeps_in_a_global(x):
    kept.append(x * 2)
    return x


def keeps_in_a_closure():
    last = None

    def step(x):
        nonlocal last
        last = x * 2
        return x + 0 * last

    return step


class Remembers:
    """An object that is no module."""

    def __call__(self, x):
        self.last = x * 2
        return x


@pytest.mark.parametrize(
    ("step", "words"),
    [
        (keeps_in_a_global, "a list in the global 'kept'"),
        (keeps_in_a_closure(), "a variable that it closes over"),
        (Remembers(), "the attribute 'last' of a Remembers"),
    ],
)
def test_other_keepers_are_named(step, words):
    with pytest.raises(ValueError, match=f"keeps a tensor of its trace in {words}"):
        ftrain.jit(step)(torch.ones(3))


@dataclasses.dataclass
class Output:
    """A container that trees do not know."""

    logits: torch.Tensor


@pytest.mark.parametrize(
    ("step", "words"),
    [
        (lambda x: {"out": Output(x * 2)}, "result 'out' is a .*Output, which is no tree and holds tensors"),
        (lambda x: (x, x.sum().item()), "result '1' is a number that depends on data"),
        (lambda x: (x, (x > 0).nonzero().shape[0]), "result '1' is a number that depends on data"),
    ],
)
def test_results_that_are_no_trees_are_refused(step, words):
    with pytest.raises(ValueError, match=words):
        ftrain.jit(step)(torch.ones(3))


def test_nothing_is_alive_after_a_trace():
    step = ftrain.jit(ftrain.value_and_grad(lambda w, x: (x @ w).tanh().square().mean()))
    compiled = step.lower(torch.ones(3, 3), torch.ones(2, 3))
    held = {id(n.meta.get("val")) for n in compiled.graph.graph.nodes}
    del compiled, step
    gc.collect()
    assert not [t for t in gc.get_objects() if type(t) is FakeTensor and id(t) in held]
