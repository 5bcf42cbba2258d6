"""Generation with an omni model: text tokens, or a decoder's codes, for many prompts side by side in one pack.

Every prompt gets its room in the packed stream at once and the whole stream is run for each new token: attention is
causal, so what has not been written yet changes nothing before it. Shapes never change, encoders run once, and a cache
of keys and values can take the place of `_hidden_at` alone.

Legend: T tokens of the pack, B prompts, D foundation width, N codes of one target, V scores.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from kernels import random
from modules import decoder as foundation
from modules import omni
from modules.omni import OmniModel
from modules.packing import Document, Text, exact_budget, measure, pack
from modules.spec import Tree


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
    batch, first_B = _lay_out(prompts, model, [0] * max_new, params)
    rows, places, _ = omni.media_rows(params, batch, model=model)
    tokens_T, done_B = batch["tokens_T"].clone(), torch.zeros_like(first_B, dtype=torch.bool)
    made = []
    for step in range(max_new):
        x_TD = omni.merge(foundation.embed(params["foundation"], tokens_T), rows, places)
        hidden_BD = _hidden_at(params, x_TD, first_B + step - 1, batch, model, balance)
        logits_BV = foundation.logits(params["foundation"], hidden_BD, model.foundation)
        made.append(_choose(logits_BV, key, step, temperature))
        tokens_T[first_B + step] = made[-1]
        done_B |= made[-1] == (-1 if stop is None else stop)
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
    places = part.codes_per_target
    batch, first_B = _lay_out(both, model, [part.begin] + [0] * places, params)
    rows, index, _ = omni.media_rows(params, batch, model=model)
    own = params["decoders"][decoder]
    codes_BN = torch.zeros(len(both), places, dtype=torch.int64, device=first_B.device)
    index = [*index, (first_B[:, None] + 1 + torch.arange(places, device=first_B.device)).flatten()]
    text_TD = foundation.embed(params["foundation"], batch["tokens_T"])
    for step in range(places):
        x_TD = omni.merge(text_TD, [*rows, part.lm_embed(own, codes_BN)], index)
        logits_BV = part.lm_logits(own, _hidden_at(params, x_TD, first_B + step, batch, model, balance))
        if unconditional is not None:
            with_BV, without_BV = logits_BV.chunk(2)
            logits_BV = without_BV + guidance * (with_BV - without_BV)
        chosen_B = _choose(logits_BV, key, step, temperature)
        codes_BN[:, step] = chosen_B.repeat(len(both) // len(prompts))
    return codes_BN[: len(prompts)]


def _lay_out(
    prompts: Sequence[Document], model: OmniModel, room: list[int], params: Tree
) -> tuple[dict[str, Any], Tensor]:
    """The packed prompts, each followed by `room`, on the parameters' device, and where each prompt's room begins."""
    if not prompts:
        raise ValueError("there are no prompts to continue")
    documents = [[*prompt, Text(room)] for prompt in prompts]
    packed = pack(documents, budget=exact_budget(documents, model=model), model=model)
    device = params["foundation"]["embedding"]["table_VD"].device
    batch = _to(packed.batch, device)
    begins_B = torch.bincount(batch["segments_T"]).cumsum(0) - len(room)
    in_pack_B = torch.tensor(packed.taken, device=device).argsort()
    return batch, begins_B[in_pack_B]


def _to(tree: Any, device: torch.device) -> Any:
    return {k: _to(v, device) for k, v in tree.items()} if isinstance(tree, Mapping) else tree.to(device)


def _hidden_at(
    params: Tree, x_TD: Tensor, at_B: Tensor, batch: Mapping[str, Any], model: OmniModel, balance: Tree
) -> Tensor:
    """Hidden states at positions `at_B` of the stream, `[B, D]`."""
    hidden_TD, _ = omni.hidden_states(params, x_TD, batch, model=model, balance=balance)
    return hidden_TD.index_select(0, at_B)


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
