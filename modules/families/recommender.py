"""Several tasks of recommendation over one foundation: clicks, conversions over the whole funnel, and watch time.

An impression is a document of the omni composition (`modules/omni.py`): who it was shown to, what they did before, and
what was shown, as text, pictures and categorical features (`modules/hashed_tables.py`). The hidden state of its last
token is what all heads read.

- Click: `p(click)`, learnt from all impressions.
- Conversion: `p(conversion | click)`, learnt through `p(click and conversion)` over all impressions, so that it is not
  trained on the clicked ones alone, which are no fair sample (ESMM, Ma et al. 2018). Products are taken as logarithms.
- Watch time: a distribution over buckets, learnt from clicked impressions. A time between the centres of two buckets is
  shared by them so that its mean is the time; the prediction is the mean over buckets.

Legend: N impressions, D width, F hidden width of a head, B buckets of watch time.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ftrain.kernels.mean import Mean, mean_where
from ftrain.modules import linear
from ftrain.modules.spec import Normal, ParamSpec, zeros

CLICK, CONVERT, WATCH = "click", "convert", "watch"
TERMS = ("ctr", "ctcvr", "watch")
"""The losses of `loss_terms`."""


@dataclass(frozen=True)
class RecommenderConfig:
    """Heads over a foundation of width `d_model`, each with a hidden layer of `d_hidden`.

    `watch_s`: centres of the buckets of watch time in seconds, increasing; times beyond them count as the nearest.
    `rates`: the shares of impressions that are clicked, and of clicks that convert, with which training begins.

    ValueError for fewer than two centres, centres that do not increase, or rates that are not between 0 and 1.
    """

    d_model: int
    d_hidden: int
    watch_s: tuple[float, ...]
    rates: tuple[float, float] = (0.5, 0.5)

    def __post_init__(self) -> None:
        if len(self.watch_s) < 2 or any(a >= b for a, b in zip(self.watch_s, self.watch_s[1:], strict=False)):
            raise ValueError(f"RecommenderConfig.watch_s={self.watch_s}: give at least two centres, increasing")
        if not all(0 < rate < 1 for rate in self.rates):
            raise ValueError(f"RecommenderConfig.rates={self.rates}: give shares between 0 and 1, without either")


class Scores(NamedTuple):
    """Logits of a click `[N]`, of a conversion after a click `[N]`, and of the buckets `[N, B]`, all float32."""

    click_N: Tensor
    convert_N: Tensor
    watch_NB: Tensor


class Predictions(NamedTuple):
    """Probabilities of a click, of a conversion after a click, of both, `[N]`; expected seconds after a click `[N]`."""

    click_N: Tensor
    convert_N: Tensor
    both_N: Tensor
    watch_N: Tensor


def specs(cfg: RecommenderConfig) -> dict[str, Any]:
    """`click`, `convert`, `watch`: each a hidden layer and the scores.

    >>> specs(RecommenderConfig(8, 16, watch_s=(1.0, 2.0, 4.0)))["watch"]["out"]["w"].shape
    (16, 3)
    """
    d, f = cfg.d_model, cfg.d_hidden
    outputs = {CLICK: 1, CONVERT: 1, WATCH: len(cfg.watch_s)}
    return {
        name: {
            "hidden": linear.specs(d, f, ("embed", "mlp"), bias=True),
            "out": {
                "w": ParamSpec((f, count), ("mlp", None), Normal(f**-0.5)),
                "b": ParamSpec((count,), (None,), zeros()),
            },
        }
        for name, count in outputs.items()
    }


def scores(params: Any, hidden_ND: Tensor, *, cfg: RecommenderConfig) -> Scores:
    """The scores of impressions by the hidden state of their last token, `[N, D]`.

    The click's and the conversion's begin at `cfg.rates`, the buckets' at equal shares.
    """
    click, convert = (torch.logit(torch.tensor(rate, dtype=torch.float64)).item() for rate in cfg.rates)

    def head(name: str) -> Tensor:
        hidden_NF = F.gelu(linear.apply(params[name]["hidden"], hidden_ND))
        return linear.apply(params[name]["out"], hidden_NF).float()

    return Scores(head(CLICK).squeeze(-1) + click, head(CONVERT).squeeze(-1) + convert, head(WATCH))


def loss_terms(found: Scores, labels: Mapping[str, Tensor], *, cfg: RecommenderConfig) -> dict[str, Mean]:
    """The loss of each task, in nats, as a `Mean`: "ctr" and "ctcvr" over all impressions, "watch" over clicks.

    `labels`, each `[N]`: "clicked" and "converted" (bool or 0 and 1; who did not click did not convert), "watch_s"
    (seconds, read where clicked), and "counted" (bool; False for padding).

    >>> cfg = RecommenderConfig(8, 16, watch_s=(1.0, 3.0))
    >>> found = Scores(torch.zeros(2), torch.zeros(2), torch.zeros(2, 2))
    >>> yes_no = torch.tensor([True, False])
    >>> labels = {"clicked": yes_no, "converted": yes_no, "watch_s": torch.ones(2), "counted": torch.ones(2) > 0}
    >>> {name: round(mean.item(), 3) for name, mean in loss_terms(found, labels, cfg=cfg).items()}
    {'ctr': 0.693, 'ctcvr': 0.837, 'watch': 0.693}
    """
    counted_N = labels["counted"].bool()
    clicked_N, converted_N = (labels[name].bool() & counted_N for name in ("clicked", "converted"))
    ctr_N = F.softplus(torch.where(clicked_N, -found.click_N, found.click_N))
    both_N = torch.where(converted_N & clicked_N, -log_both(found), -log_not_both(found))
    buckets_NB = share_between(labels["watch_s"].float(), cfg=cfg)
    watch_N = -(buckets_NB * F.log_softmax(found.watch_NB, dim=-1)).sum(-1)
    return {
        "ctr": mean_where(ctr_N, counted_N),
        "ctcvr": mean_where(both_N, counted_N),
        "watch": mean_where(watch_N, clicked_N),
    }


def log_both(found: Scores) -> Tensor:
    """`log(p(click) p(conversion | click))`, `[N]`."""
    return F.logsigmoid(found.click_N) + F.logsigmoid(found.convert_N)


def log_not_both(found: Scores) -> Tensor:
    """`log(1 - p(click) p(conversion | click))`, `[N]`, without a difference of near numbers.

    Where the product is small it is taken from 1. Elsewhere, with a and b the two scores,
    `1 - s(a) s(b) = (e^-a + e^-b + e^(-a-b)) s(a) s(b)`.
    """
    a_N, b_N, log_N = found.click_N, found.convert_N, log_both(found)
    of_small_N = torch.log1p(-torch.exp(log_N.clamp(max=-0.5)))
    of_large_N = torch.logsumexp(torch.stack([-a_N, -b_N, -a_N - b_N]), 0) + log_N
    return torch.where(log_N < -0.7, of_small_N, of_large_N)


def share_between(watch_N: Tensor, *, cfg: RecommenderConfig) -> Tensor:
    """Shares of the buckets `[N, B]`, of which at most two are not zero, whose mean is the time `[N]` in seconds.

    >>> share_between(torch.tensor([1.5, 9.0]), cfg=RecommenderConfig(8, 16, watch_s=(1.0, 2.0, 4.0))).tolist()
    [[0.5, 0.5, 0.0], [0.0, 0.0, 1.0]]
    """
    centres_B = torch.tensor(cfg.watch_s, dtype=torch.float32, device=watch_N.device)
    within_N = watch_N.clamp(cfg.watch_s[0], cfg.watch_s[-1])
    upper_N = torch.bucketize(within_N, centres_B).clamp(min=1)
    low_N, high_N = centres_B[upper_N - 1], centres_B[upper_N]
    share_N1 = ((within_N - low_N) / (high_N - low_N))[:, None]
    numbers_B = torch.arange(len(cfg.watch_s), device=watch_N.device)
    return (numbers_B == upper_N[:, None] - 1) * (1 - share_N1) + (numbers_B == upper_N[:, None]) * share_N1


def predict(found: Scores, *, cfg: RecommenderConfig) -> Predictions:
    """Probabilities, and the expected watch time in seconds."""
    click_N, convert_N = torch.sigmoid(found.click_N), torch.sigmoid(found.convert_N)
    centres_B = torch.tensor(cfg.watch_s, dtype=torch.float32, device=click_N.device)
    return Predictions(click_N, convert_N, click_N * convert_N, torch.softmax(found.watch_NB, dim=-1) @ centres_B)
