"""Films of a run on its way: what the model makes of captions of the cache, as mp4 and strips in the run's folder."""

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import torch
from torch import Tensor

from ftrain.bridge.pipelines import WanFolder
from ftrain.data.clips.cache import CachedClip, read_clip
from ftrain.data.media.film_writing import frames_of, write_mp4, write_strip
from ftrain.kernels import random
from ftrain.modules.families.wan_config import WanConfig
from ftrain.run.clip_encoders import VideoCoder
from ftrain.run.film_sampling import Asked, Expert, Sampling, make_film, noise_of
from ftrain.run.recipe import Recipe
from ftrain.step.state import TrainState

FOLDER = "videos"


@dataclass(frozen=True)
class FilmShow:
    """Makes the films of some clips' captions, from the same noise each time.

    - `clips`: whose captions, sizes and first frames are taken. `empty_SC`: states of the empty caption.
    - `folder`: of the pipeline, for its autoencoder. `cfg`: of the transformer. `first_frame`: is given in its place.
    - `to`: the run's folder. `fps`: of the files. `device`: of the run.
    """

    clips: tuple[CachedClip, ...]
    empty_SC: Tensor
    folder: WanFolder
    cfg: WanConfig
    first_frame: bool
    sampling: Sampling
    to: Path
    fps: float
    device: torch.device

    def __call__(self, recipe: Recipe, state: TrainState, number: int) -> str:
        """Write the films after step `number`; a line for the log. OSError where the disk does not take them."""
        expert = Expert(recipe.model, recipe.seen(state), self.cfg)
        files = [self._film(clip, expert, number, row) for row, clip in enumerate(self.clips)]
        return f"  films of {len(files)} captions: {files[0]}" + (" and others" if len(files) > 1 else "")

    def _film(self, clip: CachedClip, expert: Expert, number: int, row: int) -> Path:
        asked, key = self._asked(clip), random.fold_in(random.key(0, device=self.device), row)
        with torch.no_grad():
            found = make_film(asked, [expert], self.sampling, noise_ZFHW=noise_of(asked, key), key=key)
            frames = frames_of(self._coder.video(found))
        file = self.to / FOLDER / f"step_{number:06d}_{row}.mp4"
        write_mp4(file, frames, fps=self.fps)
        write_strip(file.with_suffix(".png"), frames)
        return file

    def _asked(self, clip: CachedClip) -> Asked:
        held = {name: x.to(self.device).float() for name, x in read_clip(clip).items()}
        reads_first = self.cfg.channels_in > self.cfg.channels_out
        return Asked(
            clip.latents, held["text"], self.empty_SC.to(self.device).float(),
            condition_ZFHW=held["condition"] if reads_first else None,
            image_IC=held["image"] if self.cfg.d_image else None,
            first_ZHW=held["latents"][:, 0] if self.first_frame else None,
        )  # fmt: skip

    @cached_property
    def _coder(self) -> VideoCoder:
        return VideoCoder.open(self.folder, device=self.device, dtype=torch.float32)
