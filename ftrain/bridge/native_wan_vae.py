"""The library's own video autoencoder of Wan's as a `Model`, from a folder of diffusers' (`AutoencoderKLWan`).

Legend: B videos, C channels, T frames, H and W rows and columns, Z channels of latents, F latent frames.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor

from ftrain.files.outside import JSON_BYTES
from ftrain.hf.files import CONFIG, HfFolder, parse_json, read_member
from ftrain.hf.load import fill_hf, load_hf
from ftrain.hf.save import save_hf
from ftrain.hf.shards import DIFFUSERS
from ftrain.kernels import random
from ftrain.kernels.mean import Mean
from ftrain.kernels.pack import draw_over_batch
from ftrain.modules.families import wan_vae
from ftrain.modules.families.wan_vae import WanVaeConfig
from ftrain.modules.hf_fields import Config
from ftrain.modules.hf_names import HfTensor, Names
from ftrain.modules.model import Leaf, Model
from ftrain.modules.spec import Tree, leaves_with_paths, map_with_paths

CLASS = "AutoencoderKLWan"
"""What `_class_name` says in a `config.json`."""
BATCH: Mapping[str, Leaf] = MappingProxyType({"video": Leaf("frames in [-1, 1]", "[B, C, T, H, W]", needed=True)})
NEARNESS = 1e-6
"""The weight of the divergence of latents from normal numbers in the loss."""


def native_wan_vae(source: str | Path | Mapping[str, Any], *, dtype: torch.dtype = torch.float32) -> Model:
    """The video autoencoder of a folder of weights, or of what its `config.json` says. `dtype`: of the parameters.

    A batch is `video`. `loss` is the mean squared error of the frames that come back, and `NEARNESS` times the
    divergence of latents from normal numbers; with a key latents are drawn, without they are the means. `outputs` gives
    those frames, and `hidden` the scaled latents `[B, Z, F, h, w]` that a transformer is trained on.

    Raises:
        ValueError: it is no such autoencoder, or one that the library does not have.
    """
    folder = None if isinstance(source, Mapping) else HfFolder.open(source, stem=DIFFUSERS.stem)
    told = dict(source) if isinstance(source, Mapping) else _told(Path(source))
    name = told.get("_class_name")
    if name != CLASS:
        raise ValueError(f"config.json: _class_name={name!r} is no video autoencoder of Wan's: {CLASS}")
    cfg = wan_vae.config(told)
    specs = map_with_paths(lambda _, spec: replace(spec, dtype=dtype), wan_vae.specs(cfg))
    names = tuple(HfTensor(path, path) for path, _ in leaves_with_paths(specs))
    made = NativeWanVae(cfg)
    return Model(
        name="Wan's video autoencoder (native)",
        specs=specs,
        batch=BATCH,
        loss=made.loss,
        hidden=made.hidden,
        outputs=made.outputs,
        load=None if folder is None else partial(_load, folder, specs, names),
        save=partial(_save, told, names),
        packs=False,
        alone="a video is a row of the batch",
        why="native: Wan's video autoencoder is a family of the library",
    )


@dataclass(frozen=True)
class NativeWanVae:
    """The functions of a `Model`."""

    cfg: WanVaeConfig

    def loss(self, params: Tree, batch: Mapping[str, Any], key: Tensor | None = None) -> Mean:
        """As `native_wan_vae` says. `key`: int64 `[2]`. ValueError for a batch that does not fit."""
        frames, mean, log_variance = self._run(params, batch, key)
        wide = torch.promote_types(frames.dtype, torch.float32)
        error = (frames.to(wide) - batch["video"].to(wide)).square()
        beyond = (mean.to(wide).square() + log_variance.to(wide).exp() - 1 - log_variance.to(wide)) / 2
        count = torch.full((), error.numel(), dtype=wide, device=error.device)
        # of a mean over latents as of one over pixels: all ranks have as many of the one for each of the other
        return Mean(error.sum() + NEARNESS * error.numel() / beyond.numel() * beyond.sum(), count)

    def outputs(self, params: Tree, batch: Mapping[str, Any], key: Tensor | None = None) -> Tensor:
        """Frames that come back, `[B, C, T, H, W]`. `key`: int64 `[2]`. ValueError for a batch that does not fit."""
        return self._run(params, batch, key)[0]

    def hidden(self, params: Tree, batch: Mapping[str, Any], key: Tensor | None = None) -> Tensor:
        """Scaled means of latents, `[B, Z, F, h, w]`. `key`: int64 `[2]`, which nothing draws from. ValueError for a
        batch that does not fit.
        """
        del key
        return wan_vae.scaled(wan_vae.encode(params, _video(params, batch), self.cfg)[0], self.cfg)

    def _run(self, params: Tree, batch: Mapping[str, Any], key: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
        mean, log_variance = wan_vae.encode(params, _video(params, batch), self.cfg)
        latents = mean
        if key is not None:
            noise = draw_over_batch(random.normal, key, tuple(mean.shape)).to(mean.dtype)
            latents = mean + (log_variance / 2).exp() * noise
        return wan_vae.decode(params, latents, self.cfg), mean, log_variance


def _video(params: Tree, batch: Mapping[str, Any]) -> Tensor:
    """In the dtype of the weights."""
    unknown = [name for name in batch if name not in BATCH]
    if "video" not in batch or unknown:
        wrong = f"has {unknown[0]!r}, which it does not read" if unknown else "has no 'video'"
        raise ValueError(f"Wan's video autoencoder: the batch {wrong}; it reads video")
    found: Tensor = batch["video"].to(params["quant_conv"]["bias"].dtype)
    return found


def _load(folder: HfFolder, specs: Tree, names: Names, into: Tree | None = None) -> Tree:
    """New parameters, or those of `into` filled."""
    if into is None:
        return load_hf(folder, specs, names)
    fill_hf(into, folder, names)
    return into


def _save(told: Config, names: Names, params: Tree, folder: str | Path) -> None:
    save_hf(params, folder, told, names, max_shard="10GB", form=DIFFUSERS)


def _told(folder: Path) -> dict[str, Any]:
    return parse_json(read_member(folder, CONFIG, limit=JSON_BYTES), str(folder / CONFIG))
