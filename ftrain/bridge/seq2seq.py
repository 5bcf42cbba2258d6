"""Models of transformers that read a source and write a text: encoder-decoders, of text or of sound.

Legend: S tokens of the sources in a pack, T tokens of the targets, B rows, L tokens of a row, V vocabulary.
"""

from collections.abc import Mapping
from contextlib import nullcontext
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from torch import Tensor, nn

from ftrain.bridge.attention import Call, calling
from ftrain.bridge.batches import LANGUAGE, positions, require_tokens, rows
from ftrain.bridge.draws import drawing
from ftrain.bridge.heads import HeadReads
from ftrain.bridge.language import Language
from ftrain.bridge.modes import running
from ftrain.bridge.skeleton import call, flatten
from ftrain.modules.model import Leaf
from ftrain.modules.spec import Tree
from ftrain.trace.spmd import current_sharded

SOURCE = {
    "source": Leaf(
        "ids of the source's tokens, or its sound as the model's processor gives it", "[S] or [B, ...]", True
    ),
    "source_mask": Leaf("true where a row of the source has something; absent: everywhere", "[B, L]"),
    "mask": Leaf("true where a row of the target has something, for models that look for padding", "[B, L]"),
    "source_segments": Leaf("ids of documents as in 'segments': a target reads the source of its own id", "[S]"),
    "source_positions": Leaf("places of the source's tokens in their documents; counted if absent", "[S]"),
}
"""What such a model reads beside a language model's leaves, which are of the target."""


@dataclass(frozen=True)
class Seq2Seq(Language):
    """An encoder-decoder of transformers around `module`; fields as `Language` has them.

    The batch's `tokens` are what the decoder reads, `labels` what it is to say at each.
    """

    def _run(
        self, params: Tree, batch: Mapping[str, Any], key: Tensor | None, state: Tree | None = None
    ) -> tuple[Any, Tensor | None]:
        found, read = self.result(params, batch, key, state)
        return found.logits, read

    def result(
        self, params: Tree, batch: Mapping[str, Any], key: Tensor | None = None, state: Tree | None = None
    ) -> tuple[Any, Tensor | None]:
        """What the module gives, and what its head reads, `[B, L, D]` (None where it is no linear layer).

        ValueError for a batch that does not fit.
        """
        require_tokens(self.name, batch, self.leaves)
        self._require_pairs(batch)
        leaves = flatten(params)
        tensors = {**self.held, **flatten(state or {}), **leaves}
        if batch["source"].dtype.is_floating_point:
            dtype = next(x.dtype for x in leaves.values() if x.dtype.is_floating_point)
            batch = {**batch, "source": batch["source"].to(dtype)}
        head = HeadReads(tensors[self.head]) if self.head in tensors else None
        about = Call(
            batch.get("segments"),
            batch.get("source_segments"),
            drops=key is not None,
            paths=self.paths,
            sources=self._encoder,
            unmasked=True,
        )
        draws = drawing(key, batch["tokens"].shape[0] if batch["tokens"].dim() > 1 else 0)
        mode = running(self.module, drawing=key is not None)
        with calling(about), draws, mode, head if head is not None else nullcontext():
            found = call(self.module, tensors, (), self._arguments(batch))
        return found, None if head is None else head.read

    def _require_pairs(self, batch: Mapping[str, Any]) -> None:
        """ValueError for sources and targets that cannot be told apart, or not run together."""
        packs = batch["tokens"].dim() == 1
        segments = [name for name in ("segments", "source_segments") if batch.get(name) is not None]
        if len(segments) == 1:
            raise ValueError(f"{self.name}: the batch has {segments[0]!r} alone: sources and targets need one each")
        if segments and self.alone:
            raise ValueError(
                f"{self.name}: several documents cannot share its tokens, as {self.alone}: give rows of one document "
                "each, source and tokens [B, L] without segments"
            )
        if segments and not packs:
            raise ValueError(f"{self.name}: rows are a document each: give a pack, tokens [T] and source [S]")
        if packs and batch["source"].dim() != 1:
            raise ValueError(
                f"{self.name}: tokens [T] are a pack, and the source has {batch['source'].dim()} dims: give rows"
            )
        trace = current_sharded()
        if trace is not None and trace.plan.mesh.sequence > 1:
            raise ValueError(
                f"{self.name}: it reads a source, which the ranks of a sequence axis do not share: divide rows, or "
                "packs of whole documents with their sources, among data axes (shard, replicate)"
            )

    def _arguments(self, batch: Mapping[str, Any]) -> dict[str, Any]:
        source: Tensor = rows(batch["source"])
        main: Any = self.module.main_input_name
        found: dict[str, Any] = {
            main: source,
            "decoder_input_ids": rows(batch["tokens"]),
        }
        if "use_cache" in self.accepted:
            found["use_cache"] = False
        if batch.get("source_mask") is not None:
            found["attention_mask"] = batch["source_mask"].long()
        if batch.get("mask") is not None:
            found["decoder_attention_mask"] = batch["mask"].long()
        if not self.alone and {"position_ids", "decoder_position_ids"} <= self.accepted:
            found["position_ids"] = positions(
                {
                    "tokens": batch["source"],
                    "segments": batch.get("source_segments"),
                    "positions": batch.get("source_positions"),
                }
            )
            found["decoder_position_ids"] = positions(batch)
        return found

    def settled(self) -> "Seq2Seq":
        """The same, with its encoder looked up: a step that found it out would be traced twice."""
        getattr(self, "_encoder")  # noqa: B009
        return self

    @cached_property
    def _encoder(self) -> frozenset[int]:
        """The modules of the encoder, by their id."""
        made: Any = self.module
        encoder: nn.Module = made.get_encoder()
        return frozenset(id(inner) for inner in encoder.modules())


def leaves() -> dict[str, Leaf]:
    """What an encoder-decoder reads of a batch."""
    return {**SOURCE, **LANGUAGE}
