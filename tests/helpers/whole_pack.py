"""Generation by its definition: the whole pack is run again for every new token, with no cache and no state.

Every prompt gets its room in the packed stream at once. Attention is causal, so what has not been written yet changes
nothing before it.
"""

import torch
from torch import Tensor

from ftrain.kernels import random
from ftrain.modules import decoder as foundation
from ftrain.modules import omni
from ftrain.modules.packing import Text, exact_budget, pack


def lay_out(prompts, model, room):
    """The packed prompts, each followed by `room`, and where each prompt's room begins."""
    documents = [[*prompt, Text(room)] for prompt in prompts]
    packed = pack(documents, budget=exact_budget(documents, model=model), model=model)
    begins_B = torch.bincount(packed.batch["segments_T"].ids_T).cumsum(0) - len(room)
    return packed.batch, begins_B[torch.tensor(packed.taken).argsort()]


def choose(logits_BV: Tensor, key, step: int, temperature: float) -> Tensor:
    if key is None:
        return logits_BV.argmax(-1)
    return random.categorical(random.fold_in(key, step), logits_BV / temperature)


def text(params, prompts, *, model, max_new, key=None, temperature=0.0, balance=None) -> list[list[int]]:
    """`generate_text` without a stop."""
    batch, first_B = lay_out(prompts, model, [0] * max_new)
    rows, places, _ = omni.media_rows(params, batch, model=model)
    tokens_T = batch["tokens_T"].clone()
    for step in range(max_new):
        x_TD = omni.merge(foundation.embed(params["foundation"], tokens_T), rows, places)
        hidden_TD, _ = omni.hidden_states(params, x_TD, batch, model=model, balance=balance)
        logits_BV = foundation.logits(params["foundation"], hidden_TD[first_B + step - 1], model.foundation)
        tokens_T[first_B + step] = choose(logits_BV, key, step, temperature)
    return tokens_T[first_B[:, None] + torch.arange(max_new)].tolist()


def codes(
    params, prompts, *, model, decoder, key=None, temperature=0.0, guidance=1.0, unconditional=(), balance=None
) -> Tensor:
    """`generate_codes`."""
    part, own, both = model.decoder(decoder), params["decoders"][decoder], [*prompts, *unconditional]
    places = part.codes_per_target
    batch, first_B = lay_out(both, model, [part.begin] + [0] * places)
    rows, index, _ = omni.media_rows(params, batch, model=model)
    codes_BN = torch.zeros(len(both), places, dtype=torch.int64)
    index = [*index, (first_B[:, None] + 1 + torch.arange(places)).flatten()]
    text_TD = foundation.embed(params["foundation"], batch["tokens_T"])
    for step in range(places):
        x_TD = omni.merge(text_TD, [*rows, part.lm_embed(own, codes_BN)], index)
        hidden_TD, _ = omni.hidden_states(params, x_TD, batch, model=model, balance=balance)
        logits_BV = part.lm_logits(own, hidden_TD[first_B + step])
        if unconditional:
            with_BV, without_BV = logits_BV.chunk(2)
            logits_BV = without_BV + guidance * (with_BV - without_BV)
        codes_BN[:, step] = choose(logits_BV, key, step, temperature).repeat(len(both) // len(prompts))
    return codes_BN[: len(prompts)]
