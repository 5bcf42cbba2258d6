"""A save that returns before its copy is made: steps and eager code cannot get at the state too early."""

import time
import weakref

import pytest
import torch

import ftrain
from ftrain import tree
from ftrain.checkpoint import Checkpointer, Ranks, SaveFailed, restore, snapshot
from ftrain.modules.spec import Normal, ParamSpec
from ftrain.sharding import Mesh, Plan
from tests.helpers.checkpoint_layouts import AXES
from tests.helpers.rank_processes import run

SIZE = 300


@pytest.fixture
def slow_copy(monkeypatch):
    """Copies of large leaves take a while."""
    slow_down(monkeypatch.setattr)


def slow_down(replace):
    copy = snapshot._copy_on_host

    def slow(target, source):
        if source.nbytes > 2**16:
            time.sleep(0.05)
        copy(target, source)

    replace(snapshot, "_copy_on_host", slow)


def state_at(step):
    count = torch.tensor(step)
    return {"params": {"a": torch.full((SIZE, SIZE), float(step)), "b": count * torch.ones(SIZE, SIZE)}, "step": count}


def advance(state):
    return tree.map(lambda leaf: leaf + 1, state)


def equal(a, b):
    return all(map(torch.equal, tree.leaves(a), tree.leaves(b)))


@pytest.mark.parametrize("warm", [False, True])
def test_a_step_right_after_the_save_does_not_change_what_is_saved(tmp_path, slow_copy, warm):
    step, state, first = ftrain.jit(advance, donate="state"), state_at(0), 0
    if warm:
        state, first = step(step(state)), 2
    with Checkpointer(tmp_path) as checkpoints:
        for number in range(first, first + 3):
            assert checkpoints.save(state, number)
            state = step(state)
            assert type(state["params"]["a"]) is torch.Tensor
        checkpoints.wait()
        for number in range(first, first + 3):
            assert equal(checkpoints.restore(state_at(0), number), state_at(number))
    assert equal(state, state_at(first + 3))


@pytest.mark.parametrize(
    "use", [lambda s: s["params"]["b"].zero_(), lambda s: [leaf.sub_(9) for leaf in tree.leaves(s)]], ids=["one", "all"]
)
def test_eager_code_right_after_the_save_waits_for_its_copy(tmp_path, slow_copy, use):
    state = state_at(4)
    with Checkpointer(tmp_path) as checkpoints:
        checkpoints.save(state, 4)
        use(state)
    assert equal(restore(state, tmp_path), state_at(4))


def test_a_second_save_of_a_state_that_is_still_copied(tmp_path, slow_copy):
    state = state_at(1)
    with Checkpointer(tmp_path) as checkpoints:
        checkpoints.save(state, 1)
        checkpoints.save(state, 2)
    assert type(state["params"]["a"]) is torch.Tensor
    assert equal(restore(state, tmp_path, 2), state_at(1))


def test_a_write_through_an_older_view_fails_the_save_and_names_the_leaf(tmp_path, slow_copy):
    state = state_at(1)
    view = state["params"]["b"].view(-1)
    checkpoints = Checkpointer(tmp_path)
    checkpoints.save(state, 1)
    view.zero_()
    with pytest.raises(SaveFailed, match=r"'params.b' was written to while it was copied"):
        checkpoints.close()
    assert checkpoints.latest() is None


def test_a_state_that_nobody_holds_is_freed_when_it_is_copied(tmp_path, slow_copy, monkeypatch):
    alive = []
    take = snapshot.Snapshot.take

    def taken(self):
        found = take(self)
        alive.append([leaf() is not None for leaf in leaves])
        return found

    monkeypatch.setattr(snapshot.Snapshot, "take", taken)
    with Checkpointer(tmp_path) as checkpoints:
        state = state_at(1)
        leaves = [weakref.ref(leaf) for leaf in tree.leaves(state["params"])]
        checkpoints.save(state, 1)
        del state
    assert alive == [[False, False]]


def test_the_time_that_the_loop_stood_still(tmp_path, monkeypatch):
    """In `save`, and in what then waited for the copy."""
    waits = iter([0.25])
    monkeypatch.setattr(
        "ftrain.runtime.borrow.Borrow.wait", lambda borrow: setattr(borrow, "waited", next(waits)) or borrow.end()
    )
    with Checkpointer(tmp_path) as checkpoints:
        assert checkpoints.blocked == 0
        state = state_at(1)
        checkpoints.save(state, 1)
        checkpoints._writer._borrow.wait()
        assert checkpoints.blocked > 0.25
        checkpoints.wait()


def step_on_a_mesh(rank, mesh, folder, found):
    """Each of two ranks saves its pieces and steps at once."""
    slow_down(setattr)
    specs = {"params": {"a": ParamSpec((SIZE + 1, SIZE), AXES["embed_VD"], Normal(1.0))}}
    step = ftrain.jit(lambda state, batch: advance(state), donate="state", plan=Plan(mesh), specs=specs["params"])
    state = step.init(lambda: ftrain.init(specs, ftrain.key(0)))
    with Checkpointer(folder, ranks=Ranks.of_run()) as checkpoints:
        for number in range(3):
            checkpoints.save(state, number)
            state = step(state, {})
    first = checkpoints.restore(state, 0)
    for number in range(3):
        found[rank, "same", number] = equal(step.whole(checkpoints.restore(state, number)), step.whole(first))
        first = tree.map(lambda leaf: leaf + 1, first)


def test_a_step_on_a_mesh_of_processes_waits_too(tmp_path):
    found = run(step_on_a_mesh, 2, Mesh(1, 2), str(tmp_path))
    assert len(found) == 6
    assert all(found.values())
