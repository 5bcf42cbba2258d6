"""What Janus writes: text about what it sees, and the codes of pictures, for `ftrain.modules.autoregression.generate`.

Legend: B prompts, V vocabulary, C distinct codes, D width of the decoder.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from ftrain.modules import decoder, janus
from ftrain.modules.autoregression import Family
from ftrain.modules.janus import JanusConfig
from ftrain.modules.janus_media import prepare
from ftrain.modules.kv_cache import KvCache
from ftrain.modules.sight_generation import Prompt, joined, on_device
from ftrain.modules.spec import Tree


def janus_text(cfg: JanusConfig) -> Family:
    """Text; prompts are raw leaves of one document each, with pictures, or ids alone.

    Its `prefill` raises ValueError where there is no prompt, or an empty one, and for pictures as `prepare`.
    """

    def scores(params: Any, hidden_BD: Tensor) -> Tensor:
        return decoder.logits(params["text"], hidden_BD, cfg.text)

    return _family(cfg, scores, lambda params, ids_B: decoder.embed(params["text"], ids_B))


def janus_codes(cfg: JanusConfig, *, guidance: float = 1.0, unconditional: Sequence[Prompt] | None = None) -> Family:
    """Codes of one picture after each prompt: as many as `cfg.drawn_tokens`; prompts end with the token that begins a
    picture. `vq_image.decode` makes the picture.

    With `guidance` other than 1 the scores are `u + guidance * (c - u)`, `c` those after the prompts and `u` those
    after the `unconditional` ones (Ho & Salimans 2022), of which there is one for each prompt (`without_words`).

    ValueError where a guidance other than 1 goes without unconditional prompts, or 1 with any; `prefill` raises it
    where they are not as many as prompts.
    """
    if (guidance != 1.0) != (unconditional is not None):
        raise ValueError(f"guidance={guidance}: other than 1 it goes with unconditional prompts, and 1 with none")
    plain = _family(cfg, janus.code_logits, janus.embed_codes)
    if unconditional is None:
        return plain

    def guided(scores_BC: Tensor) -> Tensor:
        with_BC, without_BC = scores_BC.chunk(2)
        return without_BC + guidance * (with_BC - without_BC)

    def prefill(params: Tree, prompts: Sequence[Prompt], room: int) -> tuple[Tensor, KvCache]:
        if len(prompts) != len(unconditional):
            raise ValueError(
                f"{len(unconditional)} unconditional prompts for {len(prompts)} prompts: give one for each"
            )
        scores_BC, cache = plain.prefill(params, [*prompts, *unconditional], room)
        return guided(scores_BC), cache

    def extend(params: Tree, chosen_B: Tensor, cache: KvCache) -> tuple[Tensor, KvCache]:
        scores_BC, cache = plain.extend(params, chosen_B.repeat(2), cache)
        return guided(scores_BC), cache

    return Family(prefill, extend)


def without_words(prompt: Sequence[int], *, keep: Sequence[int], fill: int) -> list[int]:
    """A prompt that says nothing, as Janus was trained: all ids but those of `keep` (the first of a text, that which
    begins a picture) are `fill`.

    >>> without_words([1, 8, 9, 5], keep=(1, 5), fill=0)
    [1, 0, 0, 5]
    """
    return [token if token in keep else fill for token in prompt]


def _family(
    cfg: JanusConfig, scores: Callable[[Any, Tensor], Tensor], embed: Callable[[Any, Tensor], Tensor]
) -> Family:
    """The decoder goes on by rows that `embed` makes of chosen ids; `scores` of hidden states `[B, D]`."""

    def prefill(params: Tree, prompts: Sequence[Prompt], room: int) -> tuple[Tensor, KvCache]:
        raw, lengths = joined(prompts)
        device = params["text"]["embedding"]["table_VD"].device
        batch = on_device(prepare(raw, cfg), device)
        x_TD, _ = janus.embed(params, batch, cfg)
        length_B = torch.tensor(lengths, device=device)
        positions_T = torch.cat([torch.arange(length) for length in lengths]).to(device)
        hidden_TD, cache = decoder.prefill(
            params["text"], x_TD, positions=positions_T, length_B=length_B, room=room, cfg=cfg.text
        )
        return scores(params, hidden_TD.index_select(0, length_B.cumsum(0) - 1)), cache

    def extend(params: Tree, chosen_B: Tensor, cache: KvCache) -> tuple[Tensor, KvCache]:
        x_BD = embed(params, chosen_B)
        hidden_BD, cache = decoder.extend(params["text"], x_BD, positions=cache.length_B, cache=cache, cfg=cfg.text)
        return scores(params, hidden_BD), cache

    return Family(prefill, extend)
