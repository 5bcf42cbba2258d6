"""A jitted step is the same step: the same bits, its state in place, and clear words when something is wrong."""

import copy
import dataclasses
import pickle
import threading
import warnings

import pytest
import torch

import ftrain
from ftrain import tree
from ftrain.plan.jit import jit
from ftrain.step.api import disable_jit
from ftrain.trace.tracer import Aval
from tests.helpers.momentum_steps import (
    assert_same_bits,
    momentum_state,
    momentum_step,
    stack_batch,
    stack_loss,
    stack_params,
)


def fresh():
    return momentum_state(stack_params()), stack_batch()


raw = momentum_step(stack_loss)


@pytest.mark.parametrize("donate", [None, "state"])
def test_three_steps_equal_eager_ones_to_the_bit(donate):
    step = jit(raw, donate=donate)
    (ours, batch), (theirs, _) = fresh(), fresh()
    for _ in range(3):
        ours, metrics = step(ours, batch)
        theirs, expected = raw(theirs, batch)
        assert_same_bits((ours, metrics), (theirs, expected))
    assert step.traces == 1


def test_inductor_agrees():
    state, batch = fresh()
    expected, _ = raw(*fresh())
    new, _ = jit(raw, donate="state", backend="inductor")(state, batch)
    for a, b in zip(tree.leaves(new), tree.leaves(expected), strict=True):
        torch.testing.assert_close(a, b)


def test_decorator_with_options():
    @jit(donate="x")
    def double(x):
        """Twice."""
        return x * 2

    assert (double.__name__, double.__doc__) == ("double", "Twice.")
    assert torch.equal(double(torch.ones(3)), torch.full((3,), 2.0))


def test_donated_state_keeps_its_memory():
    state, batch = fresh()
    places = [leaf.data_ptr() for leaf in tree.leaves(state)]
    new, _ = jit(raw, donate="state")(state, batch)
    assert [leaf.data_ptr() for leaf in tree.leaves(new)] == places


def test_a_donated_step_holds_one_copy_of_the_state():
    params, batch = stack_params(depth=8, width=32), stack_batch(2, 32)
    plans = [jit(raw, donate=d).lower(momentum_state(params), batch).memory() for d in ("state", None)]
    state_bytes = 2 * sum(leaf.nbytes for leaf in tree.leaves(params))
    assert plans[0].peak < 0.4 * state_bytes
    assert plans[1].peak > state_bytes


def test_without_donation_the_old_state_stays():
    state, batch = fresh()
    before = tree.map(torch.clone, state)
    jit(raw)(state, batch)
    assert_same_bits(state, before)


def test_using_a_donated_leaf_names_it():
    state, batch = fresh()
    jit(raw, donate="state")(state, batch)
    for use in (lambda w: w + 1, torch.sum, lambda w: w.shape and w[0], lambda w: torch.stack([w])):
        with pytest.raises(ValueError, match=r"leaf 'state\.params\.layers\.1\.w' was donated"):
            use(state["params"]["layers"][1]["w"])


def test_passing_a_donated_state_again_names_a_leaf():
    step = jit(raw, donate="state")
    state, batch = fresh()
    step(state, batch)
    for call in (step, step.lower, jit(raw)):
        with pytest.raises(ValueError, match=r"leaf 'state\.\S+' was donated to an earlier step.*pass the state that"):
            call(state, batch)


def test_a_step_may_swap_its_state_and_return_it_twice():
    def swap(state):
        return {"a": state["b"], "b": state["a"]}, state["a"], state["a"]

    a, b = torch.zeros(3), torch.ones(3)
    new, copy, again = jit(swap, donate="state")({"a": a.clone(), "b": b.clone()})
    assert_same_bits((new, copy, again), ({"a": b, "b": a}, a, a))


def test_a_step_may_rotate_its_state():
    def rotate(state):
        return {"a": state["b"], "b": state["c"].t(), "c": state["a"]}

    old = {name: torch.randn(3, 3) for name in "abc"}
    assert_same_bits(jit(rotate, donate="state")(tree.map(torch.clone, old)), rotate(old))


def test_a_new_value_may_be_used_twice():
    def spread(state):
        new = state["a"] + state["b"]
        return {"a": new, "b": new}, new, new[0]

    old = {"a": torch.randn(3), "b": torch.randn(3)}
    assert_same_bits(jit(spread, donate="state")(tree.map(torch.clone, old)), spread(old))


def test_a_new_value_may_be_an_argument():
    state, batch = torch.zeros(3), torch.ones(3)
    step = jit(lambda state, batch: (batch, state + batch), donate="state")
    new, total = step(state, batch)
    assert_same_bits((new, total), (batch, batch))
    assert new.data_ptr() != batch.data_ptr()


def test_a_donated_leaf_that_is_also_another_argument_is_refused():
    shared = torch.ones(3)
    with pytest.raises(ValueError, match=r"'state' and 'batch' share memory"):
        jit(lambda state, batch: state + batch, donate="state")(shared, shared)


def test_views_of_old_state_among_the_results_are_kept():
    step = jit(lambda state, x: (state + x, state[0], state.t()), donate="state")
    old = torch.arange(9.0).reshape(3, 3)
    new, row, transposed = step(old.clone(), torch.ones(3, 3))
    assert_same_bits((new, row, transposed), (old + 1, old[0], old.t()))


@pytest.mark.parametrize("donate", [None, "state"])
def test_arguments_may_change_after_many_equal_calls(donate):
    step = jit(lambda state, scale: {"w": state["w"] * scale}, donate=donate)
    state = {"w": torch.ones(2, 3)}
    for _ in range(3):
        state = step(state, 2.0)
    state = step({"w": state["w"].t().contiguous().t()}, 2.0)  # strided, as no call before
    assert torch.equal(step(state, 2.0)["w"], torch.full((2, 3), 32.0))
    assert step.traces == 1
    with pytest.warns(UserWarning, match="scale: was 2.0, is 3.0"):
        assert torch.equal(step({"w": torch.ones(2, 3)}, 3.0)["w"], torch.full((2, 3), 3.0))
    assert torch.equal(step({"w": torch.ones(2)}, 3.0)["w"], torch.full((2,), 3.0))
    assert step.traces == 3


def test_a_state_that_is_not_contiguous_is_taken():
    old = torch.arange(9.0).reshape(3, 3).t()
    new = jit(lambda state: state * 2, donate="state")(old.clone(memory_format=torch.preserve_format))
    assert torch.equal(new, old * 2)


def test_a_parameter_object_is_taken():
    step = jit(lambda state: {"w": state["w"] * 2}, donate="state")
    assert torch.equal(step({"w": torch.nn.Parameter(torch.ones(2))})["w"], torch.full((2,), 2.0))


def test_tied_donated_leaves_are_refused():
    shared = torch.ones(3)
    with pytest.raises(
        ValueError, match=r"'state\.a' and 'state\.b' share memory, and.*keep a tied weight at one place"
    ):
        jit(lambda state: {k: v + 1 for k, v in state.items()}, donate="state")({"a": shared, "b": shared})


def test_one_tensor_as_two_arguments_is_two_arguments():
    step = jit(lambda x, y: x * 2 + y)
    x = torch.ones(3)
    assert torch.equal(step(x, x), torch.full((3,), 3.0))
    assert torch.equal(step(x, torch.zeros(3)), torch.full((3,), 2.0))


def test_a_retrace_says_what_changed_and_once():
    step = jit(lambda x, y: x + y.sum())
    step(torch.ones(3), torch.ones(2))
    with pytest.warns(UserWarning, match=r"traced again.*x: was float32\[3\], is float32\[4\]") as caught:
        step(torch.ones(4), torch.ones(2))
    assert len(caught) == 1
    assert caught[0].filename == __file__
    assert "y:" not in str(caught[0].message)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        step(torch.ones(5), torch.ones(2))
        step(torch.ones(3), torch.ones(2))
    assert step.traces == 3


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        ({"a": torch.ones(3, dtype=torch.float64)}, r"x\.a: was float32\[3\], is float64\[3\]"),
        ({"a": torch.ones(3), "b": torch.ones(1)}, r"x\.b: is new"),
        ({}, r"x\.a: is absent"),
    ],
)
def test_a_retrace_names_dtypes_and_leaves(changed, words):
    step = jit(lambda x: [leaf + 1 for leaf in x.values()])
    step({"a": torch.ones(3)})
    with pytest.warns(UserWarning, match=words):
        step(changed)


def test_leaves_that_are_no_tensors_are_constants():
    step = jit(lambda x, options: (x * options["factor"], options["name"]))
    assert step(torch.ones(2), {"factor": 3, "name": "a"})[0].tolist() == [3, 3]
    assert step(torch.ones(2), {"factor": 3, "name": "a"})[1] == "a"
    assert step.traces == 1
    with pytest.warns(UserWarning, match=r"options\.factor: was 3, is 4"):
        assert step(torch.ones(2), {"factor": 4, "name": "a"})[0].tolist() == [4, 4]


def test_one_and_true_are_different_constants():
    step = jit(lambda x, flag: x + 1 if flag is True else x - 1)
    assert step(torch.zeros(1), 1).item() == -1
    with pytest.warns(UserWarning, match="flag: was 1, is True"):
        assert step(torch.zeros(1), True).item() == 1


def test_keyword_arguments():
    step = jit(lambda x, y: x - y)
    assert step(torch.ones(1), y=torch.zeros(1)).item() == 1
    assert step(y=torch.zeros(1), x=torch.ones(1)).item() == 1
    with pytest.raises(ValueError, match="has no argument z"):
        step(torch.ones(1), z=torch.zeros(1))


def test_arguments_with_defaults():
    step = jit(lambda x, y=2, z=3: x * y + z)
    assert step(torch.ones(1)).item() == 5
    with pytest.warns(UserWarning, match="z: is new"):
        assert step(torch.ones(1), z=7).item() == 9


def test_any_number_of_arguments():
    step = jit(lambda *xs: sum(xs))
    assert step(torch.ones(1), torch.ones(1), torch.ones(1)).item() == 3


def test_disable_jit_runs_eagerly():
    seen = []

    @jit(donate="x")
    def step(x):
        seen.append(id(x))
        return x + 1

    x = torch.zeros(2)
    with disable_jit():
        assert torch.equal(step(x), torch.ones(2))
    assert seen[0] == id(x)
    assert step.traces == 0
    assert torch.equal(x + 1, torch.ones(2))
    step(x)
    assert step.traces == 1


@pytest.mark.parametrize("kind", ["aval", "meta"])
def test_lower_needs_no_data(kind):
    state, batch = fresh()
    shape_only = Aval.of if kind == "aval" else lambda t: t.to("meta")
    step = jit(raw, donate="state")
    compiled = step.lower(*tree.map(shape_only, (state, batch)))
    assert compiled.memory() == jit(raw, donate="state").lower(state, batch).memory()
    assert compiled.cost().flops == 2 * 8 * 16 * 16 * (3 + 3 + 2)
    with pytest.raises(ValueError, match=r"leaf 'state\.\S+' has a shape and no data"):
        step(*tree.map(shape_only, (state, batch)))


def test_lower_of_a_large_model_takes_no_memory():
    shapes = {"layers": [{"w": Aval((1 << 17, 1 << 17), torch.float32, torch.device("cpu")), "b": _vector()}]}
    batch = (Aval((8, 1 << 17), torch.float32, torch.device("cpu")),) * 2
    state = {"params": shapes, "momentum": shapes, "count": Aval((), torch.int64, torch.device("cpu"))}
    assert jit(raw, donate="state").lower(state, batch).memory().inputs > 1 << 37


def _vector():
    return Aval((1 << 17,), torch.float32, torch.device("cpu"))


def test_init_makes_a_state():
    step = jit(raw)
    state = step.init(lambda scale: momentum_state({"w": torch.ones(2) * scale}), torch.tensor(3.0))
    assert state["params"]["w"].tolist() == [3, 3]


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: jit(raw, donate="stat"), r"donate='stat' is not an argument of step\(state, batch\)"),
        (lambda: jit(raw, backend="fast")(*fresh()), "backend='fast' is not one of auto, aten, inductor, cudagraph"),
        (lambda: jit(raw, backend="cudagraph")(*fresh()), "backend='cudagraph' needs arguments on a CUDA device"),
        (lambda: jit(raw, remat="some"), r"'some'.*'none', 'layer' or 'all'"),
        (lambda: jit(lambda state: state["a"], donate="state")({"a": torch.ones(1)}), "no part of the result has its"),
        (
            lambda: jit(lambda state: {"a": state["a"].double()}, donate="state")({"a": torch.ones(2)}),
            r"leaf 'state\.a' is float32\[2\] and its new value is float64\[2\]",
        ),
        (
            lambda: jit(lambda state: {"a": state["a"][:1]}, donate="state")({"a": torch.ones(2)}),
            r"leaf 'state\.a' is float32\[2\] and its new value is float32\[1\]",
        ),
        (lambda: jit(lambda x: x)({"a": object()}), r"leaf 'x\.a' is builtins\.object.*torch\.as_tensor"),
    ],
)
def test_mistakes_get_a_clear_error(make, words):
    with pytest.raises(ValueError, match=words):
        make()


def test_writing_into_an_argument_names_leaf_and_line():
    def step(state, batch):
        batch["x"].mul_(2)
        return state + batch["x"].sum()

    line = step.__code__.co_firstlineno + 1
    with pytest.raises(ValueError, match=rf"writes into its input 'batch\.x'.*test_jit\.py:{line}"):
        jit(step)(torch.ones(()), {"x": torch.ones(3)})


def test_writes_into_temporaries_keep_their_meaning():
    def step(x):
        y = x * 2
        view = y[1:]
        view += 1
        y[0] = 7
        z = torch.zeros_like(y)
        z[:2] = y[:2]
        z.clamp_(max=5)
        return y, z, view

    x = torch.arange(4.0)
    assert_same_bits(jit(step)(x), step(x))
    assert torch.equal(x, torch.arange(4.0))


def test_a_tensor_from_another_trace_is_refused():
    kept = []

    @jit
    def keep(x):
        kept.append(x * 2)
        return x

    with pytest.raises(ValueError, match="keeps a tensor of its trace in a list"):
        keep(torch.ones(2))
    with pytest.raises(ValueError, match="of another trace; pass it as an argument"):
        jit(lambda x: x + kept[0])(torch.ones(2))


def test_empty_and_unused_arguments():
    step = jit(lambda state, batch: ({"w": state["w"] + 1}, {}), donate="state")
    new, metrics = step({"w": torch.zeros(0, 3)}, {"unused": torch.ones(2), "none": None})
    assert new["w"].shape == (0, 3)
    assert metrics == {}


@dataclasses.dataclass
class Plain:
    w: torch.Tensor


def test_a_dataclass_that_is_no_struct_is_told_what_to_be():
    with pytest.raises(ValueError, match=r"leaf 'state' is .*Plain; .*@ftrain.struct instead of @dataclass"):
        ftrain.jit(lambda state: state.w + 1)(Plain(torch.ones(1)))


def test_a_step_of_processes_is_not_run_without_jit():
    step = ftrain.jit(lambda state, batch: state, plan=ftrain.Plan(ftrain.Mesh(shard=2)))
    with ftrain.disable_jit(), pytest.raises(ValueError, match=r"debug it on a virtual mesh of the same sizes"):
        step(torch.ones(1), torch.ones(1))


class Trainer:
    """Its step reads a number of its own."""

    def __init__(self, rate):
        self.rate = rate

    @jit(donate="state")
    def step(self, state, batch):
        return state - self.rate * batch

    @jit
    def value(its, x):
        return x * its.rate


@pytest.mark.filterwarnings("ignore:.*traced again")
def test_a_method_is_jitted_for_each_object():
    half, whole = Trainer(0.5), Trainer(1.0)
    assert [t.step(torch.ones(()), torch.ones(())).item() for t in (half, whole, half)] == [0.5, 0.0, 0.5]
    assert half.step is half.step
    assert half.step.traces == 1
    half.rate = 0.25
    assert half.step(state=torch.ones(()), batch=torch.ones(())).item() == 0.75
    assert half.value(torch.ones(())).item() == 0.25
    for copied in (copy.copy(half), copy.deepcopy(half)):
        copied.rate = 1.0
        assert copied.step(torch.ones(()), torch.ones(())).item() == 0.0


def test_a_method_of_an_object_without_a_dict_is_refused():
    class Slotted:
        __slots__ = ()

        @jit
        def step(self, x):
            return x

    with pytest.raises(ValueError, match=r"step is a jitted method, and a Slotted has no __dict__ .*no __slots__"):
        Slotted().step(torch.ones(1))


def test_a_function_that_is_an_attribute_of_a_class_is_no_method():
    class Recipe:
        step = jit(raw)

    state, batch = fresh()
    assert_same_bits(Recipe().step(state, batch), raw(*fresh()))


def test_a_function_in_c_has_any_number_of_arguments():
    assert jit(torch.relu)(torch.tensor([-1.0, 2.0])).tolist() == [0.0, 2.0]
    assert jit(torch.add)(torch.ones(1), torch.ones(1)).item() == 2.0


def test_a_step_is_pickled_and_copied_without_its_traces():
    step = jit(raw)
    expected = step(*fresh())
    for other in (pickle.loads(pickle.dumps(jit(momentum_state))), copy.deepcopy(step)):
        assert other.traces == 0
    assert_same_bits(copy.deepcopy(step)(*fresh()), expected)


def test_first_calls_of_several_threads_are_right():
    def waves(x):
        return torch.stack([torch.sin(x * i) for i in range(50)]).sum(0)

    one, found, x = jit(waves), [], torch.arange(3.0)

    def call(step):
        found.append(step(x))

    threads = [threading.Thread(target=call, args=(step,)) for step in (one, one, jit(waves), jit(waves))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 4
    assert all(torch.allclose(y, waves(x)) for y in found)
    assert one.traces == 1


def test_zeros_of_both_signs_are_different_constants():
    step = jit(lambda x, zero: x.copysign(torch.tensor(zero)))
    assert step(torch.ones(()), 0.0).item() == 1.0
    with pytest.warns(UserWarning, match="zero: was 0.0, is -0.0"):
        assert step(torch.ones(()), -0.0).item() == -1.0
