"""The compositions: Llama or Qwen3-MoE, Qwen2.5-Omni's tower of pictures, Whisper's encoder, MoVQGAN's codes.

Each part has random weights of a small size, or is that of a published folder.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

import ftrain
from experiments.composed.vocabulary import MARKS, Vocabulary
from ftrain.bridge.parts import foundation_part, picture_part, sound_part, tokenizer_part
from ftrain.modules import image_decoder, omni, tower_encoders
from ftrain.modules.attention import AttentionConfig
from ftrain.modules.audio_tower import AudioTowerConfig
from ftrain.modules.decoder import DecoderConfig
from ftrain.modules.image_decoder import ImageDecoderConfig
from ftrain.modules.moe import MoEConfig
from ftrain.modules.omni import OmniModel
from ftrain.modules.spec import Tree
from ftrain.modules.vision_tower import TowerConfig
from ftrain.modules.vq_image import VqConfig

Kind = Literal["llama", "qwen3_moe"]
GRID = 4
"""Codes a side of what a published tokenizer draws."""
_INIT_STD = 0.3  # rows of text as large as rows of media


@dataclass(frozen=True)
class Folders:
    """Published folders of parts; a part without one has random weights."""

    foundation: Path | None = None
    """of a language model (Llama, Qwen3-MoE, ...), with its tokenizer.json"""
    pictures: Path | None = None
    """of Qwen2.5-Omni, Qwen2.5-VL or Qwen2-VL, for its tower"""
    sounds: Path | None = None
    """of Whisper, for its encoder"""
    tokenizer: Path | None = None
    """of diffusers' VQModel (MoVQGAN)"""


@dataclass(frozen=True)
class Size:
    """Of random parts: width and layers of the foundation, and of the towers."""

    d: int = 96
    layers: int = 3
    tower: int = 64
    tower_layers: int = 2
    codec: tuple[int, ...] = (16, 32, 32)


@dataclass(frozen=True)
class Composition:
    """`model`, its `words`, the parts as they read and draw, and `params(key)`, begun from their folders.

    `learnt`: whether the tokenizer of pictures is a folder's, and not to be trained.
    """

    model: OmniModel
    words: Vocabulary
    eye: TowerConfig
    ear: AudioTowerConfig
    merge: int
    codec: VqConfig
    learnt: bool
    params: Callable[[Tensor], Tree]


def foundation(kind: Kind, size: Size, vocab: int) -> DecoderConfig:
    """A small foundation of the family: dense, or of 8 experts of which a token uses two."""
    moe = None if kind == "llama" else MoEConfig(size.d, size.d, experts=8, top_k=2, aux_coefficient=0.01)
    heads = AttentionConfig(size.d, heads=4, kv_heads=2, head_dim=size.d // 4, qk_norm=moe is not None)
    return DecoderConfig(
        vocab, size.d, size.layers, heads, d_hidden=0 if moe else 3 * size.d, moe=moe, init_std=_INIT_STD
    )


def eye(size: Size) -> TowerConfig:
    """Qwen2.5-Omni's tower: RMS norms, gates, windows of a digit in all layers but the last."""
    return TowerConfig(
        size.tower, size.tower_layers, heads=4, d_hidden=2 * size.tower, d_out=size.tower, patch=2, channels=1,
        norm_kind="rms", mlp_kind="swiglu", window=2, full_layers=(size.tower_layers - 1,), joint=False,
    )  # fmt: skip


def ear(size: Size) -> AudioTowerConfig:
    """Whisper's encoder with windows of a second."""
    return AudioTowerConfig(
        size.tower, size.tower_layers, heads=4, d_hidden=2 * size.tower, chunk=100, mels=40, table=True
    )


def codec(size: Size) -> VqConfig:
    """MoVQGAN of 8 x 8 pictures, of 2 x 2 codes, coarse, and of what these leave over."""
    return VqConfig(
        8, channels=1, widths=size.codec, codes=64, d_code=16, depth=2, normalise=False, networks="movq", latent=16,
        attention=(len(size.codec) - 1,),
    )  # fmt: skip


def compose(kind: Kind, folders: Folders, size: Size | None = None) -> Composition:
    """The model of these parts. ValueError for a folder that is not of the part, or has no tokenizer.json."""
    size, loads = size or Size(), dict[str, Callable[[], Tree]]()
    words, seen, heard, codes = Vocabulary(), eye(size), ear(size), codec(size)
    base = foundation(kind, size, len(words))
    if folders.foundation is not None:
        of = foundation_part(folders.foundation)
        words = Vocabulary.of_folder(folders.foundation, known=of.cfg.vocab)
        base, loads["foundation"] = replace(of.cfg, vocab=len(words)), of.load
    if folders.pictures is not None:
        tower = picture_part(folders.pictures)
        seen, loads["encoders.image.tower"] = tower.cfg, tower.load
    if folders.sounds is not None:
        encoder = sound_part(folders.sounds)
        heard, loads["encoders.audio.tower"] = encoder.cfg, encoder.load
    if folders.tokenizer is not None:
        tokenizer = tokenizer_part(folders.tokenizer, grid=GRID)
        codes, loads["decoders.image.tokenizer"] = tokenizer.cfg, tokenizer.load
    merge = next(n for n in (10, 5, 4, 2, 1) if heard.rows % n == 0)
    draws = ImageDecoderConfig(codes, base.d_model, init_std=base.init_std)
    model = OmniModel(
        base,
        {
            "image": tower_encoders.seeing(seen, base.d_model, **words.around("image")),
            "audio": tower_encoders.hearing(heard, base.d_model, merge=merge, **words.around("audio")),
        },
        {"image": image_decoder.decoder(draws, **words.around("drawing"))},
    )
    learnt = "decoders.image.tokenizer" in loads
    return Composition(model, words, seen, heard, merge, codes, learnt, lambda key: _begun(model, loads, key))


def _begun(model: OmniModel, loads: Mapping[str, Callable[[], Tree]], key: Tensor) -> Tree:
    """Random parameters with those of folders over them."""
    tree = ftrain.init(omni.specs(model), key)
    for path, load in loads.items():
        *above, name = path.split(".")
        at = tree
        for step in above:
            at = at[step]
        at[name] = _with_marks(load(), at[name]) if path == "foundation" else load()
    return tree


def _with_marks(loaded: dict[str, Any], fresh: Mapping[str, Any]) -> dict[str, Any]:
    """A folder's foundation whose table and head have rows for the marks behind those of the folder's tokens."""
    table_VD = torch.cat([loaded["embedding"]["table_VD"], fresh["embedding"]["table_VD"][-len(MARKS) :]])
    found = {**loaded, "embedding": {**loaded["embedding"], "table_VD": table_VD}}
    if "head" in loaded:
        found["head"] = {"w_DV": torch.cat([loaded["head"]["w_DV"], fresh["head"]["w_DV"][:, -len(MARKS) :]], 1)}
    return found
