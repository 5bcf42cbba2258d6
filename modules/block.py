"""The seam of a stack of layers: a block is a pair of functions, and `Context` is what its layer knows of the tokens.

An MLP, a mixture of experts, an attention and a whole layer are all `Block`s, the built-in ones (modules/layers.py)
like those of a user, in decoders, encoders (modules/encoder_stack.py) and diffusion transformers (modules/dit.py). A
block is written once: `Context.attend` reads keys and values within documents during training and prefill, and from the
cache while a token at a time is added. A block whose memory is not keys and values (a recurrent state, say) says with a
`Cache` what it keeps of a sequence and how one token changes that.

Legend: T tokens of a pack, B sequences, D model width, L layers with routers, E experts, H query heads, G key/value
heads, K head dim, V head dim of values, S places of a cache.
"""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from ftrain.kernels.attention import attention
from ftrain.kernels.backend import reference_kernels
from ftrain.kernels.documents import Segments, ids_of
from ftrain.kernels.pack import pack_index, pack_rows, pack_tokens
from ftrain.kernels.whole_batch import within_documents
from ftrain.modules import attention as attention_module
from ftrain.modules import kv_cache
from ftrain.modules.attention import AttentionConfig, RopeTable
from ftrain.modules.kv_cache import KvCache, LayerCache, Unpacking
from ftrain.modules.moe import MoEConfig, RouterStats
from ftrain.modules.spec import Tree


@dataclass(frozen=True)
class Cache:
    """What a block with a memory of its own keeps of each sequence, for `Block.cache`.

    - `prefill(params, x_TD, at) -> (y_TD, state)`: as the block's `apply` on packed prompts, and what is kept of them,
      any nesting of tensors with the B sequences first. `at` is a `Prompts`; `at.length_B` tells the prompts' lengths,
      of which some may be 0.
    - `extend(params, x_BD, state, at) -> (y_BD, state)`: one more token of each sequence. `at` is a `Newest`.

    The given state is used up: `extend` may write into its memory.
    """

    prefill: Callable[[Any, Tensor, "Prompts"], tuple[Tensor, Any]]
    extend: Callable[[Any, Tensor, Any, "Newest"], tuple[Tensor, Any]]


@dataclass(frozen=True)
class Block:
    """A part of a stack from rows to rows: an MLP, experts, an attention, or a whole layer.

    - `specs(out_gain)`: its tree of `ParamSpec`s. `out_gain` is what the initial deviation of the last weight of a
      residual branch is to be multiplied by, `1 / sqrt(2 * layers)` in a decoder or encoder (Radford et al. 2019), 1 in
      a diffusion transformer, whose gates start at zero.
    - `apply(params, x_TD, at)`: `[T, D]` to `[T, D]`. An MLP or an attention gets normed rows and returns what is added
      to the residual stream; a layer gets the stream and returns the new one, in the same dtype. Other tokens are read
      by `at.attend` alone, unless the block has a `cache`.
    - `cache`: how it goes on token by token, for a block that reads other tokens by itself. Where ranks share a
      sequence, each runs such a block on the whole pack, and keeps its own rows.
    - `heads`: of a block with a cache that reads other tokens head by head. Ranks that share a sequence and divide so
      many heads run it on their own rows: it exchanges them for some heads of all tokens by
      `ftrain.kernels.pack.divide_heads` and `join_heads` where `at.sharing(len(x_TD))` is more than 1.
    - `routers`: those of ours that `apply` runs (`ftrain.modules.layers.moe_block`), in their order; a block that
      contains others lists theirs.

    >>> from ftrain.modules.spec import ParamSpec, fan_in
    >>> square = Block(
    ...     specs=lambda out_gain: {"w": ParamSpec((4, 4), ("embed", "mlp"), fan_in(4, gain=out_gain))},
    ...     apply=lambda params, x_TD, at: (x_TD @ params["w"]).square(),
    ... )
    >>> square.specs(0.5)["w"].init.std
    0.25
    """

    specs: Callable[[float], Tree]
    apply: Callable[[Any, Tensor, "Context"], Tensor]
    cache: Cache | None = None
    routers: tuple[MoEConfig, ...] = ()
    heads: int = 0


@dataclass(frozen=True, eq=False)
class Context:
    """What blocks know of the tokens of one pass besides their rows. One object serves all layers, in their order.

    - `positions`: int64 `[T]`, or `[A, T]` with several position axes, starting again in each document.
    - `segments_T`: ids or `Documents` of the tokens (see `ftrain.kernels.documents`); None is one document.
    - `valid_T`: bool `[T]`, False for padding; None where all tokens count.
    - `biases_LE`: the state of loss-free balancing, a row for each router.
    - `stats`: what routers have recorded so far, in the order of the layers.
    """

    positions: Tensor
    segments_T: Segments | None = None
    valid_T: Tensor | None = None
    biases_LE: Tensor | None = None
    stats: list[RouterStats] = field(default_factory=list)
    _ropes: dict[tuple[Any, ...], RopeTable | None] = field(default_factory=dict)
    _whole_packs: list["_WholePack"] = field(default_factory=list)

    def run(self, block: Block, params: Any, x_TD: Tensor) -> Tensor:
        """The rows that a block makes of rows, with its cache where there is one.

        A block that contains others runs them by this. ValueError where the result has another shape.
        """
        ranks = self.sharing(len(x_TD))
        if block.cache is not None and ranks > 1 and (not block.heads or block.heads % ranks):
            return _checked(block, self._on_the_pack(block, params, x_TD), x_TD)
        with nullcontext() if block.cache is None or ranks > 1 else within_documents():
            return _checked(block, block.apply(params, x_TD, self), x_TD)

    def sharing(self, tokens: int) -> int:
        """How many ranks share the pack, given how many of its tokens this one holds."""
        return pack_tokens(tokens) // max(1, tokens)

    def pack_ids(self, tokens: int, device: torch.device) -> Tensor:
        """The id of the document of each token of the pack, int64 `[P]` on `device`; `tokens`: that this rank holds."""
        if self.sharing(tokens) > 1:
            return self._whole_pack().pack_ids(pack_tokens(tokens), device)
        ids_T = _ids(self.segments_T)
        return torch.zeros(tokens, dtype=torch.int64, device=device) if ids_T is None else ids_T

    def run_layer(self, block: Block, params: Any, x_TD: Tensor, *, layer: int) -> Tensor:
        """The rows, `[T, D]`, that layer number `layer` of a stack makes of rows, as `run`.

        ValueError where it changes the shape or the dtype of the rows.
        """
        y_TD = self.run(block, params, x_TD)
        if y_TD.dtype != x_TD.dtype:
            raise ValueError(
                f"layer {layer} makes {y_TD.dtype} rows of {x_TD.dtype}: cast what its blocks add to the stream"
            )
        return y_TD

    def _on_the_pack(self, block: Block, params: Any, x_TD: Tensor) -> Tensor:
        """Where ranks share a pack, a block that reads other tokens by itself gets all of them, on every rank."""
        y_PD = block.apply(params, pack_rows(x_TD), self._whole_pack())
        return y_PD.index_select(0, pack_index(len(x_TD), x_TD.device))

    def _whole_pack(self) -> "_WholePack":
        """What is known of the tokens of all ranks, gathered once for all layers."""
        if not self._whole_packs:
            ids_T = _ids(self.segments_T)
            self._whole_packs.append(
                _WholePack(
                    pack_rows(self.positions.movedim(-1, 0)).movedim(0, -1),
                    segments_T=None if ids_T is None else pack_rows(ids_T),
                    valid_T=None if self.valid_T is None else pack_rows(self.valid_T),
                )
            )
        return self._whole_packs[0]

    def attend(
        self,
        q_THK: Tensor,
        k_TGK: Tensor,
        v_TGV: Tensor,
        *,
        causal: bool = True,
        window: int | None = None,
        scale: float | None = None,
        sinks_H: Tensor | None = None,
    ) -> Tensor:
        """What each query reads from its document, `[T, H, V]`, as `ftrain.kernels.attention` (its options are these).

        During generation keys and values are kept, and then read from the cache. It may be called several times in a
        block. ValueError during generation where it is not causal.
        """
        return attention(
            q_THK,
            k_TGK,
            v_TGV,
            segments_T=self.segments_T,
            causal=causal,
            window=window,
            scale=scale,
            sinks_H=sinks_H,
        )

    def rope(self, cfg: AttentionConfig) -> RopeTable | None:
        """Cosines and sines of the positions as `cfg` says, each `[T, F]` with F rotated pairs of a head, made once for
        all layers; None without rotation.
        """
        rotation = attention_module.rotation(cfg)
        if rotation not in self._ropes:
            self._ropes[rotation] = attention_module.rope(self.positions, cfg)
        return self._ropes[rotation]

    def bias_E(self) -> Tensor | None:
        """The balancing biases of the next router, `[E]`; None without the state.

        ValueError if there are more routers than the blocks list.
        """
        if self.biases_LE is None:
            return None
        if len(self.stats) >= len(self.biases_LE):
            raise ValueError(
                f"decoder: there are more routers than the {len(self.biases_LE)} rows of the state of balancing: a "
                "block that runs routers lists them in Block.routers"
            )
        return self.biases_LE[len(self.stats)]

    def record(self, stats: RouterStats) -> None:
        """Leave what a router did for the caller of the stack; each router does so once."""
        self.stats.append(stats)

    def recorded(self) -> RouterStats | None:
        """What all routers have recorded, stacked in their order, `[L, E]`; None without one.

        ValueError where they differ in their number of experts, or are not as many as the state of balancing has rows.
        """
        if self.biases_LE is not None and len(self.stats) != len(self.biases_LE):
            raise ValueError(
                f"decoder: {len(self.stats)} routers have recorded what they did, and the state of balancing has "
                f"{len(self.biases_LE)} rows: a block that runs routers lists them in Block.routers"
            )
        experts = sorted({len(one.load_E) for one in self.stats})
        if len(experts) > 1:
            raise ValueError(f"decoder: routers of {experts} experts in one stack, whose statistics cannot be stacked")
        return RouterStats(*(torch.stack(x) for x in zip(*self.stats, strict=True))) if self.stats else None

    def cheaply(self) -> AbstractContextManager[None]:
        """Around anything but experts: reference kernels where tokens are so few that a kernel's call costs most."""
        return nullcontext()


class WholeItems(Context):
    """`Context` of items (pictures, frames) of which each rank of a mesh has its own, whole: none reads another's."""

    def attend(self, q_THK: Tensor, k_TGK: Tensor, v_TGV: Tensor, **options: Any) -> Tensor:
        own: Tensor = attention.local(q_THK, k_TGK, v_TGV, segments_T=self.segments_T, **options)  # type: ignore[attr-defined]
        return own


class _WholePack(Context):
    """`Context` of a block that is given the tokens of other ranks too."""

    def sharing(self, tokens: int) -> int:
        del tokens
        return 1

    def attend(self, q_THK: Tensor, k_TGK: Tensor, v_TGV: Tensor, **_: Any) -> Tensor:
        raise ValueError(
            "a block with a cache of its own calls at.attend where ranks share a sequence: put what it attends with "
            "into a block without one, and run both by at.run"
        )

    def record(self, stats: RouterStats) -> None:
        raise ValueError("a block with a cache of its own has a router, where ranks share a sequence: run it beside")


@dataclass(frozen=True, eq=False, kw_only=True)
class Prompts(Context):
    """`Context` of packed prompts whose keys, values and states are kept, with memory for `room` more tokens of each.

    `length_B`: int64, tokens of each sequence, in the order of the pack; `unpacking`: where they go.
    """

    length_B: Tensor
    unpacking: Unpacking
    entries: list[Any] = field(default_factory=list)

    def run(self, block: Block, params: Any, x_TD: Tensor) -> Tensor:
        if block.cache is None:
            return super().run(block, params, x_TD)
        place = len(self.entries)
        self.entries.append(None)  # what the block itself keeps comes before what is kept within it
        y_TD, self.entries[place] = block.cache.prefill(params, x_TD, self)
        return _checked(block, y_TD, x_TD)

    def attend(
        self,
        q_THK: Tensor,
        k_TGK: Tensor,
        v_TGV: Tensor,
        *,
        causal: bool = True,
        window: int | None = None,
        scale: float | None = None,
        sinks_H: Tensor | None = None,
    ) -> Tensor:
        _require_causal(causal)
        self.entries.append(LayerCache(self.unpack(k_TGK), self.unpack(v_TGV)))
        return super().attend(q_THK, k_TGK, v_TGV, window=window, scale=scale, sinks_H=sinks_H)

    def unpack(self, x_TGK: Tensor) -> Tensor:
        """Rows of the pack as rows of sequences, `[B, G, S, K]`, with zeros behind each sequence's end."""
        return self.unpacking(x_TGK)


@dataclass(frozen=True, eq=False, kw_only=True)
class Newest(Context):
    """`Context` of one more token of each sequence: T is B.

    `length_B`: tokens of each sequence before the new one; `room`: how many can follow it. `given`: what the pass
    before kept, `entries`: what this one has kept so far. `few`: as in `cheaply`.
    """

    length_B: Tensor
    room: int
    given: tuple[Any, ...]
    few: bool = False
    entries: list[Any] = field(default_factory=list)
    _seen: dict[int | None, Tensor] = field(default_factory=dict)

    def run(self, block: Block, params: Any, x_TD: Tensor) -> Tensor:
        with nullcontext() if block.routers else self.cheaply():
            if block.cache is None:
                return super().run(block, params, x_TD)
            place, state = self._next()
            y_BD, self.entries[place] = block.cache.extend(params, x_TD, state, self)
            return _checked(block, y_BD, x_TD)

    def attend(
        self,
        q_THK: Tensor,
        k_TGK: Tensor,
        v_TGV: Tensor,
        *,
        causal: bool = True,
        window: int | None = None,
        scale: float | None = None,
        sinks_H: Tensor | None = None,
    ) -> Tensor:
        _require_causal(causal)
        place, layer = self._next()
        layer = self.entries[place] = kv_cache.append(layer, k_TGK, v_TGV, self.length_B)
        return kv_cache.attend(q_THK, layer, self.seen(layer, window=window), scale=scale, sinks_H=sinks_H)

    def seen(self, layer: LayerCache, *, window: int | None = None) -> Tensor:
        """Which places of a cache the new tokens see, bool `[B, S]`, their own included (see `kv_cache.seen`)."""
        if window not in self._seen:
            grown = KvCache((layer,), self.length_B + 1, self.room)
            self._seen[window] = kv_cache.seen(grown, window=window)
        return self._seen[window]

    def cheaply(self) -> AbstractContextManager[None]:
        return reference_kernels() if self.few else nullcontext()

    def _next(self) -> tuple[int, Any]:
        place = len(self.entries)
        if place >= len(self.given):
            raise ValueError(
                f"the cache holds what {len(self.given)} attentions and other blocks have kept, and there are more: go "
                "on with the configuration that made it"
            )
        self.entries.append(None)
        return place, self.given[place]


def in_turn(pattern: tuple[Block | None, ...], layer: int) -> Block | None:
    """What layer number `layer` is by a pattern of layers, which goes round; None for the stack's usual layer."""
    return pattern[layer % len(pattern)] if pattern else None


def require_no_routers(pattern: tuple[Block | None, ...], stack: str) -> None:
    """ValueError, with the name of the stack, for blocks with routers, where nobody would read their statistics."""
    if any(block is not None and block.routers for block in pattern):
        raise ValueError(
            f"{stack}: a block of pattern has routers, whose statistics only a decoder returns: give it a mixture that "
            "needs no balancing, without Block.routers"
        )


def _ids(segments_T: Segments | None) -> Tensor | None:
    return None if segments_T is None else ids_of(segments_T)


def _require_causal(causal: bool) -> None:
    if not causal:
        raise ValueError("decoder: a cache needs causal attention, where a token changes nothing before it")


def _checked(block: Block, y_TD: Any, x_TD: Tensor) -> Tensor:
    if not isinstance(y_TD, Tensor) or y_TD.shape != x_TD.shape:
        found = f"rows {list(y_TD.shape)}" if isinstance(y_TD, Tensor) else f"a {type(y_TD).__name__}"
        name = getattr(block.apply, "__qualname__", repr(block.apply))
        raise ValueError(f"block {name} makes {found} of rows {list(x_TD.shape)}: return rows like those given")
    return y_TD
