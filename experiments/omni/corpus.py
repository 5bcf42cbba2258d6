"""The spoken digits: which voice says which word how, what of it is held out, and the clips of equal length.

Held out are whole voices, and, of the voices that are trained on, one in eight pairs of speed and pitch. No held-out
voice is a near copy of a trained one: espeak-ng's variants come in families, and of one family all are on one side.
Voices with breath (f2, f3, whisper, ...) are left out: espeak-ng makes it of C's `rand`, which it seeds by the clock.

Legend: N clips, S samples.
"""

import math
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cache
from typing import NamedTuple

import numpy as np
from scipy.signal import firwin, resample_poly

from experiments.omni.digits import CLASSES
from experiments.omni.language import LANGUAGES, Language
from experiments.omni.speech import WAYS, Silence, Sound, Way, find_way

RATE = 11_025
SAMPLES = 56 * 128  # 0.65 s: the longest word at the slowest speed takes 0.62 s
TRAINED_VOICES = (
    "f1", "f4", "m1", "m2", "m4", "m5", "m6", "m7", "Alex", "Andy", "Annie", "Denis", "Diogo", "Gene", "Michael",
    "anika", "antonio", "aunty", "belinda", "ed", "edward", "grandma", "grandpa", "gustave", "john", "linda", "miguel",
    "pablo", "pedro", "rob", "robert", "shelby",
)  # fmt: skip
SPEAKERS = TRAINED_VOICES[:4]
"""In whose voices a model learns to speak. Of all voices it would learn more slowly how a word sounds."""
HELD_OUT_VOICES = ("m3", "m8", "Mike", "Andrea", "boris", "paul", "steph", "travis")
SPEEDS = (150, 175, 200, 230)
PITCHES = (20, 40, 60, 80)
_QUIET = 0.03
_LEAD_S = 0.01
_LOUDNESS = 0.1


class Delivery(NamedTuple):
    """How a word is said: a voice (espeak-ng's variant), words a minute, pitch 0 to 99."""

    voice: str
    speed: int
    pitch: int


class Clips(NamedTuple):
    """Spoken digits: float32 `[N, S]` at `RATE`, what is said (int64), in which of the languages (int64), and how."""

    waves_NS: np.ndarray
    labels_N: np.ndarray
    languages_N: np.ndarray
    deliveries: tuple[Delivery, ...]


class Corpus(NamedTuple):
    """Clips to train on; clips that are held out."""

    train: Clips
    held_out: Clips


@dataclass(frozen=True)
class CorpusConfig:
    """Clips of one word in one language: `train_takes` by each trained voice, `voice_takes` by each held-out voice,
    `delivery_takes` by trained voices at speeds and pitches that are held out for them.
    """

    train_takes: int = 2
    voice_takes: int = 1
    delivery_takes: int = 4
    seed: int = 0
    trained_voices: tuple[str, ...] = TRAINED_VOICES
    held_out_voices: tuple[str, ...] = HELD_OUT_VOICES


FEW = CorpusConfig(1, 1, 1, trained_voices=TRAINED_VOICES[:4], held_out_voices=HELD_OUT_VOICES[:1])
"""A sixteenth of the clips to train on, by voices of both kinds."""


def is_held_out(delivery: Delivery, *, cfg: CorpusConfig) -> bool:
    """True for voices that are held out, and for the pairs of speed and pitch that are held out for a trained voice."""
    if delivery.voice not in cfg.trained_voices:
        return True
    pair = SPEEDS.index(delivery.speed) * len(PITCHES) + PITCHES.index(delivery.pitch)
    return pair % 8 == cfg.trained_voices.index(delivery.voice) % 8


def load(
    *, cfg: CorpusConfig | None = None, languages: Sequence[Language] = LANGUAGES, ways: Sequence[Way] = WAYS
) -> Corpus | Silence:
    """Synthesise the corpus, the same for the same config and espeak-ng; without espeak-ng, the reason."""
    cfg = cfg or CorpusConfig()
    way = find_way(ways)
    if isinstance(way, Silence):
        return way
    with ThreadPoolExecutor(2) as pool:
        parts = list(pool.map(lambda number: _speak(way, languages[number], number, cfg), range(len(languages))))
    return Corpus(_join([train for train, _ in parts]), _join([held_out for _, held_out in parts]))


def part(of: Clips, chosen_N: np.ndarray) -> Clips:
    """Those clips that are chosen (bool `[N]`)."""
    deliveries = tuple(delivery for delivery, chosen in zip(of.deliveries, chosen_N, strict=True) if chosen)
    return Clips(of.waves_NS[chosen_N], of.labels_N[chosen_N], of.languages_N[chosen_N], deliveries)


def _speak(way: Way, language: Language, number: int, cfg: CorpusConfig) -> tuple[list[tuple], list[tuple]]:
    """One language by a speaker of its own, so that languages can be made side by side; clips to train on, held out."""
    clips: tuple[list[tuple], list[tuple]] = ([], [])
    rng = np.random.Generator(np.random.Philox(key=[cfg.seed, number]))
    with way() as speaker:
        for digit in range(CLASSES):
            for delivery in _deliveries(rng, cfg):
                voice = f"{language.voice}+{delivery.voice}"
                sound = speaker.say(language.numbers[digit], voice=voice, speed=delivery.speed, pitch=delivery.pitch)
                clips[is_held_out(delivery, cfg=cfg)].append((cut(sound), digit, number, delivery))
    return clips


def _deliveries(rng: np.random.Generator, cfg: CorpusConfig) -> list[Delivery]:
    """How one word of one language is said: by all trained voices, then what is held out."""
    everything = [
        Delivery(voice, speed, pitch) for voice in cfg.trained_voices for speed in SPEEDS for pitch in PITCHES
    ]
    unseen = [delivery for delivery in everything if is_held_out(delivery, cfg=cfg)]
    chosen = []
    for voice in cfg.trained_voices:
        seen = [d for d in everything if d.voice == voice and not is_held_out(d, cfg=cfg)]
        chosen += [seen[i] for i in rng.choice(len(seen), cfg.train_takes, replace=False)]
    for voice in cfg.held_out_voices:
        for _ in range(cfg.voice_takes):
            chosen.append(Delivery(voice, SPEEDS[rng.integers(len(SPEEDS))], PITCHES[rng.integers(len(PITCHES))]))
    return chosen + [unseen[i] for i in rng.choice(len(unseen), cfg.delivery_takes, replace=False)]


def _join(parts: list[list[tuple]]) -> Clips:
    waves, labels, languages, deliveries = zip(*(clip for part in parts for clip in part), strict=True)
    return Clips(np.stack(waves), np.array(labels, np.int64), np.array(languages, np.int64), deliveries)


@cache
def _low_pass(up: int, down: int) -> np.ndarray:
    """The filter that keeps what both rates can hold; designing it takes longer than a word's resampling."""
    return firwin(20 * max(up, down) + 1, 1 / max(up, down), window=("kaiser", 5.0)).astype(np.float32)


def cut(sound: Sound, *, samples: int = SAMPLES) -> np.ndarray:
    """A clip float32 `[samples]` at `RATE`: silence before and after removed, of equal loudness, zeros behind."""
    common = math.gcd(RATE, sound.rate)
    up, down = RATE // common, sound.rate // common
    wave_S = sound.samples_S.astype(np.float32) / 32_768
    if up != down:
        wave_S = resample_poly(wave_S, up, down, window=_low_pass(up, down))
    loud = np.flatnonzero(np.abs(wave_S) > _QUIET * np.abs(wave_S).max())
    if not loud.size:
        raise ValueError(f"a sound of {len(sound.samples_S)} samples is silent")
    lead = int(_LEAD_S * RATE)
    wave_S = wave_S[max(0, loud[0] - lead) : loud[-1] + lead][:samples]
    wave_S = wave_S * (_LOUDNESS / np.sqrt(np.mean(wave_S**2)))
    return np.pad(wave_S, (0, samples - len(wave_S))).astype(np.float32)
