"""Speech of the assistant's turns in chats: codes for each frame, and room for what a talker reads of the row.

n tokens of a chat, a turns of the assistant, F frames, G codes of a frame.
"""

import io
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from ftrain.data.media.limits import Limits
from ftrain.data.media.opening import media_bytes, name_of, path_of
from ftrain.data.rejects import BadRow
from ftrain.data.sample import Place, Speech
from ftrain.modules.speech_lines import Thought
from ftrain.modules.speech_packs import FRAMES, SPEECH, VOICES, SpeechConfig, utterances


@dataclass(frozen=True)
class Speaking:
    """How a model's talker takes speech: its `speech`, and the ids `media` that stand for media in its thinker.

    `voices`: ids by name. `codec(source, place)`: from a recording to its codes int64 `[F, >= G]`; None: rows give
    codes.
    """

    speech: SpeechConfig
    media: tuple[int, ...]
    voices: Mapping[str, int]
    codec: Callable[[Any, Place], np.ndarray] | None = None
    limits: Limits = Limits()  # noqa: RUF009  # frozen
    _known: dict[str, np.ndarray] = field(default_factory=dict, repr=False)

    def leaves(self, ids_n: np.ndarray, said: Sequence[Speech | None] | None, place: Place) -> dict[str, np.ndarray]:
        """The raw leaves of speech (`ftrain.modules.speech_packs`) of a row of these tokens: "speech" `[F, G]`,
        "speech_frames" `[a]` and "speech_voices" `[a]`, int64. `said`: of each turn of the assistant; None: nothing is
        spoken. BadRow for codes that are none of the talker's, an unknown voice, or other turns than the tokens have.
        """
        chat = self.speech.chat
        turns = int(((ids_n[:-1] == chat.turn) & (ids_n[1:] == chat.assistant)).sum())
        if said is None:
            said = [None] * turns
        if len(said) != turns:
            detail = f"the chat template writes {turns} turns of the assistant for {len(said)} messages"
            raise BadRow(place, "speech", detail)
        codes = [np.zeros((0, self.speech.groups), np.int64) if s is None else self._codes(s, place) for s in said]
        return {
            SPEECH: np.concatenate([np.zeros((0, self.speech.groups), np.int64), *codes]),
            FRAMES: np.array([len(one) for one in codes], np.int64),
            VOICES: np.array([0 if s is None else self._voice(s, place) for s in said], np.int64),
        }

    def room(self, ids_n: np.ndarray, leaves: Mapping[str, np.ndarray], place: Place) -> int:
        """Tokens that the talker needs for the speech of a row. BadRow for speech that it cannot take."""
        raw = {"tokens": torch.from_numpy(ids_n), **{name: torch.from_numpy(leaf) for name, leaf in leaves.items()}}
        zeros_n3, media_n = np.zeros((len(ids_n), 3), np.int64), np.isin(ids_n, self.media)
        cfg, thought = self.speech, Thought(ids_n, zeros_n3, media_n)
        try:
            (own,) = utterances(raw, cfg)
            return sum(len(cfg.line(one, thought, cfg.chat, cfg.codes).word_s) for one in own)
        except ValueError as error:
            raise BadRow(place, "speech", str(error)) from error

    def _voice(self, said: Speech, place: Place) -> int:
        if isinstance(said.voice, int):
            return said.voice
        if said.voice is None and len(self.voices) == 1:
            return next(iter(self.voices.values()))
        found = self.voices.get(str(said.voice).lower())
        if said.voice is None or found is None:
            known = f"one of {', '.join(sorted(self.voices))}" if self.voices else "the id of its token"
            raise BadRow(place, "voice", f"its speech has the voice {said.voice!r}: give {known}")
        return found

    def _codes(self, said: Speech, place: Place) -> np.ndarray:
        """Of one turn, `[F, G]`."""
        if said.recorded:
            return self._of_recording(said.source, place)
        source = said.source
        if isinstance(source, str | bytes):
            try:
                source = np.load(io.BytesIO(media_bytes(source, place, self.limits)), allow_pickle=False)
            except (ValueError, EOFError, OSError) as error:
                if isinstance(error, BadRow):
                    raise
                raise BadRow(
                    place, "speech", f"{name_of(said.source)} holds no array of codes (.npy): {error}"
                ) from error
        try:
            found = np.asarray(source)
        except ValueError as error:
            raise BadRow(
                place, "speech", f"its codes are no array: frames have different numbers of them: {error}"
            ) from error
        found = found[:, None] if found.ndim == 1 and self.speech.groups == 1 else found
        if found.ndim != 2 or found.shape[1] != self.speech.groups or found.dtype.kind not in "iu" or not len(found):
            detail = (
                f"its codes are {found.dtype} {list(found.shape)}, not whole numbers [frames, {self.speech.groups}]"
            )
            raise BadRow(place, "speech", detail)
        return found.astype(np.int64)

    def _of_recording(self, source: Any, place: Place) -> np.ndarray:
        if self.codec is None:
            detail = "its speech is a recording, and only a codec makes codes of it: give codes, or --speech-codec DIR"
            raise BadRow(place, "speech", detail)
        path = path_of(source, place)
        found = self._known.get(path) if path is not None else None
        if found is None:
            found = self.codec(source, place)[:, : self.speech.groups]
            if path is not None:
                self._known[path] = found
        return found
