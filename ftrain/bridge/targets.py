"""What a model's scores are to say of each row: a class, or the tokens that a recording speaks.

Legend: B rows, C classes, L frames of a recording, N tokens of its text, V vocabulary.
"""

from typing import Any

import torch
from torch import Tensor

from ftrain.bridge.batches import IGNORED, mean_over_labels
from ftrain.kernels.ctc import ctc_nats
from ftrain.kernels.mean import Mean


def class_loss(scores_BC: Tensor, labels: Tensor) -> Mean:
    """The mean cross entropy of the rows that have a class, in nats.

    `labels`: classes, int64 `[B]`, -100 for a row without one. ValueError for labels of another shape.
    """
    if labels.shape != scores_BC.shape[:-1]:
        raise ValueError(
            f"the batch's 'labels' have shape {list(labels.shape)}, and the scores are of {list(scores_BC.shape[:-1])}"
        )
    wide = scores_BC.flatten(0, -2).to(torch.promote_types(scores_BC.dtype, torch.float32))
    total = torch.nn.functional.cross_entropy(wide, labels.flatten(), ignore_index=IGNORED, reduction="sum")
    return mean_over_labels(total, labels)


def ctc_loss(scores_BLV: Tensor, labels_BN: Tensor, frames_B: Tensor | None, blank: int) -> Mean:
    """Connectionist temporal classification: nats per token of the texts (Graves et al., ICML 2006).

    - `labels_BN`: tokens, int64, -100 after the last of a row. `frames_B`: how many frames of each row are sound,
      int64; None: all. `blank`: the token that says nothing.

    A text that has more tokens than its recording has frames counts as zero.
    """
    there_BN = labels_BN != IGNORED
    if frames_B is None:
        frames_B = torch.full_like(labels_BN[:, 0], scores_BLV.shape[1])
    wide = torch.promote_types(scores_BLV.dtype, torch.float32)
    logp_BLV = scores_BLV.log_softmax(-1, dtype=wide)
    nats_B = ctc_nats(logp_BLV, labels_BN.masked_fill(~there_BN, blank), frames_B, there_BN.sum(-1), blank=blank)
    return mean_over_labels(nats_B.sum(), labels_BN)


def blank_of(config: Any) -> int:
    """The token of a configuration that says nothing in connectionist temporal classification."""
    return int(getattr(config, "ctc_blank_id", None) or getattr(config, "pad_token_id", None) or 0)
