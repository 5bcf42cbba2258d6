"""The models of the library by what a `config.json` of transformers says: how each is opened, and how described.

A new kind is a row of `NATIVES`; what takes a folder asks no more than `native_of(config)`.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch

from ftrain.bridge import native_image_text, native_janus, native_mimi, native_umt5
from ftrain.bridge.native import native_decoder
from ftrain.bridge.native_sight import native_sight
from ftrain.hf.described import described_decoder, described_in_parts, described_with_sight
from ftrain.hf.files import HfFolder
from ftrain.modules import decoder, image_text, janus, vision_language
from ftrain.modules.decoder_config import used_experts
from ftrain.modules.families import janus as janus_family
from ftrain.modules.families import mimi, mimi_config, umt5
from ftrain.modules.families.registry import family_of, paired_family_of, seeing_family_of
from ftrain.modules.hf_fields import Config
from ftrain.modules.model import Model
from ftrain.modules.spec import Tree

_MOST = 4096
"""Layers of a model, and experts of a layer: more are taken for a mistake, as the work grows with them."""


class Described(NamedTuple):
    """A model by its `model_type`: the `specs` of its parameters, and how many experts a token uses (`Model.top_k`)."""

    kind: str
    specs: Tree
    top_k: int


@dataclass(frozen=True)
class Native:
    """A kind of model that the library has.

    - `is_of(config)`: whether a `config.json` is of it. `what`: it, in words.
    - `tasks`: what it may be opened for. `layered`: whether it can be had with some of its layers alone.
    - `open(folder, dtype, layers)`: the model of a folder. ValueError for one that the library does not compute.
    - `describe(config, file)`: its parameters by the configuration in `file`, without weights. ValueError likewise.
    """

    what: str
    is_of: Callable[[Config], bool]
    tasks: tuple[str, ...]
    open: Callable[[HfFolder, torch.dtype, int | None], Model]
    describe: Callable[[Config, str], Described]
    layered: bool = False


def native_of(config: Config) -> Native:
    """The kind of the model that a `config.json` describes: a decoder where it is none of the others.

    >>> native_of({"model_type": "qwen3_vl"}).what
    'a language model that sees'
    """
    return next(native for native in NATIVES if native.is_of(config))


def _open_pair(folder: HfFolder, dtype: torch.dtype, layers: int | None) -> Model:
    family = paired_family_of(folder.config())
    assert family is not None
    return native_image_text.native_image_text(folder, family)


def _describe_pair(config: Config, file: str) -> Described:
    family = paired_family_of(config)
    assert family is not None
    pair = described_in_parts(config, file, layers=_MOST, describe=family.config, parts=native_image_text.PARTS)
    return Described(_kind(config), image_text.specs(pair), 0)


def _describe_janus(config: Config, file: str) -> Described:
    cfg = described_in_parts(config, file, layers=_MOST, describe=janus_family.config, parts=native_janus.PARTS)
    return Described(native_janus.KIND, janus.specs(cfg), 0)


def _open_seeing(folder: HfFolder, dtype: torch.dtype, layers: int | None) -> Model:
    family = seeing_family_of(folder.config())
    assert family is not None
    return native_sight(folder, family, layers=layers)


def _describe_seeing(config: Config, file: str) -> Described:
    family = seeing_family_of(config)
    assert family is not None
    seen = described_with_sight(config, file, layers=_MOST, describe=family.config)
    return Described(_kind(config), vision_language.specs(seen), used_experts(seen.text))


def _describe_texts(config: Config, file: str) -> Described:
    cfg = umt5.config(config)
    if cfg.layers > _MOST:
        raise ValueError(f"{file}: num_layers={cfg.layers:,} is more than {_MOST:,}: give the model's own config.json")
    return Described("umt5 (its encoder)", umt5.specs(cfg), 0)


def _describe_decoder(config: Config, file: str) -> Described:
    cfg = described_decoder(config, file, layers=_MOST, experts=_MOST, describe=family_of(config).config)
    return Described(_kind(config), decoder.specs(cfg), used_experts(cfg))


def _kind(config: Config) -> str:
    return str(config.get("model_type"))


NATIVES = (
    Native(
        "a pair of encoders", lambda config: paired_family_of(config) is not None, ("causal_lm", "features"),
        _open_pair, _describe_pair,
    ),
    Native(
        "a language model that sees and draws", lambda config: config.get("model_type") == native_janus.KIND,
        ("causal_lm", "image_text_to_text"), lambda folder, _, __: native_janus.native_janus(folder), _describe_janus,
    ),
    Native(
        "an audio codec", lambda config: config.get("model_type") == native_mimi.KIND, ("causal_lm", "features"),
        lambda folder, dtype, _: native_mimi.native_mimi(folder, dtype=dtype),
        lambda config, _: Described(native_mimi.KIND, mimi.specs(mimi_config.config(config)), 0),
    ),
    Native(
        "an encoder of texts", native_umt5.is_encoder, ("causal_lm", "features"),
        lambda folder, dtype, _: native_umt5.native_umt5(folder, dtype=dtype), _describe_texts,
    ),
    Native(
        "a language model that sees", lambda config: seeing_family_of(config) is not None,
        ("causal_lm", "image_text_to_text"), _open_seeing, _describe_seeing, layered=True,
    ),
    Native(
        "a language model", lambda _: True, ("causal_lm",),
        lambda folder, _, layers: native_decoder(folder, layers=layers), _describe_decoder, layered=True,
    ),
)  # fmt: skip
"""Every kind, the first that fits being taken."""
