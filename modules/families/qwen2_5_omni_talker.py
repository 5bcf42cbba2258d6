"""Qwen2.5-Omni's talker: codes of speech beside the thinker's rows, one track over the other.

Each token is the sum of a row of the thinker (a word's embedding, a state, or both) and of the embedding of a code, as
wide as the thinker, projected to a stack of Qwen2's math with places on three axes. Source: Qwen team, Qwen2.5-Omni
(arXiv 2503.20215).

Legend: S tokens of the talker, W width of the thinker, D width of the talker, V codes.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from ftrain.kernels.embedding import embedding
from ftrain.kernels.mean import Mean
from ftrain.modules import decoder, linear
from ftrain.modules.decoder_config import DecoderConfig
from ftrain.modules.families.vision_language import decoder_of
from ftrain.modules.hf_fields import Config, size
from ftrain.modules.hf_names import HfTensor, Names, decoder_names, natural_order, under
from ftrain.modules.spec import Normal, ParamSpec, Tree
from ftrain.modules.speech_lines import ChatIds, CodeIds, qwen2_5_line
from ftrain.modules.speech_packs import SpeechConfig
from ftrain.modules.talker import Talker

ROPE_BASE = 1e6
"""What transformers takes where the file says nothing."""
_IDS = ("tts_codec_start_token_id", "tts_codec_end_token_id", "tts_codec_pad_token_id")
_OWN = (
    *_IDS, "embedding_size", "init_std", "tts_codec_mask_token_id", "tts_text_end_token_id", "tts_text_pad_token_id",
    "tts_text_start_token_id",
    # of the thinker, whose places the talker takes over
    "audio_end_token_id", "audio_start_token_id", "audio_token_id", "audio_token_index", "image_token_id",
    "image_token_index", "position_id_per_seconds", "seconds_per_chunk", "spatial_merge_size", "video_token_id",
    "video_token_index", "vision_end_token_id", "vision_start_token_id",
)  # fmt: skip
_CALLED = {"lm_head.weight": "codec_head.weight"}


@dataclass(frozen=True)
class TalkerConfig:
    """A `stack` over codes, from rows of the thinker `d_thinker` wide. `ids`: codes that are no sound; `untrained`: a
    code whose embedding gets no gradient.

    ValueError where an id is none of the codes.
    """

    stack: DecoderConfig
    d_thinker: int
    ids: CodeIds
    untrained: int | None = None

    def __post_init__(self) -> None:
        named = [self.ids.begin, self.ids.end, self.ids.pad]
        if not 0 <= min(named) <= max(named) < self.stack.vocab:
            raise ValueError(f"{self.ids} names a code outside of the talker's {self.stack.vocab}")


def specs(cfg: TalkerConfig) -> Tree:
    """`stack` (`decoder.specs` but for the table), `table_VW`, and the projection `into`."""
    found = decoder.specs(cfg.stack)
    return {
        "stack": {name: part for name, part in found.items() if name != "embedding"},
        "table_VW": ParamSpec((cfg.stack.vocab, cfg.d_thinker), ("vocab", "embed"), Normal(cfg.stack.init_std)),
        "into": linear.specs(cfg.d_thinker, cfg.stack.d_model, ("embed", "mlp"), bias=True),
    }


def embed(params: Tree, batch: Mapping[str, Any], cfg: TalkerConfig) -> Tensor:
    """The stream `[S, D]`. `batch`: "rows" `[S, W]`, of the thinker; "codes", int64 `[S]`, below 0 for none."""
    return row(params, batch["rows"], batch["codes"], cfg)


def row(params: Tree, rows_SW: Tensor, codes_S: Tensor, cfg: TalkerConfig) -> Tensor:
    """Rows of the thinker and codes, below 0 for none, as rows of the stream, `[S, D]`."""
    coded_SW = embedding(codes_S.clamp(min=0), params["table_VW"]).masked_fill(codes_S[:, None] < 0, 0)
    if cfg.untrained is not None:
        coded_SW = torch.where(codes_S[:, None] == cfg.untrained, coded_SW.detach(), coded_SW)
    return linear.apply(params["into"], rows_SW.to(coded_SW.dtype) + coded_SW)


def losses(params: Tree, hidden_SD: Tensor, batch: Mapping[str, Any], cfg: TalkerConfig) -> dict[str, Mean]:
    """The cross entropy of codes, in nats ("codes"). `batch`: with "labels" `[S]`, the code behind each token, or
    -100.
    """
    return {"codes": decoder.loss(params["stack"], hidden_SD, batch["labels"], cfg.stack)}


def talker(cfg: TalkerConfig, chat: ChatIds, *, layer: int, words: int) -> Talker:
    """The talker's functions. `chat`: ids of the thinker's vocabulary; `layer`: how many layers the thinker has;
    `words`: its vocabulary, of which voices are.
    """
    sounds = min(cfg.ids.begin, cfg.ids.end, cfg.ids.pad)
    return Talker(
        specs(cfg),
        cfg.stack,
        layer=layer,
        speech=SpeechConfig(qwen2_5_line, chat, cfg.ids, groups=1, sounds=sounds, voices=words),
        ends=(cfg.ids.pad, cfg.ids.end),
        terms=("codes",),
        embed=lambda params, batch: embed(params, batch, cfg),
        losses=lambda params, hidden_SD, batch: losses(params, hidden_SD, batch, cfg),
        frame=lambda params, state_BD, first_B, key, how: first_B[:, None],
        go_on=lambda params, codes_BG, rows_BW: row(params, rows_BW, codes_BG[:, 0], cfg),
    )


def config(config: Config) -> TalkerConfig:
    """The talker that a `config.json` (or its `talker_config`) describes. ValueError names an entry that it cannot
    follow.
    """
    text = {name: value for name, value in config.items() if name not in _OWN}
    stack = decoder_of(text, like="qwen2", missing={"num_key_value_heads": 4, "head_dim": 128}, rope_base=ROPE_BASE)
    begin, end, pad = (size(config, name, usual) for name, usual in zip(_IDS, (8293, 8294, 8292), strict=True))
    untrained = config.get("pad_token_id")
    return TalkerConfig(
        replace(stack, tie_embeddings=False),
        d_thinker=size(config, "embedding_size", 3584),
        ids=CodeIds(begin, end, pad),
        untrained=untrained if isinstance(untrained, int) and 0 <= untrained < stack.vocab else None,
    )


def names(cfg: TalkerConfig, *, prefix: str = "") -> Names:
    """The talker's tensors, called `prefix` and something."""
    found = [
        HfTensor("model.embed_tokens.weight", "table_VW"),
        HfTensor("thinker_to_talker_proj.weight", "into.w", transposed=True),
        HfTensor("thinker_to_talker_proj.bias", "into.b"),
    ]
    for name in under(decoder_names(cfg.stack), "stack"):
        if name.leaf != "stack.embedding.table_VD":
            found.append(replace(name, name=_CALLED.get(name.name, name.name)))
    return tuple(sorted((replace(n, name=prefix + n.name) for n in found), key=natural_order))
