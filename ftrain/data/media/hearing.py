"""How Qwen's omni models hear: recordings of any length, as log-mel frames.

n samples of a recording, F frames, M mel bands.
"""

from dataclasses import dataclass, field

import numpy as np

from ftrain.data import media
from ftrain.data.media.family import Seen
from ftrain.data.media.kept import Kept
from ftrain.data.media.limits import Limits
from ftrain.data.media.log_mel import LogMel
from ftrain.data.media.opening import name_of
from ftrain.data.rejects import BadRow
from ftrain.data.sample import Part, Place
from ftrain.modules.audio_tower import AudioTowerConfig
from ftrain.modules.scenes import mixed

SOUND, FRAMES = "sound", "sound_frames"


@dataclass(frozen=True)
class Hearing:
    """What a model makes of recordings for its `tower`.

    - `mel`: the spectrogram, of recordings as long as they are.
    - `place`: the text and the id of the token that stands for a place; `start`, `end`: of those around.
    - `per_second`: places in time of a second of a film; `stretch`: of the stretches by which a film and its sound are
      mixed, None where that is by time (`ftrain.modules.scenes`).
    - `most`: seconds of a recording, where silence is behind each (Qwen2.5-Omni); None: it ends where it ends.
    """

    mel: LogMel
    tower: AudioTowerConfig
    place: tuple[str, int]
    start: tuple[str, int]
    end: tuple[str, int]
    per_second: float
    stretch: int | None = None
    most: float | None = None
    limits: Limits = Limits()  # noqa: RUF009  # frozen
    kept: Kept = field(default_factory=Kept)

    def beside(self, film: str, times: np.ndarray, heard: Seen) -> str:
        """The text of a film that is heard: the tokens around its sound, and between them those of both, mixed. `film`:
        of a token that is shown, of which there is one for each of the seconds `times`; `heard`: its sound.
        """
        sound = heard.text.count(self.place[0])
        texts = np.array([film, self.place[0]])
        mixture = mixed(times * self.per_second, sound, interleave=self.stretch)
        return f"{self.start[0]}{''.join(texts[mixture.astype(int)])}{self.end[0]}"

    def measure(self, part: Part, place: Place) -> Seen:
        """The tokens of a recording, from its header. BadRow where it cannot be read, or is too long or too short."""
        frames = self._frames(part, place)
        return Seen(self.place[0] * self.tower.tokens_of(frames), {SOUND: frames, FRAMES: 1})

    def read(self, part: Part, place: Place, *, decoded: bool = True) -> dict[str, np.ndarray]:
        """`sound` float32 `[F, M]` and `sound_frames` int64 `[1]`. Frames are zeros if not `decoded`. BadRow as
        `measure`.
        """
        frames = self._frames(part, place)
        found = {FRAMES: np.array([frames], np.int64)}
        if not decoded:
            return {SOUND: np.zeros((frames, self.mel.bands), np.float32), **found}
        return {SOUND: self.kept.array(part, place, lambda: self._spectrogram(part, place, frames)), **found}

    def filled(self, tokens: int) -> dict[str, np.ndarray]:
        """Silence of so many tokens."""
        whole, rest = divmod(tokens, self.tower.tokens_of(self.tower.chunk))
        frames = whole * self.tower.chunk
        while self.tower.tokens_of(frames) < whole * self.tower.tokens_of(self.tower.chunk) + rest:
            frames += 1
        return {SOUND: np.zeros((frames, self.mel.bands), np.float32), FRAMES: np.array([frames], np.int64)}

    def _samples(self, part: Part, place: Place) -> int:
        made = self.kept.header(
            part, place, lambda: media.audio.heard_samples(part.source, place, self.limits, rate=self.mel.rate)
        )
        return int(made)

    def _frames(self, part: Part, place: Place) -> int:
        samples, name = self._samples(part, place), name_of(part.source)
        if self.most is not None and samples > self.most * self.mel.rate:
            seconds = samples / self.mel.rate
            raise BadRow(place, "media too large", f"{name} has {seconds:g} seconds, and the model hears {self.most:g}")
        frames = samples // self.mel.hop if self.most is None else -(-samples // self.mel.hop)
        if samples <= self.mel.window // 2 or not self.tower.tokens_of(frames):
            raise BadRow(place, "media of this shape", f"{name} has {samples} samples, too few for a token")
        return frames

    def _spectrogram(self, part: Part, place: Place, frames: int) -> np.ndarray:
        sound = media.audio.read_audio(part.source, place, self.limits, rate=self.mel.rate)
        if len(sound) != self._samples(part, place):
            raise BadRow(place, "broken media", f"{name_of(part.source)} is of another length than its header tells")
        if self.most is not None:
            sound = np.pad(sound, (0, 2 * self.mel.window))  # what is behind is silence, and of no frame that is kept
        return np.ascontiguousarray(self.mel(sound, rate=self.mel.rate).T[:frames])
