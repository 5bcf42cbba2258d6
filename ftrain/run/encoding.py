"""Encode a folder of videos with captions into a cache of clips; a killed run goes on, and several share the work."""

import hashlib
import json
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ftrain.bridge.pipelines import WanFolder
from ftrain.checkpoint.durable import make_folder
from ftrain.data.clips import cache
from ftrain.data.clips.cache import EncodedClip
from ftrain.data.clips.captions import CLEANING, Video, videos_of
from ftrain.data.clips.frames import Cut, numbers_of, there_are
from ftrain.data.clips.sizes import Resize, Size, chosen, fitted, sizes_of
from ftrain.data.media.film_frames import film_header, frames_at
from ftrain.data.media.limits import Limits
from ftrain.data.rejects import BadRow
from ftrain.run.clip_encoders import ImageCoder, Reads, TextCoder, VideoCoder, weights_of

_RATE = 16.0  # told to readers for videos that are arrays, which none is here


@dataclass(frozen=True)
class EncodeJob:
    """What is encoded and how.

    - `model`: the folder of a pipeline. `videos`, `captions`: see `ftrain.data.clips.captions.videos_of`.
    - `sizes`: as "81x480x832"; none: each video as it is. `fps`: frames a second; 0: as they are. `cut`, `resize`: see
      `ftrain.data.clips.frames` and `sizes`.
    - `dtype`: of the cache; `vae_dtype`, `text_dtype`: that encoders compute in. `at_once`: latent frames at a time.
    - `shard`: videos of a shard. `rejected`: the share of videos that may be left out.
    """

    model: Path
    videos: Path
    out: Path
    captions: Path | None = None
    sizes: tuple[str, ...] = ()
    fps: float = 16.0
    cut: Cut = "first"
    resize: Resize = "crop"
    dtype: torch.dtype = torch.bfloat16
    vae_dtype: torch.dtype = torch.float32
    text_dtype: torch.dtype = torch.float32
    at_once: int | None = None
    shard: int = 16
    rejected: float = 0.05


def encode(
    job: EncodeJob,
    *,
    device: torch.device,
    part: int = 0,
    parts: int = 1,
    say: Callable[[str], None] = print,
) -> int:
    """Encode the shards of this part of the work that are missing; how many clips were written.

    `part` of `parts`: this process among those that share the work, each of which takes every `parts`-th shard.

    ValueError for options that do not fit the model, for a folder whose cache was made otherwise, and where too many
    videos cannot be used; OSError where the disk does not take a shard.
    """
    folder = WanFolder.open(job.model)
    coder = VideoCoder.open(folder, device=device, dtype=job.vae_dtype, frames=job.at_once)
    reads = Reads.of(folder, coder.cfg)
    sizes = sizes_of(job.sizes, reads.grid)
    videos = videos_of(job.videos, job.captions)
    shards = [videos[i : i + job.shard] for i in range(0, len(videos), job.shard)]
    cache.begin(job.out, _config(job, folder, reads, videos, len(shards)))
    empty = job.out / cache.EMPTY
    own = range(part, len(shards), parts)
    mine = [n for n in own if not cache.shard_of(job.out, n).is_file()]
    if not mine and empty.is_file():
        say(f"nothing is left to encode in {job.out}")
        _require_enough(job, own)
        return 0
    texts = TextCoder.open(folder, device=device, dtype=job.text_dtype, most=reads.cfg.text_rows)
    images = ImageCoder.open(folder, device=device) if reads.image else None
    work = _Work(job, sizes, reads, coder, texts, images)
    with torch.no_grad():
        if not empty.is_file() and part == 0:
            cache.write_whole(empty, {"text": texts.states([""])[0].to(job.dtype).cpu()}, {})
        written = _shards(work, shards, mine, say)
    _require_enough(job, own)
    return written


def _require_enough(job: EncodeJob, shards: Sequence[int]) -> None:
    """ValueError where too many videos of these shards were left out."""
    clips, left_out = cache.listed_in(job.out, shards)
    videos = len({clip.key.partition(".")[0] for clip in clips}) + len(left_out)
    if len(left_out) > job.rejected * videos:
        raise ValueError(
            f"{len(left_out)} of {videos} videos cannot be used, more than --rejected {job.rejected:g} of them; the "
            f"first: {left_out[0]}"
        )


def _shards(work: "_Work", shards: Sequence[Sequence[Video]], mine: Sequence[int], say: Callable[[str], None]) -> int:
    written = 0
    make_folder(work.job.out / cache.SHARDS)
    for number in mine:
        clips, left_out = list[EncodedClip](), list[str]()
        for row, video in enumerate(shards[number], number * work.job.shard):
            try:
                clips += work.clips(video, row)
            except BadRow as error:
                left_out.append(f"{video.path}: {error.detail}")
        cache.write_shard(cache.shard_of(work.job.out, number), clips, left_out)
        written += len(clips)
        say(f"shard {number + 1} of {len(shards)}: {len(clips)} clips, {len(left_out)} videos left out")
    return written


@dataclass(frozen=True)
class _Work:
    job: EncodeJob
    sizes: tuple[Size, ...]
    reads: Reads
    coder: VideoCoder
    texts: TextCoder
    images: ImageCoder | None

    def clips(self, video: Video, row: int) -> Iterator[EncodedClip]:
        """The clips of a video. BadRow where it cannot be used."""
        job, limits, place, path = self.job, Limits(), video.place, str(video.path.resolve())
        try:
            text = self.texts.states([video.caption])[0]
        except ValueError as error:
            raise BadRow(place, "caption too long", str(error)) from error
        header = film_header(path, place, limits, rate=_RATE)
        there = there_are(header, fps=job.fps, place=place)
        size = self._size(there, header.height, header.width, video)
        for n, numbers in enumerate(numbers_of(header, size.frames, fps=job.fps, cut=job.cut, there=there)):
            frames = frames_at(path, place, limits, numbers.tolist())
            pixels = fitted(frames, size, resize=job.resize, place=place)
            tensors = {"latents": self.coder.latents(pixels), "text": text}
            if self.reads.condition:
                tensors["condition"] = self.coder.first_frame(pixels)
            if self.images is not None:
                tensors["image"] = self.images.rows(pixels)
            held = {name: x.to(job.dtype).cpu() for name, x in tensors.items()}
            yield EncodedClip(
                f"{row}.{n}", str(video.path), video.caption, (size.frames, size.height, size.width), held
            )

    def _size(self, there: int, height: int, width: int, video: Video) -> Size:
        if self.sizes:
            return chosen(self.sizes, frames=there, height=height, width=width, place=video.place)
        size = Size(there, height, width)
        fault = self.reads.grid.fault(size)
        if fault:
            raise BadRow(video.place, "another size", f"{fault}; or give --sizes, to which videos are cut")
        return size


def _config(job: EncodeJob, folder: WanFolder, reads: Reads, videos: Sequence[Video], shards: int) -> dict[str, Any]:
    listed = [[os.path.relpath(video.path, job.videos), video.caption] for video in videos]
    return {
        "format": 1,
        "vae": weights_of(folder, "vae"),
        "text_encoder": weights_of(folder, "text_encoder"),
        "image_encoder": weights_of(folder, "image_encoder") if reads.image else None,
        "condition": reads.condition,
        "sizes": list(job.sizes),
        "fps": job.fps,
        "cut": job.cut,
        "resize": job.resize,
        "dtype": str(job.dtype).removeprefix("torch."),
        "vae_dtype": str(job.vae_dtype).removeprefix("torch."),
        "text_dtype": str(job.text_dtype).removeprefix("torch."),
        "captions_cleaned_by": CLEANING,
        "videos": {"count": len(videos), "list": _hash(listed)},
        "videos_of_a_shard": job.shard,
        "shards": shards,
    }


def _hash(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, ensure_ascii=False).encode()).hexdigest()
