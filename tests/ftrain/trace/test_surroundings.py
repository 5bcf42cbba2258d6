"""Values that a step's Python reads beside its arguments: another value is another trace, never an old number."""

import array
import collections
import contextlib
import dataclasses
import functools
import logging
import operator
import os
import sys
import threading
import types
import warnings
from dataclasses import dataclass

import numpy as np
import pytest
import torch
from torch import nn

import ftrain
from ftrain.trace.surroundings import Surroundings

RATE = 0.5
GETTER = operator.attrgetter("rate")
LISTED = [1.0, 2.0]
ACTIVATION = torch.sin


class Options:
    gain = 2.0


@dataclass
class Settings:
    scale: float
    unread: int = 0


def halved(x):
    return x * RATE


class Nested:
    class optimizer:
        rate = 0.5


class Schedule:
    """A number behind a property, a method, a slot, a class attribute, and a method of its base."""

    __slots__ = ("_at",)
    base = 2.0

    def __init__(self):
        self._at = 3.0

    @property
    def rate(self):
        return self._at * 2

    def value(self):
        return self.base * self._at

    def __call__(self, x):
        return x * self._at


class Warmup(Schedule):
    __slots__ = ()

    def value(self):
        return super().value() + 1


class Attributes:
    """Attributes that are entries of a dict."""

    def __init__(self, **values):
        self._values = values

    def __getattr__(self, name):
        return self._values[name]

    def __call__(self, x):
        return x * self.rate


class Scaling(nn.Module):
    """A module with a number, an object with a number, and a method that reads them."""

    def __init__(self):
        super().__init__()
        self.scale, self.options, self.function = 2.0, types.SimpleNamespace(rate=3.0), torch.sin
        self.inner = nn.Linear(4, 4).requires_grad_(False)

    def scaled(self, x):
        return x * self.scale * self.options.rate

    def forward(self, x):
        return self.function(self.scaled(self.inner(x)))


RECIPE = types.ModuleType("recipe_of_a_test")
exec("GAIN = 2.0\ndef gained(x):\n    return x * GAIN", RECIPE.__dict__)  # as a file of that name would be


def imports_within(x):
    from recipe_of_a_test import GAIN  # type: ignore[import-not-found]

    return x * GAIN


def with_default(x, options={"rate": 2.0}):  # noqa: B006
    return x * options["rate"]


class Counting(nn.Module):
    """Counts its own calls in a number."""

    def __init__(self):
        super().__init__()
        self.calls = 0

    def forward(self, x):
        self.calls += 1
        return x * self.calls


def of_plain_python():
    settings, options = Settings(3.0), types.SimpleNamespace(optimizer=types.SimpleNamespace(rate=0.5), name="rate")
    schedule, warmup, held = Schedule(), Warmup(), [types.SimpleNamespace(k=1.0), types.SimpleNamespace(k=2.0)]
    table, queue, counts = {"a": {"b": 1.0}}, collections.deque([1.0]), collections.defaultdict(float, a=1.0)
    numbers, long, attributes = np.array([1.0, 2.0]), [1.0] * 500, Attributes(rate=2.0)
    pairs, zeros = {"a": types.SimpleNamespace(k=1.0)}, [0.0]
    rate = 1.0

    def closed(x):
        return x * rate

    def set_rate(value):
        nonlocal rate
        rate = value

    def through_a_local(x):
        mine = options.optimizer
        return x * mine.rate

    return {
        "a global of a function within": (lambda x: halved(x), lambda: globals().update(RATE=0.25)),
        "a function": (lambda x: ACTIVATION(x), lambda: globals().update(ACTIVATION=torch.cos)),
        "an entry of a list": (lambda x: x * LISTED[0], lambda: LISTED.__setitem__(0, 5.0)),
        "an entry of a long list": (lambda x: x * long[400], lambda: long.__setitem__(400, 5.0)),
        "an entry of a dict in a dict": (lambda x: x * table["a"]["b"], lambda: table["a"].update(b=5.0)),
        "the sign of a zero": (
            lambda x: x.copysign(torch.tensor(zeros[0])), lambda: zeros.__setitem__(0, -0.0)
        ),
        "an entry of a deque": (lambda x: x * sum(queue), lambda: queue.append(5.0)),
        "an entry of a defaultdict": (lambda x: x * counts["a"], lambda: counts.update(a=5.0)),
        "numbers of numpy": (lambda x: x * float(numbers[0]), lambda: numbers.__setitem__(0, 5.0)),
        "a default": (lambda x: with_default(x), lambda: with_default.__defaults__[0].update(rate=5.0)),
        "an attribute of a class": (lambda x: x * Options.gain, lambda: setattr(Options, "gain", 7.0)),
        "an attribute of a class, then of its object": (
            lambda x: x * warmup.base, lambda: setattr(Schedule, "base", 7.0)
        ),
        "an attribute of an object": (lambda x: x * settings.scale, lambda: setattr(settings, "scale", 4.0)),
        "an attribute by its name": (lambda x: x * getattr(settings, "scale"), lambda: setattr(settings, "scale", 5.0)),  # noqa: B009
        "an attribute by a name in a variable": (
            lambda x: x * getattr(options.optimizer, options.name), lambda: setattr(options.optimizer, "rate", 8.0)
        ),
        "the dict of an object": (lambda x: x * vars(settings)["scale"], lambda: setattr(settings, "scale", 6.0)),
        "the fields of a dataclass": (
            lambda x: x * dataclasses.asdict(settings)["scale"], lambda: setattr(settings, "scale", 7.0)
        ),
        "an attribute of an object within": (
            lambda x: x * options.optimizer.rate, lambda: setattr(options.optimizer, "rate", 7.0)
        ),
        "an attribute of a local": (through_a_local, lambda: setattr(options.optimizer, "rate", 9.0)),
        "an attribute of an object in a list": (
            lambda x: x * sum(o.k for o in held), lambda: setattr(held[1], "k", 5.0)
        ),
        "an attribute of an object in a dict": (lambda x: x * pairs["a"].k, lambda: setattr(pairs["a"], "k", 5.0)),
        "an object within, replaced": (
            lambda x: x * options.optimizer.rate,
            lambda: setattr(options, "optimizer", types.SimpleNamespace(rate=3.0)),
        ),
        "an attribute of a class within": (
            lambda x: x * Nested.optimizer.rate, lambda: setattr(Nested.optimizer, "rate", 7.0)
        ),
        "a property over a slot": (lambda x: x * schedule.rate, lambda: setattr(schedule, "_at", 4.0)),
        "a method": (lambda x: x * schedule.value(), lambda: setattr(schedule, "_at", 5.0)),
        "a method of a base": (lambda x: x * warmup.value(), lambda: setattr(warmup, "_at", 5.0)),
        "an object that is called": (lambda x: schedule(x), lambda: setattr(schedule, "_at", 6.0)),
        "an attribute that code finds": (lambda x: x * attributes.rate, lambda: attributes._values.update(rate=5.0)),
        "an object that is called and finds attributes": (
            lambda x: attributes(x), lambda: attributes._values.update(rate=6.0)
        ),
        "an argument of a partial": (
            functools.partial(lambda s, x: x * s.scale, settings), lambda: setattr(settings, "scale", 8.0)
        ),
        "a number of another file": (lambda x: x * RECIPE.GAIN, lambda: setattr(RECIPE, "GAIN", 5.0)),
        "a global of a function of another file": (lambda x: RECIPE.gained(x), lambda: setattr(RECIPE, "GAIN", 3.0)),
        "a number of a file that is imported within": (imports_within, lambda: setattr(RECIPE, "GAIN", 4.0)),
        "a variable of the environment": (
            lambda x: x * float(os.environ.get("FTRAIN_TEST", "1")), lambda: os.environ.update(FTRAIN_TEST="5")
        ),
        "a variable closed over": (closed, lambda: set_rate(9.0)),
    }  # fmt: skip


def of_classes_and_functions():
    class Kind(type):
        @property
        def gain(cls):
            return cls._gain

    class First(metaclass=Kind):
        _gain = rate = shared = 2.0

        @property
        def scale(self):
            return 2.0

        @property
        def doubled(self):
            return halved(2.0)

    class Second(First):
        pass

    def powers(x, power=2.0, *, times=2.0):
        return times * x**power

    second, local = Second(), threading.local()
    numbers, small = array.array("d", [2.0]), bytearray([2])
    local.rate = 2.0
    return {
        "a property, replaced": (lambda x: x * second.scale, lambda: setattr(First, "scale", property(lambda _: 3.0))),
        "an attribute that a class hides from its base": (
            lambda x: x * second.shared, lambda: setattr(Second, "shared", 3.0)
        ),
        "an attribute of a class whose object is made within": (
            lambda x: x * Second().rate, lambda: setattr(First, "rate", 3.0)
        ),
        "a property of an object that is made within": (
            lambda x: x * Second().doubled, lambda: globals().update(RATE=3.0)
        ),
        "a property of a class": (lambda x: x * First.gain, lambda: setattr(First, "_gain", 3.0)),
        "defaults": (lambda x: powers(x + 1), lambda: setattr(powers, "__defaults__", (3.0,))),
        "defaults of keywords": (lambda x: powers(x), lambda: powers.__kwdefaults__.update(times=3.0)),
        "the code of a function": (
            lambda x: powers(x), lambda: setattr(powers, "__code__", (lambda x, power, *, times: x - 1).__code__)
        ),
        "an array": (lambda x: x * numbers[0], lambda: numbers.__setitem__(0, 3.0)),
        "a bytearray": (lambda x: x * small[0], lambda: small.__setitem__(0, 3)),
        "an attribute of a thread": (lambda x: x * local.rate, lambda: setattr(local, "rate", 3.0)),
        "an attribute more": (lambda x: x * len(vars(second)), lambda: setattr(second, "more", 3.0)),
    }  # fmt: skip


def of_modules():
    net, holder, linear = nn.Dropout(0.5), types.SimpleNamespace(net=nn.Linear(1, 1)), nn.Linear(4, 4)
    scaling, stack, norm = Scaling(), nn.Sequential(nn.Linear(4, 4)), nn.LayerNorm(4, elementwise_affine=False)
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=0.5)
    rates = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.5)
    for module in (linear, stack):
        module.requires_grad_(False)

    def called_functionally(x):
        weights = {"weight": x.diag(), "bias": x}
        return torch.func.functional_call(linear, weights, (x,)) * (1 + linear.weight.requires_grad)

    return {
        "a module's mode": (lambda x: net(x), lambda: net.eval()),
        "another module of a name": (
            lambda x: x * holder.net.weight.detach().sum(), lambda: setattr(holder, "net", nn.Linear(1, 1))
        ),
        "a number of a module": (lambda x: scaling(x), lambda: setattr(scaling, "scale", 5.0)),
        "a number of torch's module": (lambda x: norm(x + x.cumsum(0)), lambda: setattr(norm, "eps", 5.0)),
        "a number of an object of a module": (lambda x: scaling(x), lambda: setattr(scaling.options, "rate", 5.0)),
        "a function of a module": (lambda x: scaling(x), lambda: setattr(scaling, "function", torch.cos)),
        "a module within, replaced": (lambda x: stack(x), lambda: stack.__setitem__(0, nn.Identity())),
        "a module within, added": (lambda x: stack(x), lambda: stack.append(nn.Tanh())),
        "a parameter, replaced": (
            lambda x: scaling(x), lambda: scaling.inner.register_parameter("weight", nn.Parameter(torch.eye(4), False))
        ),
        "a parameter that is trained": (called_functionally, lambda: linear.weight.requires_grad_(True)),
        "a hook": (lambda x: linear(x), lambda: linear.register_forward_hook(lambda m, args, out: out * 3)),
        "an optimizer's rate": (
            lambda x: x * optimizer.param_groups[0]["lr"], lambda: optimizer.param_groups[0].update(lr=3.0)
        ),
        "a schedule's rate": (lambda x: x * rates.get_last_lr()[0], lambda: [optimizer.step(), rates.step()]),
    }  # fmt: skip


def changes():
    return {**of_plain_python(), **of_classes_and_functions(), **of_modules()}


@pytest.mark.parametrize("name", changes())
@pytest.mark.filterwarnings("ignore:.*traced again")
def test_another_value_is_used_and_is_traced_once(name, monkeypatch):
    monkeypatch.setitem(sys.modules, RECIPE.__name__, RECIPE)
    monkeypatch.setenv("FTRAIN_TEST", "1")
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


def test_a_decorator_that_is_a_context_manager_is_no_iterator():
    settings = Settings(3.0)

    @contextlib.contextmanager
    def scaled():
        yield settings.scale

    @scaled()
    def double(x):
        return x * 2

    step = ftrain.jit(lambda x: double(x))
    for _ in range(3):
        step(torch.ones(1))
    assert step.traces == 1
    settings.scale = 4.0
    with pytest.warns(UserWarning, match=r"settings.scale, which the step reads: was 3.0, is 4.0"):
        step(torch.ones(1))


def test_a_step_may_know_of_context_managers_that_were_entered():
    @contextlib.contextmanager
    def opened():
        yield 2.0

    with contextlib.ExitStack() as stack:
        scale = stack.enter_context(opened())
        step = ftrain.jit(lambda x: x * scale if stack else stack.close())
        assert step(torch.ones(1)) == 2.0


@pytest.mark.filterwarnings("ignore:.*traced again")
def test_a_hook_that_is_removed_and_a_parameter_that_is_put_back():
    net = nn.Linear(4, 4).requires_grad_(False)
    step, x, weight = ftrain.jit(lambda x: net(x)), torch.ones(4), net.weight
    hook = net.register_forward_hook(lambda module, args, out: out * 2)
    torch.testing.assert_close(step(x), net(x))
    hook.remove()
    torch.testing.assert_close(step(x), net(x))
    net.weight = nn.Parameter(torch.eye(4), requires_grad=False)
    torch.testing.assert_close(step(x), net(x))
    net.weight = weight
    torch.testing.assert_close(step(x), net(x))
    assert step.traces == 3


@pytest.mark.filterwarnings("ignore:.*traced again")
def test_an_object_that_was_replaced_is_watched_too():
    options = types.SimpleNamespace(optimizer=types.SimpleNamespace(rate=0.5))
    step = ftrain.jit(lambda x: x * options.optimizer.rate)
    for replaced, rate in ((True, 2.0), (False, 3.0), (True, 4.0), (False, 5.0)):
        if replaced:
            options.optimizer = types.SimpleNamespace(rate=rate)
        options.optimizer.rate = rate
        assert step(torch.ones(1)).item() == rate


class Counter:
    """A trainer that counts in an attribute, whose name the step reads from its state."""

    def __init__(self):
        self.count, self.options = 0, {"rate": 2.0}

    def step(self, state):
        return types.SimpleNamespace(count=state["count"] * self.options["rate"]).count


def test_attributes_of_others_and_equal_values_do_not_matter():
    trainer = Counter()
    step = ftrain.jit(trainer.step)
    for n in range(4):
        trainer.count, trainer.options = n, {"rate": float("2.0")}
        assert step({"count": torch.ones(1)}).item() == 2.0
    assert step.traces == 1


@pytest.mark.filterwarnings("ignore:.*traced again")
def test_an_iterator_gives_its_next_value_at_each_call():
    numbers = iter(range(1, 5))
    step = ftrain.jit(lambda x: x * next(numbers))
    assert [step(torch.ones(())).item() for _ in range(4)] == [1, 2, 3, 4]


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


def passed_on(function):
    """A decorator."""

    @functools.wraps(function)
    def wrapped(*args, **options):
        return function(*args, **options)

    return wrapped


class Base:
    def __init__(self):
        self.rate, self.other = 0.5, None

    def own(self):
        return self.rate

    @property
    def doubled(self):
        return self.rate * 2


class Within(Base):
    """An object whose methods read a number in functions and comprehensions within, of the base, and so on."""

    doubled = 1.0  # type: ignore[assignment]

    def own(self):
        return 1.0

    def a_function(self, x):
        def scaled(y):
            return y * self.rate

        return scaled(x)

    def a_lambda(self, x):
        return (lambda y: y * self.rate)(x)

    def two_deep(self, x):
        def outer(y):
            def inner(z):
                return z * self.rate

            return inner(y)

        return outer(x)

    def a_list(self, x):
        return x * sum([self.rate * k for k in (1.0, 2.0)])

    def a_dict(self, x):
        return x * sum({k: self.rate for k in "ab"}.values())  # noqa: C420

    def a_generator(self, x):
        return x * sum(self.rate for _ in range(2))

    def a_class(self, x):
        class Scaled:
            rate = self.rate

        return x * Scaled.rate

    def a_method(self, x):
        return x * sum(Base.own(self) for _ in range(2))

    def a_helper(self, x):
        return self.a_lambda(x)

    def its_dict(self, x):
        return x * sum(vars(self)["rate"] for _ in range(2))

    def a_name(self, x):
        return x * sum(getattr(self, "rate") for _ in range(2))  # noqa: B009

    def replaced(self, x):
        def other():
            nonlocal self
            self = self.other or self

        other()
        return x * self.rate

    def all_arguments(*args):
        return args[1] * args[0].rate

    @passed_on
    def with_a_decorator(self, x):
        return x * self.rate

    def a_pattern(self, x):
        match self:
            case Base(rate=rate):
                return x * rate

    def a_getter(self, x):
        return x * operator.attrgetter("rate")(self)

    def a_getter_of_the_file(self, x):
        return x * GETTER(self)

    def of_the_base(self, x):
        return x * super(Within, self).own()  # noqa: UP008

    def of_the_base_in_a_function(self, x):
        return (lambda: x * super(Within, self).own())()

    def a_property_of_the_base(self, x):
        return x * super().doubled

    def of_a_property(self, x):
        return x * self.sum_of_rates

    @property
    def sum_of_rates(self):
        return sum(self.rate for _ in range(2))


READERS = [key for key, raw in vars(Within).items() if isinstance(raw, types.FunctionType) and key != "own"]


@pytest.mark.parametrize("name", READERS)
@pytest.mark.parametrize("jit_of", [lambda bound: bound, lambda bound: lambda x: bound(x)], ids=["method", "closure"])
@pytest.mark.filterwarnings("ignore:.*traced again")
def test_a_function_within_a_method_reads_the_object(name, jit_of):
    trainer, x = Within(), torch.ones(2)
    method = getattr(trainer, name)
    step = ftrain.jit(jit_of(method))
    for rate in (0.5, 2.0, 3.0):
        trainer.rate = rate
        torch.testing.assert_close(step(x), method(x))
    assert step.traces == 3


@pytest.mark.filterwarnings("ignore:.*traced again")
def test_a_function_within_a_class_method_reads_the_class():
    class Trainer:
        rate = 0.5

        @classmethod
        def step(cls, x):
            return x * sum(cls.rate for _ in range(2))

    step = ftrain.jit(Trainer.step)
    for rate in (0.5, 2.0, 3.0):
        Trainer.rate = rate
        assert step(torch.ones(())).item() == 2 * rate
    assert step.traces == 3


@pytest.mark.filterwarnings("ignore:.*traced again")
def test_what_a_default_of_the_step_holds_is_read():
    options = types.SimpleNamespace(rate=0.5, scale=0.5)

    def step(x, of=options, *, also=options):
        return x * of.scale * (lambda: also.rate)()

    jitted = ftrain.jit(step)
    for options.scale, options.rate in ((2.0, 3.0), (2.0, 4.0), (3.0, 4.0)):
        assert jitted(torch.ones(())).item() == options.scale * options.rate


@pytest.mark.filterwarnings("ignore:.*traced again")
def test_an_attribute_of_the_class_of_the_base():
    class First:
        rate = 0.5

        @classmethod
        def own(cls):
            return cls.rate

    class Second(First):
        @classmethod
        def own(cls):
            return super().own() * super().rate

    step = ftrain.jit(lambda x: x * Second.own())
    for First.rate in (0.5, 2.0):
        assert step(torch.ones(())).item() == First.rate**2


LOGGER = logging.getLogger("ftrain.tests.surroundings")


def test_a_logger_is_asked_in_a_step_and_does_not_count():
    def step(x):
        if LOGGER.isEnabledFor(logging.DEBUG):
            LOGGER.debug("a step")
        return x + 1

    jitted = ftrain.jit(step)
    jitted(torch.ones(2))
    LOGGER.isEnabledFor(7)
    logging.getLogger("ftrain.tests.surroundings.other")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        jitted(torch.ones(2))
