"""What a loss adds or counts once for each rank, where one device has it once: right on a mesh, or refused."""

import pytest
import torch

import ftrain
from ftrain import Mean
from ftrain.modules import spec
from ftrain.sharding import Layout, Mesh, Plan

MESH = Mesh(shard=2, kind="virtual")


def numbers(seed, *shape):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


PARAMS = {"w": numbers(0, 6, 4)}
BATCH = {"x": numbers(1, 16, 6), "y": numbers(2, 16, 4)}


def errors(p, b):
    return (b["x"] @ p["w"] - b["y"]).square()


def number(x):
    return torch.tensor(float(x))


def both(loss):
    """Value and gradients on one device and on the mesh."""

    def step(p, batch):
        return ftrain.value_and_grad(loss)(p, batch)

    on_mesh = ftrain.jit(step, plan=Plan(MESH, Layout()), specs=spec.of(PARAMS))
    return ftrain.jit(step)(PARAMS, BATCH), on_mesh(PARAMS, BATCH)


def running_total(p, b):
    total = torch.tensor(0.0, dtype=torch.float64)
    for e in errors(p, b).split(4, dim=1):
        total = total + e.sum()
    return Mean(total, number(b["y"].numel()))


def running_total_in_place(p, b):
    e = errors(p, b)
    total = e.new_zeros(())
    total += e.sum()
    return Mean(total, (e > 0.1).sum() + 1e-8)


def rows_counted(p, b):
    return Mean(errors(p, b).sum(1).sum(), number(len(b["x"])))


def mean_of_equal_ranks(p, b):
    return Mean(errors(p, b).mean() + 0.1 * p["w"].square().sum(), number(1))


def penalty_of_the_count(p, b):
    e = errors(p, b)
    count = (e > 0.1).sum()
    return Mean(e.sum() + 0.1 * p["w"].square().sum() * count, count)


def penalty_of_a_number_of_rows(p, b):
    e = errors(p, b)
    return Mean(e.sum() + 0.1 * p["w"].square().sum() * number(e.numel()), number(e.numel()))


def penalty_as_a_term(p, b):
    e = errors(p, b)
    terms = {"fit": Mean(e.sum(), number(e.numel())), "penalty": Mean(p["w"].square().sum(), number(1))}
    return ftrain.weighted_sum(terms, {"fit": 1.0, "penalty": 0.1})


@pytest.mark.parametrize(
    "loss",
    [
        running_total,
        running_total_in_place,
        rows_counted,
        mean_of_equal_ranks,
        penalty_of_the_count,
        penalty_of_a_number_of_rows,
        penalty_as_a_term,
    ],
)
def test_each_rank_adds_its_own(loss):
    one, many = both(loss)
    torch.testing.assert_close(many[0], one[0], rtol=1e-9, atol=0)
    torch.testing.assert_close(many[1]["w"], one[1]["w"], rtol=1e-9, atol=1e-12)


def penalty_in_the_total(p, b):
    e = errors(p, b)
    return Mean(e.sum() + 0.1 * p["w"].square().sum(), number(e.numel()))


def one_in_the_count(p, b):
    e = errors(p, b)
    return Mean(e.sum(), (e > 0.1).sum() + 1)


def whole_batchs_count(p, b):
    return Mean(errors(p, b).sum(), number(64))


def whole_batchs_count_filled_in(p, b):
    return Mean(errors(p, b).sum(), torch.full((), 64.0))


def whole_batchs_rows(p, b):
    return Mean(errors(p, b).mean(1).sum(), number(16))


def sum_over_one(p, b):
    return Mean(errors(p, b).sum(), number(1))


def sum_over_a_mean(p, b):
    return Mean(errors(p, b).sum(), (errors(p, b) > 0.1).double().mean())


def mean_over_rows(p, b):
    return Mean(errors(p, b).mean(), number(len(b["x"])))


def penalty_over_a_count(p, b):
    return Mean(p["w"].square().sum(), (errors(p, b) > 0.1).sum())


@pytest.mark.parametrize(
    ("loss", "says"),
    [
        (penalty_in_the_total, r"weighted_sum"),
        (one_in_the_count, r"add at .*test_own_counts.py:\d+ reads a sum over rows"),
        (whole_batchs_count, r"a Mean counts 64, and its total is a sum over a rank's 8 rows"),
        (whole_batchs_count_filled_in, r"a Mean counts 64, and its total is a sum over a rank's 8 rows"),
        (whole_batchs_rows, r"a Mean counts 16, and its total is a sum over a rank's 8 rows"),
        (sum_over_one, r"a Mean counts 1, and its total is a sum"),
        (sum_over_a_mean, r"a count that is none of its rows"),
        (mean_over_rows, r"a mean over rows already"),
        (penalty_over_a_count, r"make the total one of rows too"),
    ],
)
def test_what_would_count_once_a_rank_is_refused(loss, says):
    with pytest.raises(ValueError, match=says):
        both(loss)


def test_a_metric_with_the_whole_batchs_count_is_refused_too():
    def step(p, batch):
        return {"error": Mean(errors(p, batch).sum(), number(64))}

    with pytest.raises(ValueError, match="a Mean counts 64"):
        ftrain.jit(step, plan=Plan(MESH, Layout()), specs=spec.of(PARAMS))(PARAMS, BATCH)
