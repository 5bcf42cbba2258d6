"""Ops that a trace keeps as one node: a schema, an implementation, a shape rule.

A kernel's forward and backward are each one opaque op *without* autograd; a `torch.autograd.Function` with
`setup_context` joins them. `torch.func` refuses ops whose autograd was registered through `torch.library`, and an
opaque op is what lets data-dependent work (a loop over documents, a loop over experts) live in a static graph.
"""

from collections.abc import Callable
from typing import Any, ParamSpec, TypeVar

import torch

P = ParamSpec("P")
R = TypeVar("R")

_library = torch.library.Library("ftrain", "FRAGMENT")


def opaque_op(
    schema: str, *, fake: Callable[..., Any], random: bool = False
) -> Callable[[Callable[P, R]], Callable[P, R]]:
    """Register the decorated function as `torch.ops.ftrain.<name>` and return the op's `default` overload.

    - `schema`: the op's signature in the dispatcher's language, e.g. `"scale(Tensor x, float factor) -> Tensor"`.
    - `fake`: gets the same arguments with fake tensors and returns empty outputs of the right shapes, dtypes and
      strides.
    - `random`: True if the op draws from torch's generator. Otherwise equal inputs must give equal results.

    The op must neither mutate nor alias its inputs unless its schema says so. RuntimeError, of torch, for a name that
    is taken or a schema that cannot be read.

    >>> import torch
    >>> from ftrain.kernels.opaque import opaque_op
    >>> @opaque_op("twice_of_a_docstring(Tensor x) -> Tensor", fake=lambda x: torch.empty_like(x))
    ... def twice(x):
    ...     return 2 * x
    >>> twice(torch.tensor([1.0, 2.0]))
    tensor([2., 4.])
    """
    name = schema.split("(", 1)[0]

    def register(implementation: Callable[P, R]) -> Callable[P, R]:
        _library.define(schema, tags=(torch.Tag.nondeterministic_seeded,) if random else ())
        _library.impl(name, implementation, "CompositeExplicitAutograd")
        torch.library.register_fake(f"ftrain::{name}", fake, lib=_library)
        return getattr(torch.ops.ftrain, name).default

    return register
