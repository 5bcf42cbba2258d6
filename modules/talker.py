"""What a talker is to losses and to the loop of speech, whichever family it is of.

Legend: S tokens of the talker, W width of the thinker, D width of the talker, B samples, G codes of a frame.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from ftrain.kernels.documents import Segments
from ftrain.kernels.mean import Mean
from ftrain.modules import decoder
from ftrain.modules.decoder import DecoderStats
from ftrain.modules.decoder_config import DecoderConfig
from ftrain.modules.sampling import Sampling
from ftrain.modules.spec import Tree
from ftrain.modules.speech_packs import SpeechConfig


@dataclass(frozen=True)
class Talker:
    """A talker as functions of its parameters.

    - `specs`: of its parameters, those of its `stack` at "stack".
    - `layer`: which of the thinker's streams its states are (`keep` of `ftrain.modules.decoder.apply`).
    - `speech`: how its lines are made; `ends`: the codes that end speech.
    - `embed(params, batch) -> [S, D]`: the stream of a batch, with "rows" `[S, W]` of the thinker.
    - `losses(params, hidden_SD, batch)`: its means, by their names, `terms`.
    - `frame(params, state_BD, first_B, key, how) -> [B, G]`: all codes of frames whose first ones are known.
    - `go_on(params, codes_BG, rows_BW) -> [B, D]`: the stream of a frame, beside a row of the thinker.
    """

    specs: Tree
    stack: DecoderConfig
    layer: int
    speech: SpeechConfig
    ends: tuple[int, ...]
    terms: tuple[str, ...]
    embed: Callable[[Tree, Mapping[str, Any]], Tensor]
    losses: Callable[[Tree, Tensor, Mapping[str, Any]], dict[str, Mean]]
    frame: Callable[[Tree, Tensor, Tensor, Tensor | None, Sampling], Tensor]
    go_on: Callable[[Tree, Tensor, Tensor], Tensor]

    def hidden(
        self, params: Tree, batch: Mapping[str, Any], *, segments: Segments | None = None
    ) -> tuple[Tensor, DecoderStats]:
        """The states `[S, D]` from which first codes are read, and what routers did.

        `batch`: as `embed` takes it, with "positions" `[S, 3]`.
        """
        x_SD, place = self.embed(params, batch), batch["positions"].mT
        return decoder.apply(params["stack"], x_SD, positions=place, segments=segments, cfg=self.stack)

    def logits(self, params: Tree, hidden_SD: Tensor) -> Tensor:
        """The scores of every next first code, `[S, V]`."""
        return decoder.logits(params["stack"], hidden_SD, self.stack)
