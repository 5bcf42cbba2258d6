"""The encoder of UMT5, whose states Wan's video transformers read (Chung et al. 2023, arXiv 2304.09151).

Each layer adds numbers of its own to scores, by how far two tokens are apart; scores are not scaled. Texts share a
pack.

Legend: T tokens of the pack, D width, H heads, K head dim, F hidden width, B buckets of distances.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as nnf
from torch import Tensor

from ftrain.kernels.documents import Segments, document_index, ids_of
from ftrain.kernels.dtypes import accumulate_dtype
from ftrain.modules import embedding, norm
from ftrain.modules.hf_fields import Config, number, require_understood, size
from ftrain.modules.hf_names import HfTensor, Names
from ftrain.modules.linear import affine
from ftrain.modules.spec import Normal, ParamSpec, Tree


@dataclass(frozen=True)
class Umt5Config:
    """`layers` layers `d_model` wide; `heads` heads of `head_dim`, a gated MLP of `d_hidden`.

    `buckets`: of distances, half of them for tokens before, half of these for single distances; `farthest`: from this
    distance on all are in the last bucket. ValueError for buckets that do not divide so.
    """

    vocab: int
    d_model: int
    layers: int
    heads: int
    head_dim: int
    d_hidden: int
    buckets: int = 32
    farthest: int = 128
    norm_eps: float = 1e-6

    def __post_init__(self) -> None:
        if self.buckets % 4 or self.farthest <= self.buckets // 4:
            raise ValueError(
                f"Umt5Config: buckets={self.buckets} must be a multiple of 4, and farthest={self.farthest} more than a "
                "quarter of it"
            )


_READ = (
    "classifier_dropout", "d_ff", "d_kv", "d_model", "dense_act_fn", "dropout_rate", "feed_forward_proj",
    "initializer_factor", "is_gated_act", "layer_norm_epsilon", "num_decoder_layers", "num_heads", "num_layers",
    "output_past", "relative_attention_max_distance", "relative_attention_num_buckets", "scalable_attention",
    "scale_decoder_outputs", "tie_word_embeddings",
)  # fmt: skip


def config(config: Config) -> Umt5Config:
    """The encoder that a `config.json` of transformers (`UMT5EncoderModel`) describes. ValueError names an entry that
    it cannot follow.

    >>> sizes = {"d_model": 8, "d_kv": 4, "d_ff": 16, "num_layers": 1, "num_heads": 2, "vocab_size": 11}
    >>> config({"model_type": "umt5", **sizes}).buckets
    32
    """
    require_understood(config, _READ)
    kind = config.get("feed_forward_proj", "gated-gelu")
    if kind != "gated-gelu":
        raise ValueError(f"config.json: feed_forward_proj={kind!r}; UMT5's MLP is 'gated-gelu'")
    return Umt5Config(
        size(config, "vocab_size", 250_112),
        size(config, "d_model", 512),
        size(config, "num_layers", 8),
        size(config, "num_heads", 6),
        size(config, "d_kv", 64),
        size(config, "d_ff", 1024),
        size(config, "relative_attention_num_buckets", 32),
        size(config, "relative_attention_max_distance", 128),
        number(config, "layer_norm_epsilon", 1e-6),
    )


PUBLISHED_XXL: Config = {
    "model_type": "umt5", "d_model": 4096, "d_kv": 64, "d_ff": 10_240, "num_layers": 24, "num_heads": 64,
    "vocab_size": 256_384,
}  # fmt: skip
"""What the text encoder of Wan says of its sizes."""


def specs(cfg: Umt5Config) -> dict[str, Any]:
    """`embedding`, `layers`, `norm`.

    >>> from ftrain.modules import spec
    >>> spec.count(specs(config(PUBLISHED_XXL)))
    5680910336
    """
    return {
        "embedding": embedding.specs(cfg.vocab, cfg.d_model, init=Normal(1.0)),
        "layers": [_layer_specs(cfg) for _ in range(cfg.layers)],
        "norm": norm.specs(cfg.d_model),
    }


def _layer_specs(cfg: Umt5Config) -> dict[str, Any]:
    d, inner, hidden = cfg.d_model, cfg.heads * cfg.head_dim, cfg.d_hidden
    narrow, wide = Normal(d**-0.5), Normal(hidden**-0.5)
    return {
        "attention_norm": norm.specs(d),
        "attention": {
            "w_q_DHK": ParamSpec((d, inner), ("embed", "heads"), Normal((d * cfg.head_dim) ** -0.5)),
            "w_k_DHK": ParamSpec((d, inner), ("embed", "heads"), narrow),
            "w_v_DHK": ParamSpec((d, inner), ("embed", "heads"), narrow),
            "w_o_HKD": ParamSpec((inner, d), ("heads", "embed"), Normal(inner**-0.5)),
            "distance_BH": ParamSpec((cfg.buckets, cfg.heads), (None, "heads"), narrow),
        },
        "mlp_norm": norm.specs(d),
        "mlp": {
            "w_gate_DF": ParamSpec((d, hidden), ("embed", "mlp"), narrow),
            "w_up_DF": ParamSpec((d, hidden), ("embed", "mlp"), narrow),
            "w_down_FD": ParamSpec((hidden, d), ("mlp", "embed"), wide),
        },
    }


def apply(params: Tree, tokens_T: Tensor, *, cfg: Umt5Config, segments_T: Segments | None = None) -> Tensor:
    """States of the tokens of a pack, `[T, D]` in the dtype of the weights.

    - `tokens_T`: int64 ids. `segments_T`: the text of each token, ids or `Documents`; None: all are of one. Tokens see
      all of their own text.

    Memory grows with heads x T x T: packs of about 1,024 tokens.

    >>> from ftrain.kernels import random
    >>> from ftrain.modules import spec
    >>> cfg = Umt5Config(vocab=11, d_model=8, layers=1, heads=2, head_dim=4, d_hidden=16)
    >>> list(apply(spec.init(specs(cfg), random.key(0)), torch.tensor([3, 1]), cfg=cfg).shape)
    [2, 8]
    """
    ids_T = torch.zeros_like(tokens_T) if segments_T is None else document_index(ids_of(segments_T))
    place_T = torch.arange(len(tokens_T), device=tokens_T.device)
    bucket_TT = buckets(place_T[None, :] - place_T[:, None], cfg)  # of a text: what is before it makes no difference
    apart_TT = ids_T[:, None] != ids_T[None, :]
    x_TD = embedding.apply(params["embedding"], tokens_T)
    for layer in params["layers"]:
        inner_TD = norm.apply(layer["attention_norm"], x_TD, eps=cfg.norm_eps)
        x_TD = x_TD + _attend(layer["attention"], inner_TD, bucket_TT, apart_TT, cfg)
        x_TD = x_TD + _mlp(layer["mlp"], norm.apply(layer["mlp_norm"], x_TD, eps=cfg.norm_eps))
    return norm.apply(params["norm"], x_TD, eps=cfg.norm_eps)


def buckets(ahead_TT: Tensor, cfg: Umt5Config) -> Tensor:
    """The bucket of each distance, int64 of any shape: how far a key stands behind its query; below 0, before it.

    >>> cfg = Umt5Config(vocab=11, d_model=8, layers=1, heads=2, head_dim=4, d_hidden=16)
    >>> buckets(torch.tensor([0, -1, 1, 9, 500]), cfg).tolist()
    [0, 1, 17, 24, 31]
    """
    half, exact = cfg.buckets // 2, cfg.buckets // 4
    far_TT = ahead_TT.abs()
    # as transformers rounds it: float32, and the distances of the exact buckets replaced before the logarithm of 0
    ratio_TT = torch.log(far_TT.clamp(min=exact).float() / exact) / math.log(cfg.farthest / exact)
    large_TT = (exact + (ratio_TT * (half - exact)).to(torch.int64)).clamp(max=half - 1)
    return torch.where(far_TT < exact, far_TT, large_TT) + half * (ahead_TT > 0)


def _attend(params: Tree, x_TD: Tensor, bucket_TT: Tensor, apart_TT: Tensor, cfg: Umt5Config) -> Tensor:
    q_THK, k_THK, v_THK = (affine(x_TD, params[f"w_{n}_DHK"]).unflatten(-1, (cfg.heads, -1)) for n in "qkv")
    wide = accumulate_dtype(x_TD.dtype)
    added_HTT = params["distance_BH"].to(wide)[bucket_TT].permute(2, 0, 1)
    scores_HTT = torch.einsum("thk,shk->hts", q_THK, k_THK).to(wide) + added_HTT
    weights_HTT = scores_HTT.masked_fill(apart_TT, torch.finfo(wide).min).softmax(-1)
    read_THK = torch.einsum("hts,shk->thk", weights_HTT.to(v_THK.dtype), v_THK)
    return affine(read_THK.flatten(1), params["w_o_HKD"])


def _mlp(params: Tree, x_TD: Tensor) -> Tensor:
    gate_TF = nnf.gelu(affine(x_TD, params["w_gate_DF"]), approximate="tanh")
    return affine(gate_TF * affine(x_TD, params["w_up_DF"]), params["w_down_FD"])


_ATTENTION = (("q", "w_q_DHK"), ("k", "w_k_DHK"), ("v", "w_v_DHK"), ("o", "w_o_HKD"))
_MLP = (("wi_0", "w_gate_DF"), ("wi_1", "w_up_DF"), ("wo", "w_down_FD"))


def names(cfg: Umt5Config, *, twice: bool = False) -> Names:
    """The tensors of `UMT5EncoderModel`, in the order of its state. `twice`: files have the table by both its names.

    >>> cfg = Umt5Config(vocab=11, d_model=8, layers=1, heads=2, head_dim=4, d_hidden=16)
    >>> [name.name for name in names(cfg)][:2]
    ['shared.weight', 'encoder.embed_tokens.weight']
    """
    return tuple(_names(cfg, twice))


def _names(cfg: Umt5Config, twice: bool) -> Iterator[HfTensor]:
    yield HfTensor("shared.weight", "embedding.table_VD")
    yield HfTensor("encoder.embed_tokens.weight", "embedding.table_VD", copy=True, written=twice)
    for i in range(cfg.layers):
        there, here = f"encoder.block.{i}.layer", f"layers.{i}"
        for name, leaf in _ATTENTION:
            yield HfTensor(f"{there}.0.SelfAttention.{name}.weight", f"{here}.attention.{leaf}", transposed=True)
        bias = f"{there}.0.SelfAttention.relative_attention_bias.weight"
        yield HfTensor(bias, f"{here}.attention.distance_BH")
        yield HfTensor(f"{there}.0.layer_norm.weight", f"{here}.attention_norm.weight_D")
        for name, leaf in _MLP:
            yield HfTensor(f"{there}.1.DenseReluDense.{name}.weight", f"{here}.mlp.{leaf}", transposed=True)
        yield HfTensor(f"{there}.1.layer_norm.weight", f"{here}.mlp_norm.weight_D")
    yield HfTensor("encoder.final_layer_norm.weight", "norm.weight_D")
