"""`ftrain sample --model PIPELINE --prompt "..." --out film.mp4`: films of a pipeline of Wan's."""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch

from ftrain import lora
from ftrain.bridge.native_wan import native_wan
from ftrain.bridge.pipelines import WanFolder, shift_of
from ftrain.cli.recipes import DTYPES
from ftrain.cli.train import device_of
from ftrain.data.clips.sizes import Size, fitted, sizes_of
from ftrain.data.media.film_writing import frames_of, write_mp4, write_strip
from ftrain.data.media.images import read_image
from ftrain.data.media.limits import Limits
from ftrain.data.sample import Place
from ftrain.kernels import random
from ftrain.modules.spec import map_with_paths
from ftrain.run.clip_encoders import ImageCoder, Reads, TextCoder, VideoCoder
from ftrain.run.film_sampling import Asked, Expert, Sampling, make_film, noise_of


@dataclass(frozen=True)
class SampleOptions:
    """Make a film with a video pipeline of Wan's, as mp4 and a strip of its frames as PNG beside it."""

    model: Path
    """The folder of a pipeline of Wan's, as diffusers writes it."""
    prompt: str
    """What the film shows."""
    out: Path
    """The mp4; the strip has its name with .png."""
    adapter: Path | None = None
    """A folder that PEFT or `ftrain train video` wrote, for the transformer (of two experts the first)."""
    adapter_low: Path | None = None
    """Another one for the second expert."""
    transformer: Path | None = None
    """A folder in the place of the pipeline's transformer, such as that of a run."""
    negative: str = ""
    """What the film must not be: the other side of guidance."""
    size: str = "81x480x832"
    """Frames x height x width."""
    image: Path | None = None
    """A picture that the film begins with, for image-to-video pipelines."""
    sampler: Literal["unipc", "euler", "few"] = "unipc"
    """unipc and euler take --steps; few is for distilled models and takes --times."""
    steps: int = 50
    """Steps of the sampler."""
    shift: float | None = None
    """Moves times towards noise; default: what the pipeline's scheduler says, or 3."""
    guidance: float = 5.0
    """How far the prompt is followed beyond the negative one; 1: no guidance, half the work."""
    guidance_low: float | None = None
    """That of the second of two experts; default: the same."""
    times: tuple[float, ...] = ()
    """Of the sampler few: going down to 0, such as 1 0.937 0.833 0.624 0."""
    seed: int = 0
    """Of the noise."""
    fps: float = 16.0
    """Frames a second of the file."""
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """Of the transformer and the text encoder. auto: bfloat16 on CUDA, float32 on a CPU."""
    at_once: int | None = None
    """Latent frames that are decoded at a time, to save memory."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """auto: CUDA where there is one."""


def run(options: SampleOptions) -> int:
    """The command. ValueError for what the user can mend."""
    folder, device = WanFolder.open(options.model), device_of(options.device)
    dtype = DTYPES[("bfloat16" if device.type == "cuda" else "float32") if options.dtype == "auto" else options.dtype]
    shift = shift_of(folder) if options.shift is None else options.shift
    sampling = Sampling(
        options.sampler, options.steps, shift, options.guidance, options.guidance_low, tuple(options.times)
    )
    coder = VideoCoder.open(folder, device=device, dtype=torch.float32, frames=options.at_once)
    reads = Reads.of(folder, coder.cfg)
    size = sizes_of([options.size], reads.grid)[0]
    _require_possible(options, reads, folder)
    with torch.no_grad():
        asked = _asked(options, folder, reads, coder, size, device, dtype)
        experts = _experts(options, folder, device, dtype)
        key = random.key(options.seed, device=device)
        found = make_film(
            asked, experts, sampling, noise_ZFHW=noise_of(asked, random.fold_in(key, 0)), key=random.fold_in(key, 1)
        )
        frames = frames_of(coder.video(found))
    write_mp4(options.out, frames, fps=options.fps)
    strip = options.out.with_suffix(".png")
    write_strip(strip, frames)
    print(f"wrote {options.out} and {strip}")
    return 0


def _require_possible(options: SampleOptions, reads: Reads, folder: WanFolder) -> None:
    if options.out.suffix != ".mp4":
        raise ValueError(f"--out {options.out}: films are written as .mp4")
    begins = reads.condition or reads.image
    if begins and options.image is None:
        raise ValueError(f"{folder.path} makes films of a first picture: give --image")
    if options.image is not None and not begins and not reads.clean_first:
        raise ValueError(f"--image {options.image}: {folder.path} makes films of texts alone")
    if options.adapter_low is not None and len(folder.transformers) < 2:
        raise ValueError(f"--adapter-low {options.adapter_low}: {folder.path} has one transformer alone")


def _asked(
    options: SampleOptions,
    folder: WanFolder,
    reads: Reads,
    coder: VideoCoder,
    size: Size,
    device: torch.device,
    dtype: torch.dtype,
) -> Asked:
    """What the encoders make of the options; they are let go afterwards."""
    texts = TextCoder.open(folder, device=device, dtype=dtype, most=reads.cfg.text_rows)
    text, negative = texts.states([options.prompt, options.negative])
    latents = (
        coder.cfg.latent_channels, (size.frames - 1) // coder.cfg.time_factor + 1,
        size.height // coder.cfg.space_factor, size.width // coder.cfg.space_factor,
    )  # fmt: skip
    if options.image is None:
        return Asked(latents, text, negative)
    place = Place(str(options.image), 1)
    picture = read_image(str(options.image.resolve()), place, Limits())
    first = fitted(picture[None], Size(1, *size[1:]), resize="crop", place=place).to(device)
    video = torch.zeros(3, *size, device=device)
    video[:, :1] = first
    return Asked(
        latents, text, negative,
        condition_ZFHW=coder.first_frame(video) if reads.condition else None,
        image_IC=ImageCoder.open(folder, device=device).rows(video) if reads.image else None,
        first_ZHW=coder.latents(first)[:, 0] if reads.clean_first and not reads.condition else None,
    )  # fmt: skip


def _experts(options: SampleOptions, folder: WanFolder, device: torch.device, dtype: torch.dtype) -> tuple[Expert, ...]:
    """The pipeline's transformers with their adapters merged."""
    found = list[Expert]()
    for number, name in enumerate(folder.transformers):
        own = options.transformer if number == 0 and options.transformer is not None else folder.part(name)
        model, cfg = native_wan(own, dtype=dtype), folder.config(name)
        assert model.load is not None
        params = model.load()
        adapter = options.adapter if number == 0 else options.adapter_low
        if adapter is not None:
            made, delta = lora.load(adapter, model)
            params = lora.merge(params, delta, made)
        found.append(Expert(model, map_with_paths(lambda _, p: p.to(device), params), cfg))
    return tuple(found)


COMMANDS = {"sample": (SampleOptions, run)}
