"""Speech by espeak-ng: what is held out, that it repeats, and what happens without it."""

import os
import stat
import sys
from contextlib import contextmanager
from functools import partial

import numpy as np
import pytest

from experiments.omni import corpus, speech
from experiments.omni.corpus import HELD_OUT_VOICES, PITCHES, SPEEDS, TRAINED_VOICES, CorpusConfig, Delivery
from experiments.omni.language import LANGUAGES
from experiments.omni.speech import Silence, Sound

SMALL = CorpusConfig(
    train_takes=2, voice_takes=1, delivery_takes=2, trained_voices=("f1", "m1", "grandma"), held_out_voices=("m3",)
)
CHIRP = np.sin(np.arange(8_000) ** 1.1 / 9) * np.hanning(8_000) * 20_000


@contextmanager
def chirping():
    """A speaker that needs no espeak-ng: every word is a chirp as long as its letters."""

    class Chirper:
        def say(self, word, *, voice, speed, pitch):
            return Sound(CHIRP[: 2_000 + 300 * len(word)].astype(np.int16), 22_050)

    yield Chirper()


def broken(message):
    raise OSError(message)


def test_without_any_way_the_reasons_are_given():
    ways = (partial(broken, "the library is gone"), partial(speech.installed, "no-such-espeak"))
    silence = corpus.load(cfg=SMALL, ways=ways)
    assert isinstance(silence, Silence)
    for words in ("the library is gone", "no-such-espeak", "goes on without audio", "pip install espeakng-loader"):
        assert words in silence.reason


def test_the_second_way_is_taken_where_the_first_is_closed():
    assert speech.find_way((partial(broken, "closed"), chirping)) is chirping


def test_no_held_out_voice_or_delivery_is_trained_on():
    parts = corpus.load(cfg=SMALL, ways=(chirping,))
    trained, held_out = set(parts.train.deliveries), set(parts.held_out.deliveries)
    assert {delivery.voice for delivery in trained} == {"f1", "m1", "grandma"}
    assert "m3" in {delivery.voice for delivery in held_out}
    assert {"f1", "m1", "grandma"} & {delivery.voice for delivery in held_out}
    assert not trained & held_out
    assert not any(corpus.is_held_out(delivery, cfg=SMALL) for delivery in trained)
    assert all(corpus.is_held_out(delivery, cfg=SMALL) for delivery in held_out)


def test_every_digit_of_every_language_is_on_both_sides():
    parts = corpus.load(cfg=SMALL, ways=(chirping,))
    for clips in parts:
        said = set(zip(clips.labels_N.tolist(), clips.languages_N.tolist(), strict=True))
        assert said == {(digit, language) for digit in range(10) for language in range(len(LANGUAGES))}
    assert len(parts.train.labels_N) == 60 * 3 * 2
    assert len(parts.held_out.labels_N) == 60 * (1 + 2)


def test_the_voices_are_disjoint_and_one_delivery_in_eight_is_held_out():
    assert not set(TRAINED_VOICES) & set(HELD_OUT_VOICES)
    cfg = CorpusConfig()
    for voice in TRAINED_VOICES:
        kept = [corpus.is_held_out(Delivery(voice, s, p), cfg=cfg) for s in SPEEDS for p in PITCHES]
        assert sum(kept) == 2


@pytest.mark.parametrize("rate", [22_050, 11_025, 16_000])
def test_clips_are_trimmed_and_equally_loud(rate):
    quiet = np.zeros(3_000)
    sound = Sound(np.concatenate([quiet, CHIRP[2_000:6_000], quiet]).astype(np.int16), rate)
    clip = corpus.cut(sound)
    assert clip.shape == (corpus.SAMPLES,)
    assert clip.dtype == np.float32
    spoken = np.flatnonzero(np.abs(clip) > 0.02)
    assert spoken[0] < 0.03 * corpus.RATE
    length = 4_000 * corpus.RATE / rate
    assert 0.9 * length < spoken[-1] - spoken[0] < 1.1 * length
    louder = corpus.cut(Sound(sound.samples_S // 4, rate))
    np.testing.assert_allclose(louder, clip, atol=2e-3)


def test_a_silent_sound_is_refused():
    with pytest.raises(ValueError, match="100 samples is silent"):
        corpus.cut(Sound(np.zeros(100, np.int16), 22_050))


def has_library():
    return not isinstance(speech.find_way((speech.bundled,)), Silence)


@pytest.mark.skipif(not has_library(), reason="espeakng-loader is not installed")
class TestLibrary:
    """What needs espeak-ng itself."""

    def test_equal_calls_in_equal_order_give_equal_samples(self):
        parts = [corpus.load(cfg=SMALL, languages=LANGUAGES[:2], ways=(speech.bundled,)) for _ in range(2)]
        for name in ("train", "held_out"):
            one, two = (getattr(part, name) for part in parts)
            np.testing.assert_array_equal(one.waves_NS, two.waves_NS)
            np.testing.assert_array_equal(one.labels_N, two.labels_N)
            assert one.deliveries == two.deliveries

    @pytest.mark.parametrize("language", LANGUAGES, ids=lambda language: language.tag)
    def test_words_of_a_language_differ_and_voices_differ(self, language):
        with speech.bundled() as speaker:
            spoken = [
                corpus.cut(speaker.say(word, voice=f"{language.voice}+{voice}", speed=175, pitch=50))
                for word in language.numbers[:10]
                for voice in ("f1", "m1")
            ]
        spectra = np.abs(np.fft.rfft(np.stack(spoken)))
        assert len({spectrum.tobytes() for spectrum in spectra}) == 20

    def test_speed_shortens_a_word(self):
        with speech.bundled() as speaker:
            slow, fast = (speaker.say("seven", voice="en", speed=speed, pitch=50) for speed in (120, 240))
        assert slow.rate == fast.rate == 22_050
        assert len(fast.samples_S) < 0.8 * len(slow.samples_S)

    def test_all_voices_exist(self):
        with speech.bundled() as speaker:
            for voice in TRAINED_VOICES + HELD_OUT_VOICES:
                assert len(speaker.say("one", voice=f"en+{voice}", speed=175, pitch=50).samples_S)

    def test_an_unknown_voice_is_named(self):
        with speech.bundled() as speaker, pytest.raises(ValueError, match="no voice 'klingon-x'"):
            speaker.say("one", voice="klingon-x", speed=175, pitch=50)


@pytest.mark.skipif(os.name != "posix", reason="the fake command is a script")
def test_the_command_gives_sound_from_its_pipe_and_names_its_errors(tmp_path):
    header = b"RIFF\xff\xff\xff\x7fWAVEfmt " + bytes([16, 0, 0, 0, 1, 0, 1, 0]) + (22_050).to_bytes(4, "little")
    header += (44_100).to_bytes(4, "little") + bytes([2, 0, 16, 0]) + b"data\xff\xff\xff\x7f"
    script = tmp_path / "espeak-fake"
    script.write_text(
        f"#!{sys.executable}\nimport sys\n"
        "if 'xx' in sys.argv: sys.exit('no such voice')\n"
        f"sys.stdout.buffer.write({header!r} + bytes(range(200)))\n"
    )
    script.chmod(script.stat().st_mode | stat.S_IXUSR)
    with speech.installed(str(script)) as speaker:
        sound = speaker.say("one", voice="en+f1", speed=175, pitch=50)
        assert sound.rate == 22_050
        np.testing.assert_array_equal(sound.samples_S, np.frombuffer(bytes(range(200)), "<i2"))
        with pytest.raises(ValueError, match="no such voice"):
            speaker.say("one", voice="xx", speed=175, pitch=50)
