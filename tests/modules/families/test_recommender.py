"""The heads of a recommender: the funnel against its definition in float64, watch time, padding, ranks."""

import math

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

import ftrain
from ftrain.kernels import random
from ftrain.modules import spec
from ftrain.modules.families import recommender
from ftrain.modules.families.recommender import RecommenderConfig, Scores

CFG = RecommenderConfig(8, 16, watch_s=(1.0, 2.0, 5.0, 10.0), rates=(0.3, 0.2))


def labels(clicked: list[int], converted: list[int], watch: list[float], counted: list[int] | None = None):
    return {
        "clicked": torch.tensor(clicked),
        "converted": torch.tensor(converted),
        "watch_s": torch.tensor(watch),
        "counted": torch.tensor(counted or [1] * len(clicked)),
    }


@given(st.floats(-60, 60), st.floats(-60, 60), st.booleans())
@example(0.0, -8.0, False)
@settings(deadline=None, max_examples=60)
def test_the_funnels_loss_is_that_of_the_product_of_both_probabilities(a: float, b: float, bought: bool) -> None:
    found = Scores(torch.tensor([a]), torch.tensor([b]), torch.zeros(1, 4))
    terms = recommender.loss_terms(found, labels([bought], [bought], [1.0]), cfg=CFG)
    a, b = float(torch.tensor(a)), float(torch.tensor(b))
    both = -math.log1p(math.exp(-a)) - math.log1p(math.exp(-b))
    odds = math.exp(-a) + math.exp(-b) + math.exp(-a - b)
    neither = (math.log1p(-math.exp(both)) if both < -1e-2 else math.log(odds) + both) if not bought else 0.0
    assert terms["ctcvr"].item() == pytest.approx(-both if bought else -neither, rel=1e-5, abs=1e-6)


def test_gradients_are_finite_where_probabilities_are_certain() -> None:
    click = torch.tensor([90.0, -90.0, 90.0, -90.0], requires_grad=True)
    convert = torch.tensor([90.0, 90.0, -90.0, -90.0], requires_grad=True)
    terms = recommender.loss_terms(
        Scores(click, convert, torch.zeros(4, 4)), labels([0, 0, 0, 0], [0, 0, 0, 0], [1.0] * 4), cfg=CFG
    )
    for slope in torch.autograd.grad(terms["ctcvr"].value(), (click, convert)):
        assert slope.isfinite().all()


def test_a_time_is_the_mean_of_its_buckets_and_is_predicted_so() -> None:
    times_N = torch.tensor([0.2, 1.0, 1.25, 4.0, 9.5, 80.0])
    shares_NB = recommender.share_between(times_N, cfg=CFG)
    torch.testing.assert_close(shares_NB.sum(-1), torch.ones(6))
    torch.testing.assert_close(shares_NB @ torch.tensor(CFG.watch_s), times_N.clamp(1, 10))
    found = Scores(torch.zeros(6), torch.zeros(6), shares_NB.clamp(min=1e-30).log())
    torch.testing.assert_close(recommender.predict(found, cfg=CFG).watch_N, times_N.clamp(1, 10))


def test_padding_and_films_that_were_not_clicked_count_nowhere() -> None:
    generator = torch.Generator().manual_seed(0)
    found = Scores(*(torch.randn(*shape, generator=generator) for shape in ((4,), (4,), (4, 4))))
    some = recommender.loss_terms(
        Scores(*(x[:3] for x in found)), labels([1, 0, 1], [1, 0, 0], [3.0, 0.0, 7.0]), cfg=CFG
    )
    padded = recommender.loss_terms(
        found, labels([1, 0, 1, 1], [1, 0, 0, 1], [3.0, 0.0, 7.0, 2.0], [1, 1, 1, 0]), cfg=CFG
    )
    for name in recommender.TERMS:
        assert padded[name].item() == pytest.approx(some[name].item(), rel=1e-6)
    assert [some[name].count.item() for name in recommender.TERMS] == [3, 3, 2]


def test_training_begins_at_the_rates() -> None:
    params = spec.init(recommender.specs(CFG), random.key(0))
    found = recommender.predict(recommender.scores(params, torch.zeros(2, 8), cfg=CFG), cfg=CFG)
    torch.testing.assert_close(found.click_N, torch.full((2,), 0.3))
    torch.testing.assert_close(found.both_N, torch.full((2,), 0.06))


def test_on_ranks_each_task_is_the_mean_over_all_of_them() -> None:
    """Ranks have different numbers of clicks: a mean of their means would be another number."""
    params = spec.init(recommender.specs(CFG), random.key(0))
    batch = {
        "hidden": torch.randn(4, 8, generator=torch.Generator().manual_seed(0)),
        "labels": labels([1, 1, 1, 0], [1, 0, 0, 0], [3.0, 2.0, 7.0, 0.0]),
    }

    def step(params, batch):
        def loss(params):
            found = recommender.scores(params, batch["hidden"], cfg=CFG)
            return ftrain.weighted_sum(recommender.loss_terms(found, batch["labels"], cfg=CFG), {"watch": 0.3})

        return ftrain.value_and_grad(loss)(params)

    plan = ftrain.Plan(ftrain.Mesh(shard=2, kind="virtual"), ftrain.Layout())
    got, want = (
        ftrain.jit(step, plan=plan, specs={"params": recommender.specs(CFG)})(params, batch),
        ftrain.jit(step)(params, batch),
    )
    for a, b in zip(ftrain.tree.leaves(got), ftrain.tree.leaves(want), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"watch_s": (1.0,)}, "at least two centres"),
        ({"watch_s": (2.0, 1.0)}, "increasing"),
        ({"watch_s": (1.0, 2.0), "rates": (0.0, 0.5)}, "shares between 0 and 1"),
    ],
)
def test_configurations_that_cannot_be_are_refused(fields, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        RecommenderConfig(8, 16, **fields)
