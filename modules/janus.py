"""Janus (Wu et al., arXiv 2410.13848): a decoder that reads pictures by an encoder and writes them as codes.

Pictures that are seen become rows by an encoder and an aligner. Those that are drawn are codes of a tokenizer, embedded
by an aligner of their own and predicted by a head of their own. Both stand where the decoder's token of pictures is.
The tokenizer is trained by itself (modules/vq_image.py): only its codes enter, so no gradient reaches it.

Legend: T tokens, D width of the decoder, C distinct codes, N codes of a picture, n rows of all pictures of a kind, B
pictures or prompts, Z width of a code.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ftrain.kernels.documents import Segments
from ftrain.kernels.embedding import embedding, merge_rows
from ftrain.kernels.linear_cross_entropy import linear_cross_entropy
from ftrain.kernels.mean import Mean
from ftrain.kernels.pack import pack_tokens, take_rows
from ftrain.modules import decoder, linear, picture_encoder, vq_image
from ftrain.modules.decoder_config import DecoderConfig
from ftrain.modules.picture_encoder import PictureConfig
from ftrain.modules.spec import Normal, ParamSpec, Tree
from ftrain.modules.vq_image import VqConfig


@dataclass(frozen=True)
class JanusConfig:
    """A decoder `text`, the encoder `picture` of what it sees, the tokenizer `codec` of what it draws.

    `image`: the token that stands for a row of a picture. `aligner`, `code_aligner`: linear layers of each aligner.
    `d_head`: hidden width of the head of codes.
    """

    text: DecoderConfig
    picture: PictureConfig
    codec: VqConfig
    image: int
    aligner: int = 2
    code_aligner: int = 2
    d_head: int = 2048

    @property
    def seen_tokens(self) -> int:
        """Tokens of a picture that is seen."""
        return self.picture.side**2

    @property
    def drawn_tokens(self) -> int:
        """Tokens of a picture that is drawn."""
        return self.codec.codes_per_image


def specs(cfg: JanusConfig) -> dict[str, Tree]:
    """`text`, `vision`, `aligner`, `codec`, `codes_CZ`, `code_aligner`, and `head` (`up`, `out`)."""
    d, codec = cfg.text.d_model, cfg.codec
    codes = ParamSpec((codec.vocabulary, codec.d_code), ("codebook", "code_dim"), Normal(cfg.text.init_std))
    return {
        "text": decoder.specs(cfg.text),
        "vision": picture_encoder.specs(cfg.picture),
        "aligner": _aligner_specs(cfg.picture.d_model, d, cfg.aligner),
        "codec": vq_image.specs(codec),
        "codes_CZ": codes,
        "code_aligner": _aligner_specs(codec.d_code, d, cfg.code_aligner),
        "head": {
            "up": linear.specs(d, cfg.d_head, ("embed", "mlp"), bias=True),
            "out": linear.specs(cfg.d_head, codec.vocabulary, ("mlp", "codebook"), bias=True),
        },
    }


def _aligner_specs(d_in: int, d_out: int, layers: int) -> list[Tree]:
    return [linear.specs(d_in if i == 0 else d_out, d_out, ("mlp", "embed"), bias=True) for i in range(layers)]


def _aligned(params: Any, x_nI: Tensor) -> Tensor:
    for i, layer in enumerate(params):
        x_nI = linear.apply(layer, F.gelu(x_nI) if i else x_nI)
    return x_nI


def embed_codes(params: Any, codes_n: Tensor) -> Tensor:
    """Codes, int64 `[n]`, as rows of the stream, `[n, D]`."""
    return _aligned(params["code_aligner"], embedding(codes_n, params["codes_CZ"]))


def code_logits(params: Any, hidden_nD: Tensor) -> Tensor:
    """Scores of every code given the hidden state before it, `[n, C]`."""
    head = params["head"]
    return linear.apply(head["out"], F.gelu(linear.apply(head["up"], hidden_nD)))


def code_loss(params: Any, hidden_nD: Tensor, codes_n: Tensor) -> Mean:
    """Cross entropy in nats of each code given the hidden state before it; codes of -100 count nothing."""
    out, up_nF = params["head"]["out"], F.gelu(linear.apply(params["head"]["up"], hidden_nD))
    # the bias is a row of the weight that a constant reads: the loss holds no scores of all rows
    x_nF = torch.cat([up_nF, up_nF.new_ones(len(up_nF), 1)], 1)
    total = linear_cross_entropy(x_nF, torch.cat([out["w"], out["b"][None]]), codes_n, ignore_index=decoder.IGNORE)
    return Mean(total, (codes_n != decoder.IGNORE).to(total.dtype).sum())


def embed(params: Any, batch: Mapping[str, Any], cfg: JanusConfig) -> tuple[Tensor, Tensor | None]:
    """The stream `[T, D]` with the rows of pictures in it, and the codes `[n]` of those that are drawn, if there are.

    `batch`: "tokens" `[T]`, and of `ftrain.modules.janus_media.prepare` "replaced" `[T]` and "media". A token of a
    picture without a picture's row, or a row for another token, gives NaN: no number that looks like one.
    """
    tokens_T, media = batch["tokens"], batch.get("media", {})
    seen, drawn = media.get("seen"), media.get("drawn")
    x_TD = decoder.embed(params["text"], tokens_T)
    rows, places, codes_n = list[Tensor](), list[Tensor](), None
    if seen is not None:
        rows_BnD = picture_encoder.apply(params["vision"], seen["pixels"], cfg.picture)
        rows.append(_aligned(params["aligner"], rows_BnD.flatten(0, 1)))
        places.append(seen["index"])
    if drawn is not None:
        codes_n = _codes(params, drawn, cfg).flatten()
        rows.append(embed_codes(params, codes_n))
        places.append(drawn["index"])
    if rows:
        x_TD = merge_rows(x_TD, torch.cat([own.to(x_TD.dtype) for own in rows]), torch.cat(places))
    stands_T, replaced_T = tokens_T == cfg.image, batch.get("replaced")
    wrong_T = stands_T if replaced_T is None else stands_T != replaced_T
    return x_TD.masked_fill(wrong_T[:, None], torch.nan), codes_n


def _codes(params: Any, drawn: Mapping[str, Tensor], cfg: JanusConfig) -> Tensor:
    """The codes of drawn pictures, `[B, N]`, as they are given or of their pixels."""
    return drawn["codes"] if "codes" in drawn else vq_image.encode(params["codec"], drawn["pixels"], cfg=cfg.codec)


def hidden(params: Any, x_TD: Tensor, positions_T: Tensor, segments: Segments | None, cfg: JanusConfig) -> Tensor:
    """The decoder's hidden states over the stream, `[T, D]`."""
    return decoder.apply(params["text"], x_TD, positions=positions_T, segments=segments, cfg=cfg.text)[0]


def drawn_loss(params: Any, hidden_TD: Tensor, codes_n: Tensor, index_n: Tensor) -> Mean:
    """The loss of the codes that stand at `index_n`, each given the hidden state of the token before it."""
    nowhere = pack_tokens(len(hidden_TD))  # where padding stands: it reads zeros, and has no label
    labels_n = torch.where(index_n < nowhere, codes_n, decoder.IGNORE)
    return code_loss(params, take_rows(hidden_TD, torch.where(index_n < nowhere, index_n - 1, nowhere)), labels_n)
