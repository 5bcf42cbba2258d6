"""The cache of encoded clips: a folder of shards of safetensors, each written whole or not at all.

    OUT/cache.json              what the clips were made of and how; another run must agree to go on in the folder
    OUT/empty.safetensors       states of the empty text
    OUT/shards/00000.safetensors    clips of the first rows; its header lists them, and rows that were left out

Legend: Z channels of latents, F latent frames, H and W rows and columns of latents, S text rows, C their width, I rows
of the image encoder.
"""

import json
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from safetensors.torch import save_file
from torch import Tensor

from ftrain.checkpoint.durable import make_folder, sync_path, write_text
from ftrain.data.sample import Place
from ftrain.files.outside import JSON_BYTES, check, listed, parse, record, text, whole
from ftrain.hf.files import member, opened, parse_json, read_member

CONFIG, EMPTY, SHARDS = "cache.json", "empty.safetensors", "shards"
_CLIP = record(
    {"key": text(64), "video": text(4096), "caption": text(), "size": listed(whole(1, 2**20), least=3)},
    optional={"latents": listed(whole(1, 2**20), least=4), "text_rows": whole(0, 2**20)},
)
_ROWS = record({"clips": listed(_CLIP), "left_out": listed(text())})
NAMES = ("latents", "text", "condition", "image")
"""Tensors of a clip: latents `[Z, F, H, W]`, states of its text `[S, C]`, and where the model asks for them latents of
its first frame before nothing `[Z, F, H, W]` and rows of the image encoder `[I, width]`."""


class CachedClip(NamedTuple):
    """A clip of the cache: the `shard` and the `key` of its tensors, its video, caption and size in pixels, the shape
    of its latents `[Z, F, H, W]`, and how many rows its text has.
    """

    shard: Path
    key: str
    video: str
    caption: str
    size: tuple[int, int, int]
    latents: tuple[int, int, int, int]
    text_rows: int

    @property
    def place(self) -> Place:
        """For messages."""
        return Place(f"{self.shard.name}: {self.video}", 1)


class EncodedClip(NamedTuple):
    """A clip to be written; `tensors` by `NAMES`."""

    key: str
    video: str
    caption: str
    size: tuple[int, int, int]
    tensors: Mapping[str, Tensor]


def begin(folder: Path, config: Mapping[str, Any]) -> None:
    """Make the folder of a cache, or go on in one. ValueError for a folder whose cache was made otherwise, which names
    the first thing that differs.
    """
    make_folder(folder / SHARDS)
    if (folder / CONFIG).is_file():
        require_same(folder, config_of(folder), config)
    elif any((folder / SHARDS).iterdir()):
        raise ValueError(f"{folder / SHARDS} holds files and {CONFIG} is missing: give a new folder")
    else:
        write_text(folder / CONFIG, json.dumps(config, indent=2, sort_keys=True) + "\n")


def config_of(folder: Path) -> dict[str, Any]:
    """What `cache.json` says. ValueError for a folder without one."""
    if not (folder / CONFIG).is_file():
        raise ValueError(f"{folder} is no cache of clips, as `ftrain encode` writes it: it has no {CONFIG}")
    return parse_json(read_member(folder, CONFIG, limit=JSON_BYTES), str(folder / CONFIG))


def missing_shards(folder: Path) -> list[int]:
    """Numbers of the shards that are not written yet. ValueError for a folder without a cache."""
    config = config_of(folder)
    check(config, record({"shards": whole(1, 10**8)}, others=True), str(folder / CONFIG))
    return [n for n in range(config["shards"]) if not shard_of(folder, n).is_file()]


def require_same(folder: Path, before: Mapping[str, Any], now: Mapping[str, Any]) -> None:
    """ValueError for the first entry in which two descriptions of a cache differ."""
    for name in sorted({*before, *now}):
        if _weights(before.get(name)) != _weights(now.get(name)):
            raise ValueError(
                f"the cache in {folder} was made with {name} = {_said(before.get(name))}, and these options say "
                f"{_said(now.get(name))}: give the same, or encode into another folder"
            )


def _weights(value: Any) -> Any:
    """Of weights only the digest: the same ones may lie elsewhere."""
    return value["digest"] if isinstance(value, dict) and "digest" in value else value


def _said(value: Any) -> Any:
    if isinstance(value, dict) and "digest" in value:
        return f"that of {value.get('path')} (weights {str(value['digest'])[:8]})"
    return value


def shard_of(folder: Path, number: int) -> Path:
    """The file of a shard."""
    return folder / SHARDS / f"{number:05d}.safetensors"


def write_shard(file: Path, clips: Sequence[EncodedClip], left_out: Sequence[str]) -> None:
    """Write a shard; a process that is killed leaves none under its name. OSError where the disk does not take it."""
    rows = [
        {
            "key": clip.key, "video": clip.video, "caption": clip.caption, "size": list(clip.size),
            "latents": list(clip.tensors["latents"].shape), "text_rows": len(clip.tensors["text"]),
        }
        for clip in clips
    ]  # fmt: skip
    tensors = {f"{c.key}.{name}": x.detach().cpu().clone() for c in clips for name, x in c.tensors.items()}  # no views
    write_whole(file, tensors, {"rows": json.dumps({"clips": rows, "left_out": list(left_out)})})


def write_whole(file: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> None:
    """Write tensors of any shapes under another name first. OSError where the disk does not take them."""
    made = file.with_name(f".{file.name}.part")  # one process writes a shard, and the next one over what it left
    save_file(dict(tensors), made, metadata=dict(metadata))
    sync_path(made)
    os.replace(made, file)
    sync_path(file.parent)


@dataclass(frozen=True)
class Cache:
    """A whole cache: its `folder`, what `config` says, its `clips` in order, and rows that were left out."""

    folder: Path
    config: Mapping[str, Any]
    clips: tuple[CachedClip, ...]
    left_out: tuple[str, ...]

    @staticmethod
    def open(folder: Path) -> "Cache":
        """Read the headers of all shards. ValueError for a folder without a cache, one that is not finished, a damaged
        shard, or one without clips.
        """
        config, missing = config_of(folder), missing_shards(folder)
        if missing or not (folder / EMPTY).is_file():
            done = config["shards"] - len(missing)
            raise ValueError(
                f"{folder} has {done} of {config['shards']} shards: the same `ftrain encode` command makes the others"
            )
        clips, left_out = listed_in(folder, range(config["shards"]))
        if not clips:
            raise ValueError(f"{folder} has no clip: {left_out[0] if left_out else 'encode videos into it'}")
        return Cache(folder, config, tuple(clips), tuple(left_out))

    def __len__(self) -> int:
        return len(self.clips)

    def __getitem__(self, index: int) -> CachedClip:
        return self.clips[index]

    def empty_text(self) -> Tensor:
        """States of the empty text `[S, C]`. ValueError where the file is damaged."""
        with opened(member(self.folder, EMPTY)) as file:
            found: Tensor = file.get_tensor("text")
        return found


def read_clip(clip: CachedClip) -> dict[str, Tensor]:
    """The tensors of a clip, by those of `NAMES` that it has, in the dtype of the cache. ValueError for a damaged file,
    and for shapes that its header does not tell.
    """
    with opened(clip.shard) as file:
        there = set(file.keys())
        found = {name: file.get_tensor(f"{clip.key}.{name}") for name in NAMES if f"{clip.key}.{name}" in there}
    shapes = (tuple(found["latents"].shape), len(found["text"])) if {"latents", "text"} <= found.keys() else None
    if shapes != (clip.latents, clip.text_rows):
        raise ValueError(f"{clip.shard}: clip {clip.key!r} is not what the file's header tells: encode it again")
    return found


def listed_in(folder: Path, shards: Iterable[int]) -> tuple[list[CachedClip], list[str]]:
    """Clips of these shards, and the rows that were left out of them. ValueError for a damaged one."""
    clips, left_out = list[CachedClip](), list[str]()
    for number in shards:
        own, out = _read_header(folder, shard_of(folder, number))
        clips += own
        left_out += out
    return clips, left_out


def _read_header(folder: Path, file: Path) -> tuple[list[CachedClip], list[str]]:
    with opened(member(folder, file.name, below=SHARDS)) as held:
        rows = (held.metadata() or {}).get("rows", "null")
    found = check(parse(rows, str(file)), _ROWS, str(file))
    clips = [
        CachedClip(
            file, row["key"], row["video"], row["caption"], tuple(row["size"]), tuple(row["latents"]), row["text_rows"]
        )
        for row in found["clips"]
    ]
    return clips, found["left_out"]
