"""What a `config.json` alone tells of a model of the library: its parameters, before there are weights."""

from pathlib import Path
from typing import NamedTuple

from ftrain.hf.described import described_decoder, described_image_text, described_with_sight
from ftrain.bridge.native_mimi import KIND as MIMI
from ftrain.bridge.native_umt5 import is_encoder
from ftrain.hf.described import described_decoder, described_with_sight
from ftrain.hf.files import CONFIG, read_json
from ftrain.modules import decoder, image_text, vision_language
from ftrain.modules.decoder_config import DecoderConfig
from ftrain.modules.families.registry import family_of, paired_family_of, seeing_family_of
from ftrain.modules.families import mimi, mimi_config
from ftrain.modules.families import umt5
from ftrain.modules.families.registry import family_of, seeing_family_of
from ftrain.modules.spec import Tree

_MOST = 4096
"""Layers of a model, and experts of a layer: more are taken for a mistake, as the work grows with them."""


class Described(NamedTuple):
    """A model by its `model_type`: the `specs` of its parameters, and how many experts a token uses (`Model.top_k`)."""

    kind: str
    specs: Tree
    top_k: int


def described(folder: str | Path) -> Described:
    """The model of the library that the `config.json` in a folder describes; nothing else is read there.

    ValueError for a folder without the file, and for a model that the library does not compute.
    """
    file = Path(folder) / CONFIG
    config = read_json(file)
    kind, seeing, paired = str(config.get("model_type")), seeing_family_of(config), paired_family_of(config)
    if paired is not None:
        pair = described_image_text(config, str(file), layers=_MOST, describe=paired.config)
        return Described(kind, image_text.specs(pair), 0)
    if kind == MIMI:
        return Described(kind, mimi.specs(mimi_config.config(config)), 0)
    kind, seeing = str(config.get("model_type")), seeing_family_of(config)
    if is_encoder(config):
        return Described("umt5 (its encoder)", umt5.specs(_of_depth(umt5.config(config), str(file))), 0)
    if seeing is not None:
        seen = described_with_sight(config, str(file), layers=_MOST, describe=seeing.config)
        return Described(kind, vision_language.specs(seen), used_experts(seen.text))
    cfg = described_decoder(config, str(file), layers=_MOST, experts=_MOST, describe=family_of(config).config)
    return Described(kind, decoder.specs(cfg), used_experts(cfg))


def _of_depth(cfg: umt5.Umt5Config, file: str) -> umt5.Umt5Config:
    if cfg.layers > _MOST:
        raise ValueError(f"{file}: num_layers={cfg.layers:,} is more than {_MOST:,}: give the model's own config.json")
    return cfg


def used_experts(cfg: DecoderConfig) -> int:
    """How many experts a token uses in each layer that has them; 0 without."""
    return max((router.top_k for router in cfg.routers), default=0)
