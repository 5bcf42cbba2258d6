"""Values that a step's Python reads beside its arguments: another value is another trace, never an old number."""

import types
from dataclasses import dataclass

import pytest
import torch
from torch import nn

import ftrain
from ftrain.trace.surroundings import Surroundings

RATE = 0.5
LISTED = [1.0, 2.0]


class Options:
    gain = 2.0


@dataclass
class Settings:
    scale: float
    unread: int = 0


def halved(x):
    return x * RATE


class Counting(nn.Module):
    """Counts its own calls in a number."""

    def __init__(self):
        super().__init__()
        self.calls = 0

    def forward(self, x):
        self.calls += 1
        return x * self.calls


def changes():
    settings, net, holder = Settings(3.0), nn.Dropout(0.5), types.SimpleNamespace(net=nn.Linear(1, 1))
    rate = 1.0

    def closed(x):
        return x * rate

    def set_rate(value):
        nonlocal rate
        rate = value

    return {
        "a global of a function within": (lambda x: halved(x), lambda: globals().update(RATE=0.25)),
        "an entry of a list": (lambda x: x * LISTED[0], lambda: LISTED.__setitem__(0, 5.0)),
        "an attribute of a class": (lambda x: x * Options.gain, lambda: setattr(Options, "gain", 7.0)),
        "an attribute of an object": (lambda x: x * settings.scale, lambda: setattr(settings, "scale", 4.0)),
        "a variable closed over": (closed, lambda: set_rate(9.0)),
        "a module's mode": (lambda x: net(x), lambda: net.eval()),
        "another module of a name": (
            lambda x: x * holder.net.weight.detach().sum(), lambda: setattr(holder, "net", nn.Linear(1, 1))
        ),
    }  # fmt: skip


@pytest.mark.parametrize("name", changes())
@pytest.mark.filterwarnings("ignore:.*traced again")
def test_another_value_is_used_and_is_traced_once(name):
    function, change = changes()[name]
    step, x = ftrain.jit(function), torch.ones(4)

    def both():
        torch.manual_seed(0)
        expected = function(x)
        torch.manual_seed(0)
        return expected, step(x)

    for _ in range(2):
        torch.testing.assert_close(*both())
    change()
    for _ in range(2):
        torch.testing.assert_close(*both())
    assert step.traces == 2


def test_what_changed_is_said():
    settings = Settings(3.0)
    step = ftrain.jit(lambda x: x * settings.scale)
    step(torch.ones(1))
    settings.scale = 4.0
    with pytest.warns(UserWarning, match=r"settings.scale, which the step reads: was 3.0, is 4.0"):
        step(torch.ones(1))


def test_what_the_code_does_not_read_may_change():
    settings = Settings(3.0)
    step = ftrain.jit(lambda x: x * settings.scale)
    for n in range(3):
        settings.unread = n
        step(torch.ones(1))
    assert step.traces == 1


@pytest.mark.filterwarnings("ignore:.*traced again")
def test_a_number_that_the_step_itself_changes_is_never_an_old_one():
    net, eager = Counting(), Counting()
    step = ftrain.jit(lambda x: net(x))
    for _ in range(3):
        torch.testing.assert_close(step(torch.ones(2)), eager(torch.ones(2)))


def test_a_gradient_of_a_method_sees_the_object():
    settings = Settings(2.0)

    class Trainer:
        rate = 0.5

        def loss(self, w):
            return (w * self.rate * settings.scale).sum()

    trainer = Trainer()
    trainer.rate = 0.25
    names = Surroundings(ftrain.value_and_grad(trainer.loss)).names
    assert "self.rate" in names
    assert "settings.scale" in names
