"""Pictures and texts in one space (CLIP, Radford et al. 2021; SigLIP, Zhai et al. 2023): two encoders and their losses.

A picture lies near the text that stands beside it in the batch, and far from all other texts, those of other ranks
included.

Legend: B pairs, L tokens of a text, D width of the text encoder, E width of the common space, M pairs of all ranks.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ftrain.kernels.documents import Documents
from ftrain.kernels.embedding import embedding
from ftrain.kernels.mean import Mean
from ftrain.kernels.whole_batch import whole_rows
from ftrain.modules import encoder_stack, linear, picture_encoder
from ftrain.modules.encoder_stack import StackConfig
from ftrain.modules.mlp import Kind
from ftrain.modules.picture_encoder import PictureConfig
from ftrain.modules.spec import Constant, Normal, ParamSpec, Tree


@dataclass(frozen=True)
class TextConfig:
    """A text encoder over `vocab` tokens, for texts of up to `places` tokens; else as `StackConfig`.

    `end`: a text is what the encoder knows at the first token of this id, or -1: at the token of the highest id; None:
    at the last token.
    """

    vocab: int
    d_model: int
    layers: int
    heads: int
    d_hidden: int
    places: int
    mlp_kind: Kind = "gelu_tanh"
    eps: float = 1e-6
    causal: bool = False
    end: int | None = None

    @property
    def stack(self) -> StackConfig:
        """The transformer."""
        return StackConfig(
            self.d_model, self.layers, self.heads, self.d_hidden,
            rope_base=None, mlp_kind=self.mlp_kind, eps=self.eps, causal=self.causal,
        )  # fmt: skip


@dataclass(frozen=True)
class ImageTextConfig:
    """The encoders, and the width `d_out` of what they have in common.

    `pairwise` (SigLIP): each picture with each text is a yes or no; else (CLIP) a picture chooses among all texts, and
    a text among all pictures. `scale`: what the logarithm of the factor of cosines starts at.

    ValueError where the picture's row is not `d_out` wide and, being pairwise, is not projected.
    """

    picture: PictureConfig
    text: TextConfig
    d_out: int
    pairwise: bool
    scale: float = 2.6592

    def __post_init__(self) -> None:
        if self.pairwise and self.picture.d_model != self.d_out:
            raise ValueError(
                f"ImageTextConfig: texts become {self.d_out} numbers and pictures {self.picture.d_model}: give both "
                "encoders one width"
            )


def specs(cfg: ImageTextConfig) -> dict[str, Tree]:
    """`picture` (`picture_encoder.specs`), `text` (`table_VD`, `places_LD`, `stack`), `text_head`, `scale`, and
    `picture_head` or, pairwise, `bias`.
    """
    text, axes = cfg.text, ("embed", "mlp")
    tree: dict[str, Tree] = {
        "picture": picture_encoder.specs(cfg.picture),
        "text": {
            "table_VD": ParamSpec((text.vocab, text.d_model), ("vocab", "embed"), Normal(0.02)),
            "places_LD": ParamSpec((text.places, text.d_model), ("position", "embed"), Normal(0.01)),
            "stack": encoder_stack.specs(text.stack),
        },
        "text_head": linear.specs(text.d_model, cfg.d_out, axes, bias=cfg.pairwise),
    }
    if cfg.pairwise:
        one = {name: ParamSpec((1,), (None,), Constant(at)) for name, at in (("scale", 2.3026), ("bias", -10.0))}
        return {**tree, **one}
    head = linear.specs(cfg.picture.d_model, cfg.d_out, axes)
    return {**tree, "picture_head": head, "scale": ParamSpec((), (), Constant(cfg.scale))}


def picture_points(params: Any, pictures_BCHW: Tensor, cfg: ImageTextConfig) -> Tensor:
    """Where pictures lie in the common space, `[B, E]`, of length one. ValueError as `picture_encoder.apply`."""
    rows_BnD = picture_encoder.apply(params["picture"], pictures_BCHW, cfg.picture)
    point_BE = picture_encoder.pool(params["picture"], rows_BnD, cfg.picture)
    return F.normalize(point_BE if cfg.pairwise else linear.apply(params["picture_head"], point_BE), dim=-1)


def text_points(params: Any, tokens_BL: Tensor, cfg: ImageTextConfig) -> Tensor:
    """Where texts, int64 `[B, L]`, lie in the common space, `[B, E]`, of length one.

    All L tokens are read, fillers too, as both families learned them. ValueError for texts that are no `[B, L]` or too
    long.
    """
    text, own = cfg.text, params["text"]
    if tokens_BL.dim() != 2 or not 0 < tokens_BL.shape[1] <= text.places:
        raise ValueError(f"texts {list(tokens_BL.shape)}: give tokens [B, L] with 1 to {text.places} tokens of each")
    texts, length = tokens_BL.shape
    x_BLD = embedding(tokens_BL.flatten(), own["table_VD"]).unflatten(0, (texts, length)) + own["places_LD"][:length]
    each = Documents.equal(texts, length, tokens_BL.device)
    x_TD = encoder_stack.apply(
        own["stack"], x_BLD.flatten(0, 1), positions=each.ids_T, segments_T=each, cfg=text.stack, whole=True
    )
    last_B = _ends(tokens_BL, text.end) + torch.arange(texts, device=tokens_BL.device) * length
    return F.normalize(linear.apply(params["text_head"], x_TD.index_select(0, last_B)), dim=-1)


def _ends(tokens_BL: Tensor, end: int | None) -> Tensor:
    """The token at which a text is read, `[B]`."""
    if end is None:
        return tokens_BL.new_full((len(tokens_BL),), tokens_BL.shape[1] - 1)
    return (tokens_BL if end == -1 else (tokens_BL == end).long()).argmax(1)


def scores(params: Any, text_BE: Tensor, picture_ME: Tensor) -> Tensor:
    """How near each text is to each picture, `[B, M]`, before a softmax or a sigmoid."""
    cosine_BM = text_BE @ picture_ME.T * params["scale"].exp()
    return cosine_BM + params["bias"] if "bias" in params else cosine_BM


def loss(params: Any, tokens_BL: Tensor, pictures_BCHW: Tensor, cfg: ImageTextConfig) -> tuple[Mean, dict[str, Mean]]:
    """The mean over pairs of the whole batch, in nats, and `accuracy`: for how many texts their picture is the nearest.

    ValueError where there are not as many texts as pictures, and as the encoders.
    """
    if len(tokens_BL) != len(pictures_BCHW):
        raise ValueError(f"{len(tokens_BL)} texts and {len(pictures_BCHW)} pictures: a text belongs to each picture")
    text_ME = whole_rows(text_points(params, tokens_BL, cfg))
    picture_ME = whole_rows(picture_points(params, pictures_BCHW, cfg))
    scores_MM = scores(params, text_ME, picture_ME)
    scores_MM = scores_MM.to(torch.promote_types(scores_MM.dtype, torch.float32))
    each_M = pairwise_loss(scores_MM) if cfg.pairwise else choice_loss(scores_MM)
    right_M = scores_MM.argmax(1) == torch.arange(len(scores_MM), device=scores_MM.device)
    return Mean.of(each_M), {"accuracy": Mean.of(right_M.to(each_M.dtype))}


def choice_loss(scores_MM: Tensor) -> Tensor:
    """CLIP's: the cross entropy of a text's picture among all pictures and of a picture's text among all texts, half of
    each, `[M]`; pairs are on the diagonal.

    >>> round(choice_loss(torch.zeros(4, 4))[0].exp().item(), 4)
    4.0
    """
    own = scores_MM.diagonal()
    return (scores_MM.logsumexp(0) + scores_MM.logsumexp(1)) / 2 - own


def pairwise_loss(scores_MM: Tensor) -> Tensor:
    """SigLIP's: the logistic losses of a text with all pictures, summed, `[M]`; only those on the diagonal belong
    together.

    >>> round(pairwise_loss(torch.zeros(4, 4))[0].exp().item(), 4)
    16.0
    """
    away_MM = F.softplus(scores_MM).sum(1)
    return away_MM - scores_MM.diagonal()  # softplus(-s) = softplus(s) - s


def points(params: Any, batch: Mapping[str, Tensor], cfg: ImageTextConfig) -> Tensor:
    """Where the texts and then the pictures of a batch lie, `[2 B, E]`."""
    found = [text_points(params, batch["tokens"], cfg), picture_points(params, batch["pixels"], cfg)]
    return torch.cat(found)
