"""What a family of language models that see is to whoever opens a folder, and what Qwen's have in common.

Their `config.json` has the decoder's entries at the top, as transformers 4 wrote them, or in `text_config`, as 5 does;
their tensors are called `visual.` and `model.`, or `model.visual.` and `model.language_model.`. All are read, and a
model is saved as it was read.
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

from ftrain.modules.attention import AttentionConfig
from ftrain.modules.decoder_config import DecoderConfig
from ftrain.modules.hf_config import decoder_config
from ftrain.modules.hf_fields import Config, agreed, flag, number, require_understood, size
from ftrain.modules.hf_names import HfTensor, Names, decoder_names
from ftrain.modules.mrope import After
from ftrain.modules.pictures import MediaConfig
from ftrain.modules.vision_language import VisionLanguageConfig
from ftrain.modules.vision_tower import TowerConfig

Shapes = Mapping[str, tuple[int, ...]]
"""The tensors of a folder: name to shape."""


@dataclass(frozen=True)
class VisionLanguageFamily:
    """A family of language models that see.

    - `config(config)`: the model that a `config.json` describes. ValueError names an entry that it cannot follow.
    - `laid(config, cfg, shapes)`: the same model with parameters as a folder of tensors of these shapes has them, where
      the family knows several ways.
    - `names(cfg, shapes)`: the tensors of such a model in a folder that holds tensors of these shapes, as it calls them
      and lays them, in the order in which transformers 5 saves them.
    - `others`: what tensors begin with that such a folder may hold beside, which are kept as they are.
    """

    config: Callable[[Config], VisionLanguageConfig]
    names: Callable[[VisionLanguageConfig, Shapes], Names]
    laid: Callable[[Config, VisionLanguageConfig, Shapes], VisionLanguageConfig] = lambda _, cfg, __: cfg
    others: tuple[str, ...] = ()


_TOP = (
    "image_token_id", "video_token_id", "vision_start_token_id", "vision_end_token_id", "vision_token_id",
    "text_config", "vision_config", "tie_word_embeddings", "text_after_video",
)  # fmt: skip
_OF_AXES = ("mrope_section", "mrope_interleaved", "interleaved")
_AXES = (("type", "mrope"), ("rope_type", "mrope"))


def text_of(config: Config, *, tied_inside: bool = False) -> dict[str, Any]:
    """The decoder's entries, from either place, with "tie_word_embeddings" as the whole model has it.

    `tied_inside`: it may be said in `text_config`, as transformers 4 wrote Qwen2-VL and Qwen2.5-VL; elsewhere it is not
    meant there.

    Where there is `text_config` it decides. ValueError for an entry beside it that says something else or is unknown.
    """
    nested = config.get("text_config")
    top = {name: value for name, value in config.items() if name not in _TOP}
    if nested is None:
        return {**top, "tie_word_embeddings": flag(config, "tie_word_embeddings")}
    if not isinstance(nested, Mapping):
        raise ValueError(f"config.json: text_config={nested!r} must be an object")
    beside = {name: value for name, value in top.items() if name != "model_type"}
    for name in [name for name in beside if name in nested]:
        if beside[name] != nested[name] and None not in (beside[name], nested[name]):
            raise ValueError(
                f"config.json: {name}={beside[name]!r} and text_config.{name}={nested[name]!r} contradict each other: "
                "leave the one that is meant"
            )
        del beside[name]
    require_understood(beside, ())
    tied = flag(config, "tie_word_embeddings") or (tied_inside and flag(nested, "tie_word_embeddings"))
    return {**nested, "tie_word_embeddings": tied}


def decoder_of(
    text: Config,
    *,
    like: str,
    missing: Config,
    rope_base: float,
    interleaved: bool = False,
    sections: tuple[int, ...] | None = None,
) -> DecoderConfig:
    """The decoder that these entries describe, of the math of the text family `like`, with places on three axes.

    `missing`, `rope_base`, `sections` (how many frequencies turn with each axis): what transformers' class takes for
    entries that are not there; None: it takes nothing. `interleaved`: the axes take frequencies in turns. ValueError
    names an entry that our decoder cannot follow.
    """
    ropes = {
        place: text[place] for place in ("rope_scaling", "rope_parameters") if isinstance(text.get(place), Mapping)
    }
    cleaned = {**missing, **text, **{place: _of_one_axis(said) for place, said in ropes.items()}, "model_type": like}
    if not any(said.get("rope_theta") for said in (text, *ropes.values())):
        cleaned["rope_theta"] = rope_base
    found = decoder_config(cleaned)
    section = agreed({place: said.get("mrope_section") for place, said in ropes.items()}, *ropes) or sections
    return replace(found, attention=on_three_axes(found.attention, section, interleaved=interleaved))


def _of_one_axis(said: Mapping[str, Any]) -> dict[str, Any]:
    """What rotary positions are but for their three axes."""
    kept = {name: value for name, value in said.items() if name not in _OF_AXES}
    return {name: "default" if (name, value) in _AXES else value for name, value in kept.items()}


def on_three_axes(cfg: AttentionConfig, section: Any, *, interleaved: bool) -> AttentionConfig:
    """The attention with places on three axes, of which a file says by `section` how many frequencies turn with each.

    ValueError where that is no such thing.
    """
    return replace(cfg, rope_sections=_sections(section, cfg.rotated // 2, interleaved), rope_interleaved=interleaved)


def _sections(section: Any, half: int, interleaved: bool) -> tuple[int, ...]:
    whole = isinstance(section, list | tuple) and all(isinstance(n, int) and n >= 0 for n in section)
    if not whole or len(section) != 3 or (not interleaved and sum(section) != half):
        raise ValueError(
            f"config.json: mrope_section={section!r} must give time, rows and columns their frequencies, three whole "
            f"numbers that sum to {half}, half of what is rotated of a head"
        )
    if not interleaved:
        return tuple(section)
    # in turns, an axis has no more than there are turns, and time has what the others leave
    turns = [len(range(axis, min(half, 3 * section[axis]), 3)) for axis in (1, 2)]
    return (half - sum(turns), *turns)


def vision_of(config: Config, read: tuple[str, ...]) -> Mapping[str, Any]:
    """The entries of the tower, of which `read` are looked at beside those that all towers have.

    ValueError for one that says something and is not known, and for the channels called in two ways.
    """
    vision = config.get("vision_config")
    if not isinstance(vision, Mapping):
        raise ValueError(f"config.json: vision_config={vision!r} must be an object, what the tower is made of")
    require_understood(vision, (*read, *_OF_ALL_TOWERS))
    return {**vision, "in_channels": agreed(vision, "in_channels", "in_chans") or 3}


_OF_ALL_TOWERS = (
    "depth", "hidden_act", "hidden_size", "in_channels", "in_chans", "initializer_range", "num_heads", "patch_size",
    "rope_parameters", "spatial_merge_size", "spatial_patch_size", "temporal_patch_size",
)  # fmt: skip
_KINDS = {"quick_gelu": "quick_gelu", "gelu": "gelu", "gelu_pytorch_tanh": "gelu_tanh", "silu": "swiglu"}


def tower_of(vision: Config, *, patch: int = 14, act: str, gated: bool = False, **own: Any) -> TowerConfig:
    """The tower that `vision_of` has read; `own`: fields of `TowerConfig` that a family reads in a way of its own.

    `patch`: pixels a side of a patch, `act`: the activation, where nothing is said; `gated`: its MLPs have a gate.

    ValueError names an entry that it cannot follow.
    """
    said = vision.get("hidden_act") or act
    if (_KINDS.get(said) == "swiglu") != gated or said not in _KINDS:
        raise ValueError(f"config.json: vision_config.hidden_act={said!r}; this tower computes {act!r}")
    rope = vision.get("rope_parameters") or {}
    if rope.get("rope_type", "axial") not in ("axial", "default"):
        raise ValueError(f"config.json: vision_config.rope_parameters={rope}; places of patches are of type 'axial'")
    fields = {
        "layers": size(vision, "depth", 32),
        "heads": size(vision, "num_heads", 16),
        "patch": size(vision, "patch_size", patch),
        "frames": size(vision, "temporal_patch_size", 2),
        "channels": size(vision, "in_channels", 3),
        "merge": size(vision, "spatial_merge_size", 2),
        "mlp_kind": _KINDS[said],
        "rope_base": number(rope, "rope_theta", 10_000.0, where="vision_config.rope_parameters."),
        "init_std": number(vision, "initializer_range", 0.02),
    }
    return TowerConfig(**{**fields, **own})


def media_of(config: Config, tower: TowerConfig, **own: Any) -> MediaConfig:
    """What the model asks of its pictures; `own`: fields of `MediaConfig` that a family has.

    `text_after_video` ("extent" or "max", see `ftrain.modules.mrope.After`) is an entry of ours. ValueError for any
    other value, and for an id that is none.
    """
    after = config.get("text_after_video", "extent")
    if after not in ("extent", "max"):
        raise ValueError(f"config.json: text_after_video={after!r} is not 'extent' or 'max'")
    rule: After = after
    image, video = (size(config, f"{kind}_token_id", usual) for kind, usual in (("image", 151655), ("video", 151656)))
    return MediaConfig(tower, image, video, after=rule, **own)


def is_nested(shapes: Shapes) -> bool:
    """Whether a folder's tensors are called as transformers has them in memory, `model.visual.`."""
    return any(name.startswith("model.visual.") for name in shapes)


def text_names(cfg: DecoderConfig, prefix: str, names: Callable[[DecoderConfig], Names] = decoder_names) -> Names:
    """The decoder's tensors, those of its body called `prefix` and something. `names`: of its family of text models."""
    found = [(n.name.removeprefix("model."), n) for n in names(cfg)]
    return tuple(replace(n, name=n.name if n.name == own else prefix + own, leaf=f"text.{n.leaf}") for own, n in found)


@dataclass(frozen=True)
class TowerNames:
    """What a family calls the linear layers of an MLP, as (theirs, ours); the norm and linear layers of a merger; and
    the list of deep mergers.
    """

    mlp: tuple[tuple[str, str], ...]
    merger: tuple[str, str, str]
    deep: str = "deepstack_merger_list"


def tower_names(cfg: TowerConfig, prefix: str, called: TowerNames) -> Iterator[HfTensor]:
    """The tower's tensors, called `prefix` and something, in the order of transformers' modules."""
    yield HfTensor(f"{prefix}patch_embed.proj.weight", "vision.patch.w_DCSYX")
    if cfg.patch_bias:
        yield HfTensor(f"{prefix}patch_embed.proj.bias", "vision.patch.b_D")
    if cfg.side is not None:
        yield HfTensor(f"{prefix}pos_embed.weight", "vision.table_LD")
    for i in range(cfg.layers):
        there, here = f"{prefix}blocks.{i}", f"vision.layers.{i}"
        for norm in ("norm1", "norm2"):
            yield from _norm(f"{there}.{norm}", f"{here}.{norm}", cfg)
        for name, weight, bias in _JOINT if cfg.joint else _APART:
            yield from _linear(f"{there}.attn.{name}", f"{here}.attention", weight, bias)
        yield from _linear(f"{there}.attn.proj", f"{here}.attention", "o_HKD", "o_D")
        for name, ours in called.mlp:
            dims, out = ("FD", "D") if ours == "down" else ("DF", "F")
            yield from _linear(f"{there}.mlp.{name}", f"{here}.mlp", f"{ours}_{dims}", f"{ours}_{out}")
    mergers = [(f"{prefix}merger", "vision.merger")]
    mergers += [(f"{prefix}{called.deep}.{k}", f"vision.deep.{k}") for k in range(len(cfg.deep_layers))]
    for there, here in mergers:
        norm, first, second = (f"{there}.{name}" for name in called.merger)
        yield from _norm(norm, f"{here}.norm", cfg)
        yield from _linear(first, here, "up_MM", "up_M")
        yield from _linear(second, here, "out_MV", "out_V")


_JOINT = (("qkv", "qkv_D3HK", "qkv_3HK"),)
_APART = (("q", "q_DHK", "q_HK"), ("k", "k_DGK", "k_GK"), ("v", "v_DGK", "v_GK"))


def _norm(there: str, here: str, cfg: TowerConfig) -> Iterator[HfTensor]:
    yield HfTensor(f"{there}.weight", f"{here}.weight_D")
    if cfg.norm_kind == "layer":
        yield HfTensor(f"{there}.bias", f"{here}.bias_D")


def _linear(there: str, here: str, weight: str, bias: str) -> Iterator[HfTensor]:
    yield HfTensor(f"{there}.weight", f"{here}.w_{weight}", transposed=True)
    yield HfTensor(f"{there}.bias", f"{here}.b_{bias}")
