"""What a Wan video transformer is (Wan team 2025, arXiv 2503.20314): sizes, patches, conditions, its range of noise.

Read from the `config.json` of diffusers (`WanTransformer3DModel`) or of the authors (`WanModel`).
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

from ftrain.modules.hf_fields import Config, number, require_understood, size

Patch = tuple[int, int, int]
Range = tuple[float, float]


@dataclass(frozen=True)
class WanConfig:
    """`layers` layers `d_model` wide; `heads` heads, an MLP of `d_hidden`.

    - `channels_in`, `channels_out`: of the latents with their conditions, and of the velocity. `patch`: latent frames,
      rows and columns of which one token is made.
    - `d_text`, `text_rows`: width and number of the text rows that each clip reads. Shorter texts are filled up with
      zeros, which are read like all others: no mask.
    - `d_image`: width of the rows of an image encoder, which an image-to-video model of Wan 2.1 reads beside the text;
      0 for none. `image_places`: rows of a learned table that is added to them; 0 for none.
    - `text_norm`: the stream is normed before it reads the text.
    - `most_places`: positions along an axis are less than this.
    - `times`: the range of times that this model is for, first included, last not (but 1 is): all, or that of one of
      the two experts of Wan 2.2.

    Raises:
        ValueError: heads that do not divide the width or are narrower than 6 dims, sizes below 1, a range that is none.
    """

    channels_in: int
    channels_out: int
    d_model: int
    layers: int
    heads: int
    d_hidden: int
    d_text: int = 4096
    text_rows: int = 512
    d_image: int = 0
    image_places: int = 0
    time_features: int = 256
    patch: Patch = (1, 2, 2)
    norm_eps: float = 1e-6
    text_norm: bool = True
    most_places: int = 1024
    times: Range = (0.0, 1.0)

    def __post_init__(self) -> None:
        if self.d_model % self.heads or self.head_dim % 2 or self.head_dim < 6:
            raise ValueError(
                f"WanConfig: d_model={self.d_model} must give heads={self.heads} an even width of at least 6 each"
            )
        if self.time_features % 2:
            raise ValueError(f"WanConfig: time_features={self.time_features} must be even: cosines and sines")
        if len(self.patch) != 3 or min(self.patch) < 1:
            raise ValueError(f"WanConfig: patch={self.patch} must be three sizes of at least 1")
        if not 0 <= self.times[0] < self.times[1] <= 1:
            raise ValueError(f"WanConfig: times={self.times} must be a range within 0 and 1")

    @property
    def head_dim(self) -> int:
        """K."""
        return self.d_model // self.heads

    @property
    def row_in(self) -> int:
        """Numbers of a row of the input: a patch of all channels."""
        return self.channels_in * math.prod(self.patch)

    @property
    def row_out(self) -> int:
        """Numbers of a row of the velocity."""
        return self.channels_out * math.prod(self.patch)

    @property
    def rope_sections(self) -> tuple[int, int, int]:
        """Rotated pairs of a head that turn with the frame, the row and the column: 22, 21, 21 of 64."""
        third = self.head_dim // 6
        return (self.head_dim // 2 - 2 * third, third, third)


_READ = (
    "added_kv_proj_dim", "attention_head_dim", "cross_attn_norm", "eps", "ffn_dim", "freq_dim", "image_dim",
    "in_channels", "num_attention_heads", "num_layers", "out_channels", "patch_size", "pos_embed_seq_len", "qk_norm",
    "rope_max_seq_len", "text_dim",
)  # fmt: skip
_READ_OF_AUTHORS = (
    "cross_attn_norm", "dim", "eps", "ffn_dim", "freq_dim", "in_dim", "num_heads", "num_layers", "out_dim",
    "patch_size", "qk_norm", "text_dim", "text_len", "window_size",
)  # fmt: skip
DIFFUSERS, AUTHORS = "WanTransformer3DModel", "WanModel"
"""What `_class_name` says in the two kinds of `config.json`."""


def config(config: Config, *, image: bool | None = None, times: Range = (0.0, 1.0)) -> WanConfig:
    """The model that a `config.json` of diffusers or of the authors describes.

    `image`: whether weights of an image branch are there, which the authors' file does not tell; None if unknown.
    `times`: the range that the model is for. ValueError names an entry that it cannot follow.

    >>> from ftrain.modules.families.wan_config import PUBLISHED, config
    >>> config(PUBLISHED["2.1-t2v-1.3b"]).d_model
    1536
    """
    name = config.get("_class_name")
    if name == DIFFUSERS:
        return _of_diffusers(config, times)
    if name == AUTHORS:
        return _of_authors(config, image, times)
    raise ValueError(f"config.json: _class_name={name!r} is no Wan transformer: {DIFFUSERS} or {AUTHORS}")


def _of_diffusers(config: Config, times: Range) -> WanConfig:
    require_understood(config, _READ)
    heads = size(config, "num_attention_heads", 40)
    width = heads * size(config, "attention_head_dim", 128)
    _require_norms_across_heads(config, "rms_norm_across_heads")
    image, keys = config.get("image_dim"), config.get("added_kv_proj_dim")
    if (image is None) != (keys is None) or keys not in (None, width):
        raise ValueError(
            f"config.json: image_dim={image!r} and added_kv_proj_dim={keys!r} must both be null, or a size and the "
            f"model's width {width}"
        )
    channels = size(config, "in_channels", 16)
    return WanConfig(
        channels,
        size(config, "out_channels", 16 if "out_channels" not in config else channels),
        width,
        layers=size(config, "num_layers", 40),
        heads=heads,
        d_hidden=size(config, "ffn_dim", 13_824),
        d_text=size(config, "text_dim", 4096),
        d_image=0 if image is None else size(config, "image_dim"),
        image_places=0 if config.get("pos_embed_seq_len") is None else size(config, "pos_embed_seq_len"),
        time_features=size(config, "freq_dim", 256),
        patch=_patch(config),
        norm_eps=number(config, "eps", 1e-6),
        text_norm=config.get("cross_attn_norm", True) is not False,
        most_places=size(config, "rope_max_seq_len", 1024),
        times=times,
    )


def _of_authors(config: Config, image: bool | None, times: Range) -> WanConfig:
    require_understood(config, _READ_OF_AUTHORS)
    kind = config.get("model_type", "t2v")
    if kind not in ("t2v", "i2v", "ti2v", "flf2v"):
        raise ValueError(f"config.json: model_type={kind!r} is not one of t2v, i2v, ti2v, flf2v")
    if tuple(config.get("window_size", (-1, -1))) != (-1, -1):
        raise ValueError(f"config.json: window_size={config['window_size']!r}; here all rows of a clip see each other")
    _require_norms_across_heads(config, True)
    has_image = kind in ("i2v", "flf2v") if image is None else image
    return WanConfig(
        size(config, "in_dim", 16),
        size(config, "out_dim", 16),
        size(config, "dim", 2048),
        layers=size(config, "num_layers", 32),
        heads=size(config, "num_heads", 16),
        d_hidden=size(config, "ffn_dim", 8192),
        d_text=size(config, "text_dim", 4096),
        text_rows=size(config, "text_len", 512),
        d_image=1280 if has_image else 0,
        image_places=514 if kind == "flf2v" else 0,
        time_features=size(config, "freq_dim", 256),
        patch=_patch(config),
        norm_eps=number(config, "eps", 1e-6),
        text_norm=config.get("cross_attn_norm", True) is not False,
        times=times,
    )


def _patch(config: Config) -> Patch:
    found = config.get("patch_size", (1, 2, 2))
    if not isinstance(found, list | tuple) or len(found) != 3 or not all(isinstance(n, int) and n > 0 for n in found):
        raise ValueError(f"config.json: patch_size={found!r} must be three whole numbers of at least 1")
    return (found[0], found[1], found[2])


def _require_norms_across_heads(config: Config, only: Any) -> None:
    if config.get("qk_norm", only) != only:
        raise ValueError(
            f"config.json: qk_norm={config['qk_norm']!r}; Wan norms queries and keys across heads: {only!r}"
        )


def diffusers_config(cfg: WanConfig) -> dict[str, Any]:
    """The `config.json` of diffusers for this model. ValueError where diffusers has no such model.

    >>> from ftrain.modules.families.wan_config import PUBLISHED, config, diffusers_config
    >>> config(diffusers_config(config(PUBLISHED["2.1-i2v-14b"]))) == config(PUBLISHED["2.1-i2v-14b"])
    True
    """
    if cfg.text_rows != 512:
        raise ValueError(f"diffusers' Wan reads 512 rows of text, and this model {cfg.text_rows}")
    return {
        "_class_name": DIFFUSERS,
        "added_kv_proj_dim": cfg.d_model if cfg.d_image else None,
        "attention_head_dim": cfg.head_dim,
        "cross_attn_norm": cfg.text_norm,
        "eps": cfg.norm_eps,
        "ffn_dim": cfg.d_hidden,
        "freq_dim": cfg.time_features,
        "image_dim": cfg.d_image or None,
        "in_channels": cfg.channels_in,
        "num_attention_heads": cfg.heads,
        "num_layers": cfg.layers,
        "out_channels": cfg.channels_out,
        "patch_size": list(cfg.patch),
        "pos_embed_seq_len": cfg.image_places or None,
        "qk_norm": "rms_norm_across_heads",
        "rope_max_seq_len": cfg.most_places,
        "text_dim": cfg.d_text,
    }


def authors_config(cfg: WanConfig) -> dict[str, Any]:
    """The `config.json` of the authors' programs for this model. ValueError where they have no such model."""
    if cfg.d_image not in (0, 1280) or cfg.image_places not in (0, 514) or cfg.patch != (1, 2, 2):
        raise ValueError(
            f"the authors' config.json cannot tell d_image={cfg.d_image}, image_places={cfg.image_places}, "
            f"patch={cfg.patch}: write diffusers' layout"
        )
    kind = "flf2v" if cfg.image_places else "i2v" if cfg.d_image or cfg.channels_in == 36 else "t2v"
    return {
        "_class_name": AUTHORS,
        "dim": cfg.d_model,
        "eps": cfg.norm_eps,
        "ffn_dim": cfg.d_hidden,
        "freq_dim": cfg.time_features,
        "in_dim": cfg.channels_in,
        "model_type": kind,
        "num_heads": cfg.heads,
        "num_layers": cfg.layers,
        "out_dim": cfg.channels_out,
        "text_dim": cfg.d_text,
        "text_len": cfg.text_rows,
    }


def keep_float32(cfg: WanConfig) -> tuple[str, ...]:
    """Globs of the parameters that the authors compute with in float32 while the others are narrower, for
    `ftrain.Precision(keep=...)`: the time, the tables of shifts, scales and gates, norms of the stream, the head.

    >>> keep_float32(WanConfig(4, 4, d_model=24, layers=1, heads=2, d_hidden=32))
    ('time.**', 'layers.*.table_16D', 'out.*', 'layers.*.text_norm.*')
    """
    norms = ("layers.*.text_norm.*",) if cfg.text_norm else ()
    pictures = ("image.norm_*.*",) if cfg.d_image else ()
    return ("time.**", "layers.*.table_16D", "out.*", *norms, *pictures)


def expert_times(boundary: float, *, high: bool) -> Range:
    """The times of one of the two experts of Wan 2.2: from `boundary` up (`high`), or below it.

    >>> expert_times(0.875, high=True), expert_times(0.875, high=False)
    ((0.875, 1.0), (0.0, 0.875))
    """
    return (boundary, 1.0) if high else (0.0, boundary)


def _published(heads: int, layers: int, hidden: int, **more: Any) -> Mapping[str, Any]:
    sizes = {"num_attention_heads": heads, "attention_head_dim": 128, "num_layers": layers, "ffn_dim": hidden}
    return MappingProxyType({"_class_name": DIFFUSERS, "in_channels": 16, "out_channels": 16, **sizes, **more})


PUBLISHED: Mapping[str, Mapping[str, Any]] = MappingProxyType(
    {
        "2.1-t2v-1.3b": _published(12, 30, 8960),
        "2.1-t2v-14b": _published(40, 40, 13_824),
        "2.1-i2v-14b": _published(40, 40, 13_824, in_channels=36, image_dim=1280, added_kv_proj_dim=5120),
        "2.2-ti2v-5b": _published(24, 30, 14_336, in_channels=48, out_channels=48),
        "2.2-t2v-a14b": _published(40, 40, 13_824),
        "2.2-i2v-a14b": _published(40, 40, 13_824, in_channels=36),
    }
)
"""What diffusers' `config.json` of the published models says. Those of "a14b" are two experts of equal shape."""
BOUNDARIES: Mapping[str, float] = MappingProxyType({"2.2-t2v-a14b": 0.875, "2.2-i2v-a14b": 0.9})
"""The time at which the one expert takes over from the other."""
