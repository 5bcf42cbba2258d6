"""Language models that see, and some that hear (Qwen2-VL and its successors): towers whose rows stand among a decoder's
tokens.

Legend: T tokens, n tokens of pictures, D width of the decoder, B prompts.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ftrain.kernels.documents import Segments
from ftrain.kernels.embedding import merge_rows
from ftrain.modules import audio_tower, decoder, vision_tower
from ftrain.modules.decoder import Added, DecoderStats
from ftrain.modules.decoder_config import DecoderConfig
from ftrain.modules.pictures import MediaConfig
from ftrain.modules.sounds import SoundConfig
from ftrain.modules.spec import Tree


@dataclass(frozen=True)
class VisionLanguageConfig:
    """A decoder `text`, and what it sees and hears by `media`.

    ValueError where a tower's rows are of another width, where positions have not three axes, or where the tower
    gives rows for more layers than the decoder has.
    """

    text: DecoderConfig
    media: MediaConfig

    def __post_init__(self) -> None:
        tower, sections = self.media.tower, self.text.attention.rope_sections
        if tower.d_out != self.text.d_model:
            raise ValueError(f"the tower's rows are {tower.d_out} wide, the decoder's {self.text.d_model}")
        sound = self.media.sound
        if sound is not None and sound.tower.d_out != self.text.d_model:
            raise ValueError(f"rows of sound are {sound.tower.d_out} wide, the decoder's {self.text.d_model}")
        if sections is None or len(sections) != 3:
            raise ValueError(f"rope_sections={sections}: tokens among pictures have places on three axes")
        if len(tower.deep_layers) > self.text.layers:
            raise ValueError(f"{len(tower.deep_layers)} deep layers for a decoder of {self.text.layers} layers")


def specs(cfg: VisionLanguageConfig) -> dict[str, Tree]:
    """`text` (`decoder.specs`) and `vision` (`vision_tower.specs`); with sound `audio` (`audio_tower.specs`)."""
    found = {"text": decoder.specs(cfg.text), "vision": vision_tower.specs(cfg.media.tower)}
    if cfg.media.sound is not None:
        found["audio"] = audio_tower.specs(cfg.media.sound.tower)
    return found


def embed(params: Tree, batch: Mapping[str, Any], cfg: VisionLanguageConfig) -> tuple[Tensor, Added]:
    """The stream `[T, D]` of folded tokens with the rows of media in it, and what is added behind its first layers.

    `batch`: "tokens" `[T]`, and of `ftrain.modules.vision_media.prepare` "replaced" `[T]`, "media" and "audio", whose
    towers are not run where they hold "rows". A token of media without a row of them, or a row for another token, gives
    NaN: no number that looks like one.
    """
    tokens_T, media, audio = batch["tokens"], batch.get("media"), batch.get("audio")
    x_TD = decoder.embed(params["text"], tokens_T)
    added = Added()
    if media is not None:
        rows = [rows_nD.to(x_TD.dtype) for rows_nD in _seen(params, media, cfg)]
        x_TD = merge_rows(x_TD, rows[0], media["index"])
        added = Added(tuple(rows[1:]), media["index"])
    if audio is not None and cfg.media.sound is not None:
        x_TD = merge_rows(x_TD, _heard(params, audio, cfg.media.sound).to(x_TD.dtype), audio["index"])
    replaced_T = batch.get("replaced")
    stands_T = torch.stack([tokens_T == token for token in cfg.media.ids]).any(0)
    wrong_T = stands_T if replaced_T is None else stands_T != replaced_T
    return x_TD.masked_fill(wrong_T[:, None], torch.nan), added


def tower_rows(params: Tree, batch: Mapping[str, Any], cfg: VisionLanguageConfig) -> dict[str, Tensor]:
    """What the towers make of the batch's "media" `[n, R, D]` and "audio" `[n, D]`, of those that it has: what can be
    given as rows (`ftrain.modules.vision_media.prepare`). `params`: "vision", and with sound "audio".
    """
    found, media, audio = dict[str, Tensor](), batch.get("media"), batch.get("audio")
    if media is not None:
        found["media"] = torch.stack(tuple(_seen(params, media, cfg)), 1)
    if audio is not None and cfg.media.sound is not None:
        found["audio"] = _heard(params, audio, cfg.media.sound)
    return found


def _seen(params: Tree, media: Mapping[str, Any], cfg: VisionLanguageConfig) -> Sequence[Tensor]:
    """The rows `[n, D]` of pictures: those among the tokens, then those behind the first layers."""
    if "rows" in media:
        return media["rows"].unbind(1)
    seen = vision_tower.apply(params["vision"], media, cfg.media.tower)
    return seen.rows_nV, *seen.deep


def _heard(params: Tree, audio: Mapping[str, Any], sound: SoundConfig) -> Tensor:
    rows_nD: Tensor = audio["rows"] if "rows" in audio else audio_tower.apply(params["audio"], audio, sound.tower)
    return rows_nD


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
