"""No tensor of a trace outlives it: modules are left as they were found, other keepers are refused by name."""

import dataclasses
import gc
import random

import numpy as np
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
            self.later = torch.ones(3)
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
        (lambda x: {"out": Output(x * 2)}, "result 'out' is a .*Output, which is not a tree but holds tensors"),
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


class Counts(nn.Module):
    """Keeps what it has seen, in an attribute or a buffer of its own."""

    def __init__(self, buffer):
        super().__init__()
        seen = torch.zeros(3)
        self.register_buffer("seen", seen) if buffer else setattr(self, "seen", seen)

    def forward(self, x):
        self.seen = self.seen * 0.9 + x
        return x * self.seen


@pytest.mark.parametrize("buffer", [True, False])
def test_a_module_that_keeps_what_it_has_read_is_refused(buffer):
    module = Counts(buffer)
    before = module.seen
    with pytest.raises(ValueError, match=r"a new tensor in the place of 'seen' of a Counts, which it reads"):
        ftrain.jit(lambda x: module(x).sum())(torch.ones(3))
    assert module.seen is before
    assert torch.equal(module(torch.ones(3)), torch.ones(3))


class Table(nn.Module):
    """Makes a table anew when it is too short, as rotary embeddings do."""

    def __init__(self):
        super().__init__()
        self.table = torch.arange(2.0)

    def forward(self, x):
        if len(self.table) < len(x):
            self.table = torch.arange(float(len(x)))
        return x * self.table


def test_a_table_that_a_module_makes_anew_is_no_state():
    module = Table()
    assert torch.equal(ftrain.jit(lambda x: module(x))(torch.ones(3)), torch.arange(3.0))
    assert torch.equal(module(torch.ones(3)), torch.arange(3.0))


class Keeps(nn.Module):
    """Keeps what a call computes, in one of the ways that modules do."""

    def __init__(self, how):
        super().__init__()
        self.how, self.prev, self.log, self.by_name, self.calls, self.long = how, None, [], {}, 0, list(range(100))

    def count(self):
        self.calls += 1

    def forward(self, x):
        return self.how(self, x * 2)


def keeps_in_an_attribute(module, x):
    out = x if module.prev is None else x + module.prev
    module.prev = x.detach()
    return out


def keeps_in_a_list(module, x):
    module.log.append(x.detach())
    return x * len(module.log)


def keeps_in_a_dict(module, x):
    module.by_name["x"] = x.sum()
    return x


def draws_once(module, x):
    if module.prev is None:
        module.prev = torch.randn(3)
    return x + module.prev


def writes_into_what_it_makes(module, x):
    module.prev = torch.zeros(3)
    module.prev[0] = x[0].detach()
    return x + module.prev


def lengthens_a_long_list(module, x):
    module.long.append(1)
    return x * len(module.long)


@pytest.mark.parametrize(
    ("how", "name"),
    [
        (keeps_in_an_attribute, "prev"),
        (keeps_in_a_list, "log"),
        (keeps_in_a_dict, "by_name"),
        (draws_once, "prev"),
        (writes_into_what_it_makes, "prev"),
        (lengthens_a_long_list, "long"),
    ],
)
def test_a_module_that_keeps_what_a_call_computes_is_refused(how, name):
    module = Keeps(how)
    with pytest.raises(ValueError, match=rf"in the place of '{name}' of a Keeps, .*Pass it as a part of the state"):
        ftrain.jit(lambda x: module(x).sum())(torch.ones(3))
    assert module.prev is None
    assert not any(isinstance(x, torch.Tensor) for x in [*module.log, *module.by_name.values()])


def counts_in_a_method(module, x):
    module.count()
    return x * module.calls


def counts_in_a_list(module, x):
    module.log.append(1)
    return x * len(module.log)


def counts_in_a_dict(module, x):
    module.by_name["n"] = module.by_name.get("n", 0) + 1
    return x * module.by_name["n"]


def counts_in_a_new_attribute(module, x):
    module.times = getattr(module, "times", 0) + 1
    return x * module.times


def is_built_at_the_first_call(module, x):
    if not module.calls:
        module.calls = 1
    return x


@pytest.mark.parametrize(
    ("how", "traces"),
    [
        (counts_in_a_method, 4),
        (counts_in_a_list, 4),
        (counts_in_a_dict, 4),
        (counts_in_a_new_attribute, 4),
        (is_built_at_the_first_call, 2),
    ],
)
@pytest.mark.filterwarnings("ignore:.*traced again")
def test_plain_values_that_a_step_changes_are_those_of_eager_code(how, traces):
    ours, eager, x = Keeps(how), Keeps(how), torch.ones(3, dtype=torch.float64)
    step = ftrain.jit(lambda x: ours(x))
    for _ in range(4):
        torch.testing.assert_close(step(x), eager(x), rtol=0, atol=0)
    assert step.traces == traces
    assert (ours.calls, ours.log, ours.by_name) == (eager.calls, eager.log, eager.by_name)


@pytest.mark.parametrize(
    ("how", "name"),
    [
        (counts_in_a_method, "calls"),
        (counts_in_a_list, "log"),
        (counts_in_a_dict, "by_name"),
        (counts_in_a_new_attribute, "times"),
    ],
)
def test_a_counter_of_a_module_that_also_caches_is_refused(how, name):
    def counts_and_caches(module, x):
        module.prev = torch.arange(3.0)
        return how(module, x) + module.prev

    module = Keeps(counts_and_caches)
    words = rf"changes '{name}' of a Keeps at every call, .*keeps a tensor.*as a part of the state"
    with pytest.raises(ValueError, match=words):
        ftrain.jit(lambda x: module(x))(torch.ones(3))
    assert (module.prev, module.calls, module.log, module.by_name) == (None, 0, [], {})
    assert not hasattr(module, "times")


@pytest.mark.parametrize(
    ("draw", "name"),
    [
        (lambda: random.random(), "Python's random"),
        (lambda: float(np.random.rand()), "numpy.random"),
        (lambda: torch.manual_seed(3) and 1.0, "torch.manual_seed"),
    ],
)
def test_numbers_that_python_draws_in_a_step_are_refused(draw, name):
    state = torch.get_rng_state()
    with pytest.raises(ValueError, match=rf"the step uses {name}.* while it is traced.*ftrain.uniform"):
        ftrain.jit(lambda x: x * draw())(torch.ones(3))
    torch.set_rng_state(state)
