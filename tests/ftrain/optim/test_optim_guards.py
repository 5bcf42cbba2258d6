"""Clipping, skipping of bad steps, and the running average of parameters."""

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from ftrain import optim, tree
from ftrain.kernels.primitive import bind
from ftrain.kernels.squares import sum_of_squares


def equal(a: Any, b: Any) -> bool:
    return all(torch.equal(x, y) for x, y in zip(tree.leaves(a), tree.leaves(b), strict=True))


def params() -> Any:
    torch.manual_seed(0)
    return {"w": torch.randn(3, 4), "b": torch.randn(4)}


def inner() -> optim.Transform:
    return optim.chain(optim.clip_by_global_norm(1.0), optim.adamw(0.1), optim.ema(0.9))


def recipe(**options: Any) -> optim.Transform:
    return optim.skip_nonfinite(inner(), **options)


@pytest.mark.parametrize("poison", [float("nan"), float("inf"), -float("inf")])
def test_a_bad_step_changes_nothing_but_the_counters(poison: float):
    p, tx = params(), recipe()
    updates, state = tx.update(p, tx.init(p), p)
    p = optim.apply_updates(p, updates)
    bad = {"w": p["w"].clone(), "b": p["b"]}
    bad["w"][1, 2] = poison
    for times in (1, 2):
        updates, after = tx.update(bad, state, p)
        assert equal(optim.apply_updates(p, updates), p)
        assert equal(after.inner, state.inner)
        assert (int(after.skipped_total), int(after.skipped_in_a_row)) == (times, times)
        state = after
    updates, after = tx.update(p, state, p)
    assert (int(after.skipped_total), int(after.skipped_in_a_row)) == (2, 0)
    assert equal(updates, inner().update(p, state.inner, p)[0])
    assert not equal(optim.apply_updates(p, updates), p)


def test_a_good_step_is_the_step_without_the_guard():
    p = params()
    guarded, bare = optim.skip_nonfinite(optim.adamw(0.1)), optim.adamw(0.1)
    assert equal(guarded.update(p, guarded.init(p), p)[0], bare.update(p, bare.init(p), p)[0])


def test_after_too_many_bad_steps_one_is_let_through():
    p, tx = params(), recipe(max_consecutive=2)
    bad, state, moved = tree.map(lambda x: x * float("nan"), p), tx.init(p), []
    for _ in range(3):
        updates, state = tx.update(bad, state, p)
        moved.append(bool(updates["w"].isnan().any()))
    assert moved == [False, False, True]
    assert int(state.skipped_total) == 2


def test_all_finite_knows_large_numbers_from_infinite_ones():
    largest = torch.finfo(torch.float32).max
    assert bool(
        optim.all_finite([torch.tensor([largest, -largest]), torch.zeros(0), torch.tensor(1e300, dtype=torch.float64)])
    )
    assert not bool(optim.all_finite([torch.tensor(1.0), torch.tensor([0.0, float("inf")]).bfloat16()]))


def test_a_shard_elsewhere_that_is_not_finite_skips_the_step_here_too():
    with bind({"sum_over_shards": lambda values_N, leaves: values_N + 1}):
        assert not bool(optim.all_finite(params()))


def test_global_norm_sums_over_shards():
    whole = optim.global_norm(params())
    with bind({"sum_over_shards": lambda values_N, leaves: 4 * values_N}):
        torch.testing.assert_close(optim.global_norm(params()), 2 * whole)
    assert float(optim.global_norm({})) == 0.0


@given(
    st.integers(1, 5), st.integers(0, 6), st.booleans(), st.sampled_from([torch.float32, torch.float64, torch.bfloat16])
)
def test_sum_of_squares_of_any_layout(rows: int, columns: int, turned: bool, dtype: torch.dtype):
    x = torch.arange(rows * columns, dtype=dtype).reshape(rows, columns) / 8
    x = x.mT if turned else x
    torch.testing.assert_close(sum_of_squares(x).double(), x.double().square().sum(), rtol=1e-6, atol=0)


def test_sum_of_squares_does_not_drift_on_long_vectors():
    x = torch.full((4_000_000,), 1e-3)
    torch.testing.assert_close(float(sum_of_squares(x)), 4.0, rtol=1e-5, atol=0)


def test_clip_by_value():
    tx = optim.clip_by_value(0.5)
    clipped, _ = tx.update(torch.tensor([-2.0, 0.25, 3.0]), tx.init(torch.zeros(3)), torch.zeros(3))
    assert clipped.tolist() == [-0.5, 0.25, 0.5]


@pytest.mark.parametrize("warmup", [False, True])
def test_ema_averages_the_parameters_after_each_update(warmup: bool):
    p = {"w": torch.tensor([1.0, -2.0], dtype=torch.float64)}
    tx = optim.chain(optim.sgd(0.5), optim.ema(0.75, warmup=warmup))
    state, expected = tx.init(p), p["w"]
    assert state[1].average["w"] is not p["w"]
    for t in range(1, 40):
        updates, state = tx.update(p, state, p)
        p = optim.apply_updates(p, updates)
        keep = min(0.75, (1 + t) / (10 + t)) if warmup else 0.75
        expected = keep * expected + (1 - keep) * p["w"]
        torch.testing.assert_close(state[1].average["w"], expected, rtol=1e-6, atol=0)


def test_ema_of_bfloat16_parameters_is_kept_in_float32():
    p = torch.ones(2, dtype=torch.bfloat16)
    tx = optim.ema(0.999)
    _, state = tx.update(torch.ones_like(p), tx.init(p), p)
    torch.testing.assert_close(state.average, torch.full((2,), 1.001))
