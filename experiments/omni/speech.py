"""Spoken words from espeak-ng, in many voices, speeds and pitches; without espeak-ng, the reason why there are none.

Two ways, in this order: the library and voices that PyPI's `espeakng-loader` carries, through ctypes, and the command
`espeak-ng` (Debian's package of that name). The library keeps its state in C globals that no call resets, so that a
word sounds a little different after other words. A `Library` therefore loads a copy of the file of its own: equal calls
in equal order give equal samples, and two of them can speak at once.

Legend: N clips, S samples.
"""

import ctypes
import shutil
import subprocess
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple, Protocol

import numpy as np

_SYNCHRONOUS, _DONT_EXIT, _UTF8, _SPEED, _PITCH = 2, 0x8000, 1, 1, 3  # espeak-ng/speak_lib.h
_BUFFER_MS = 2000  # a word in one call back, since each has to wait for the interpreter
_WAV_HEADER = 44
_SPEECH_TIMEOUT_S = 20
_ON_SAMPLES = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.POINTER(ctypes.c_short), ctypes.c_int, ctypes.c_void_p)


class Sound(NamedTuple):
    """Mono samples int16 `[S]` at `rate` a second."""

    samples_S: np.ndarray
    rate: int


class Speaker(Protocol):
    """Something that says words: `voice` as espeak-ng names it (`de+f3`), `speed` words a minute, `pitch` 0 to 99."""

    def say(self, word: str, *, voice: str, speed: int, pitch: int) -> Sound:
        """The word as sound; ValueError if there is no such voice."""


Way = Callable[[], AbstractContextManager[Speaker]]
"""How to get a speaker; entering it raises OSError or ImportError where that way is closed."""


@dataclass(frozen=True)
class Silence:
    """There is no speech, and why."""

    reason: str


class Library:
    """espeak-ng through ctypes: `folder` holds a copy of `libespeak-ng.so` that nothing else loads, and its data."""

    def __init__(self, folder: Path) -> None:
        self._library = ctypes.CDLL(str(folder / "libespeak-ng.so"))
        self._library.espeak_Synth.argtypes = [
            ctypes.c_char_p, ctypes.c_size_t, ctypes.c_uint, ctypes.c_int, ctypes.c_uint, ctypes.c_uint,
            ctypes.c_void_p, ctypes.c_void_p,
        ]  # fmt: skip
        data = str(folder / "espeak-ng-data").encode()
        self._rate = self._library.espeak_Initialize(_SYNCHRONOUS, _BUFFER_MS, data, _DONT_EXIT)
        if self._rate <= 0:
            raise OSError(f"espeak_Initialize gave {self._rate}")
        self._heard: list[np.ndarray] = []
        self._callback = _ON_SAMPLES(self._hear)  # held here, for C holds no reference to it
        self._library.espeak_SetSynthCallback(self._callback)

    def _hear(self, samples: "ctypes._Pointer[ctypes.c_short]", count: int, _events: int) -> int:
        if samples and count > 0:
            self._heard.append(np.ctypeslib.as_array(samples, shape=(count,)).copy())
        return 0

    def say(self, word: str, *, voice: str, speed: int, pitch: int) -> Sound:
        """The word as sound; ValueError if there is no such voice."""
        self._heard.clear()
        if self._library.espeak_SetVoiceByName(voice.encode()):
            raise ValueError(f"espeak-ng has no voice {voice!r}")
        self._library.espeak_SetParameter(_SPEED, speed, 0)
        self._library.espeak_SetParameter(_PITCH, pitch, 0)
        text = word.encode()
        status = self._library.espeak_Synth(text, len(text) + 1, 0, 1, 0, _UTF8, None, None)
        if status or not self._heard:
            raise OSError(f"espeak-ng did not say {word!r} with voice {voice!r} (status {status})")
        return Sound(np.concatenate(self._heard), self._rate)

    def close(self) -> None:
        """Free what the library holds."""
        self._library.espeak_Terminate()


class Command:
    """espeak-ng as a process for every word."""

    def __init__(self, program: str) -> None:
        self._program = program

    def say(self, word: str, *, voice: str, speed: int, pitch: int) -> Sound:
        """The word as sound; ValueError if there is no such voice."""
        command = [self._program, "--stdout", "-v", voice, "-s", str(speed), "-p", str(pitch), word]
        done = subprocess.run(command, capture_output=True, timeout=_SPEECH_TIMEOUT_S, check=False)
        if done.returncode or len(done.stdout) <= _WAV_HEADER:
            raise ValueError(f"{' '.join(command)}: {done.stderr.decode(errors='replace').strip() or 'no sound'}")
        # The sizes in the header are not known when it is written to a pipe, so they are not read.
        samples_S = np.frombuffer(done.stdout[_WAV_HEADER : len(done.stdout) // 2 * 2], "<i2").copy()
        return Sound(samples_S, int.from_bytes(done.stdout[24:28], "little"))


@contextmanager
def bundled() -> Iterator[Speaker]:
    """The library and the voices in PyPI's `espeakng-loader`."""
    import espeakng_loader  # in the function: where it is missing, there is still the other way

    with tempfile.TemporaryDirectory(prefix="espeak-") as name:
        folder = Path(name)
        shutil.copy(espeakng_loader.get_library_path(), folder / "libespeak-ng.so")
        # espeak-ng holds the path in 160 bytes, which a deep virtual environment exceeds
        (folder / "espeak-ng-data").symlink_to(espeakng_loader.get_data_path())
        library = Library(folder)
        try:
            yield library
        finally:
            library.close()


@contextmanager
def installed(program: str = "espeak-ng") -> Iterator[Speaker]:
    """The command of Debian's package `espeak-ng`."""
    path = shutil.which(program)
    if path is None:
        raise FileNotFoundError(f"there is no command {program!r}")
    yield Command(path)


WAYS: tuple[Way, ...] = (bundled, installed)


def find_way(ways: Sequence[Way] = WAYS) -> Way | Silence:
    """The first way that says a word, or, if none does, the reason of each."""
    reasons = []
    for way in ways:
        name = getattr(way, "__name__", str(way))
        try:
            with way() as speaker:
                speaker.say("one", voice="en", speed=175, pitch=50)
            return way
        except (OSError, ImportError, ValueError, subprocess.SubprocessError) as error:
            reasons.append(f"{name}: {type(error).__name__}: {error}")
    return Silence(
        "no speech, so the run goes on without audio: "
        + "; ".join(reasons or ["no way was given"])
        + ". Mend it with `pip install espeakng-loader` or `apt-get install espeak-ng`."
    )
