"""From scores to the next token: the most likely one, or one drawn at a temperature among the likely ones.

Legend: B samples, V vocabulary.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ftrain.kernels import random


@dataclass(frozen=True)
class Sampling:
    """How a token is chosen from its scores.

    - `temperature`: 0 takes the most likely token; above it scores are divided by it, and one is drawn.
    - `top_k`: only among the k most likely ones (Fan et al. 2018); ties with the k-th stay.
    - `top_p`: only among the fewest of the most likely ones whose probabilities, at the temperature and after `top_k`,
      sum to at least p (nucleus sampling, Holtzman et al. 2020). The most likely one always stays.

    ValueError for a negative temperature, `top_k` below 1, `top_p` outside of (0, 1].
    """

    temperature: float = 0.0
    top_k: int | None = None
    top_p: float | None = None

    def __post_init__(self) -> None:
        if not self.temperature >= 0:
            raise ValueError(f"temperature={self.temperature} must be 0, or above 0 with a random key")
        if self.top_k is not None and self.top_k < 1:
            raise ValueError(f"top_k={self.top_k} must be at least 1")
        if self.top_p is not None and not 0 < self.top_p <= 1:
            raise ValueError(f"top_p={self.top_p} must be above 0 and at most 1")

    def check_key(self, key: Tensor | None) -> None:
        """ValueError where tokens are to be drawn without a key (int64 `[2]`, or `[B, 2]`)."""
        if self.temperature > 0 and key is None:
            raise ValueError(f"temperature={self.temperature} must be 0, or above 0 with a random key")


def choose(scores_BV: Tensor, key: Tensor | None, step: int, how: Sampling) -> Tensor:
    """One token per row, int64 `[B]`, as number `step` of its sample.

    `key`: int64 `[2]`, or `[B, 2]`, one for each sample, whose tokens then do not depend on the rest of the batch;
    ValueError for keys of another shape. Without a key, or at temperature 0, the most likely token.

    >>> scores_BV = torch.tensor([[0.0, 2.0, 1.0]]).expand(4, 3)
    >>> choose(scores_BV, None, 0, Sampling()).tolist()
    [1, 1, 1, 1]
    >>> drawn_B = choose(scores_BV, random.key(0), 0, Sampling(temperature=1.0, top_k=2))
    >>> set(drawn_B.tolist()) <= {1, 2}
    True
    """
    if how.temperature == 0 or key is None:
        return scores_BV.argmax(-1)
    likely_BV = likely(scores_BV / how.temperature, how)
    if key.ndim == 1:
        return random.categorical(random.fold_in(key, step), likely_BV)
    if key.shape != (len(scores_BV), 2):
        raise ValueError(f"keys {list(key.shape)} for {len(scores_BV)} samples: give one key [2], or one each [B, 2]")
    rows = zip(key.unbind(), likely_BV.unbind(), strict=True)
    return torch.stack([random.categorical(random.fold_in(one, step), row_V) for one, row_V in rows])


def likely(scores_BV: Tensor, how: Sampling) -> Tensor:
    """The scores of the tokens that `top_k` and `top_p` leave, and minus infinity for the others."""
    if how.top_k is not None and how.top_k < scores_BV.shape[-1]:
        least_B1 = scores_BV.topk(how.top_k, dim=-1).values[:, -1:]
        scores_BV = scores_BV.masked_fill(scores_BV < least_B1, -torch.inf)
    if how.top_p is None or how.top_p == 1:
        return scores_BV
    sorted_BV, order_BV = scores_BV.sort(dim=-1, descending=True, stable=True)
    probability_BV = sorted_BV.to(torch.promote_types(sorted_BV.dtype, torch.float32)).softmax(-1)
    before_BV = probability_BV.cumsum(-1) - probability_BV  # of the more likely ones
    left_BV = sorted_BV.masked_fill(before_BV >= how.top_p, -torch.inf)
    return torch.empty_like(left_BV).scatter(-1, order_BV, left_BV)


def until(ids: Sequence[int], stop: Sequence[int]) -> list[int]:
    """The ids before the first of the `stop` ones.

    >>> until([5, 6, 2, 7], [2, 3])
    [5, 6]
    """
    end = next((i for i, token in enumerate(ids) if token in stop), len(ids))
    return list(ids[:end])
