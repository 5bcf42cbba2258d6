"""Generation with an omni model: text tokens, or a decoder's codes, for many prompts side by side in one pack.

Prompts are packed with their room, that is with a place for every token to come: the pack says what position each has.
Encoders run once, the prompts' own tokens run once, and from then on each step runs one token per prompt, which reads
the keys and values of those before it from a cache (modules/kv_cache.py).

Legend: T tokens of the pack, B prompts, D foundation width, N places of what is to come (codes of one target),
V scores, A position axes.
"""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ftrain.kernels import random
from ftrain.kernels.documents import Documents, ids_of
from ftrain.modules import decoder as foundation
from ftrain.modules import omni
from ftrain.modules.kv_cache import KvCache
from ftrain.modules.omni import OmniModel
from ftrain.modules.packing import Document, Text, exact_budget, measure, pack
from ftrain.modules.spec import Tree


@torch.no_grad()
def generate_text(
    params: Tree,
    prompts: Sequence[Document],
    *,
    model: OmniModel,
    max_new: int,
    stop: int | None = None,
    key: Tensor | None = None,
    temperature: float = 0.0,
    balance: Tree = None,
) -> list[list[int]]:
    """Continue each prompt with at most `max_new` token ids, up to and without `stop`.

    `temperature` 0 takes the most likely token; above, it samples with the random `key`. `balance`: the state of
    loss-free balancing, if the foundation has one.
    """
    _check_sampling(key, temperature)
    empty = [i for i, prompt in enumerate(prompts) if not prompt or not measure(prompt, model=model).tokens]
    if empty:
        raise ValueError(f"prompt {empty[0]} is empty: the first token needs something before it")
    now = _begin(params, prompts, [], max_new, model=model, balance=balance)
    done_B = torch.zeros(len(prompts), dtype=torch.bool, device=now.hidden_BD.device)
    made: list[Tensor] = []
    for step in range(max_new):
        if step:
            now = _go_on(params, foundation.embed(params["foundation"], made[-1]), now, model=model, balance=balance)
        logits_BV = foundation.logits(params["foundation"], now.hidden_BD, model.foundation)
        made.append(_choose(logits_BV, key, step, temperature))
        if stop is None:
            continue  # nothing to wait for
        done_B |= made[-1] == stop
        if bool(done_B.all()):
            break
    return [_until(ids, stop) for ids in torch.stack(made, dim=1).tolist()] if made else [[] for _ in prompts]


@torch.no_grad()
def generate_codes(
    params: Tree,
    prompts: Sequence[Document],
    *,
    model: OmniModel,
    decoder: str,
    key: Tensor | None = None,
    temperature: float = 0.0,
    guidance: float = 1.0,
    unconditional: Sequence[Document] | None = None,
    balance: Tree = None,
) -> Tensor:
    """The codes `[B, N]` int64 of one target of modality `decoder` after each prompt; `lm_generate` makes media of it.

    With `guidance` other than 1 the scores are `u + guidance * (c - u)`, `c` those after the prompts and `u` those
    after the `unconditional` ones (classifier-free guidance, Ho & Salimans 2022), of which there is one for each
    prompt, which may be empty. `temperature`, `key` and `balance` as in `generate_text`.
    """
    _check_sampling(key, temperature)
    part = model.decoder(decoder)
    if (guidance != 1.0) != (unconditional is not None) or len(unconditional or prompts) != len(prompts):
        raise ValueError(
            f"guidance={guidance} with {len(unconditional or [])} unconditional prompts for {len(prompts)} prompts: "
            "a guidance other than 1 goes with one for each, and 1 with none"
        )
    both = [*prompts, *(unconditional or [])]
    own, places = params["decoders"][decoder], part.codes_per_target
    now = _begin(params, both, [part.begin], places, model=model, balance=balance)
    codes_BN = torch.zeros(len(both), places, dtype=torch.int64, device=now.hidden_BD.device)
    for step in range(places):
        if step:
            # what a code's row is depends on its place among the codes
            rows_BND = part.lm_embed(own, codes_BN).unflatten(0, (len(both), places))
            rows_BD = rows_BND[:, step - 1].to(now.hidden_BD.dtype)
            now = _go_on(params, rows_BD, now, model=model, balance=balance)
        logits_BV = part.lm_logits(own, now.hidden_BD)
        if unconditional is not None:
            with_BV, without_BV = logits_BV.chunk(2)
            logits_BV = without_BV + guidance * (with_BV - without_BV)
        chosen_B = _choose(logits_BV, key, step, temperature)
        codes_BN[:, step] = chosen_B.repeat(len(both) // len(prompts))
    return codes_BN[: len(prompts)]


class _Now(NamedTuple):
    """Where generation stands: the hidden states of each prompt's newest token, all before it, and what comes after.

    `next_BN`: the positions of each prompt's tokens to come, `[B, N]` or `[A, B, N]`.
    """

    hidden_BD: Tensor
    cache: KvCache
    next_BN: Tensor


def _begin(
    params: Tree, prompts: Sequence[Document], first: list[int], room: int, *, model: OmniModel, balance: Tree
) -> _Now:
    """Run the prompts, each with the tokens `first` after it (together not empty); `room` tokens may follow."""
    batch, begin_B, after_B = _lay_out(prompts, model, [*first, *[0] * room], params)
    end_B = after_B + len(first)  # these are on the host: nothing below waits for the device
    rows, places, _ = omni.media_rows(params, batch, model=model)
    x_TD = omni.merge(foundation.embed(params["foundation"], batch["tokens_T"]), rows, places)
    spans = zip(begin_B.tolist(), end_B.tolist(), strict=True)
    known_T = torch.cat([torch.arange(begin, end) for begin, end in spans]).to(x_TD.device)
    length_B = (end_B - begin_B).to(x_TD.device)
    hidden_TD, cache = foundation.prefill(
        params["foundation"],
        x_TD.index_select(0, known_T),
        positions=batch["positions_T"][..., known_T],
        length_B=length_B,
        room=room,
        cfg=model.foundation,
        balance=balance,
    )
    next_BN = (end_B[:, None] + torch.arange(room)).to(x_TD.device)
    return _Now(hidden_TD.index_select(0, length_B.cumsum(0) - 1), cache, batch["positions_T"][..., next_BN])


def _go_on(params: Tree, x_BD: Tensor, now: _Now, *, model: OmniModel, balance: Tree) -> _Now:
    """Run one more token of each prompt, given as rows of the stream."""
    hidden_BD, cache = foundation.extend(
        params["foundation"],
        x_BD,
        positions=now.next_BN[..., 0],
        cache=now.cache,
        cfg=model.foundation,
        balance=balance,
    )
    return _Now(hidden_BD, cache, now.next_BN[..., 1:])


def _lay_out(
    prompts: Sequence[Document], model: OmniModel, after: list[int], params: Tree
) -> tuple[dict[str, Any], Tensor, Tensor]:
    """The packed prompts, each with the tokens `after` it, on the parameters' device.

    Also where each prompt begins and where what is after it does, `[B]` on the host, in the order of the prompts.
    """
    if not prompts:
        raise ValueError("there are no prompts to continue")
    documents = [[*prompt, Text(after)] for prompt in prompts]
    packed = pack(documents, budget=exact_budget(documents, model=model), model=model)
    batch = _to(packed.batch, params["foundation"]["embedding"]["table_VD"].device)
    size_B = torch.bincount(ids_of(packed.batch["segments_T"]))
    end_B = size_B.cumsum(0)
    in_pack_B = torch.tensor(packed.taken).argsort()
    return batch, (end_B - size_B)[in_pack_B], (end_B - len(after))[in_pack_B]


def _to(tree: Any, device: torch.device) -> Any:
    if isinstance(tree, Mapping):
        return {k: _to(v, device) for k, v in tree.items()}
    if isinstance(tree, Documents):
        return Documents(tree.ids_T.to(device), tree.offsets_N.to(device), tree.longest)
    return tree.to(device)


def _check_sampling(key: Tensor | None, temperature: float) -> None:
    if temperature < 0 or (temperature > 0 and key is None):
        raise ValueError(f"temperature={temperature} must be 0, or above 0 with a random key")


def _choose(logits_BV: Tensor, key: Tensor | None, step: int, temperature: float) -> Tensor:
    """One index per row, `[B]`."""
    if temperature == 0 or key is None:
        return logits_BV.argmax(-1)
    return random.categorical(random.fold_in(key, step), logits_BV / temperature)


def _until(ids: list[int], stop: int | None) -> list[int]:
    return ids[: ids.index(stop)] if stop in ids else ids
