"""The multi-task foundation: a decoder over events, titles and covers, with three heads.

They read the last token's hidden state, and the rows of tables of what is shown as they are (Wide & Deep, Cheng et al.
2016): what is known of a maker needs no layers.

Legend: N impressions.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from experiments.recommend.features import FIELDS, WATCH_S, WORDS, id_of
from ftrain.kernels.pack import take_rows
from ftrain.modules import decoder, hashed_tables, omni, vision_encoder
from ftrain.modules.attention import AttentionConfig
from ftrain.modules.decoder import DecoderConfig
from ftrain.modules.families import recommender
from ftrain.modules.families.recommender import RecommenderConfig, Scores
from ftrain.modules.hashed_tables import TablesConfig
from ftrain.modules.omni import OmniModel
from ftrain.modules.vision_encoder import VisionConfig

_STD = 0.3  # of rows of text and events, as large as those of pictures


@dataclass(frozen=True)
class Foundation:
    """The composition and its heads, as pure functions; `width` and `layers` of the decoder."""

    width: int = 64
    layers: int = 2
    rates: tuple[float, float] = (0.5, 0.5)

    @property
    def tables(self) -> TablesConfig:
        """The categorical features."""
        return TablesConfig(dict(FIELDS), d_out=self.width, init_std=_STD / len(FIELDS) ** 0.5)

    @property
    def vision(self) -> VisionConfig:
        """Covers: a token each."""
        return VisionConfig(32, layers=1, heads=4, d_out=self.width, patch=4, channels=1, merge=2)

    @property
    def heads(self) -> RecommenderConfig:
        """The tasks."""
        return RecommenderConfig(2 * self.width, 2 * self.width, WATCH_S, self.rates)

    @property
    def model(self) -> OmniModel:
        """Foundation and encoders."""
        attention = AttentionConfig(self.width, heads=4, kv_heads=4, head_dim=self.width // 4, qk_norm=True)
        cfg = DecoderConfig(len(WORDS), self.width, self.layers, attention, d_hidden=2 * self.width, init_std=_STD)
        return OmniModel(
            cfg,
            {
                "events": hashed_tables.encoder(self.tables, begin=id_of("<events>"), end=id_of("</events>")),
                "image": vision_encoder.encoder(self.vision, begin=id_of("<image>"), end=id_of("</image>")),
            },
        )

    def specs(self) -> dict[str, Any]:
        """`omni` and `heads`."""
        return {"omni": omni.specs(self.model), "heads": recommender.specs(self.heads)}

    def scores(self, params: Any, batch: Mapping[str, Any]) -> Scores:
        """The scores of a pack's impressions (`features.packed`)."""
        model = self.model
        rows, places, _ = omni.media_rows(params["omni"], batch, model=model)
        x_TD = omni.merge(decoder.embed(params["omni"]["foundation"], batch["tokens_T"]), rows, places)
        hidden_TD, _ = omni.hidden_states(params["omni"], x_TD, batch, model=model)
        read_ND, shown_ND = take_rows(hidden_TD, batch["read_N"]), take_rows(x_TD, batch["shown_N"])
        return recommender.scores(params["heads"], torch.cat([read_ND, shown_ND], -1), cfg=self.heads)
