"""The baseline: a tower for the person and one for the film, which meet in a product (Covington et al. 2016).

Both read all that the foundation reads. The history is a mean over events, each through an MLP of its own, so that what
was done stays with the film that it was done to. Each task has vectors of its own.

Legend: N impressions, E events, W words of a title, P pixels, D width, B buckets of watch time.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from experiments.recommend.features import FIELDS, WATCH_S, WORDS
from ftrain.modules import embedding, hashed_tables, linear, mlp
from ftrain.modules.families.recommender import CLICK, CONVERT, WATCH, RecommenderConfig, Scores
from ftrain.modules.hashed_tables import TablesConfig
from ftrain.modules.mlp import MlpConfig
from ftrain.modules.spec import Normal

_TASKS = (CLICK, CONVERT, WATCH)


@dataclass(frozen=True)
class Towers:
    """Two towers of `width`; `pixels` of a cover."""

    width: int = 64
    pixels: int = 64
    rates: tuple[float, float] = (0.5, 0.5)

    @property
    def tables(self) -> TablesConfig:
        """The categorical features."""
        return TablesConfig(dict(FIELDS), d_out=self.width, init_std=0.1)

    @property
    def heads(self) -> RecommenderConfig:
        """The tasks, whose losses are those of the foundation."""
        return RecommenderConfig(self.width, self.width, WATCH_S, self.rates)

    @property
    def _wide(self) -> MlpConfig:
        return MlpConfig(self.width, 4 * self.width, kind="gelu", bias=True)

    def specs(self) -> dict[str, Any]:
        """Tables, the MLP of an event, that of a cover, the two towers, and what makes scores of their products."""
        d, outputs = self.width, len(_TASKS) * self.width
        return {
            "tables": hashed_tables.specs(self.tables),
            "words": embedding.specs(len(WORDS), d, init=Normal(0.1)),
            "event": mlp.specs(self._wide),
            "cover": {"hidden": linear.specs(self.pixels, d, (None, "embed"), bias=True), "mlp": mlp.specs(self._wide)},
            **{side: self._tower(outputs) for side in ("person", "film")},
            "click": linear.specs(1, 1, (None, None), bias=True),
            "convert": linear.specs(1, 1, (None, None), bias=True),
            "watch": linear.specs(d, len(WATCH_S), ("embed", None), bias=True),
        }

    def _tower(self, outputs: int) -> dict[str, Any]:
        d = self.width
        return {
            "in": linear.specs(2 * d, d, (None, "embed"), bias=True),
            "mlp": mlp.specs(self._wide),
            "out": linear.specs(d, outputs, ("embed", None)),
        }

    def scores(self, params: Any, batch: Mapping[str, Any]) -> Scores:
        """The scores of impressions (`features.unpacked`)."""
        events_NED = hashed_tables.lm_encode(params["tables"], batch["events"], cfg=self.tables)
        history_NED = events_NED[:, 1:-1] + mlp.apply(params["event"], events_NED[:, 1:-1], cfg=self._wide)
        person = self._vectors(params["person"], events_NED[:, 0], history_NED.mean(1))
        pixels_ND = F.gelu(linear.apply(params["cover"]["hidden"], batch["cover_NP"]))
        cover_ND = pixels_ND + mlp.apply(params["cover"]["mlp"], pixels_ND, cfg=self._wide)
        title_ND = embedding.apply(params["words"], batch["title_NW"]).sum(1)
        film = self._vectors(params["film"], events_NED[:, -1] + title_ND, cover_ND)
        products = {task: person[task] * film[task] for task in _TASKS}
        click, convert = (torch.logit(torch.tensor(rate, dtype=torch.float64)).item() for rate in self.rates)
        return Scores(
            self._score(params["click"], products[CLICK]) + click,
            self._score(params["convert"], products[CONVERT]) + convert,
            linear.apply(params["watch"], products[WATCH]),
        )

    def _vectors(self, params: Any, first_ND: Tensor, second_ND: Tensor) -> dict[str, Tensor]:
        """A vector of each task of one side, `[N, D]`."""
        x_ND = linear.apply(params["in"], torch.cat([first_ND, second_ND], -1))
        x_ND = x_ND + mlp.apply(params["mlp"], x_ND, cfg=self._wide)
        return dict(zip(_TASKS, linear.apply(params["out"], F.gelu(x_ND)).chunk(len(_TASKS), -1), strict=True))

    def _score(self, params: Any, product_ND: Tensor) -> Tensor:
        return linear.apply(params, product_ND.sum(-1, keepdim=True) * self.width**-0.5).squeeze(-1)
