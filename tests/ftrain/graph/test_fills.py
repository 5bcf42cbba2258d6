"""Random fills: whatever the layout of what is filled, the numbers are those of eager code, in its places."""

import pytest
import torch
import torch.nn.functional as F

import ftrain
from ftrain.graph.op_effects import Effect, effect_of

FILLS = {
    "bernoulli": lambda x: x.bernoulli_(0.5),
    "bernoulli_each": lambda x: x.bernoulli_(torch.linspace(0, 1, x.shape[-1])),
    "uniform": lambda x: x.uniform_(-1, 1),
    "normal": lambda x: x.normal_(),
    "random": lambda x: x.random_(),
    "random_below": lambda x: x.random_(9),
    "random_between": lambda x: x.random_(2, 9),
    "log_normal": lambda x: x.log_normal_(0.1, 0.2),
    "exponential": lambda x: x.exponential_(2.0),
    "geometric": lambda x: x.geometric_(0.3),
    "cauchy": lambda x: x.cauchy_(),
    "dropout": lambda x: F.dropout(x.fill_(1), 0.4),
    "dropout_": lambda x: F.dropout(x.fill_(1), 0.4, inplace=True),
    "leaky": lambda x: F.rrelu(x.fill_(-1), training=True),
    "poisson": lambda x: torch.poisson(x.fill_(3)),
    "like": torch.rand_like,
}

LAYOUTS = {
    "rows": lambda x: torch.empty_like(x),
    "columns": lambda x: torch.empty_like((x @ x.T @ x).T),
    "permuted": lambda x: torch.zeros(3, 4, 5).permute(2, 0, 1),
    "every_second": lambda x: torch.zeros(8, 14)[:, ::2],
    "a_slice": lambda x: torch.zeros(8, 9)[:, 2:9],
    "written_before": lambda x: torch.zeros(7, 8).T.copy_(x),
    "channels_last": lambda x: torch.empty(2, 3, 4, 4).to(memory_format=torch.channels_last),
}


def drawn(step, x):
    torch.manual_seed(3)
    return step(x), torch.rand(2)  # and whoever draws next gets the same


@pytest.mark.parametrize("lay", LAYOUTS.values(), ids=LAYOUTS)
def test_the_numbers_are_eager_ones(lay):
    def step(x):
        return {name: fill(lay(x)) * 2 for name, fill in FILLS.items()}

    x = torch.linspace(-1, 1, 56, dtype=torch.float64).reshape(8, 7)
    torch.testing.assert_close(drawn(ftrain.jit(step), x), drawn(step, x), rtol=0, atol=0)


def test_in_a_loss_whatever_is_made_again():
    def step(w, x):
        def loss(w):
            h = torch.tanh(x @ w).T
            return (h * torch.empty_like(h).bernoulli_(0.5)).square().sum()

        return ftrain.value_and_grad(loss)(w)

    w, x = torch.linspace(-1, 1, 12).reshape(4, 3), torch.linspace(0, 1, 20).reshape(5, 4)
    for remat in ("none", "all"):
        ours = drawn(ftrain.jit(lambda w: step(w, x), remat=remat), w)
        torch.testing.assert_close(ours, drawn(lambda w: step(w, x), w))


def test_passes_know_that_it_draws():
    graph = ftrain.jit(lambda x: torch.empty_like(x.T).normal_() * x.T).lower(torch.ones(3, 4)).graph.graph
    assert [n.target.name() for n in graph.nodes if effect_of(n) is Effect.RANDOM] == ["ftrain::fill_normal"]


def test_contiguous_memory_needs_no_op_of_ours():
    graph = ftrain.jit(lambda x: F.dropout(x, 0.5)).lower(torch.ones(3, 4)).graph.graph
    assert [n.target.name() for n in graph.nodes if effect_of(n) is Effect.RANDOM] == ["aten::bernoulli.p"]


def test_a_size_that_depends_on_data():
    def rows(x, lay):
        found = x.nonzero()
        return lay(torch.empty(found.shape)).bernoulli_(0.5).sum()

    x = torch.ones(3, 4)
    torch.testing.assert_close(
        drawn(ftrain.jit(lambda x: rows(x, lambda h: h)), x), drawn(lambda x: rows(x, lambda h: h), x)
    )
    with pytest.raises(ValueError, match=r"test_fills.py:\d+.*size depends on data and which is not contiguous"):
        ftrain.jit(lambda x: rows(x, torch.t))(x)
