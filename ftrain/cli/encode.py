"""`ftrain encode --model PIPELINE --videos DIR --out CACHE`: latents, texts and conditions of a folder of videos."""

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from ftrain.cli.recipes import DTYPES
from ftrain.cli.train import device_of
from ftrain.data.clips.cache import Cache, missing_shards
from ftrain.data.clips.frames import Cut
from ftrain.data.clips.sizes import Resize
from ftrain.run.encoding import EncodeJob, encode


@dataclass(frozen=True)
class EncodeOptions:
    """Encode videos with captions for `ftrain train video`. A command that was killed goes on when it is given again;
    under torchrun, or with --part and --parts, several processes share the work.
    """

    model: Path
    """The folder of a pipeline of Wan's, as diffusers writes it: its vae, text_encoder and tokenizer are used."""
    videos: Path
    """A folder of videos, with captions.csv or captions.jsonl (file_name, text), or a .txt beside each."""
    out: Path
    """The folder of the cache."""
    captions: Path | None = None
    """Another list of captions, csv or jsonl."""
    sizes: tuple[str, ...] = ()
    """Sizes of clips, as 81x480x832 (frames x height x width); a video gets the one that fits it best. Default: each
    video keeps its own size, which must be one that the model takes."""
    fps: float = 16.0
    """Frames a second; 0: as the videos have them. Wan 2.1 is for 16, Wan 2.2's 5B for 24."""
    cut: Cut = "first"
    """Of a longer video: its beginning, its middle, or as many whole clips as it has."""
    resize: Resize = "crop"
    """crop: scale to cover the size and cut the middle out; stretch: scale each side; refuse: leave other sizes out."""
    dtype: Literal["bfloat16", "float32"] = "bfloat16"
    """Of the cache."""
    vae_dtype: Literal["float32", "bfloat16"] = "float32"
    """In which the autoencoder computes."""
    text_dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """In which the text encoder computes. auto: bfloat16 on CUDA, float32 on a CPU."""
    at_once: int | None = None
    """Latent frames that are encoded at a time, to save memory; default: all of a clip."""
    shard: int = 16
    """Videos of a file of the cache."""
    rejected: float = 0.05
    """The share of videos that cannot be used before the command ends with an error."""
    part: int | None = None
    """This process's number among --parts, from 0; default: its rank under torchrun."""
    parts: int | None = None
    """How many processes share the work."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """auto: CUDA where there is one."""


def run(options: EncodeOptions) -> int:
    """The command. ValueError for what the user can mend."""
    part = int(os.environ.get("RANK", "0")) if options.part is None else options.part
    parts = int(os.environ.get("WORLD_SIZE", "1")) if options.parts is None else options.parts
    if not 0 <= part < parts or options.shard < 1 or options.fps < 0:
        raise ValueError(
            f"--part {part} of --parts {parts}, --shard {options.shard}, --fps {options.fps:g}: parts count from 0, a "
            "shard has a video at least, and a rate is not negative"
        )
    device = device_of(options.device)
    text = ("bfloat16" if device.type == "cuda" else "float32") if options.text_dtype == "auto" else options.text_dtype
    job = EncodeJob(
        options.model, options.videos, options.out, options.captions, options.sizes, options.fps, options.cut,
        options.resize, DTYPES[options.dtype], DTYPES[options.vae_dtype], DTYPES[text], options.at_once, options.shard,
        options.rejected,
    )  # fmt: skip
    encode(job, device=device, part=part, parts=parts)
    missing = missing_shards(options.out)
    if missing:
        print(f"{options.out}: {len(missing)} shards are left for other processes")
        return 0
    found = Cache.open(options.out)
    sizes = sorted({clip.size for clip in found.clips})
    told = ", ".join("x".join(map(str, size)) for size in sizes)
    print(f"{options.out}: {len(found)} clips of {told}; {len(found.left_out)} videos were left out")
    for line in found.left_out[:10]:
        print(f"  {line}")
    return 0


COMMANDS = {"encode": (EncodeOptions, run)}
