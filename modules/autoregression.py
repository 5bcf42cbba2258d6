"""Token by token: the loop of generation, for any family that can run prompts and then one more token of each.

A `Family` is two functions; greedy choice, sampling, stop tokens, batches of prompts of different lengths are here.
`decoder_family` is that of a decoder alone, modules/generation.py has those of an omni model. An encoder-decoder or a
recurrent network gives its own.

Legend: B samples, N tokens that are made, V vocabulary, D model width, T tokens of a pack, A position axes.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ftrain.modules import decoder
from ftrain.modules.decoder_config import DecoderConfig
from ftrain.modules.kv_cache import KvCache
from ftrain.modules.sampling import Sampling, choose, until
from ftrain.modules.spec import Tree


@dataclass(frozen=True)
class Family:
    """What generation needs of a model.

    - `prefill(params, prompts, room) -> (scores_BV, state)`: the scores of the token after each of B prompts, and all
      that goes on from there, for at most `room` tokens. What prompts are (lists of ids, arrays, pairs of a source and
      a beginning) only the family knows.
    - `extend(params, chosen_B, state) -> (scores_BV, state)`: one more token of each, int64; the state is used up.
    """

    prefill: Callable[[Tree, Any, int], tuple[Tensor, Any]]
    extend: Callable[[Tree, Tensor, Any], tuple[Tensor, Any]]


def generate(
    params: Tree,
    prompts: Any,
    *,
    family: Family,
    max_new: int,
    stop: int | Sequence[int] | None = None,
    key: Tensor | None = None,
    temperature: float = 0.0,
    top_k: int | None = None,
    top_p: float | None = None,
) -> list[list[int]]:
    """Continue each prompt with at most `max_new` ids, up to and without the first `stop` id (one, or any of several).

    `temperature`, `top_k`, `top_p`: see `Sampling`. `key`: for a temperature above 0, int64 `[2]`, or `[B, 2]`, one for
    each prompt (`random.split(key, B)`), whose sample then does not depend on the other prompts. ValueError for options
    that make no sense; the family's own for prompts.

    A family that counts down from its prompt, to a vocabulary of ten:

    >>> def scores(ids_B):
    ...     return torch.nn.functional.one_hot((ids_B - 1).clamp(0), 10).float()
    >>> countdown = Family(
    ...     prefill=lambda params, prompts, room: (scores(torch.tensor(prompts)), None),
    ...     extend=lambda params, ids_B, state: (scores(ids_B), state),
    ... )
    >>> generate({}, [5, 3], family=countdown, max_new=4, stop=0)
    [[4, 3, 2, 1], [2, 1]]
    """
    how = Sampling(temperature, top_k, top_p)
    ends = () if stop is None else (stop,) if isinstance(stop, int) else tuple(stop)
    made_BN = generate_ids(params, prompts, family=family, max_new=max_new, stop=ends, key=key, how=how)
    return [until(ids, ends) for ids in made_BN.tolist()]


@torch.no_grad()
def generate_ids(
    params: Tree,
    prompts: Any,
    *,
    family: Family,
    max_new: int,
    stop: Sequence[int] = (),
    key: Tensor | None = None,
    how: Sampling = Sampling(),  # noqa: B008  # frozen
) -> Tensor:
    """The ids after each prompt as they were chosen, int64 `[B, N]`, N at most `max_new`.

    It ends early when every sample has had a `stop` id; what is behind a sample's first one means nothing.

    Args:
        params, prompts: what `family` takes.
        family: the model, as two functions.
        max_new: the most tokens per sample, at least 0.
        stop: ids after which a sample is done.
        key: int64 `[2]`, or `[B, 2]`, one for each sample; needed where tokens are drawn.
        how: how a token is chosen from its scores.

    Raises:
        ValueError: `max_new` is below 0, the keys have another shape, or tokens are to be drawn without a key.
    """
    how.check_key(key)
    if max_new < 0:
        raise ValueError(f"max_new={max_new} must be at least 0")
    scores_BV, state = family.prefill(params, prompts, max_new)
    made = [torch.empty(len(scores_BV), 0, dtype=torch.int64, device=scores_BV.device)]
    stop_S = torch.tensor(stop, dtype=torch.int64, device=scores_BV.device) if stop else None
    done_B = torch.zeros(len(scores_BV), dtype=torch.bool, device=scores_BV.device)
    for step in range(max_new):
        if step:
            scores_BV, state = family.extend(params, made[-1][:, 0], state)
        chosen_B = choose(scores_BV, key, step, how)
        made.append(chosen_B[:, None])
        if stop_S is None:
            continue  # nothing to wait for
        done_B |= torch.isin(chosen_B, stop_S)
        if bool(done_B.all()):
            break
    return torch.cat(made, dim=1)


def decoder_family(cfg: DecoderConfig, *, balance: Tree = None) -> Family:
    """A decoder alone; prompts are lists of token ids, of any lengths above 0, and params those of `decoder.specs`.

    `balance`: the state of loss-free balancing, if the decoder has one. Its `prefill` raises ValueError where there is
    no prompt, or an empty one.

    >>> from ftrain.kernels import random
    >>> from ftrain.modules import spec
    >>> cfg = decoder.preset("llama-tiny")
    >>> params = spec.init(decoder.specs(cfg), random.key(0))
    >>> made = generate(params, [[5, 6, 7], [8]], family=decoder_family(cfg), max_new=3)
    >>> [len(ids) for ids in made]
    [3, 3]
    """

    def prefill(params: Tree, prompts: Sequence[Sequence[int]], room: int) -> tuple[Tensor, KvCache]:
        empty = [i for i, prompt in enumerate(prompts) if not len(prompt)]
        if empty or not len(prompts):
            what = f"prompt {empty[0]} is empty" if empty else "there are no prompts to continue"
            raise ValueError(f"{what}: the first token needs something before it")
        device = params["embedding"]["table_VD"].device
        tokens_T = torch.tensor([token for prompt in prompts for token in prompt], dtype=torch.int64)
        length_B = torch.tensor([len(prompt) for prompt in prompts])
        positions_T = torch.cat([torch.arange(len(prompt)) for prompt in prompts]).to(device)
        last_B = (length_B.cumsum(0) - 1).to(device)
        hidden_TD, cache = decoder.prefill(
            params,
            decoder.embed(params, tokens_T.to(device)),
            positions=_on_all_axes(positions_T, cfg),
            length_B=length_B.to(device),
            room=room,
            cfg=cfg,
            balance=balance,
        )
        return decoder.logits(params, hidden_TD.index_select(0, last_B), cfg), cache

    def extend(params: Tree, chosen_B: Tensor, cache: KvCache) -> tuple[Tensor, KvCache]:
        x_BD, positions = decoder.embed(params, chosen_B), _on_all_axes(cache.length_B, cfg)
        hidden_BD, cache = decoder.extend(params, x_BD, positions=positions, cache=cache, cfg=cfg, balance=balance)
        return decoder.logits(params, hidden_BD, cfg), cache

    return Family(prefill, extend)


def _on_all_axes(positions_T: Tensor, cfg: DecoderConfig) -> Tensor:
    """Positions of text, which are equal on all axes that the rotation has."""
    sections = cfg.attention.rope_sections
    return positions_T if sections is None else positions_T.expand(len(sections), -1)
