"""LoRA+ (Hayou et al., arXiv 2402.12354): the factor at the output learns faster than the one at the input."""

from collections.abc import Callable

from torch import Tensor

from ftrain.optim import LearningRate, Transform, multi_transform


def plus(make: Callable[[LearningRate], Transform], rate: LearningRate, *, ratio: float = 16.0) -> Transform:
    """An optimizer of deltas whose `B` have `ratio` times the rate of all others.

    - `make(rate)`: the optimizer, such as `optim.adamw`. `rate`: a number, a 0-d tensor or a schedule.

    What must see all deltas at once (`optim.clip_by_global_norm`) comes before it in a chain. ValueError for a ratio
    that is not above 0.

    >>> import torch
    >>> from ftrain import lora, optim
    >>> delta = {"w_lora": {"A": torch.zeros(2, 1), "B": torch.zeros(1, 2)}}
    >>> tx = lora.plus(optim.sgd, 0.1, ratio=10.0)
    >>> ones = {"w_lora": {"A": torch.ones(2, 1), "B": torch.ones(1, 2)}}
    >>> updates, _ = tx.update(ones, tx.init(delta), delta)
    >>> updates["w_lora"]["B"]
    tensor([[-1., -1.]])
    """
    if not ratio > 0:
        raise ValueError(f"lora: ratio={ratio} of the rates of LoRA+ must be above 0")
    faster = _times(rate, ratio) if callable(rate) else rate * ratio
    return multi_transform({"A": make(rate), "B": make(faster)}, lambda path: "B" if path.endswith(".B") else "A")


def _times(rate: Callable[[Tensor], Tensor], ratio: float) -> Callable[[Tensor], Tensor]:
    return lambda step: rate(step) * ratio
