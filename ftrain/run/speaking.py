"""How a run takes speech: by the talker of a folder, with codes that rows give or that a codec makes of recordings.

S samples of a recording, F frames, Q levels of codes.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ftrain.bridge.native_mimi import native_mimi
from ftrain.bridge.native_talking import talking_config
from ftrain.data import media
from ftrain.data.media.limits import Limits
from ftrain.data.rejects import BadRow
from ftrain.data.sample import Place
from ftrain.data.speech import Speaking
from ftrain.hf.files import HfFolder
from ftrain.modules.families import mimi, mimi_config
from ftrain.modules.families.mimi_config import MimiConfig
from ftrain.modules.spec import Tree, map_with_paths


@dataclass(frozen=True)
class Coder:
    """A codec that makes codes of recordings."""

    cfg: MimiConfig
    params: Tree
    state: Tree
    levels: int
    device: torch.device
    limits: Limits = Limits()  # noqa: RUF009  # frozen

    def __call__(self, source: Any, place: Place) -> np.ndarray:
        """The codes int64 `[F, Q]` of a recording, of all frames that it reaches. BadRow where it cannot be read."""
        wave_S = media.audio.read_audio(source, place, self.limits, rate=self.cfg.rate)
        if not len(wave_S):
            raise BadRow(place, "speech", "its speech is an empty recording")
        batch = mimi.recordings([wave_S], rate=self.cfg.rate, cfg=self.cfg)
        codes_BQF = mimi.encode(self.params, self.state, batch["audio"].to(self.device), self.cfg, levels=self.levels)
        return codes_BQF[0].T[: int(self.cfg.frames(batch["samples"])[0])].cpu().numpy()


def speaking_of(folder: Path, codec: Path | None, *, device: torch.device) -> Speaking:
    """How the talker of a folder takes speech. `codec`: a folder of Mimi's. ValueError for a folder without a talker,
    or a codec whose codes are not the talker's.
    """
    here = HfFolder.open(folder)
    cfg = talking_config(here)
    told = here.config()["talker_config"].get("speaker_id")
    voices = {str(name).lower(): int(number) for name, number in told.items()} if isinstance(told, Mapping) else {}
    speech = cfg.talker.speech
    coder = None if codec is None else _coder(codec, speech.groups, speech.sounds, device)
    return Speaking(speech, cfg.thinker.media.ids, voices, coder)


def _coder(folder: Path, groups: int, sounds: int, device: torch.device) -> Coder:
    model, cfg = native_mimi(folder), mimi_config.config(HfFolder.open(folder).config())
    assert model.load is not None
    if cfg.levels < groups or cfg.codes > sounds:
        raise ValueError(
            f"--speech-codec {folder}: it has {cfg.levels} levels of {cfg.codes} codes, and the talker takes {groups} "
            f"of {sounds}: take the codec of the talker's codes"
        )
    moved = [map_with_paths(lambda _, x: x.to(device), tree) for tree in (model.load(), model.state)]
    return Coder(cfg, moved[0], moved[1], groups, device)
