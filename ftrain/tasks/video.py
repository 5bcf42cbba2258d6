"""Flow matching of a video transformer of Wan's on clips side by side in packs: noise, times, captions left out.

Times, noise and captions that are left out come from the step's key and the clips' numbers, so that all ranks of a mesh
agree on them. A batch is that of `ftrain.run.clip_batches`.

Legend: N rows of a pack (patches), P numbers of a row of the input, Q of clean data, M clips, S text rows, C width.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from ftrain.kernels import random
from ftrain.kernels.mean import Mean
from ftrain.modules.model import Leaf, Model
from ftrain.modules.spec import Tree
from ftrain.sharding.batch import BatchRule, Replicated, Tokens
from ftrain.tasks.flow import BINS, Flow, Times, dropped, squared_error
from ftrain.tasks.task import for_log, require_leaf

BATCH: Mapping[str, Leaf] = {
    "data": Leaf("patches of clean latents", "[N, Q]", needed=True),
    "condition": Leaf("channels beside them: a mask and latents of the first frame", "[N, P - Q]"),
    "labels": Leaf("0 for a patch that counts, -100 for padding", "[N]", needed=True),
    "clip": Leaf("the number of each row's clip among `clips`", "[N]", needed=True),
    "clips": Leaf("numbers of the clips, of all ranks", "[M]", needed=True),
    "given": Leaf("rows of a first frame that is given clean", "[N]"),
    "text": Leaf("states of the captions", "[S, C]", needed=True),
    "text_clip": Leaf("the number of each text row's clip", "[S]", needed=True),
    "text_row": Leaf("the place of each text row in its caption", "[S]", needed=True),
    "empty": Leaf("states of the empty caption, filled up", "[text_rows, C]"),
}
"""Leaves of the task's own; others (`positions`, `segments`, `image`, ...) are the model's."""
RULES: Mapping[str, BatchRule] = {
    "clips": Replicated(), "empty": Replicated(optional=True),
    "text": Tokens(), "text_clip": Tokens(), "text_row": Tokens(), "image": Tokens(optional=True),
}  # fmt: skip
"""How ranks share them: `image` if a model reads rows of pictures, `empty` if captions are left out."""
_SEED = 17  # of the noise of held-out losses, which are measured without a key


@dataclass(frozen=True)
class VideoFlow:
    """Flow matching: which times are trained at, how errors weigh, and how often a caption is left out."""

    times: Literal["uniform", "logit_normal", "mode"] = "uniform"
    """How times are drawn, before the shift."""
    mean: float = 0.0
    """Of logit_normal: of the normal number whose sigmoid is taken."""
    std: float = 1.0
    """Of logit_normal: its deviation."""
    scale: float = 1.29
    """Of mode: how much times are heaped about the middle."""
    shift: float = 3.0
    """Moves times towards noise, as the sampler's shift does; 1: not at all."""
    low: float | None = None
    """Times are at least this; default: all that the model is for."""
    high: float | None = None
    """Times are at most this; default: all that the model is for."""
    weighting: Literal["none", "bell", "sigma_sqrt", "cosmap"] = "none"
    """Of errors by their time."""
    drop: float = 0.0
    """Share of clips that train without their caption, for guidance; 0.1 is usual."""

    compares: ClassVar[bool] = False

    def __post_init__(self) -> None:
        """ValueError for numbers out of range."""
        if not 0 <= self.drop < 1:
            raise ValueError(f"video: drop={self.drop}, a share of captions, must be in [0, 1)")
        self.flow  # noqa: B018  # is refused here

    @property
    def flow(self) -> Flow:
        """The loss of a velocity field. ValueError for numbers out of range."""
        low, high = 0.0 if self.low is None else self.low, 1.0 if self.high is None else self.high
        return Flow(Times(self.times, self.mean, self.std, self.scale, self.shift, low, high), self.weighting)

    def loss(
        self, model: Model, params: Tree, batch: Mapping[str, Any], *, key: Tensor | None = None
    ) -> tuple[Any, dict[str, Mean]]:
        """The weighted mean of squared errors of the velocity, without terms.

        - `batch`: of leaves as `BATCH` says, and those of the model but `latents`, `times` and `time_rows`.
        - `key`: int64 `[2]`, of the step. None: the unweighted mean at five fixed times of the range, each of them a
          term too, with noise that is the same at each call.

        ValueError for a batch without a leaf that is needed, and for a model that gives no velocities.
        """
        if model.outputs is None:
            raise ValueError(f"{model.name} gives no velocities: video trains a video transformer of Wan's")
        data_NQ = batch["data"]
        clip_N, labels_N = (require_leaf("video", batch, name, BATCH[name].means) for name in ("clip", "labels"))
        asked = partial(
            self.flow.noisy, data_NQ, ids_N=batch["clips"][clip_N], given_N=batch.get("given"), valid_N=labels_N == 0
        )
        if key is None:
            return self._fixed(model, params, batch, asked)
        noisy, texts = asked(key=key), self._captions(batch, key)
        times_M = self.flow.times.draw(key, batch["clips"])
        found = _velocity(model, params, {**batch, "text": texts}, noisy.x, times_M, key)
        return squared_error(found, noisy.target, noisy.counted_N, self.flow.weight(noisy.time_N)), {}

    def _fixed(
        self, model: Model, params: Tree, batch: Mapping[str, Any], asked: Callable[..., Any]
    ) -> tuple[Mean, dict[str, Mean]]:
        """At the middles of five bins of the range."""
        key = random.key(_SEED, device=batch["clips"].device)
        low, high = self.flow.times.low, self.flow.times.high
        terms = dict[str, Mean]()
        for share in BINS:
            time = low + (high - low) * share
            times_M = torch.full(batch["clips"].shape, time, dtype=torch.float32, device=batch["clips"].device)
            noisy = asked(key=key, time_N=times_M[batch["clip"]])
            found = _velocity(model, params, batch, noisy.x, times_M, None)
            terms[f"at_{time:.3g}"] = squared_error(found, noisy.target, noisy.counted_N)
        totals, counts = zip(*((t.total, t.count) for t in terms.values()), strict=True)
        return Mean(torch.stack(totals).sum(), torch.stack(counts).sum()), {n: for_log(t) for n, t in terms.items()}

    def _captions(self, batch: Mapping[str, Any], key: Tensor) -> Tensor:
        """The states of captions, of which some are those of the empty one."""
        text_SC: Tensor = batch["text"]
        if not self.drop:
            return text_SC
        if "empty" not in batch:
            raise ValueError("video: captions are left out (drop), and the batch has no 'empty', states of no caption")
        without_S = dropped(key, batch["clips"][batch["text_clip"]], self.drop)
        return torch.where(without_S[:, None], batch["empty"][batch["text_row"]].to(text_SC.dtype), text_SC)


def _velocity(
    model: Model, params: Tree, batch: Mapping[str, Any], x_NQ: Tensor, times_M: Tensor, key: Tensor | None
) -> Tensor:
    """What the model predicts of rows whose clips are at these times; rows that are given are at 0."""
    rows_N: Tensor = batch["clip"]
    if "given" in batch:
        times_M = torch.cat([times_M, times_M.new_zeros(1)])
        rows_N = torch.where(batch["given"], len(times_M) - 1, rows_N)
    latents_NP = torch.cat([x_NQ, batch["condition"]], -1) if "condition" in batch else x_NQ
    of_model = {name: leaf for name, leaf in batch.items() if name not in BATCH or name == "text"}
    assert model.outputs is not None
    found: Tensor = model.outputs(
        params, {**of_model, "latents": latents_NP, "times": times_M, "time_rows": rows_N}, key
    )
    return found
