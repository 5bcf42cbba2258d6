"""Small models with low-rank deltas in float64: native and bridged, each with a loss over (delta, base, batch)."""

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

import ftrain
from ftrain import lora, tree
from ftrain.bridge import from_transformers
from ftrain.lora.adapter import Adapter
from ftrain.lora.low_rank import dense
from tests.helpers import mesh_models

SIZES = {
    "vocab_size": 61, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 4,
    "pad_token_id": 0, "num_key_value_heads": 2, "head_dim": 4,
}  # fmt: skip


@dataclass(frozen=True, eq=False)
class Adapted:
    """`loss(params, batch)` of a model with these specs, an adapter of it, and `batch(packs)`."""

    specs: Any
    loss: Callable[[Any, Any], Any]
    batch: Callable[[int], dict[str, Any]]
    adapter: Adapter

    def arguments(self, packs: int = 1, *, dtype: torch.dtype = torch.float64) -> tuple[Any, Any, Any]:
        """Deltas, none of which is zero, the base, and a batch of so many packs."""
        base = tree.map(lambda x: x.to(dtype), ftrain.init(self.specs, ftrain.key(0)))
        delta = self.adapter.init(ftrain.key(1), base=base)
        noise = tree.map_with_path(lambda path, x: 0.1 * numbers(path, x), delta)
        return tree.map(lambda x, n: (x + n).to(dtype), delta, noise), base, self.batch(packs)

    def of_parts(self, delta: Any, base: Any, batch: Any) -> Any:
        """The loss of what `bind` gives."""
        return self.loss(lora.bind(base, delta, self.adapter), batch)

    def of_sums(self, delta: Any, base: Any, batch: Any) -> Any:
        """The loss of the same weights, added up before the model sees them."""
        return self.loss(tree.map(dense, lora.bind(base, delta, self.adapter)), batch)


def numbers(path: str, like: torch.Tensor) -> torch.Tensor:
    """Normal numbers of the shape of `like`, by its name."""
    return ftrain.normal(ftrain.key(sum(map(ord, path))), tuple(like.shape))


def native(kind: str, targets: Any = "all-linear", **options: Any) -> Adapted:
    """The library's own decoder, "dense" or "mixture"."""
    model = getattr(mesh_models, kind)()
    adapter = lora.add(model.specs, targets, rank=3, alpha=6, **options)
    return Adapted(model.specs, lambda params, batch: model.loss(params, batch)[0], model.batch, adapter)


@functools.cache
def _bridged(kind: str) -> Any:
    import transformers

    own = {
        "llama": lambda: transformers.LlamaConfig(**SIZES),
        "tied": lambda: transformers.LlamaConfig(**SIZES, tie_word_embeddings=True),
        "experts": lambda: transformers.Qwen3MoeConfig(
            **SIZES, moe_intermediate_size=8, num_experts=4, num_experts_per_tok=2
        ),
        "gpt2": lambda: transformers.GPT2Config(
            vocab_size=61, n_embd=16, n_layer=2, n_head=4, n_positions=64,
            resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0,
        ),
    }  # fmt: skip
    return from_transformers(own[kind]())


def bridged(kind: str, targets: Any = "all-linear", **options: Any) -> Adapted:
    """A model of transformers: "llama", "tied" (its head is its table), "experts", "gpt2"."""
    model = _bridged(kind)
    adapter = lora.add(model, targets, rank=3, alpha=6, **options)

    def batch(packs: int) -> dict[str, Any]:
        made = mesh_models.text_batch(61, packs)
        return {name.removesuffix("_T"): x for name, x in made.items()}

    return Adapted(model.specs, model.loss, batch, adapter)
