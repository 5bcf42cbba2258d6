"""Language models that see (Qwen2-VL and its successors): a vision tower whose rows stand among a decoder's tokens.

Legend: T tokens, n tokens of pictures, D width of the decoder, B prompts.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ftrain.kernels.documents import Segments
from ftrain.kernels.embedding import merge_rows
from ftrain.modules import decoder, vision_tower
from ftrain.modules.decoder import Added, DecoderStats
from ftrain.modules.decoder_config import DecoderConfig
from ftrain.modules.pictures import MediaConfig
from ftrain.modules.spec import Tree


@dataclass(frozen=True)
class VisionLanguageConfig:
    """A decoder `text`, and what it sees by `media`.

    ValueError where the tower's rows are of another width, where positions have not three axes, or where the tower
    gives rows for more layers than the decoder has.
    """

    text: DecoderConfig
    media: MediaConfig

    def __post_init__(self) -> None:
        tower, sections = self.media.tower, self.text.attention.rope_sections
        if tower.d_out != self.text.d_model:
            raise ValueError(f"the tower's rows are {tower.d_out} wide, the decoder's {self.text.d_model}")
        if sections is None or len(sections) != 3:
            raise ValueError(f"rope_sections={sections}: tokens among pictures have places on three axes")
        if len(tower.deep_layers) > self.text.layers:
            raise ValueError(f"{len(tower.deep_layers)} deep layers for a decoder of {self.text.layers} layers")


def specs(cfg: VisionLanguageConfig) -> dict[str, Tree]:
    """`text` (`decoder.specs`) and `vision` (`vision_tower.specs`)."""
    return {"text": decoder.specs(cfg.text), "vision": vision_tower.specs(cfg.media.tower)}


def embed(params: Tree, batch: Mapping[str, Any], cfg: VisionLanguageConfig) -> tuple[Tensor, Added]:
    """The stream `[T, D]` of folded tokens with the rows of pictures in it, and what is added behind its first layers.

    `batch`: "tokens" `[T]`, and of `ftrain.modules.vision_media.prepare` "replaced" `[T]` and "media". A token of a
    picture without a picture's row, or a row for another token, gives NaN: no number that looks like one.
    """
    tokens_T, media = batch["tokens"], batch.get("media")
    x_TD = decoder.embed(params["text"], tokens_T)
    added = Added()
    if media is not None:
        seen = vision_tower.apply(params["vision"], media, cfg.media.tower)
        rows = [rows_nD.to(x_TD.dtype) for rows_nD in (seen.rows_nV, *seen.deep)]
        x_TD = merge_rows(x_TD, rows[0], media["index"])
        added = Added(tuple(rows[1:]), media["index"])
    replaced_T = batch.get("replaced")
    stands_T = (tokens_T == cfg.media.image) | (tokens_T == cfg.media.video)
    wrong_T = stands_T if replaced_T is None else stands_T != replaced_T
    return x_TD.masked_fill(wrong_T[:, None], torch.nan), added


def hidden(
    params: Tree,
    batch: Mapping[str, Any],
    cfg: VisionLanguageConfig,
    *,
    segments: Segments | None = None,
    keep: Sequence[int] = (),
) -> tuple[Tensor, DecoderStats]:
    """The decoder's hidden states `[T, D]` and its statistics. `batch`: as for `embed`, with "positions" `[T, 3]`.

    `keep`: streams that the statistics hold beside (`ftrain.modules.decoder.apply`): 0 are the embeddings with the rows
    of media in them.
    """
    x_TD, added = embed(params, batch, cfg)
    return decoder.apply(
        params["text"], x_TD, positions=batch["positions"].mT, segments=segments, cfg=cfg.text, added=added, keep=keep
    )
