"""Random numbers of a step: torch draws at every run; another generator, or another state of it, is refused."""

import random
import threading
from contextlib import contextmanager

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

import ftrain

CAPTURED = torch.Generator().manual_seed(0)

GIVEN = {
    "captured": lambda x: x * torch.randn(3, generator=CAPTURED),
    "made within": lambda x: x * torch.randn(3, generator=torch.Generator().manual_seed(0)),
    "a permutation": lambda x: x + torch.randperm(3, generator=torch.Generator().manual_seed(0)),
    "in place": lambda x: torch.empty(3).normal_(generator=CAPTURED) + x,
    "bernoulli": lambda x: torch.bernoulli(x.sigmoid(), generator=CAPTURED),
    "multinomial": lambda x: torch.multinomial(x.abs() + 1, 2, generator=CAPTURED),
    "an initializer": lambda x: torch.nn.init.normal_(torch.empty(3), generator=CAPTURED) + x,
    "the default one": lambda x: x * torch.rand(3, generator=torch.default_generator),
    "in a loss": lambda x: ftrain.grad(lambda w: (w * torch.rand(3, generator=CAPTURED)).sum())(x),
}


@pytest.mark.parametrize("step", GIVEN.values(), ids=GIVEN)
def test_a_generator_is_refused_with_the_line(step):
    state, own = torch.get_rng_state(), CAPTURED.get_state()
    with pytest.raises(ValueError, match=r"test_own_draws.py:\d+ .*draws from a torch.Generator.*ftrain.uniform"):
        ftrain.jit(step)(torch.ones(3))
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(CAPTURED.get_state(), own)


def forked(x):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return x * torch.rand(3)


def forked_between(x):
    with torch.random.fork_rng():
        y = torch.rand(3)
    return x * y - torch.rand(3)


def put_back(x):
    state = torch.get_rng_state()
    y = torch.rand(3)
    torch.set_rng_state(state)
    return torch.rand(3) - y * x


def forked_at_the_end(x):
    with torch.random.fork_rng():
        return x * torch.rand(3)


@pytest.mark.parametrize("step", [forked, forked_between, put_back, forked_at_the_end])
def test_another_state_of_the_generator_is_refused(step):
    torch.manual_seed(0)
    state = torch.get_rng_state()
    with pytest.raises(ValueError, match=r"torch.manual_seed, set_rng_state or fork_rng.*[Ss]eed outside|seed outside"):
        ftrain.jit(step)(torch.ones(3))
    assert torch.equal(torch.get_rng_state(), state)


def test_draws_of_torch_are_those_of_eager_code_at_every_call():
    def step(x):
        return x * torch.randn(3, dtype=torch.float64) + torch.randperm(3)

    jitted, x = ftrain.jit(step), torch.ones(3, dtype=torch.float64)
    torch.manual_seed(1)
    expected = [step(x) for _ in range(3)]
    torch.manual_seed(1)
    assert all(torch.equal(jitted(x), e) for e in expected)


OF_NUMPY, OF_NUMPY_BEFORE, OF_PYTHON = np.random.default_rng(0), np.random.RandomState(0), random.Random(0)


class Noisy:
    """Holds a generator in an attribute."""

    def __init__(self):
        self.generator = np.random.default_rng(0)

    def step(self, x):
        return x * float(self.generator.normal())


HELD = {
    "OF_NUMPY', a numpy Generator": (lambda x: x * float(OF_NUMPY.uniform()), OF_NUMPY),
    "OF_NUMPY_BEFORE', a numpy RandomState": (lambda x: x * OF_NUMPY_BEFORE.rand(), OF_NUMPY_BEFORE),
    "OF_PYTHON', a random Random": (lambda x: x * OF_PYTHON.uniform(0, 1), OF_PYTHON),
    "self.generator', a numpy Generator": ((noisy := Noisy()).step, noisy.generator),
}


@pytest.mark.parametrize("name", HELD)
def test_a_generator_that_the_step_holds_is_refused_by_name(name):
    step, generator = HELD[name]
    jitted, before = ftrain.jit(step), repr(drawn(generator))
    with pytest.raises(ValueError, match=f"the step draws from '{name}.*ftrain.uniform"):
        jitted(torch.ones(3))
    assert repr(drawn(generator)) == before


def drawn(generator):
    """Numbers from a generator, whose state stays."""
    if isinstance(generator, random.Random):
        state, numbers = generator.getstate(), generator.random()
        generator.setstate(state)
    elif isinstance(generator, np.random.RandomState):
        state, numbers = generator.get_state(), generator.rand()
        generator.set_state(state)
    else:
        state, numbers = generator.bit_generator.state, generator.random()
        generator.bit_generator.state = state
    return numbers


def test_a_generator_that_only_gives_its_name_is_not_refused():
    kind = ftrain.jit(lambda x: x * (2 if type(OF_PYTHON) is random.Random else 1))
    assert torch.equal(kind(torch.ones(3)), torch.full((3,), 2.0))


@contextmanager
def another_thread_that_draws():
    ended = threading.Event()

    def draw():
        while not ended.wait(1e-4):
            random.random(), np.random.rand(), torch.rand(1)

    thread = threading.Thread(target=draw)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()


def long_sum(x):
    return torch.stack([torch.sin(x * i) for i in range(100)]).sum(0)


def test_another_thread_may_draw_during_a_trace():
    with another_thread_that_draws():
        found = ftrain.jit(long_sum)(torch.ones(3))
    torch.testing.assert_close(found, long_sum(torch.ones(3)))


@pytest.mark.parametrize(
    ("name", "draw"),
    {
        "Python's random": lambda: random.random(),
        "numpy.random": lambda: np.random.rand(),
        "torch.manual_seed": lambda: torch.manual_seed(0).initial_seed(),
    }.items(),
)
def test_the_step_itself_may_not_draw_beside_another_thread(name, draw):
    with another_thread_that_draws(), pytest.raises(ValueError, match=f"the step uses {name}"):
        ftrain.jit(lambda x: long_sum(x) * draw())(torch.ones(3))


def attention_alone(x_TD):
    return F.scaled_dot_product_attention(*[x_TD[None, None]] * 3)[0, 0]


def test_attention_without_dropout_may_be_recomputed_by_torch_which_changes_the_state():
    def loss(w_DD, x_TD):
        return checkpoint(lambda x: attention_alone(x @ w_DD), x_TD, use_reentrant=False).square().sum()

    w_DD, x_TD = torch.randn(4, 4, dtype=torch.float64), torch.randn(5, 4, dtype=torch.float64)
    trained_DD = w_DD.clone().requires_grad_()
    (expected_DD,) = torch.autograd.grad(loss(trained_DD, x_TD), trained_DD)
    torch.testing.assert_close(ftrain.jit(ftrain.grad(loss))(w_DD, x_TD), expected_DD)


class KeptTable(torch.nn.Module):
    """Keeps what attention makes of a constant."""

    def forward(self, x):
        self.table = attention_alone(torch.eye(3))
        return x * self.table


def test_attention_without_dropout_gives_a_module_no_state():
    module, x = KeptTable(), torch.ones(3)
    assert torch.equal(ftrain.jit(module)(x), module(x))
