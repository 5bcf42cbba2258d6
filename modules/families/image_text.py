"""CLIP and SigLIP by what transformers writes: their `config.json` and the names of their tensors.

Sources: Radford et al., arXiv 2103.00020; Zhai et al., arXiv 2303.15343.
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from ftrain.modules.families.family import tensors
from ftrain.modules.hf_fields import Config, number, require_understood, size
from ftrain.modules.hf_names import HfTensor, Names
from ftrain.modules.image_text import ImageTextConfig, TextConfig
from ftrain.modules.mlp import Kind
from ftrain.modules.picture_encoder import PictureConfig


@dataclass(frozen=True)
class ImageTextFamily:
    """A family of pairs of encoders: the model that a `config.json` describes (ValueError names an entry that it cannot
    follow), and its tensors in the order in which transformers 5 saves them.
    """

    config: Callable[[Config], ImageTextConfig]
    names: Callable[[ImageTextConfig], Names]


KINDS: Mapping[str, Kind] = {"gelu": "gelu", "gelu_pytorch_tanh": "gelu_tanh", "quick_gelu": "quick_gelu"}
"""Activations of encoders, by transformers' names."""
_SIZES = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "hidden_act")
_OF_PICTURES = ("image_size", "patch_size", "num_channels")
_ELSEWHERE = ("initializer_factor", "projection_dim", "tie_word_embeddings")
"""What older files say of an encoder too, and nothing of it depends on."""
_CLIP: dict[str, Any] = {"act": "quick_gelu", "eps": 1e-5}
_SIGLIP: dict[str, Any] = {"act": "gelu_pytorch_tanh", "eps": 1e-6}


def part_of(config: Config, name: str, read: tuple[str, ...]) -> Mapping[str, Any]:
    """The entries of an encoder, of which `read` are looked at beside sizes. ValueError for one that says something and
    is not known, dropped attention among them.
    """
    part = config.get(name)
    if not isinstance(part, Mapping):
        raise ValueError(f"config.json: {name}={part!r} must be an object, what the encoder is made of")
    require_understood(part, (*_SIZES, *_ELSEWHERE, "layer_norm_eps", *read))
    return part


def sizes_of(part: Config, *, act: str, eps: float, hidden: int = 3072, width: int = 768) -> dict[str, Any]:
    """The fields that encoders of pictures and of texts share; `act`, `eps`, `hidden`, `width`: where nothing is said.

    ValueError for an activation that the encoders do not compute.
    """
    said = part.get("hidden_act") or act
    if said not in KINDS:
        raise ValueError(f"config.json: hidden_act={said!r} is not one of {', '.join(KINDS)}")
    return {
        "d_model": size(part, "hidden_size", width),
        "layers": size(part, "num_hidden_layers", 12),
        "heads": size(part, "num_attention_heads", 12),
        "d_hidden": size(part, "intermediate_size", hidden),
        "mlp_kind": KINDS[said],
        "eps": number(part, "layer_norm_eps", eps),
    }


def picture_of(part: Config, *, size_of: int = 224, patch: int = 16, **own: Any) -> PictureConfig:
    """The encoder of pictures; `own`: its other fields. ValueError names an entry that it cannot follow."""
    pixels = {
        "size": size(part, "image_size", size_of),
        "patch": size(part, "patch_size", patch),
        "channels": size(part, "num_channels", 3),
    }
    return PictureConfig(**{**pixels, **own})


def _clip(config: Config) -> ImageTextConfig:
    _require_top(config, ("projection_dim", "logit_scale_init_value"))
    vision = part_of(config, "vision_config", _OF_PICTURES)
    text = {"num_attention_heads": 8, **part_of(config, "text_config", ("eos_token_id",))}
    end = text.get("eos_token_id", 49407)
    if not isinstance(end, int):
        raise ValueError(f"config.json: text_config.eos_token_id={end!r}: a text of CLIP is read at one id, give it")
    words = sizes_of(text, width=512, hidden=2048, **_CLIP)
    vocab, places = size(text, "vocab_size", 49408), size(text, "max_position_embeddings", 77)
    return ImageTextConfig(
        picture=picture_of(vision, patch=32, class_row=True, **sizes_of(vision, **_CLIP)),
        # models from before transformers 4.32 say 2, and are read at the highest id
        text=TextConfig(vocab, places=places, causal=True, end=-1 if end == 2 else end, **words),
        d_out=size(config, "projection_dim", 512),
        pairwise=False,
        scale=number(config, "logit_scale_init_value", 2.6592),
    )


def _siglip(config: Config) -> ImageTextConfig:
    _require_top(config, ())
    vision = part_of(config, "vision_config", (*_OF_PICTURES, "vision_use_head"))
    text = part_of(config, "text_config", ("projection_size",))
    if vision.get("vision_use_head") is False:
        raise ValueError("config.json: vision_config.vision_use_head=false: no picture becomes a point without a head")
    words = sizes_of(text, **_SIGLIP)
    vocab, places = size(text, "vocab_size", 32000), size(text, "max_position_embeddings", 64)
    return ImageTextConfig(
        picture=picture_of(vision, pooled=True, **sizes_of(vision, **_SIGLIP)),
        text=TextConfig(vocab, places=places, **words),
        d_out=size(text, "projection_size", words["d_model"]),
        pairwise=True,
    )


def _require_top(config: Config, read: tuple[str, ...]) -> None:
    require_understood(config, ("text_config", "vision_config", "initializer_factor", *read))


_LAYER = (
    ("self_attn.k_proj.weight", "attention.w_k_DGK"), ("self_attn.k_proj.bias", "attention.b_k_GK"),
    ("self_attn.v_proj.weight", "attention.w_v_DGK"), ("self_attn.v_proj.bias", "attention.b_v_GK"),
    ("self_attn.q_proj.weight", "attention.w_q_DHK"), ("self_attn.q_proj.bias", "attention.b_q_HK"),
    ("self_attn.out_proj.weight", "attention.w_o_HKD"), ("self_attn.out_proj.bias", "attention.b_o_D"),
    ("layer_norm1.weight", "norm_attention.weight_D"), ("layer_norm1.bias", "norm_attention.bias_D"),
    ("mlp.fc1.weight", "mlp.w_up_DF"), ("mlp.fc1.bias", "mlp.b_up_F"),
    ("mlp.fc2.weight", "mlp.w_down_FD"), ("mlp.fc2.bias", "mlp.b_down_D"),
    ("layer_norm2.weight", "norm_mlp.weight_D"), ("layer_norm2.bias", "norm_mlp.bias_D"),
)  # fmt: skip
_POOL = (
    ("probe", "probe_11D"), ("attention.in_proj_weight", "w_qkv_D3D"), ("attention.in_proj_bias", "b_qkv_3D"),
    ("attention.out_proj.weight", "w_o_DD"), ("attention.out_proj.bias", "b_o_D"),
    ("layernorm.weight", "norm.weight_D"), ("layernorm.bias", "norm.bias_D"),
    ("mlp.fc1.weight", "mlp.w_up_DF"), ("mlp.fc1.bias", "mlp.b_up_F"),
    ("mlp.fc2.weight", "mlp.w_down_FD"), ("mlp.fc2.bias", "mlp.b_down_D"),
)  # fmt: skip


def stack_tensors(there: str, here: str, layers: int, last: str, *, out: str = "out_proj") -> Iterator[HfTensor]:
    """The tensors of a stack of layers and of the norm `last` behind it; `out`: what the last map of an attention is
    called.
    """
    table = [(name.replace("out_proj", out), leaf) for name, leaf in _LAYER]
    for i in range(layers):
        yield from tensors(f"{there}.encoder.layers.{i}", f"{here}.stack.layers.{i}", table)
    yield from tensors(there, f"{here}.stack.norm_out", [(f"{last}.weight", "weight_D"), (f"{last}.bias", "bias_D")])


def picture_tensors(cfg: PictureConfig, there: str, here: str, *, out: str = "out_proj") -> Iterator[HfTensor]:
    """The tensors of an encoder of pictures, called `there` and something; `here`: its path in our tree."""
    if cfg.class_row:
        yield HfTensor(f"{there}.embeddings.class_embedding", f"{here}.class_D")
    yield HfTensor(f"{there}.embeddings.patch_embedding.weight", f"{here}.patch.w_DCYX")
    if not cfg.class_row:
        yield HfTensor(f"{there}.embeddings.patch_embedding.bias", f"{here}.patch.b_D")
    yield HfTensor(f"{there}.embeddings.position_embedding.weight", f"{here}.places_LD")
    if cfg.class_row:
        norm = (("pre_layrnorm.weight", "norm_in.weight_D"), ("pre_layrnorm.bias", "norm_in.bias_D"))
        yield from tensors(there, here, norm)
    yield from stack_tensors(there, here, cfg.layers, "post_layernorm", out=out)
    if cfg.pooled:
        for found in tensors(f"{there}.head", f"{here}.pool", _POOL):
            packed = found.name.endswith("in_proj_weight")
            yield HfTensor(found.name, found.leaf, transposed=packed or found.transposed)


def names(cfg: ImageTextConfig) -> Names:
    """The tensors of CLIP or SigLIP."""
    found = [HfTensor("logit_scale", "scale")]
    if cfg.pairwise:
        found.append(HfTensor("logit_bias", "bias"))
    found.append(HfTensor("text_model.embeddings.token_embedding.weight", "text.table_VD"))
    found.append(HfTensor("text_model.embeddings.position_embedding.weight", "text.places_LD"))
    found += stack_tensors("text_model", "text", cfg.text.layers, "final_layer_norm")
    if cfg.pairwise:
        found.append(HfTensor("text_model.head.weight", "text_head.w", transposed=True))
        found.append(HfTensor("text_model.head.bias", "text_head.b"))
    found += picture_tensors(cfg.picture, "vision_model", "picture")
    if not cfg.pairwise:
        found.append(HfTensor("visual_projection.weight", "picture_head.w", transposed=True))
        found.append(HfTensor("text_projection.weight", "text_head.w", transposed=True))
    return tuple(found)


CLIP, SIGLIP = ImageTextFamily(_clip, names), ImageTextFamily(_siglip, names)
