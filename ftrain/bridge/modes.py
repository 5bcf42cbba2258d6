"""A module as it runs with randomness and without: no switch of a family's own stays on where there is no key."""

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn


@contextmanager
def running(module: nn.Module, *, drawing: bool) -> Iterator[None]:
    """Within the block the module trains; without `drawing` it does what draws nothing: dropout, masking of features
    and dropped layers are off, and a normalization over the batch is still one over the batch.
    """
    before = {inner: inner.training for inner in module.modules()}
    for inner, trains in before.items():
        inner.training = trains and (drawing or isinstance(inner, nn.modules.batchnorm._NormBase))
    try:
        yield
    finally:
        for inner, trains in before.items():
            inner.training = trains
