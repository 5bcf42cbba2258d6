"""A workflow of stages: what runs when, and that it goes on inside a stage to the same numbers."""

import pytest
import torch

import ftrain
from ftrain import key
from ftrain.checkpoint import Checkpointer
from ftrain.run.stages import Stage, always, end_of, every, fold, place_of, saved_tree

SEED = 3


def train(tree, batch, key):
    """A step with a random number, by which a lost step or key shows."""
    noise = ftrain.normal(key, (2,))
    return {**tree, "w": tree["w"] * 0.9 + batch + noise, "count": tree["count"] + 1}, {"w": tree["w"].sum()}


def follow(tree, batch, key):
    return {**tree, "slow": 0.5 * tree["slow"] + 0.5 * tree["w"]}, {"slow": tree["slow"].sum()}


def begun(tree, key):
    return {"base": tree["w"], "w": torch.zeros(2), "count": tree["count"], "slow": ftrain.normal(key, (2,))}


def stages(first=5, second=7):
    data = lambda number: torch.full((2,), float(number))  # noqa: E731
    return [
        Stage("warm", first, [(always, train)], data),
        Stage("main", second, [(always, train), (every(3), follow)], data, begun),
    ]


START = {"w": torch.ones(2), "count": torch.tensor(0)}


def equal(a, b):
    return sorted(a) == sorted(b) and all(torch.equal(a[name], b[name]) for name in a)


class Stop(Exception):
    pass


@pytest.mark.parametrize("stop", [2, 5, 6, 9, 12])
def test_a_run_goes_on_inside_a_stage_to_the_bit(tmp_path, stop):
    whole = fold(stages(), START, seed=SEED)
    done = 0

    def until(stage, number, metrics):
        nonlocal done
        if done == stop:
            raise Stop
        done += 1

    with Checkpointer(tmp_path, background=False) as checkpoints:
        if stop < 12:
            with pytest.raises(Stop):
                fold(stages(), START, seed=SEED, checkpoints=checkpoints, save=1, log=until)
        else:
            fold(stages(), START, seed=SEED, checkpoints=checkpoints, save=1)
        assert checkpoints.latest() == stop
        seen = []
        found = fold(
            stages(), START, seed=SEED, checkpoints=checkpoints, save=4, log=lambda stage, n, _: seen.append((stage, n))
        )
    assert equal(found, whole)
    expected = [("warm", n + 1) for n in range(5)] + [("main", n + 1) for n in range(7)]
    assert seen == expected[stop:]
    assert int(whole["count"]) == 12


def test_a_schedule_runs_what_is_due_in_its_order_with_keys_of_its_own():
    seen = []

    def watched(name):
        def step(tree, batch, key):
            seen.append((name, int(batch), tuple(key.tolist())))
            return tree, {}

        return step

    schedule = [(always, watched("critic")), (every(2), watched("student")), (lambda n: n == 1, watched("once"))]
    fold([Stage("a", 4, schedule, lambda n: 10 + n)], START, seed=0)
    assert [(name, batch) for name, batch, _ in seen] == [
        ("critic", 10), ("student", 10), ("critic", 11), ("once", 11), ("critic", 12), ("student", 12), ("critic", 13),
    ]  # fmt: skip
    assert len({at for _, _, at in seen}) == len(seen)


def test_keys_of_a_stage_do_not_depend_on_the_stages_before():
    early, late = [], []
    step = lambda into: lambda tree, batch, key: (into.append(key.tolist()), (tree, {}))[1]  # noqa: E731
    fold([Stage("b", 2, [(always, step(early))], lambda n: n)], START, seed=SEED)
    fold([stages()[0], Stage("b", 2, [(always, step(late))], lambda n: n)], START, seed=SEED)
    assert early == late


def test_a_folder_of_other_stages_is_refused(tmp_path):
    with Checkpointer(tmp_path, background=False) as checkpoints:
        whole = fold(stages(), START, seed=SEED, checkpoints=checkpoints)
        at_end = end_of(stages(), "warm")
        warm = saved_tree(stages(), START, at_end, seed=SEED, checkpoints=checkpoints)
        assert equal(warm, fold(stages()[:1], START, seed=SEED))
        assert equal(saved_tree(stages(), START, 12, seed=SEED, checkpoints=checkpoints), whole)
        with pytest.raises(
            ValueError, match=r"is of step 7 of stage 'main', and by these stages it would be of step 8"
        ):
            fold(stages(4, 9), START, seed=SEED, checkpoints=checkpoints)
        with pytest.raises(ValueError, match="step 12 is none of the 5 steps"):
            fold(stages()[:1], START, seed=SEED, checkpoints=checkpoints)


def test_what_cannot_be_is_refused():
    data = lambda n: n  # noqa: E731
    with pytest.raises(ValueError, match="must have names of their own"):
        fold([stages()[0], stages()[0]], START, seed=0)
    with pytest.raises(ValueError, match="steps=0"):
        Stage("a", 0, [(always, train)], data)
    with pytest.raises(ValueError, match="no stage 'cold': stages are warm, main"):
        end_of(stages(), "cold")
    with pytest.raises(ValueError, match=r"every\(0\)"):
        every(0)
    more = lambda tree, batch, key: ({**tree, "new": torch.zeros(1)}, {})  # noqa: E731
    with pytest.raises(ValueError, match="other leaves than it got"):
        fold([Stage("a", 1, [(always, more)], data)], START, seed=0)
    same = lambda tree, batch, key: (tree, {"loss": torch.zeros(())})  # noqa: E731
    with pytest.raises(ValueError, match="two steps report 'loss'"):
        fold([Stage("a", 1, [(always, same), (always, same)], data)], START, seed=0)
    assert place_of(stages(), 5) == (0, 5)
    assert place_of(stages(), 6) == (1, 1)


def test_jitted_steps_give_the_same_numbers():
    jitted = Stage("warm", 3, [(always, ftrain.jit(train, donate="tree"))], lambda n: torch.full((2,), float(n)))
    found = fold([jitted], {name: x.clone() for name, x in START.items()}, seed=SEED)
    torch.testing.assert_close(found["w"], fold([stages(3)[0]], START, seed=SEED)["w"])
    assert key(0).shape == (2,)
