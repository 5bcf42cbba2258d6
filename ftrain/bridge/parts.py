"""Parts of published folders, for a model that is composed of them: a foundation, a tower of pictures, an encoder of
sound, a tokenizer of pictures.

Each is a configuration and what reads its parameters, for `ftrain.modules.omni`: `decoder.specs(part.cfg)` and
`part.load()` are of one tree. Nothing but headers is read before `load`.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Generic, TypeVar

from ftrain.files.outside import JSON_BYTES
from ftrain.hf.described import described_decoder, described_in_parts, described_with_sight
from ftrain.hf.files import CONFIG, HfFolder, parse_json, read_member
from ftrain.hf.load import load_hf
from ftrain.hf.shards import DIFFUSERS
from ftrain.modules import audio_tower, decoder, vision_tower
from ftrain.modules.audio_tower import AudioTowerConfig
from ftrain.modules.decoder_config import DecoderConfig
from ftrain.modules.families import vq_model, whisper
from ftrain.modules.families.registry import family_of, seeing_family_of
from ftrain.modules.hf_names import Names
from ftrain.modules.spec import Tree
from ftrain.modules.vision_tower import TowerConfig
from ftrain.modules.vq_image import VqConfig

Cfg = TypeVar("Cfg")


@dataclass(frozen=True)
class Part(Generic[Cfg]):
    """A part of a folder: its configuration, and `load()`, new parameters with the folder's numbers, in float32."""

    cfg: Cfg
    load: Callable[[], Tree]


def foundation_part(path: str | Path) -> Part[DecoderConfig]:
    """The decoder of a folder of a language model: Llama, Qwen3, Qwen3-MoE, ... (`ftrain.modules.families.registry`).

    ValueError for a model that the library does not compute, or with a state beside its parameters (balancing biases,
    modules of multi-token prediction).
    """
    folder = HfFolder.open(path)
    config = folder.config()
    family, most = family_of(config), len(folder.tensors)
    experts = None if family.stacked else most
    cfg = described_decoder(config, str(folder.path / CONFIG), layers=most, experts=experts, describe=family.config)
    if cfg.mtp or decoder.balance_specs(cfg):
        raise ValueError(
            f"{folder.path}: {config.get('model_type')!r} has modules of multi-token prediction or balancing biases, "
            "which a composed model does not keep: open it with ftrain.hf.open"
        )
    names = tuple(name for name in family.names(cfg) if not name.written or name.name in folder.tensors)
    return Part(cfg, partial(load_hf, folder, decoder.specs(cfg), names))


def picture_part(path: str | Path) -> Part[TowerConfig]:
    """The tower of pictures of a folder of Qwen2-VL, Qwen2.5-VL or Qwen2.5-Omni, whose other tensors are left alone.

    ValueError for a folder of none of the families that see.
    """
    folder = HfFolder.open(path)
    config = folder.config()
    family = seeing_family_of(config)
    if family is None:
        raise ValueError(f"{folder.path}: {config.get('model_type')!r} is of no family with a tower of pictures")
    shown, most = str(folder.path / CONFIG), len(folder.tensors)
    shapes = {name: stored.shape for name, stored in folder.tensors.items()}
    whole = family.laid(config, described_with_sight(config, shown, layers=most, describe=family.config), shapes)
    names = tuple(name for name in family.names(whole, shapes) if name.leaf.startswith("vision."))
    tower = whole.media.tower
    return Part(tower, partial(_branch, folder, "vision", vision_tower.specs(tower), names))


def sound_part(path: str | Path) -> Part[AudioTowerConfig]:
    """The encoder of a folder of Whisper, of the whole model or of its body; the decoder's tensors are left alone.

    ValueError for a folder of another model.
    """
    folder = HfFolder.open(path)
    config = folder.config()
    if config.get("model_type") != "whisper":
        raise ValueError(f"{folder.path}: {config.get('model_type')!r} is not 'whisper', whose encoder is wanted")
    shown, most = str(folder.path / CONFIG), len(folder.tensors)
    cfg = described_in_parts(config, shown, layers=most, describe=whisper.encoder_config, parts=())
    _require_held(shown, "encoder_layers", cfg.layers, most)
    prefix = "model.encoder." if "model.encoder.conv1.weight" in folder.tensors else "encoder."
    names = whisper.encoder_names(cfg, prefix)
    return Part(cfg, partial(_branch, folder, "audio", audio_tower.specs(cfg), names))


def tokenizer_part(path: str | Path, *, grid: int) -> Part[VqConfig]:
    """The tokenizer of a folder of diffusers' `VQModel` (MoVQGAN, VQGAN), for pictures of `grid` codes a side.

    ValueError for a folder of another model.
    """
    folder = HfFolder.open(path, stem=DIFFUSERS.stem)
    shown, most = str(folder.path / CONFIG), len(folder.tensors)
    config = parse_json(read_member(folder.path, CONFIG, limit=JSON_BYTES), shown)
    describe = partial(vq_model.config, grid=grid)
    cfg = described_in_parts(config, shown, layers=most, describe=describe, parts=())
    _require_held(shown, "layers_per_block", cfg.blocks, most)
    return Part(cfg, partial(_tokenizer, folder, cfg))


def _require_held(shown: str, entry: str, count: int, most: int) -> None:
    """Work grows with such numbers long before a weight is looked for."""
    if count > most:
        raise ValueError(f"{shown}: {entry} is {count:,}, and the folder holds {most:,} tensors: give its own file")


def _branch(folder: HfFolder, name: str, specs: Tree, names: Names) -> Tree:
    found: Mapping[str, Any] = load_hf(folder, {name: specs}, names, unexpected="ignore")
    return found[name]


def _tokenizer(folder: HfFolder, cfg: VqConfig) -> Tree:
    return vq_model.from_stored(load_hf(folder, vq_model.stored_specs(cfg), vq_model.names(cfg)), cfg)
