"""Language models of transformers that read pictures and sound among their tokens, as pure functions.

Legend: B rows, L tokens of a row, P patches, V vocabulary, D model width.
"""

import inspect
from collections.abc import Mapping
from contextlib import nullcontext
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from ftrain.bridge.attention import Call, calling
from ftrain.bridge.batches import LANGUAGE, require_tokens
from ftrain.bridge.draws import drawing
from ftrain.bridge.heads import HeadReads
from ftrain.bridge.language import Language
from ftrain.bridge.modes import running
from ftrain.bridge.patches import Parts, Patches
from ftrain.bridge.places import InPlaces
from ftrain.bridge.rowwise import NAMES
from ftrain.bridge.skeleton import as_it_was, call, flatten
from ftrain.modules.model import Leaf
from ftrain.modules.spec import Tree
from ftrain.trace.spmd import current_sharded

TEXT = {
    "input_ids", "attention_mask", "position_ids", "cache", "past_key_values", "inputs_embeds", "labels", "use_cache",
    "logits_to_keep", "cache_position", "mm_encoder_outputs", "rope_deltas", "return_dict", "output_attentions",
    "output_hidden_states",
}  # fmt: skip
"""Arguments of a forward that are not of media."""


@dataclass(frozen=True)
class Media(Language):
    """A language model with media in the batch around `module`; fields as `Language` has them."""

    @cached_property
    def arguments(self) -> dict[str, str]:
        """The arguments of the module's forward that are of media, by the names of the leaves."""
        names = inspect.signature(self.module.forward).parameters
        named = [n for n, p in names.items() if p.kind not in (p.VAR_KEYWORD, p.VAR_POSITIONAL)]
        return {NAMES.get(name, name): name for name in named if name not in TEXT and not name.startswith("output_")}

    def _run(
        self, params: Tree, batch: Mapping[str, Any], key: Tensor | None, state: Tree | None = None
    ) -> tuple[Any, Tensor | None]:
        require_tokens(self.name, batch, self.leaves)
        self._require_rows(batch)
        leaves = flatten(params)
        tensors = {**self.held, **flatten(state or {}), **leaves}
        dtype = next(x.dtype for x in leaves.values() if x.dtype.is_floating_point)
        head = HeadReads(tensors[self.head]) if self.head in tensors else None
        about = Call(drops=key is not None, paths=self.paths, unmasked=True)
        draws = drawing(key, batch["tokens"].shape[0])
        mode = running(self.module, drawing=key is not None)
        places, read = InPlaces(batch["tokens"]), head if head is not None else nullcontext()
        with as_it_was(self.module), calling(about), draws, mode, places, read:
            found = call(self.module, tensors, (), self._given(batch, dtype))
        return found.logits, None if head is None else head.read

    def _require_rows(self, batch: Mapping[str, Any]) -> None:
        if batch["tokens"].dim() != 2 or batch.get("segments") is not None:
            raise ValueError(
                f"{self.name}: it reads media, and documents cannot share its tokens: give rows of one document each, "
                "tokens [B, L] without segments"
            )
        trace = current_sharded()
        if trace is not None and trace.plan.mesh.sequence > 1:
            raise ValueError(
                f"{self.name}: rows [B, L] on a sequence axis, whose ranks share the tokens of a pack: divide rows "
                "among data axes (shard, replicate)"
            )

    def _given(self, batch: Mapping[str, Any], dtype: torch.dtype) -> dict[str, Any]:
        """The module's arguments, media that are floating in the dtype of its parameters."""
        found: dict[str, Any] = {"input_ids": batch["tokens"]}
        if "use_cache" in self.accepted:
            found["use_cache"] = False
        place = batch.get("positions")
        if place is not None:
            found["position_ids"] = place.transpose(0, 1) if place.dim() == 3 else place
        found |= {name: batch[leaf] for leaf, name in self.arguments.items() if leaf in batch}
        for leaf, x in batch.get("media", {}).items():
            found[self.arguments.get(leaf, leaf)] = x.flatten(0, 1)
        for leaf in ("image_sizes", "batch_num_images"):
            if isinstance(found.get(leaf), tuple):
                found[leaf] = _sizes(self.name, leaf, found[leaf], len(found.get("pixel_values", ())))
        for modality in ("image", "video"):
            _with_grid(self.name, found, modality)
        media = {n for n in self.arguments.values() if isinstance(found.get(n), Tensor)}
        return {n: x.to(dtype) if n in media and x.dtype.is_floating_point else x for n, x in found.items()}


def _sizes(name: str, leaf: str, sizes: tuple[Any, ...], pictures: int) -> list[Any]:
    """The shapes of a rank's pictures, of those of all. ValueError where ranks would have others."""
    trace = current_sharded()
    if (trace is None or len(sizes) == pictures) or len(set(sizes)) == 1:
        own = sizes if trace is None else sizes[:pictures]
        return [list(size) if isinstance(size, tuple) else size for size in own]
    raise ValueError(
        f"{name}: the pictures of the batch have several {leaf!r}, and ranks share one program, in which they are "
        "constants: give each step pictures of one size, or train on one device"
    )


def _with_grid(name: str, given: dict[str, Any], modality: str) -> None:
    """Put in what a tower reads of its pictures' grid, of which all is known but how many patches there are."""
    parts = given.get(f"{modality}_cu_seqlens")
    if parts is None:
        return
    given[f"{modality}_grid_thw"] = Patches(name, len(parts))
    given[f"{modality}_cu_seqlens"] = Parts(name, parts)
    if f"{modality}_window_index" in given:
        given[f"{modality}_window_index"] = given[f"{modality}_window_index"].argsort()
        given[f"{modality}_cu_window_seqlens"] = Parts(name, given[f"{modality}_cu_window_seqlens"])


def leaves(made: Media) -> dict[str, Leaf]:
    """What a model with media reads of a batch."""
    text = {name: leaf for name, leaf in LANGUAGE.items() if name != "segments"}
    own = {leaf: Leaf(f"transformers' {name}", "as its processor gives it") for leaf, name in made.arguments.items()}
    return {**text, **own, "media": Leaf("what `model.media(batch)` makes of media", "rows first")}
