"""Text that a language model writes about what it sees and hears, for `ftrain.modules.autoregression.generate`.

Media are read once, with the prompts; from then on each step is one token of each prompt, as without media.

Legend: B prompts, V vocabulary, D model width, T tokens of all prompts.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ftrain.modules import decoder, vision_language
from ftrain.modules.autoregression import Family
from ftrain.modules.kv_cache import KvCache
from ftrain.modules.sounds import folded
from ftrain.modules.spec import Tree
from ftrain.modules.vision_language import VisionLanguageConfig
from ftrain.modules.vision_media import prepare

Prompt = Mapping[str, Any] | Sequence[int]
"""Raw leaves of one document (`ftrain.modules.vision_media.prepare`), or the ids of text alone."""


class _Now(NamedTuple):
    """Where generation stands: all keys and values, and the place of each prompt's next token, on all axes."""

    cache: KvCache
    next_B: Tensor


def sight_family(cfg: VisionLanguageConfig) -> Family:
    """The text of such a model; prompts are `Prompt`s.

    What is written goes on behind the place of the prompt's last token. Its `prefill` raises ValueError where there is
    no prompt, or an empty one, and for media as `prepare` does.
    """

    def prefill(params: Tree, prompts: Sequence[Prompt], room: int) -> tuple[Tensor, _Now]:
        raw, lengths = joined(prompts, fold=_folding(cfg))
        batch = on_device(prepare(raw, cfg.media), params["text"]["embedding"]["table_VD"].device)
        x_TD, added = vision_language.embed(params, batch, cfg)
        length_B = torch.tensor(lengths, device=x_TD.device)
        hidden_TD, cache = decoder.prefill(
            params["text"],
            x_TD,
            positions=batch["positions"].mT,
            length_B=length_B,
            room=room,
            cfg=cfg.text,
            added=added,
        )
        last_B = length_B.cumsum(0) - 1
        next_B = batch["positions"].index_select(0, last_B).amax(1) + 1
        return decoder.logits(params["text"], hidden_TD.index_select(0, last_B), cfg.text), _Now(cache, next_B)

    def extend(params: Tree, chosen_B: Tensor, now: _Now) -> tuple[Tensor, _Now]:
        x_BD, place = decoder.embed(params["text"], chosen_B), now.next_B.expand(3, -1)
        hidden_BD, cache = decoder.extend(params["text"], x_BD, positions=place, cache=now.cache, cfg=cfg.text)
        return decoder.logits(params["text"], hidden_BD, cfg.text), _Now(cache, now.next_B + 1)

    return Family(prefill, extend)


def _folding(cfg: VisionLanguageConfig) -> Callable[[dict[str, Tensor]], dict[str, Tensor]] | None:
    """What makes leaves of a pack of a prompt's recordings; None for a model that does not hear."""
    sound = cfg.media.sound
    return None if sound is None else lambda prompt: folded(prompt, sound.tower)


def joined(
    prompts: Sequence[Prompt], *, fold: Callable[[dict[str, Tensor]], dict[str, Tensor]] | None = None
) -> tuple[dict[str, Tensor], list[int]]:
    """The prompts as one raw pack, and their lengths. ValueError where there is none, an empty one, or rows.

    `fold`: what is done with the leaves of each before they are joined.
    """
    given = [
        dict(prompt) if isinstance(prompt, Mapping) else {"tokens": torch.tensor(prompt, dtype=torch.int64)}
        for prompt in prompts
    ]
    lengths = [len(prompt["tokens"]) for prompt in given]
    if not given or 0 in lengths:
        what = f"prompt {lengths.index(0)} is empty" if given else "there are no prompts to continue"
        raise ValueError(f"{what}: the first token needs something before it")
    for prompt in given:
        prompt.pop("labels", None)
        if prompt["tokens"].dim() != 1 or "segments" in prompt:
            raise ValueError("a prompt is one document: tokens [T] without segments")
    given = given if fold is None else [fold(prompt) for prompt in given]
    names = dict.fromkeys(name for prompt in given for name in prompt)
    raw = {name: torch.cat([prompt[name] for prompt in given if name in prompt]) for name in names}
    return {**raw, "segments": torch.repeat_interleave(torch.tensor(lengths))}, lengths


def on_device(tree: Any, device: torch.device) -> Any:
    """A batch of nested dicts of tensors on the device."""
    return {name: on_device(x, device) for name, x in tree.items()} if isinstance(tree, dict) else tree.to(device)
