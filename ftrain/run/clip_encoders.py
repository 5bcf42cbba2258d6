"""What a video transformer of Wan's reads of a clip, made by the encoders of its pipeline.

Legend: F frames, H and W their height and width; Z channels, f frames, h and w rows and columns of latents; S text
rows, C their width; I rows of the image encoder.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ftrain.bridge.native_umt5 import native_umt5
from ftrain.bridge.native_wan_vae import native_wan_vae
from ftrain.bridge.pipelines import WanFolder, digest
from ftrain.data.chat_template import load_tokenizer
from ftrain.data.clips.captions import cleaned
from ftrain.data.clips.sizes import Grid
from ftrain.files.outside import JSON_BYTES
from ftrain.hf.files import CONFIG, parse_json, read_member
from ftrain.modules.families import wan_vae
from ftrain.modules.families.wan_config import WanConfig
from ftrain.modules.families.wan_vae import WanVaeConfig
from ftrain.modules.model import Model
from ftrain.modules.spec import Tree, map_with_paths

_MOST = 1024  # tokens that the text encoder takes at a time


@dataclass(frozen=True)
class VideoCoder:
    """The autoencoder of a pipeline with its parameters. `frames`: latent frames at a time, None for all."""

    cfg: WanVaeConfig
    params: Tree
    frames: int | None = None

    @staticmethod
    def open(folder: WanFolder, *, device: torch.device, dtype: torch.dtype, frames: int | None = None) -> "VideoCoder":
        """ValueError for a pipeline without one that the library has."""
        model = native_wan_vae(folder.part("vae"), dtype=dtype)
        return VideoCoder(coder_config(folder), _loaded(model, device), frames)

    def latents(self, video_3FHW: Tensor) -> Tensor:
        """Scaled means of the latents of a video in [-1, 1], `[Z, f, h, w]`. ValueError for sizes that do not fit."""
        mean = wan_vae.encode(self.params, self._own(video_3FHW)[None], self.cfg, frames=self.frames)[0]
        return wan_vae.scaled(mean, self.cfg)[0]

    def first_frame(self, video_3FHW: Tensor) -> Tensor:
        """Latents of the first frame before gray ones, `[Z, f, h, w]`: an image-to-video model's condition. ValueError
        for sizes that do not fit.
        """
        alone = torch.zeros_like(video_3FHW)
        alone[:, 0] = video_3FHW[:, 0]
        return self.latents(alone)

    def video(self, latents_ZFHW: Tensor) -> Tensor:
        """The frames of scaled latents `[Z, f, h, w]`, float32 `[3, F, H, W]` in [-1, 1]. ValueError for latents of
        another autoencoder.
        """
        given = wan_vae.unscaled(self._own(latents_ZFHW)[None], self.cfg)
        return wan_vae.decode(self.params, given, self.cfg, frames=self.frames)[0].float().clamp(-1, 1)

    def _own(self, x: Tensor) -> Tensor:
        bias = self.params["quant_conv"]["bias"]
        return x.to(bias.device, bias.dtype)


def coder_config(folder: WanFolder) -> WanVaeConfig:
    """What the autoencoder of a pipeline is. ValueError where it has none that the library has."""
    path = folder.part("vae")
    return wan_vae.config(parse_json(read_member(path, CONFIG, limit=JSON_BYTES), str(path / CONFIG)))


@dataclass(frozen=True)
class TextCoder:
    """The text encoder of a pipeline: `tokenizer`, the `model` with `params`, and the `most` tokens of a text."""

    tokenizer: Any
    model: Model
    params: Tree
    most: int = 512

    @staticmethod
    def open(folder: WanFolder, *, device: torch.device, dtype: torch.dtype, most: int = 512) -> "TextCoder":
        """ValueError for a pipeline without UMT5's encoder and its tokenizer."""
        model = native_umt5(folder.part("text_encoder"), dtype=dtype)
        return TextCoder(load_tokenizer(folder.part("tokenizer")), model, _loaded(model, device), most)

    def tokens(self, text: str) -> list[int]:
        """Ids of a text after `cleaned`. ValueError for more than the model reads."""
        ids: list[int] = self.tokenizer(cleaned(text), add_special_tokens=True)["input_ids"]
        if len(ids) > self.most:
            raise ValueError(
                f"a caption has {len(ids)} tokens, and the model reads {self.most}: shorten it ({text[:40]!r}...)"
            )
        return ids

    def states(self, texts: Sequence[str]) -> list[Tensor]:
        """States of each text `[S, C]`, of its own tokens alone; several share a pack. ValueError as `tokens`."""
        found, pack = list[Tensor](), list[list[int]]()
        for ids in map(self.tokens, texts):
            if pack and sum(map(len, pack)) + len(ids) > _MOST:
                found += self._run(pack)
                pack = []
            pack.append(ids)
        return found + (self._run(pack) if pack else [])

    def _run(self, pack: list[list[int]]) -> list[Tensor]:
        assert self.model.hidden is not None
        lengths = torch.tensor([len(ids) for ids in pack])
        device = self.params["norm"]["weight_D"].device
        tokens = torch.tensor([i for ids in pack for i in ids])
        segments = torch.arange(len(pack)).repeat_interleave(lengths)
        states = self.model.hidden(self.params, {"tokens": tokens.to(device), "segments": segments.to(device)})
        return list(states.split(lengths.tolist()))


@dataclass(frozen=True)
class ImageCoder:
    """The image encoder of an image-to-video pipeline, which is transformers' own module, and its `processor`."""

    module: Any
    processor: Any

    @staticmethod
    def open(folder: WanFolder, *, device: torch.device) -> "ImageCoder":
        """ValueError for a pipeline without one."""
        from transformers import CLIPImageProcessor, CLIPVisionModel

        module: Any = CLIPVisionModel.from_pretrained(folder.part("image_encoder"), local_files_only=True)
        processor = CLIPImageProcessor.from_pretrained(folder.part("image_processor"), local_files_only=True)
        return ImageCoder(module.to(device).eval(), processor)

    def rows(self, video_3FHW: Tensor) -> Tensor:
        """Rows `[I, width]` of the first frame: what the last layer but one gives."""
        pixels_HW3 = ((video_3FHW[:, 0].permute(1, 2, 0) + 1) * 127.5).round().clamp(0, 255).byte()
        given = self.processor(images=pixels_HW3.cpu().numpy(), return_tensors="pt")["pixel_values"]
        device = next(self.module.parameters()).device
        found: Tensor = self.module(given.to(device), output_hidden_states=True).hidden_states[-2][0]
        return found


@dataclass(frozen=True)
class Reads:
    """What the transformers of a pipeline read: `grid`, the sizes of clips; `condition`: latents of a first frame
    beside those that are noised, and a mask; `image`: rows of the image encoder; `clean_first`: the first frame in its
    own place. `cfg`: of the first of them.
    """

    cfg: WanConfig
    grid: Grid
    condition: bool
    image: bool
    clean_first: bool

    @staticmethod
    def of(folder: WanFolder, coder: WanVaeConfig) -> "Reads":
        """ValueError for a transformer whose channels are not those of the autoencoder."""
        cfg, z = folder.config(folder.transformers[0]), coder.latent_channels
        beside = cfg.channels_in - z
        if cfg.channels_out != z or beside not in (0, z + coder.time_factor):
            raise ValueError(
                f"{folder.path}: the transformer takes {cfg.channels_in} channels and gives {cfg.channels_out}, and "
                f"its vae has {z}: it must take {z}, or {2 * z + coder.time_factor} with those of a first frame"
            )
        grid = Grid(coder.time_factor * cfg.patch[0], coder.space_factor * max(cfg.patch[1:]))
        return Reads(cfg, grid, beside > 0, bool(cfg.d_image), folder.clean_first)


def first_frame_mask(latents_ZFHW: Tensor, channels: int) -> Tensor:
    """The channels `[channels, f, h, w]` that tell which frames are given: the first one.

    >>> first_frame_mask(torch.zeros(16, 3, 1, 1), 4)[:, :, 0, 0].tolist()
    [[1.0, 0.0, 0.0], [1.0, 0.0, 0.0], [1.0, 0.0, 0.0], [1.0, 0.0, 0.0]]
    """
    mask = latents_ZFHW.new_zeros(channels, *latents_ZFHW.shape[1:])
    mask[:, 0] = 1
    return mask


def weights_of(folder: WanFolder, part: str) -> dict[str, str]:
    """What a cache remembers of an encoder: its path, for messages, and the digest of its weights."""
    path: Path = folder.part(part)
    return {"path": str(path), "digest": digest(path)}


def _loaded(model: Model, device: torch.device) -> Tree:
    assert model.load is not None
    return map_with_paths(lambda _, p: p.to(device), model.load())
