"""Connectionist temporal classification: how likely a text is, over all ways to lay it over the frames of a recording.

Legend: B rows, L frames, V vocabulary, N tokens of the longest text, S = 2 N + 1 places: a blank before, between and
after the tokens. Source: Graves et al., ICML 2006.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ftrain.kernels.backend import choose_backend
from ftrain.kernels.first_order import first_order
from ftrain.kernels.opaque import opaque_op

__all__ = ["ctc_nats", "ctc_nats_reference"]

BACKENDS = {"cpu": "torch", "cuda": "torch"}
_NEVER = -1e30  # the logarithm of a chance that is none; finite, so that gradients are


def ctc_nats(
    logp_BLV: Tensor, labels_BN: Tensor, frames_B: Tensor, tokens_B: Tensor, *, blank: int = 0, backend: str = "auto"
) -> Tensor:
    """What each row's text costs: minus the logarithm of its chance, in nats, `[B]` in the dtype of the chances.

    - `logp_BLV`: logarithms of the chances of tokens, float32 or float64, which sum to 1 over V. `blank`: the token
      that says nothing.
    - `labels_BN`: int64 in `[0, V)`, of which the first `tokens_B` of each row are its text; others are not read.
    - `frames_B`, `tokens_B`: int64, how many frames and tokens a row has.
    - `backend`: "auto", "reference" or "torch".

    A text that cannot be laid over its frames costs zero, with zero gradients. Differentiable once, but for the
    reference. ValueError for shapes that do not fit.

    >>> import torch
    >>> from ftrain.kernels.ctc import ctc_nats
    >>> even_BLV = torch.full((1, 2, 4), 0.25).log()
    >>> ctc_nats(even_BLV, torch.tensor([[3]]), torch.tensor([2]), torch.tensor([1])).exp()  # 3 ways of 16
    tensor([5.3333])
    """
    rows = len(logp_BLV)
    if logp_BLV.dim() != 3 or labels_BN.dim() != 2 or {len(labels_BN), len(frames_B), len(tokens_B)} != {rows}:
        raise ValueError(
            f"ctc: chances {list(logp_BLV.shape)}, labels {list(labels_BN.shape)}, frames {list(frames_B.shape)} and "
            f"tokens {list(tokens_B.shape)} are not [B, L, V], [B, N], [B] and [B]"
        )
    if choose_backend(backend, logp_BLV.device, BACKENDS) == "reference":
        return ctc_nats_reference(logp_BLV, labels_BN, frames_B, tokens_B, blank=blank)
    found: Tensor = _Nats.apply(logp_BLV, labels_BN, frames_B, tokens_B, blank)
    return found


def ctc_nats_reference(
    logp_BLV: Tensor, labels_BN: Tensor, frames_B: Tensor, tokens_B: Tensor, *, blank: int = 0
) -> Tensor:
    """The definition of `ctc_nats`, with its arguments: the forward recursion, frame by frame. Nothing is checked."""
    rows, places = len(labels_BN), 2 * labels_BN.shape[1] + 1
    text_BS = labels_BN.new_full((rows, places), blank)
    text_BS[:, 1::2] = labels_BN
    jumps_BS = torch.zeros_like(text_BS, dtype=torch.bool)
    jumps_BS[:, 2:] = (text_BS[:, 2:] != blank) & (text_BS[:, 2:] != text_BS[:, :-2])
    never = logp_BLV.new_tensor(_NEVER)
    at_BS = torch.where(torch.arange(places, device=never.device) < 2, logp_BLV[:, 0].gather(1, text_BS), never)
    for frame in range(1, logp_BLV.shape[1]):
        steps = [torch.nn.functional.pad(at_BS, (n, 0), value=_NEVER)[:, :places] for n in (0, 1, 2)]
        reached_BS = torch.stack([*steps[:2], torch.where(jumps_BS, steps[2], never)]).logsumexp(0)
        moved_BS = reached_BS + logp_BLV[:, frame].gather(1, text_BS)
        at_BS = torch.where((frame < frames_B)[:, None], moved_BS, at_BS)
    last_B = at_BS.gather(1, 2 * tokens_B[:, None])[:, 0]
    before_B = at_BS.gather(1, (2 * tokens_B[:, None] - 1).clamp(min=0))[:, 0]
    chance_B = torch.logaddexp(last_B, torch.where(tokens_B > 0, before_B, never))
    return torch.where(chance_B < _NEVER / 2, 0, -chance_B)


@opaque_op(
    "ctc(Tensor logp, Tensor labels, Tensor frames, Tensor tokens, int blank) -> Tensor",
    fake=lambda logp, *_: logp.new_empty(logp.shape[0]),
)
def ctc(logp_BLV: Tensor, labels_BN: Tensor, frames_B: Tensor, tokens_B: Tensor, blank: int) -> Tensor:
    """`ctc_nats` as one opaque op."""
    nats_B, _ = torch.ops.aten._ctc_loss.Tensor(logp_BLV.transpose(0, 1), labels_BN, frames_B, tokens_B, blank, True)
    return torch.where(nats_B.isinf(), 0, nats_B)


@opaque_op(
    "ctc_backward(Tensor grad, Tensor logp, Tensor labels, Tensor frames, Tensor tokens, int blank) -> Tensor",
    fake=lambda grad, logp, *_: logp.new_empty(logp.shape),
)
def ctc_backward(
    grad_B: Tensor, logp_BLV: Tensor, labels_BN: Tensor, frames_B: Tensor, tokens_B: Tensor, blank: int
) -> Tensor:
    """The gradient of `ctc_nats` by the logarithms, `[B, L, V]`; what the forward made is made again."""
    given = (logp_BLV.transpose(0, 1), labels_BN, frames_B, tokens_B)
    made = torch.ops.aten._ctc_loss.Tensor(*given, blank, True)
    found: Tensor = torch.ops.aten._ctc_loss_backward.Tensor(grad_B.contiguous(), *given, *made, blank, True)
    return found.transpose(0, 1).contiguous()


class _Nats(torch.autograd.Function):
    @staticmethod
    def forward(*args: Any) -> Tensor:
        return ctc(*args)

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Tensor) -> None:
        *tensors, ctx.blank = inputs
        ctx.save_for_backward(*tensors)

    @staticmethod
    def backward(ctx: Any, grad_B: Tensor) -> tuple[Any, ...]:
        return first_order(ctc_backward, "ctc")(grad_B, *ctx.saved_tensors, ctx.blank), None, None, None, None


def _workspace(logp_BLV: Tensor, labels_BN: Tensor, *_: Any) -> int:
    """The forward's table of places."""
    return logp_BLV.shape[0] * logp_BLV.shape[1] * (2 * labels_BN.shape[1] + 1) * logp_BLV.element_size()


WORKSPACE: dict[str, Callable[..., int]] = {
    "ftrain::ctc": _workspace,
    "ftrain::ctc_backward": lambda grad, logp, labels, *_: (
        2 * _workspace(logp, labels) + logp.numel() * logp.element_size()
    ),
}
"""Bytes that each op allocates besides its result."""
