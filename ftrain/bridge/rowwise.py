"""Models of transformers whose batch is rows: pictures and recordings, with a class or a text for each, or features.

Legend: B rows, C classes, L frames or patches of a row, D model width, V vocabulary.
"""

import inspect
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

from ftrain.bridge.attention import Call, calling
from ftrain.bridge.batches import require_tokens
from ftrain.bridge.modes import running
from ftrain.bridge.modules import Bridged
from ftrain.bridge.skeleton import flatten
from ftrain.bridge.targets import blank_of, class_loss, ctc_loss
from ftrain.kernels.mean import Mean
from ftrain.modules.model import Leaf
from ftrain.modules.spec import Tree
from ftrain.trace.spmd import current_sharded

NAMES = {
    "pixel_values": "pixels",
    "input_values": "sound",
    "input_features": "sound",
    "input_ids": "tokens",
    "attention_mask": "mask",
    "labels": "labels",
}
"""The leaves of a batch by the names of transformers' arguments; others keep their name."""
_MEANS = {
    "pixels": Leaf("pictures, floating", "[B, channels, height, width], or as the model's processor gives them"),
    "sound": Leaf("recordings, floating", "[B, samples], or [B, frames, bands] in the order of the model's processor"),
    "tokens": Leaf("ids of tokens", "[B, L]"),
    "mask": Leaf("true where a row has something; absent: everywhere", "[B, samples] or [B, frames], bool or int64"),
}
_NO_INPUT = ("use_cache", "return_dict", "head_mask", "labels")
TASKS = ("image_classification", "audio_classification", "ctc", "features")
"""The tasks of such models."""


@dataclass(frozen=True)
class Rowwise:
    """A model around `bridged`, whose rows do not know of each other (but for statistics of the batch).

    `task`: one of `TASKS`. It runs on the module's own numbers (`bridged`), or as a function of a tree.
    """

    bridged: Bridged
    task: str

    @cached_property
    def arguments(self) -> dict[str, str]:
        """The arguments of the module's forward that a batch can give, by the names of the leaves."""
        module: Any = self.bridged.module
        found = {NAMES.get(module.main_input_name, module.main_input_name): module.main_input_name}
        for name, parameter in inspect.signature(module.forward).parameters.items():
            by_name = parameter.kind not in (parameter.VAR_KEYWORD, parameter.VAR_POSITIONAL)
            if by_name and not name.startswith("output_") and name not in _NO_INPUT:
                found[NAMES.get(name, name)] = name
        return found

    @cached_property
    def leaves(self) -> dict[str, Leaf]:
        """What the model reads of a batch."""
        first, *_ = self.arguments
        found = {}
        for leaf, name in self.arguments.items():
            about = _MEANS.get(leaf, Leaf(f"transformers' {name}", "as transformers says"))
            found[leaf] = Leaf(about.means, about.shape, needed=leaf == first)
        if self.task == "ctc":
            found["labels"] = Leaf("the tokens that are spoken, or -100", "[B, N]")
            found["frames"] = Leaf("how many of the model's frames of a row are sound; absent: by the mask", "[B]")
        elif self.task != "features":
            found["labels"] = Leaf("the class of each row, or -100", "[B]")
        return found

    def loss(self, params: Tree, batch: Mapping[str, Any], key: Tensor | None = None, state: Tree | None = None) -> Any:
        """The mean loss of the batch's labels, or `(Mean, state)` if the model has state. `key`: int64 `[2]`, for
        dropout. ValueError for a batch that does not fit.
        """
        self._require_labels(batch)
        result, after = self._run(params, batch, key, state)
        mean = self._mean(self.bridged.module, result, batch)
        return (mean, after) if self.bridged.written else mean

    def logits(
        self, params: Tree, batch: Mapping[str, Any], key: Tensor | None = None, state: Tree | None = None
    ) -> Tensor:
        """The scores, `[B, C]` or `[B, L, V]`."""
        scores: Tensor = self._run(params, batch, key, state)[0].logits
        return scores

    def hidden(
        self, params: Tree, batch: Mapping[str, Any], key: Tensor | None = None, state: Tree | None = None
    ) -> Any:
        """The last layer's features as the module gives them: `[B, L, D]`, or `[B, D, height, width]`; or
        `(features, state)` if the model has state.
        """
        found, after = self._run(params, batch, key, state)
        return (found[0], after) if self.bridged.written else found[0]

    def plain(self, module: nn.Module, batch: Mapping[str, Any]) -> Mean:
        """The loss of a `module` of transformers by itself, in the mode that it is in. ValueError as `loss`."""
        self._require_labels(batch)
        return self._mean(module, module(**self._given(batch, next(module.parameters()).dtype)), batch)

    def _require_labels(self, batch: Mapping[str, Any]) -> None:
        if self.task == "features":
            raise ValueError(
                f"{self.bridged.name}: features have no loss: make one of model.hidden(params, batch), as a "
                "ftrain.Mean(total, count)"
            )
        if "labels" not in batch:
            raise ValueError(f"{self.bridged.name}: a loss needs the batch's 'labels'")

    def _run(self, params: Tree, batch: Mapping[str, Any], key: Tensor | None, state: Tree | None) -> tuple[Any, Tree]:
        require_tokens(self.bridged.name, batch, self.leaves)
        self._require_rows()
        dtype = next(x.dtype for x in flatten(params).values() if x.dtype.is_floating_point)
        with calling(Call(drops=key is not None, unmasked=True)), running(self.bridged.module, drawing=key is not None):
            return self.bridged.run(params, self._given(batch, dtype), key, state)

    def _require_rows(self) -> None:
        trace = current_sharded()
        if trace is not None and trace.plan.mesh.sequence > 1:
            raise ValueError(
                f"{self.bridged.name}: its batch is rows, and the ranks of a sequence axis share the tokens of a pack: "
                "divide rows among data axes (shard, replicate)"
            )

    def _given(self, batch: Mapping[str, Any], dtype: torch.dtype) -> dict[str, Any]:
        """The module's arguments, floating ones in the dtype of its parameters."""
        found = {name: batch[leaf] for leaf, name in self.arguments.items() if leaf in batch}
        return {name: x.to(dtype) if x.dtype.is_floating_point else x for name, x in found.items()}

    def _mean(self, module: Any, result: Any, batch: Mapping[str, Any]) -> Mean:
        if self.task == "ctc":
            return ctc_loss(result.logits, batch["labels"], self._frames(module, batch), blank_of(module.config))
        return class_loss(result.logits, batch["labels"])

    def _frames(self, module: Any, batch: Mapping[str, Any]) -> Tensor | None:
        """How many frames of each row are sound: given, or by the mask; None for all."""
        if "frames" in batch or "mask" not in batch:
            return batch.get("frames")
        count = getattr(module, "_get_feat_extract_output_lengths", None)
        if count is None:
            raise ValueError(
                f"{self.bridged.name} does not say how many frames a mask leaves: give the batch's 'frames' [B] too"
            )
        frames: Tensor = count(batch["mask"].sum(-1)).long()
        return frames
