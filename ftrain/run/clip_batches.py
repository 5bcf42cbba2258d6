"""From cached clips to the batches of `ftrain.tasks.video`: clips of several sizes side by side in packs.

Legend: N rows of a batch, Q numbers of a row of clean data, P of the input, M clips, S text rows, C their width; Z
channels, F frames, H and W rows and columns of latents.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ftrain.data.clips.cache import CachedClip, read_clip
from ftrain.data.cost import Cost
from ftrain.data.documents import IGNORE, Document, Group
from ftrain.data.layout import PackLayout
from ftrain.data.packing import Plan
from ftrain.data.rejects import BadRow
from ftrain.data.sample import Part
from ftrain.kernels.documents import ids_of
from ftrain.modules.families.wan_config import WanConfig
from ftrain.modules.families.wan_latents import Clip, grid, lay
from ftrain.run.clip_encoders import first_frame_mask


@dataclass(frozen=True)
class ClipRows:
    """From a cached clip to a document of as many tokens as it has patches, which says what is read later."""

    cfg: WanConfig

    takes = (CachedClip,)

    def __call__(self, clip: CachedClip) -> Group:
        """BadRow for latents that do not divide into patches."""
        try:
            rows = math.prod(grid(clip.latents[1:], self.cfg.patch))
        except ValueError as error:
            raise BadRow(clip.place, "another size", str(error)) from error
        zeros = np.zeros(rows, np.int64)
        return Group((Document(zeros, zeros, parts=((Part("video", source=clip), clip.place),)),))


@dataclass(frozen=True)
class ReadClips:
    """A `Finish` of the loader: documents with the tensors of their clips, float32. `decoded`: False for clips that
    another process trains on, of which the shapes are needed alone.
    """

    cfg: WanConfig
    condition: bool = False
    image: bool = False
    decoded: bool = True

    def __call__(self, group: Group) -> Group:
        """BadRow for a clip whose file is damaged, or that lacks what the model reads."""
        # a list first: a tuple that a thread makes of a generator breaks where another thread asks gc for all objects
        read = [self._read(document) for document in group.documents]
        return Group(tuple(read), group.cost)

    def _read(self, document: Document) -> Document:
        clip, place = document.parts[0][0].source, document.parts[0][1]
        if not (self.decoded or self.image):
            empty = {"latents": np.zeros(clip.latents, np.float32), "text": np.zeros((0, self.cfg.d_text), np.float32)}
            more = {"condition": empty["latents"]} if self.condition else {}
            return Document(document.tokens, document.labels, media={**empty, **more})
        try:
            held = read_clip(clip)
        except (ValueError, OSError) as error:
            raise BadRow(place, "broken clip", str(error)) from error
        wanted = ["latents", "text", *(["condition"] if self.condition else []), *(["image"] if self.image else [])]
        missing = [name for name in wanted if name not in held]
        if missing:
            raise BadRow(place, "broken clip", f"the cache has no {missing[0]!r} of it: encode for this model")
        media = {name: held[name].float().numpy() for name in wanted}
        return Document(document.tokens, document.labels, media=media)


@dataclass(frozen=True, kw_only=True)
class ClipLayout(PackLayout):
    """Clips in packs as `ftrain.tasks.video` reads them.

    - `cfg`: the model. `most`: clips of a pack. `multiple`: of the rows of a pack, for ranks that share it.
    - `clean_first`: the first latent frame of each clip of several is given as it is.
    - `empty`: states of the empty caption `[S, C]`, where captions are left out; None elsewhere.
    - `mask`: channels of a condition that tell which frames are given; 0 without conditions.
    """

    cfg: WanConfig
    most: int = 1
    multiple: int = 1
    clean_first: bool = False
    empty: Tensor | None = None
    mask: int = 0

    def batch(
        self, packs: Sequence[Sequence[Group]], plan: Plan, *, slots: int, leaves: Mapping[str, np.dtype] | None
    ) -> dict[str, Any]:
        """The leaves that `ftrain.tasks.video.BATCH` tells, and those of the model."""
        del slots, leaves
        documents = [[document for group in pack for document in group.documents] for pack in packs]
        laid = lay(
            [[self._clip(document.media) for document in pack] for pack in documents],
            self.cfg, rows=plan.shape.length, clips=self.most, multiple=self.multiple,
        )  # fmt: skip
        own = self.cfg.row_out
        latents, clip_N = laid.pop("latents"), ids_of(laid["segments"]).clone()
        kept = {name: leaf for name, leaf in laid.items() if name not in ("times", "time_rows")}
        found = {
            **kept,
            "data": latents[:, :own].contiguous(),
            "labels": torch.where(clip_N % (self.most + 1) == self.most, IGNORE, 0),
            "clip": clip_N,
            "clips": torch.arange(len(packs) * (self.most + 1)),
            "text_clip": ids_of(laid["text_segments"]).clone(),
            "text_row": torch.arange(len(laid["text"])) % self.cfg.text_rows,
        }
        if latents.shape[1] > own:
            found["condition"] = latents[:, own:].contiguous()
        if self.clean_first:
            found["given"] = torch.cat([self._given(pack, plan.shape.length) for pack in documents])
        if self.empty is not None:
            short = self.cfg.text_rows - len(self.empty)
            found["empty"] = torch.cat([self.empty.float(), torch.zeros(short, self.cfg.d_text)])
        return found

    def _clip(self, media: Mapping[str, np.ndarray]) -> Clip:
        latents = torch.from_numpy(media["latents"])
        if "condition" in media:
            beside = torch.from_numpy(media["condition"])
            latents = torch.cat([latents, first_frame_mask(latents, self.mask), beside])
        image = torch.from_numpy(media["image"]) if "image" in media else None
        return Clip(latents, self.cfg.times[0], torch.from_numpy(media["text"]), image)

    def _given(self, pack: Sequence[Document], rows: int) -> Tensor:
        """Which rows of a pack are of a first frame."""
        found = torch.zeros(rows, dtype=torch.bool)
        first = 0
        for document in pack:
            f, h, w = grid(document.media["latents"].shape[1:], self.cfg.patch)
            found[first : first + h * w] = f > 1
            first += f * h * w
        return found


def cost_of(cfg: WanConfig) -> Cost:
    """What a clip costs by its rows, in FLOPs of a forward pass."""
    d = cfg.d_model
    linear = cfg.layers * (12 * d * d + 4 * d * cfg.d_hidden + 4 * cfg.text_rows * d)
    return Cost(linear=float(linear), quadratic=float(cfg.layers * 4 * d))
