"""The codes of a frame of sound behind its first, one after the other (Qwen3-Omni's code predictor).

A frame of speech is G codes, one from each codebook, each of which corrects what those before it leave. A talker writes
the first; the rest are read from a short sequence of its own for each frame: the talker's state, then the codes so far,
each by its own table, and each next code by its own head.

Legend: N frames, G codes of a frame, R = G - 1 of them behind the first, D width, V codes in a codebook, B samples.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ftrain.kernels.attention import attention
from ftrain.kernels.documents import Documents
from ftrain.kernels.embedding import embedding
from ftrain.kernels.mean import Mean
from ftrain.modules import decoder, norm
from ftrain.modules.block import Context
from ftrain.modules.decoder_config import DecoderConfig, layer_block
from ftrain.modules.sampling import Sampling, choose
from ftrain.modules.spec import Tree


@dataclass(frozen=True)
class PredictorConfig:
    """A `stack` over the codes of one codebook (its `vocab`), and `groups`, how many codes a frame has.

    ValueError for less than two codes, or a stack with experts, several axes of positions, or tied embeddings.
    """

    stack: DecoderConfig
    groups: int

    def __post_init__(self) -> None:
        if self.groups < 2:
            raise ValueError(f"PredictorConfig: groups={self.groups} leaves nothing to predict behind the first code")
        if self.stack.routers or self.stack.attention.rope_sections is not None or self.stack.tie_embeddings:
            raise ValueError(
                "PredictorConfig: the stack of a code predictor has no experts, one axis of positions, and heads that "
                "are not its tables"
            )


def specs(cfg: PredictorConfig) -> Tree:
    """`tables` and `heads`, one of each for every code behind the first, `layers` and `norm`.

    >>> from ftrain.modules.decoder_config import preset
    >>> sorted(specs(PredictorConfig(preset("llama-tiny"), groups=4)))
    ['heads', 'layers', 'norm', 'tables']
    """
    found = decoder.specs(cfg.stack)
    return {
        "tables": [found["embedding"] for _ in range(cfg.groups - 1)],
        "layers": found["layers"],
        "norm": found["norm"],
        "heads": [found["head"] for _ in range(cfg.groups - 1)],
    }


def embed(params: Tree, codes_NR: Tensor) -> Tensor:
    """The rows of a frame's codes behind the first, added up, `[N, D]`: what the talker reads of them. Codes below 0
    are of no frame and give zeros. ValueError for another number of codes.
    """
    if codes_NR.shape[1] != len(params["tables"]):
        raise ValueError(
            f"frames of {codes_NR.shape[1] + 1} codes, of which the model has {len(params['tables']) + 1}: give all of "
            "each frame"
        )
    rows = [_rows(table, code_N) for table, code_N in zip(params["tables"], codes_NR.unbind(1), strict=True)]
    return torch.stack(rows).sum(0).masked_fill(codes_NR[:, :1] < 0, 0)


def _rows(table: Tree, code_N: Tensor) -> Tensor:
    return embedding(code_N.clamp(min=0), table["table_VD"])


def scores(params: Tree, state_ND: Tensor, first_ND: Tensor, codes_NR: Tensor, cfg: PredictorConfig) -> list[Tensor]:
    """What the heads read, R of `[N, D]`: of each frame what is known before each of its codes.

    `state_ND`: the talker's state from which the first code was read; `first_ND`: that code's row in its table.
    `codes_NR`: the codes behind it, of which the last is not read; below 0 for a row without a frame.

    ValueError where these are not of one number of frames, or of another number of codes.
    """
    frames, of = len(codes_NR), cfg.groups
    if codes_NR.shape != (len(state_ND), of - 1) or state_ND.shape != first_ND.shape:
        raise ValueError(
            f"code predictor: codes {list(codes_NR.shape)} of frames with states {list(state_ND.shape)} and first rows "
            f"{list(first_ND.shape)}: give {of - 1} codes of each, and as many rows of each"
        )
    tables = zip(params["tables"], codes_NR[:, :-1].unbind(1), strict=False)
    x_NGD = torch.stack([state_ND, first_ND, *(_rows(table, code_N) for table, code_N in tables)], 1)
    place_T, at_T = torch.arange(frames * of, device=x_NGD.device), torch.arange(frames + 1, device=x_NGD.device) * of
    at = _Frames(place_T % of, segments_T=Documents(place_T // of, at_T.to(torch.int32), of))
    at.rope(cfg.stack.attention)  # before the layers, of which it is no part
    x_TD = x_NGD.flatten(0, 1)
    for i, layer in enumerate(params["layers"]):
        x_TD = at.run_layer(layer_block(cfg.stack, i), layer, x_TD, layer=i)
    hidden_NGD = norm.apply(params["norm"], x_TD, eps=cfg.stack.norm_eps).unflatten(0, (frames, of))
    return list(hidden_NGD[:, 1:].unbind(1))


class _Frames(Context):
    """`Context` of frames of which each rank of a mesh has its own, whole."""

    def attend(self, q_THK: Tensor, k_TGK: Tensor, v_TGV: Tensor, **options: Any) -> Tensor:
        own: Tensor = attention.local(q_THK, k_TGK, v_TGV, segments_T=self.segments_T, **options)  # type: ignore[attr-defined]
        return own


def loss(params: Tree, state_ND: Tensor, first_ND: Tensor, codes_NR: Tensor, cfg: PredictorConfig) -> Mean:
    """The cross entropy of the codes behind the first, in nats, over all of them; arguments as of `scores`."""
    read = scores(params, state_ND, first_ND, codes_NR, cfg)
    label_RN = codes_NR.masked_fill(codes_NR < 0, decoder.IGNORE).unbind(1)
    found = zip(params["heads"], read, label_RN, strict=True)
    return Mean.pool([decoder.loss({"head": w}, x_ND, label_N.contiguous(), cfg.stack) for w, x_ND, label_N in found])


def generate(
    params: Tree,
    state_BD: Tensor,
    first_BD: Tensor,
    cfg: PredictorConfig,
    *,
    key: Tensor | None = None,
    how: Sampling = Sampling(),  # noqa: B008  # frozen
) -> Tensor:
    """The codes behind the first of one frame of each sample, int64 `[B, R]`; `key`, `how`: see `choose`.

    `state_BD`, `first_BD`: as in `scores`.
    """
    samples, made = len(state_BD), list[Tensor]()
    length_B = torch.full((samples,), 2, device=state_BD.device)
    place_T = torch.arange(2, device=state_BD.device).repeat(samples)
    x_TD = torch.stack([state_BD, first_BD], 1).flatten(0, 1)
    hidden_TD, cache = decoder.prefill(
        params, x_TD, positions=place_T, length_B=length_B, room=cfg.groups - 2, cfg=cfg.stack
    )
    hidden_BD = hidden_TD[1::2]
    for step, head in enumerate(params["heads"]):
        if step:
            x_BD = _rows(params["tables"][step - 1], made[-1])
            hidden_BD, cache = decoder.extend(params, x_BD, positions=cache.length_B, cache=cache, cfg=cfg.stack)
        made.append(choose(decoder.logits({"head": head}, hidden_BD, cfg.stack), key, step, how))
    return torch.stack(made, 1)
