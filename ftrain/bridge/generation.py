"""Generation with bridged language models: transformers' module with its own cache, as the two functions of a `Family`.

The cache is whatever the module makes of it (keys and values, windows, states of a scan). Prompts of one length run
side by side; those of another length have a cache of their own, so nothing is padded, which a recurrent layer would
read. A module that gives no cache runs all tokens again for each new one.

Legend: B prompts, L tokens of a prompt, V vocabulary.
"""

import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import islice
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ftrain.bridge.skeleton import as_it_was, buffers, build, call, flatten
from ftrain.modules.autoregression import Family
from ftrain.modules.spec import Tree

_CACHES = ("cache", "past_key_values", "state")
"""What transformers' modules call the cache that they give and take, the newest name first."""


class Group(NamedTuple):
    """Prompts of one length: their places among all, `[B]`, and their tokens so far, `[B, L]`.

    `cache`: the module's, by the name that it has there, which a call writes into; empty where the module gave none.
    """

    place_B: Tensor
    tokens_BL: Tensor
    cache: Mapping[str, Any]


@dataclass(frozen=True)
class Continued:
    """How a language model of transformers continues prompts.

    `make()`: the module with its own attention, which is built without memory at the first prompt. `name`: for errors.
    `stored`: its buffers by name that a folder holds.
    """

    make: Callable[[], nn.Module]
    name: str
    stored: Mapping[str, Tensor] = field(default_factory=dict)

    def family(self) -> Family:
        """The two functions, of prompts that are lists of token ids. `prefill` raises ValueError for an empty one."""
        return Family(self._prefill, self._extend)

    def _prefill(self, params: Tree, prompts: Sequence[Sequence[int]], room: int) -> tuple[Tensor, tuple[Group, ...]]:
        del room  # a cache of transformers grows by itself
        empty = [i for i, prompt in enumerate(prompts) if not len(prompt)]
        if empty or not len(prompts):
            what = f"prompt {empty[0]} is empty" if empty else "there are no prompts to continue"
            raise ValueError(f"{self.name}: {what}: the first token needs something before it")
        device = next(iter(flatten(params).values())).device
        groups = list[Group]()
        for length in sorted({len(prompt) for prompt in prompts}):
            places = [i for i, prompt in enumerate(prompts) if len(prompt) == length]
            tokens_BL = torch.tensor([list(prompts[i]) for i in places], device=device)
            groups.append(Group(torch.tensor(places, device=device), tokens_BL, {}))
        return self._run(params, tuple(groups))

    def _extend(self, params: Tree, chosen_B: Tensor, groups: tuple[Group, ...]) -> tuple[Tensor, tuple[Group, ...]]:
        longer = (Group(g.place_B, torch.cat([g.tokens_BL, chosen_B[g.place_B][:, None]], 1), g.cache) for g in groups)
        return self._run(params, tuple(longer))

    def _run(self, params: Tree, groups: tuple[Group, ...]) -> tuple[Tensor, tuple[Group, ...]]:
        ran = [self._run_group(params, group) for group in groups]
        place_B = torch.cat([group.place_B for group in groups])
        return torch.cat([scores for scores, _ in ran])[place_B.argsort()], tuple(group for _, group in ran)

    def _run_group(self, params: Tree, group: Group) -> tuple[Tensor, Group]:
        """The scores `[B, V]` after the newest tokens, of which the cache, if there is one, has all but those."""
        read_BL = group.tokens_BL[:, -1:] if group.cache else group.tokens_BL
        tensors = {**{name: x.to(read_BL.device) for name, x in self._held.items()}, **flatten(params)}
        options = {"use_cache": True} if "use_cache" in self._accepted else {}
        with as_it_was(self._module):
            found = call(self._module, tensors, (), {"input_ids": read_BL, **options, **group.cache})
        if found.logits.shape[1] != read_BL.shape[1]:
            raise ValueError(
                f"{self.name}: it cannot continue a prompt here, as it takes a cache in a way of its own "
                f"({found.logits.shape[1]} scores for {read_BL.shape[1]} tokens): write with transformers' generate"
            )
        given = (name for name in _CACHES if name in self._accepted and getattr(found, name, None) is not None)
        return found.logits[:, -1], group._replace(cache={name: found[name] for name in islice(given, 1)})

    @cached_property
    def _module(self) -> nn.Module:
        return build(self.make).eval()

    @cached_property
    def _held(self) -> Mapping[str, Tensor]:
        return {**buffers(self._module), **self.stored}

    @cached_property
    def _accepted(self) -> set[str]:
        return set(inspect.signature(self._module.forward).parameters)
