"""A table of token embeddings.

Legend: T tokens, V vocabulary, D width.
"""

from typing import Any

from torch import Tensor

from ftrain.kernels.embedding import embedding
from ftrain.modules.spec import Init, Normal, ParamSpec


def specs(vocab: int, d_model: int, *, init: Init | None = None) -> dict[str, ParamSpec]:
    """`table_VD [vocab, d_model]`, by default normal with deviation 0.02."""
    return {"table_VD": ParamSpec((vocab, d_model), ("vocab", "embed"), init or Normal(0.02))}


def apply(params: dict[str, Any], tokens_T: Tensor) -> Tensor:
    """Rows of the table: token ids `[T]` (integers in `[0, vocab)`) to `[T, D]`.

    >>> import torch
    >>> apply({"table_VD": torch.tensor([[0.0, 1.0], [2.0, 3.0]])}, torch.tensor([1, 0])).tolist()
    [[2.0, 3.0], [0.0, 1.0]]
    """
    return embedding(tokens_T, params["table_VD"])
