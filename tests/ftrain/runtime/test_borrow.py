"""Borrowed leaves: eager code waits for the reader, a jitted step reads at once and waits before it writes."""

import threading
import time

import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Shard
from torch.utils._python_dispatch import TorchDispatchMode

import ftrain
from ftrain import tree
from ftrain.runtime.borrow import Borrow, borrowable, plain_leaves
from ftrain.runtime.donation import DonatedTensor
from ftrain.runtime.execute import compile_graph
from tests.helpers.momentum_steps import momentum_state, momentum_step, stack_batch, stack_loss, stack_params

WIDTH = 130


def after(seconds, borrow, check=lambda: None):
    """End the borrow a while later, in another thread that first calls `check`; `join` raises what that raised."""
    errors = []

    def reader():
        time.sleep(seconds)
        try:
            check()
        except AssertionError as error:
            errors.append(error)
        borrow.end()

    thread = threading.Thread(target=reader)
    thread.start()

    def join():
        thread.join()
        assert not errors, errors

    return join


def large(kind):
    values = torch.arange(WIDTH * WIDTH, dtype=torch.float32).reshape(WIDTH, WIDTH)
    if kind is torch.nn.Parameter:
        return torch.nn.Parameter(values, requires_grad=False)
    if kind is DTensor:
        return DTensor.from_local(values, init_device_mesh("cpu", (1,)), [Shard(0)])
    return values


@pytest.fixture(scope="module")
def one_process(tmp_path_factory):
    dist.init_process_group("gloo", init_method=f"file://{tmp_path_factory.mktemp('store')}/s", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.mark.parametrize("kind", [torch.Tensor, torch.nn.Parameter, DTensor])
@pytest.mark.parametrize(
    "write",
    [lambda x: x.zero_(), lambda x: torch._foreach_zero_([x]), lambda x: x[0].zero_(), lambda x: x.copy_(x + 1)],
    ids=["method", "list", "view", "copy"],
)
def test_eager_code_waits_for_the_reader(one_process, kind, write):
    leaf = large(kind)
    local = leaf.to_local() if kind is DTensor else leaf.detach()
    before = local.clone()
    borrow = Borrow([leaf])
    assert isinstance(leaf, kind)
    assert type(leaf) is not kind
    join = after(0.05, borrow, lambda: torch.testing.assert_close(local, before, rtol=0, atol=0))
    write(leaf)
    assert type(leaf) is kind
    assert not torch.equal(local, before)
    join()


def test_numpy_waits_too():
    leaf = large(torch.Tensor)
    join = after(0.05, Borrow([leaf]))
    leaf.numpy()[:] = 0
    join()
    assert leaf.sum() == 0


def test_the_seconds_that_others_waited_are_counted(monkeypatch):
    borrow = Borrow([large(torch.Tensor)])
    monkeypatch.setattr(borrow._ended, "wait", lambda: time.sleep(0.02))
    borrow.wait()
    borrow.wait()
    assert borrow.waited >= 0.04
    borrow.end()
    waited = borrow.waited
    borrow.wait()
    assert borrow.waited == waited


def test_what_can_be_lent():
    assert borrowable(large(torch.Tensor))
    assert not borrowable(torch.zeros(3))
    assert not borrowable(3)
    assert not borrowable("a" * 10**6)


def test_a_leaf_that_was_given_away_meanwhile_stays_so():
    leaf = large(torch.Tensor)
    borrow = Borrow([leaf, leaf])
    join = after(0.05, borrow)
    with plain_leaves([1, leaf]) as borrows:
        assert borrows == {1: borrow}
        assert type(leaf) is torch.Tensor
        leaf.__class__ = DonatedTensor
    join()
    assert type(leaf) is DonatedTensor


def state_of(depth=2):
    return momentum_state(stack_params(depth, WIDTH))


def borrowed(state, reads=None):
    return Borrow([leaf for leaf in tree.leaves(state) if borrowable(leaf)], reads)


@pytest.mark.parametrize("warm", [False, True])
@pytest.mark.parametrize("seconds", [0.0, 0.2])
def test_a_donating_step_computes_at_once_and_writes_after_the_loan(warm, seconds):
    step = ftrain.jit(momentum_step(stack_loss), donate="state")
    batch, state, twin = stack_batch(8, WIDTH), state_of(), state_of()
    if warm:
        state, _ = step(state, batch)
        twin, _ = step(twin, batch)
    reads = {str(i): leaf.detach() for i, leaf in enumerate(tree.leaves(state)) if borrowable(leaf)}
    before, addresses = [leaf.clone() for leaf in reads.values()], {leaf.data_ptr() for leaf in reads.values()}

    def unchanged():
        assert all(map(torch.equal, reads.values(), before))

    join = after(seconds, borrowed(state, reads), unchanged)
    new, metrics = step(state, batch)
    join()
    expected, plain = step(twin, batch)
    assert torch.equal(metrics["loss"], plain["loss"])
    assert all(map(torch.equal, tree.leaves(new), tree.leaves(expected)))
    assert addresses <= {leaf.data_ptr() for leaf in tree.leaves(new)}


@pytest.mark.parametrize("donate", ["state", None])
def test_a_step_has_the_loan_end_before_it_returns(donate):
    step = ftrain.jit(lambda state: {"w": state["w"]}, donate=donate)
    state = {"w": large(torch.Tensor)}
    borrow = borrowed(state)
    join = after(0.1, borrow)
    result = step(state)
    assert type(result["w"]) is torch.Tensor
    assert borrow._ended.is_set()
    join()


class CountMatmuls(TorchDispatchMode):
    """How many matrix products ran so far."""

    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += func is torch.ops.aten.mm.default
        return func(*args, **(kwargs or {}))


def test_the_forward_is_done_when_the_program_waits():
    state, batch = state_of(depth=5), stack_batch(8, WIDTH)
    compiled = ftrain.jit(momentum_step(stack_loss), donate="state").lower(state, batch)
    mode, seen = CountMatmuls(), []
    program = compile_graph(compiled.executed, "aten", before_write=lambda: seen.append(mode.count))
    with mode:
        program([*tree.leaves(state), *batch])
    assert len(seen) == 1
    assert 5 < seen[0] < mode.count


def test_an_error_in_a_step_leaves_nothing_lent():
    step = ftrain.jit(lambda state: {"w": state["w"] @ torch.zeros(1, 2)}, donate="state")
    state = {"w": large(torch.Tensor)}
    join = after(0.1, borrowed(state))
    with pytest.raises(RuntimeError):
        step(state)
    assert type(state["w"]) is torch.Tensor
    join()
