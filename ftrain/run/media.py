"""How a model's documents lie in the batches of a run, with the media that it reads."""

import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ftrain.data.layout import Layout, PackLayout, RowLayout
from ftrain.data.media.family import MediaFamily
from ftrain.modules.model import Model
from ftrain.modules.speech_packs import FRAMES, SPEECH, VOICES

PROCESSOR_FILES = (
    "preprocessor_config.json", "video_preprocessor_config.json", "processor_config.json", "chat_template.json",
)  # fmt: skip
"""Files of a folder that say how media are read, beside those of its tokenizer."""
_ONLY_FOR_PLACES = ("second_per_grid_ts",)


def layout_of(
    model: Model, family: MediaFamily | None = None, *, sequence: int = 1, rows: bool = False, codes: int = 0
) -> Layout:
    """How documents lie in batches of a model: in packs where they may share them, else as rows of their own.

    `family`: how the model sees media; None where it has none, or is not to see them. `sequence`: ranks that share a
    pack, each of which encodes frames of its own. `rows`: the family gives what towers made of media before. `codes`:
    of a frame of speech, of which a talker learns; 0: there is none. ValueError for more than one rank and rows of
    documents.
    """
    streams = () if family is None else family.streams
    if model.packs:
        heard = tuple(stream.heard for stream in streams)
        ready = None if model.media is None else _ReadyPack(model, heard, sequence, rows, codes)
        return PackLayout(streams, ready, parts=sequence)
    if sequence > 1:
        raise ValueError(
            f"--sequence {sequence}: {model.name} takes a row for each document, as {model.alone}, and ranks of a "
            "sequence axis share packs: divide rows among --shard and --replicate"
        )
    return RowLayout(streams, None if model.media is None else _ReadyRows(model, family))


@dataclass(frozen=True)
class _ReadyRows:
    """`model.media`, without what it alone reads."""

    model: Model
    family: MediaFamily | None

    def __call__(self, batch: dict[str, Any]) -> dict[str, Any]:
        given = batch if self.family is None else self.family.arranged(batch)
        made: dict[str, Any] = self.model.media(given)  # type: ignore[misc]
        return {name: leaf for name, leaf in made.items() if name not in _ONLY_FOR_PLACES}


@dataclass(frozen=True)
class _ReadyPack:
    """`model.media` of packs, with room for so many tokens of media in each: in a model that sees for some at least, so
    that all batches have the same leaves. `heard`: which kinds of media are sound. `parts`: ranks that share a pack.
    `rows`: media are rows of towers. `codes`: as `layout_of`.
    """

    model: Model
    heard: tuple[bool, ...] = ()
    parts: int = 1
    rows: bool = False
    codes: int = 0

    def __call__(self, batch: dict[str, Any], places: tuple[int, ...], packs: int) -> dict[str, Any]:
        pictures = sum(room for room, heard in zip(places, self.heard, strict=True) if not heard)
        room = max(self.parts, pictures) if places else None
        told: dict[str, Any] = {"rows": True} if self.rows else {}
        if self.codes and SPEECH not in batch:  # a step of packs without a document
            none = torch.zeros(0, dtype=torch.int64)
            batch = {**batch, SPEECH: none.view(0, self.codes), FRAMES: none, VOICES: none}
        made: dict[str, Any] = self.model.media(batch, places=room, packs=packs, parts=self.parts, **told)  # type: ignore[misc]
        return made


def copy_processor(source: Path, to: Path) -> None:
    """Copy the files that say how media are read from one folder to another; those that are not there are left out.
    OSError where the disk does not take them.
    """
    for name in PROCESSOR_FILES:
        if (source / name).is_file():
            shutil.copyfile(source / name, to / name)
