"""Models of transformers as pure functions: causal and masked language models.

Legend: T tokens of a pack, B rows, L tokens of a row, V vocabulary, D model width.
"""

import inspect
from collections.abc import Mapping
from contextlib import nullcontext
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any, Self

import torch
from torch import Tensor, nn

from ftrain.bridge.attention import Call, calling
from ftrain.bridge.batches import LANGUAGE, counted, folded, mean_over_labels, positions, require_tokens, rows
from ftrain.bridge.draws import drawing
from ftrain.bridge.experts import expert_modules
from ftrain.bridge.heads import HeadReads, Scores, cross_entropy, token_losses
from ftrain.bridge.hit_experts import EveryExpert
from ftrain.bridge.routers import biases_of, counting, moved
from ftrain.bridge.skeleton import as_it_was, buffers, call, flatten, nest, parameters
from ftrain.kernels.mean import Mean
from ftrain.modules.model import Leaf
from ftrain.modules.moe import RouterLoad
from ftrain.modules.spec import Tree
from ftrain.trace.spmd import current_sharded


@dataclass(frozen=True)
class Language:
    """A language model of transformers around `module`, which may be without memory.

    `held`: its buffers by name. `accepted`: what its forward pass takes. `paths`: of the modules within it, by their
    id. `head`: the name of the head's weight, "" if the head is no linear layer. `alone`: why documents cannot share a
    pack, empty if they can. `first`: the position of a document's first token. `leaves`: what it reads of a batch.
    `written`: names of parameters that it writes over while it runs; it is given copies of them.
    `balanced`: by the path of experts the name of their router's balancing biases (`bridge/routers.py`), which are the
    model's state.
    """

    module: nn.Module
    name: str
    held: Mapping[str, Tensor]
    accepted: frozenset[str]
    paths: Mapping[int, str]
    head: str
    alone: str = ""
    first: int = 0
    leaves: Mapping[str, Leaf] = field(default_factory=lambda: MappingProxyType(LANGUAGE))
    written: frozenset[str] = frozenset()
    balanced: Mapping[str, str] = field(default_factory=lambda: MappingProxyType({}))

    @classmethod
    def of(cls, module: nn.Module, stored: Mapping[str, Tensor] | None = None) -> Self:
        """The model around a module. `stored`: buffers of any shape, by name, that a folder holds. ValueError for a
        module with a buffer that has no memory.
        """
        held = {**buffers(module), **(stored or {})}
        return cls(
            module,
            type(module).__name__,
            held,
            accepted=frozenset(inspect.signature(module.forward).parameters),
            paths={id(inner): path for path, inner in module.named_modules()},
            head=_head(module),
            balanced=MappingProxyType(biases_of(expert_modules(module), held)),
        )

    @property
    def state(self) -> Tree:
        """The balancing biases of the routers, in at least float32; empty for most models."""
        found = {name: self.held[name] for name in self.balanced.values()}
        return nest({name: x.to(torch.promote_types(x.dtype, torch.float32)) for name, x in found.items()})

    @property
    def routes(self) -> bool:
        """True for a model with experts that our primitive computes."""
        return any(True for _ in expert_modules(self.module))

    def loss(self, params: Tree, batch: Mapping[str, Any], key: Tensor | None = None, state: Tree | None = None) -> Any:
        """The `Mean` cross entropy of the batch's labels, or `(Mean, new state)` if the model has `state`: biases moved
        against the load of this batch. `key`: int64 `[2]`, for dropout. ValueError for a batch without labels, or that
        does not fit.
        """
        if not self.balanced:
            return self._mean(params, batch, key, state)
        mean, loads = self.routed(params, batch, key, state)
        return mean, self.rebalanced(state or self.state, loads)

    def routed(
        self, params: Tree, batch: Mapping[str, Any], key: Tensor | None = None, state: Tree | None = None
    ) -> tuple[Mean, Mapping[str, RouterLoad]]:
        """The mean of `loss`, and what each router did, by the path of its experts. `key`: int64 `[2]`. ValueError as
        `loss`.
        """
        with counting(self.paths) as loads:
            mean = self._mean(params, batch, key, state)
        return mean, loads

    def rebalanced(self, state: Tree, loads: Mapping[str, RouterLoad]) -> Tree:
        """The state after a step whose routers did this."""
        return nest(moved(flatten(state), loads, self.balanced))

    def _mean(self, params: Tree, batch: Mapping[str, Any], key: Tensor | None, state: Tree | None) -> Mean:
        self._require_labels(batch)
        total = cross_entropy(self._run(params, batch, key, state)[0], rows(batch["labels"]))
        return mean_over_labels(total, batch["labels"])

    def token_losses(
        self, params: Tree, batch: Mapping[str, Any], key: Tensor | None = None, state: Tree | None = None
    ) -> Tensor:
        """The cross entropy of each label, `[T]` or `[B, L]`, 0 where there is none. ValueError as `loss`."""
        self._require_labels(batch)
        found = token_losses(self._run(params, batch, key, state)[0], rows(batch["labels"]))
        return found[0] if batch["tokens"].dim() == 1 else found

    def _require_labels(self, batch: Mapping[str, Any]) -> None:
        if "labels" not in batch:
            raise ValueError(f"{self.name}: a loss needs the batch's 'labels'")

    def logits(
        self, params: Tree, batch: Mapping[str, Any], key: Tensor | None = None, state: Tree | None = None
    ) -> Tensor:
        """The scores `[T, V]` or `[B, L, V]`, in the dtype of the model."""
        scores = self._run(params, batch, key, state)[0]
        scores = scores.tensor() if isinstance(scores, Scores) else scores
        return scores[0] if batch["tokens"].dim() == 1 else scores

    def hidden(
        self, params: Tree, batch: Mapping[str, Any], key: Tensor | None = None, state: Tree | None = None
    ) -> Tensor:
        """What the head reads, `[T, D]` or `[B, L, D]`. ValueError where the head is no linear layer."""
        read = self._run(params, batch, key, state)[1]
        if read is None:
            raise ValueError(f"{self.name}: its head is no linear layer, so there is no input of it to show")
        return read[0] if batch["tokens"].dim() == 1 else read

    def _run(
        self, params: Tree, batch: Mapping[str, Any], key: Tensor | None, state: Tree | None = None
    ) -> tuple[Any, Tensor | None]:
        require_tokens(self.name, batch, self.leaves)
        self._require_documents_apart(batch)
        tensors = {**self.held, **flatten(state or {}), **flatten(params)}
        tensors |= {name: tensors[name].clone() for name in self.written}
        head = HeadReads(tensors[self.head]) if self.head in tensors else None
        about = Call(folded(batch.get("segments"), batch["tokens"]), drops=key is not None, paths=self.paths)
        draws = drawing(key, *batch["tokens"].shape[:2])
        read = head if head is not None else nullcontext()
        with as_it_was(self.module), calling(about), draws, EveryExpert(), read:
            found = call(self.module, tensors, (), self._arguments(batch))
        return found.logits, None if head is None else head.read

    def _require_documents_apart(self, batch: Mapping[str, Any]) -> None:
        """ValueError for documents, or ranks, that share a row of tokens which the model cannot keep apart."""
        trace = current_sharded()
        shared = trace is not None and trace.plan.mesh.sequence > 1
        if self.alone and (batch.get("segments") is not None or (shared and batch["tokens"].dim() == 1)):
            what = "ranks of a sequence axis" if shared else "several documents"
            raise ValueError(
                f"{self.name}: {what} cannot share its tokens, as {self.alone}: give rows of one document each, tokens "
                "[B, L] without segments, on data axes"
            )
        if shared and batch["tokens"].dim() > 1:
            raise ValueError(
                f"{self.name}: rows [B, L] on a sequence axis, whose ranks share the tokens of a pack: give one pack "
                "[T] with segments, or divide rows among data axes (shard, replicate)"
            )

    def _arguments(self, batch: Mapping[str, Any]) -> dict[str, Any]:
        found: dict[str, Any] = {"input_ids": rows(batch["tokens"])}
        if "use_cache" in self.accepted:
            found["use_cache"] = False
        if "lengths" in self.accepted:  # XLM and FlauBERT
            found.update(counted(found["input_ids"], self.module.config.pad_index))  # type: ignore[union-attr,arg-type]
        place = positions(batch) if "position_ids" in self.accepted else None
        if place is not None:
            found["position_ids"] = place + self.first if self.first else place
        return found


def _head(module: nn.Module) -> str:
    """The name, among the parameters, of the head's weight; "" if the head is no linear layer."""
    try:
        head = module.get_output_embeddings()  # type: ignore[operator]
    except (AttributeError, NotImplementedError):  # some models do not say where theirs is
        return ""
    if not isinstance(head, nn.Linear):
        return ""
    return next((name for name, p in parameters(module).items() if p is head.weight), "")
