"""Generation with an omni model: text tokens, or a decoder's codes, for many prompts side by side in one pack.

Prompts are packed with their room, that is with a place for every token to come: the pack says what position each has.
Encoders run once, the prompts' own tokens run once, and from then on each step runs one token per prompt, which reads
the keys and values of those before it from a cache (modules/kv_cache.py). The loop is that of every family
(modules/autoregression.py), whose names can be imported from here too.

Legend: T tokens of the pack, B prompts, D foundation width, N places of what is to come (codes of one target),
V scores, A position axes.
"""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ftrain.kernels.documents import Documents, ids_of
from ftrain.modules import decoder as foundation
from ftrain.modules import omni
from ftrain.modules.autoregression import Family, decoder_family, generate, generate_ids
from ftrain.modules.kv_cache import KvCache
from ftrain.modules.omni import OmniModel
from ftrain.modules.packing import Document, Text, exact_budget, measure, pack
from ftrain.modules.sampling import Sampling
from ftrain.modules.spec import Tree

__all__ = [
    "Family",
    "codes_family",
    "decoder_family",
    "generate",
    "generate_codes",
    "generate_ids",
    "generate_text",
    "text_family",
]


def generate_text(
    params: Tree,
    prompts: Sequence[Document],
    *,
    model: OmniModel,
    max_new: int,
    stop: int | Sequence[int] | None = None,
    key: Tensor | None = None,
    temperature: float = 0.0,
    top_k: int | None = None,
    top_p: float | None = None,
    balance: Tree = None,
) -> list[list[int]]:
    """Continue each prompt with at most `max_new` token ids, up to and without `stop` (one id, or several).

    `temperature` 0 takes the most likely token; above, it samples with the random `key` (or one key for each prompt),
    among those that `top_k` and `top_p` leave: see `generate`. `balance`: the state of loss-free balancing, if the
    foundation has one. ValueError for a prompt without a token, and for options that make no sense.

    >>> from ftrain.kernels import random
    >>> from ftrain.modules import spec
    >>> model = OmniModel(foundation.preset("llama-tiny"))
    >>> params = spec.init(omni.specs(model), random.key(0))
    >>> [len(ids) for ids in generate_text(params, [[Text([5, 6])], [Text([7])]], model=model, max_new=3)]
    [3, 3]
    """
    return generate(
        params,
        prompts,
        family=text_family(model, balance=balance),
        max_new=max_new,
        stop=stop,
        key=key,
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
    )


def generate_codes(
    params: Tree,
    prompts: Sequence[Document],
    *,
    model: OmniModel,
    decoder: str,
    key: Tensor | None = None,
    temperature: float = 0.0,
    top_k: int | None = None,
    top_p: float | None = None,
    guidance: float = 1.0,
    unconditional: Sequence[Document] | None = None,
    balance: Tree = None,
) -> Tensor:
    """The codes `[B, N]` int64 of one target of modality `decoder` after each prompt; `lm_generate` makes media of it.

    With `guidance` other than 1 the scores are `u + guidance * (c - u)`, `c` those after the prompts and `u` those
    after the `unconditional` ones (classifier-free guidance, Ho & Salimans 2022), of which there is one for each
    prompt, which may be empty. The other options as in `generate_text`.
    """
    places = model.decoder(decoder).codes_per_target
    family = codes_family(model, decoder, guidance=guidance, unconditional=unconditional, balance=balance)
    how = Sampling(temperature, top_k, top_p)
    return generate_ids(params, prompts, family=family, max_new=places, key=key, how=how)


def text_family(model: OmniModel, *, balance: Tree = None) -> Family:
    """The text of an omni model, for `generate`: prompts are documents, ids those of text tokens.

    `balance`: the state of loss-free balancing, if the foundation has one. Its `prefill` raises ValueError for an
    empty prompt.
    """

    def scores(params: Tree, now: _Now) -> tuple[Tensor, _Now]:
        return foundation.logits(params["foundation"], now.hidden_BD, model.foundation), now

    def prefill(params: Tree, prompts: Sequence[Document], room: int) -> tuple[Tensor, _Now]:
        empty = [i for i, prompt in enumerate(prompts) if not prompt or not measure(prompt, model=model).tokens]
        if empty:
            raise ValueError(f"prompt {empty[0]} is empty: the first token needs something before it")
        return scores(params, _begin(params, prompts, [], room, model=model, balance=balance))

    def extend(params: Tree, chosen_B: Tensor, now: _Now) -> tuple[Tensor, _Now]:
        x_BD = foundation.embed(params["foundation"], chosen_B)
        return scores(params, _go_on(params, x_BD, now, model=model, balance=balance))

    return Family(prefill, extend)


def codes_family(
    model: OmniModel,
    decoder: str,
    *,
    guidance: float = 1.0,
    unconditional: Sequence[Document] | None = None,
    balance: Tree = None,
) -> Family:
    """The codes of one modality of an omni model, for `generate_ids` with as many tokens as a target has codes.

    `guidance`, `unconditional`: see `generate_codes`; the foundation then runs both kinds of prompts side by side.

    Raises:
        ValueError: the model has no such decoder. The family's `prefill` raises it where a guidance other than 1 goes
            without one unconditional prompt for each prompt, or 1 with any.
    """
    part = model.decoder(decoder)

    def scores(params: Tree, now: _Now, codes_BN: Tensor, step: int) -> tuple[Tensor, Any]:
        scores_BV = part.lm_logits(params["decoders"][decoder], now.hidden_BD)
        if unconditional is not None:
            with_BV, without_BV = scores_BV.chunk(2)
            scores_BV = without_BV + guidance * (with_BV - without_BV)
        return scores_BV, (now, codes_BN, step)

    def prefill(params: Tree, prompts: Sequence[Document], room: int) -> tuple[Tensor, Any]:
        if (guidance != 1.0) != (unconditional is not None) or len(unconditional or prompts) != len(prompts):
            raise ValueError(
                f"guidance={guidance} with {len(unconditional or [])} unconditional prompts for {len(prompts)} "
                "prompts: a guidance other than 1 goes with one for each, and 1 with none"
            )
        both = [*prompts, *(unconditional or [])]
        now = _begin(params, both, [part.begin], room, model=model, balance=balance)
        codes_BN = torch.zeros(len(both), part.codes_per_target, dtype=torch.int64, device=now.hidden_BD.device)
        return scores(params, now, codes_BN, 0)

    def extend(params: Tree, chosen_B: Tensor, state: Any) -> tuple[Tensor, Any]:
        now, codes_BN, step = state
        codes_BN[:, step] = chosen_B.repeat(len(codes_BN) // len(chosen_B))
        # what a code's row is depends on its place among the codes
        rows_BND = part.lm_embed(params["decoders"][decoder], codes_BN).unflatten(0, codes_BN.shape)
        x_BD = rows_BND[:, step].to(now.hidden_BD.dtype)
        return scores(params, _go_on(params, x_BD, now, model=model, balance=balance), codes_BN, step + 1)

    return Family(prefill, extend)


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
