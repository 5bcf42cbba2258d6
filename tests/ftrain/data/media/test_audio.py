import io

import numpy as np
import pytest

pytest.importorskip("soundfile")

import soundfile

from ftrain.data.media.audio import heard_samples, read_audio, resample
from ftrain.data.media.limits import Limits
from ftrain.data.media.log_mel import LogMel
from ftrain.data.rejects import BadRow
from ftrain.data.sample import Place

PLACE = Place("rows/chat.jsonl", 4)


def tone(seconds=0.5, rate=16_000, hertz=440.0):
    return (0.5 * np.sin(2 * np.pi * hertz * np.arange(round(seconds * rate)) / rate)).astype(np.float32)


def encoded(sound, rate, kind="WAV", **options):
    file = io.BytesIO()
    soundfile.write(file, sound, rate, format=kind, **options)
    return file.getvalue()


@pytest.mark.parametrize(("kind", "off"), [("WAV", 1e-4), ("FLAC", 1e-4), ("OGG", 0.05), ("MP3", 0.05)])
def test_a_recording_of_each_kind_at_its_own_rate(kind, off):
    sound = tone()
    found = read_audio(encoded(sound, 16_000, kind), PLACE, Limits(), rate=16_000)
    assert found.dtype == np.float32
    assert np.abs(found[1000:7000] - sound[1000:7000]).max() < off


@pytest.mark.parametrize("rate", [8_000, 22_050, 44_100, 48_000])
def test_another_rate_is_resampled(rate):
    found = read_audio(encoded(tone(rate=rate), rate, subtype="FLOAT"), PLACE, Limits(), rate=16_000)
    assert len(found) == 8_000
    assert np.abs(found[500:-500] - tone()[500:-500]).max() < 2e-3


def test_what_lies_above_the_new_rate_is_filtered_out():
    high = resample(tone(rate=48_000, hertz=15_000), 48_000, 16_000)
    assert np.abs(high[200:-200]).max() < 0.02


def test_channels_are_averaged_and_arrays_are_taken():
    left, right = tone(hertz=300), tone(hertz=500)
    stereo = np.stack([left, right], axis=1)
    wanted = (left + right) / 2
    for source in (encoded(stereo, 16_000, subtype="FLOAT"), (stereo, 16_000)):
        assert np.abs(read_audio(source, PLACE, Limits(), rate=16_000) - wanted).max() < 1e-6


def test_whole_numbers_are_of_a_known_range_or_refused():
    loud = (tone() * 32768).astype(np.int16)
    assert (read_audio((loud, 16_000), PLACE, Limits(), rate=16_000) == loud / np.float32(32768)).all()
    assert not read_audio(([0] * 99, 16_000), PLACE, Limits(), rate=16_000).any()
    for source in ((loud.tolist(), 16_000), ([[1.0], [1.0, 2.0]], 9), ([0.5, None], 9), (tone(), 0), (tone(), None)):
        for read in (read_audio, heard_samples):
            with pytest.raises(BadRow, match=r"rows/chat\.jsonl, row 4: an? "):
                read(source, PLACE, Limits(), rate=16_000)


def test_kinds_that_soundfile_does_not_know_are_read_by_av():
    av = pytest.importorskip("av")
    file = io.BytesIO()
    with av.open(file, "w", format="mp4") as container:
        stream = container.add_stream("aac", rate=16_000)
        stream.layout = "mono"
        frame = av.AudioFrame.from_ndarray(tone(1.0)[None], format="fltp", layout="mono")
        frame.sample_rate = 16_000
        for packet in [*stream.encode(frame), *stream.encode(None)]:
            container.mux(packet)
    found = read_audio(file.getvalue(), PLACE, Limits(), rate=16_000)
    assert abs(len(found) - 16_000) < 3000
    spectrum = np.abs(np.fft.rfft(found[2000:14_000]))
    assert abs(spectrum.argmax() * 16_000 / 12_000 - 440) < 4


@pytest.mark.parametrize(
    ("source", "limits", "kind"),
    [
        (encoded(tone(2.0), 16_000), Limits(seconds=1.0), "media too large"),
        (encoded(tone(2.0), 16_000), Limits(decoded_bytes=1000), "media too large"),
        ((tone(2.0), 16_000), Limits(seconds=1.0), "media too large"),
        (b"no sound", Limits(), "broken media"),
        (b"", Limits(), "broken media"),
        (encoded(tone(0.0), 16_000), Limits(), "broken media"),
        (encoded(np.full(99, np.nan, np.float32), 16_000, subtype="FLOAT"), Limits(), "broken media"),
        ("none.wav", Limits(), "media missing"),
    ],
)
def test_what_is_too_long_or_no_sound_is_a_named_reject(source, limits, kind):
    with pytest.raises(BadRow, match=r"row 4: ") as error:
        read_audio(source, PLACE, limits, rate=16_000)
    assert error.value.kind == kind


def test_a_header_that_tells_of_years_is_refused_before_anything_is_decoded():
    raw = bytearray(encoded(tone(), 16_000, "FLAC"))
    at = 8 + 13  # STREAMINFO: 36 bits of the number of samples end at byte 18 of it
    raw[at] |= 0x0F
    raw[at + 1 : at + 5] = b"\xff\xff\xff\xff"
    with pytest.raises(BadRow, match="seconds, more than 3600") as error:
        read_audio(bytes(raw), PLACE, Limits(), rate=16_000)
    assert error.value.kind == "media too large"


@pytest.mark.parametrize("bands", [80, 128])
@pytest.mark.parametrize("seconds", [0.5, 3.0, 31.0])
def test_log_mel_is_whispers(bands, seconds):
    transformers = pytest.importorskip("transformers")
    noise = np.random.default_rng(0).standard_normal(round(seconds * 16_000)).astype(np.float32)
    sound = 0.3 * noise + tone(seconds)
    theirs = transformers.WhisperFeatureExtractor(feature_size=bands)._np_extract_fbank_features(
        np.pad(sound[:480_000], (0, max(0, 480_000 - len(sound))))[None], device="cpu"
    )[0]
    ours = LogMel(bands)(sound)
    assert ours.shape == theirs.shape == (bands, 3000)
    assert np.abs(ours - theirs).max() < 1e-5
    called = transformers.WhisperFeatureExtractor(feature_size=bands)(sound[:480_000], sampling_rate=16_000)
    assert np.abs(ours - called["input_features"][0]).max() < 1e-4  # in float32 by torch


def test_log_mel_without_a_length_and_of_too_little():
    assert LogMel(seconds=None)(tone(1.0)).shape == (80, 100)
    with pytest.raises(ValueError, match="shorter than a window"):
        LogMel(seconds=None)(np.zeros(100, np.float32))


@pytest.mark.parametrize(
    ("sound", "rate", "message"),
    [
        (tone(1.0), 8000, "8000 samples a second, and 16000 are heard: resample"),
        ((tone(1.0) * 32767).astype(np.int16), 16_000, "a wave of int16: give floating numbers"),
        (np.append(tone(1.0), np.nan), 16_000, "sample 16000 of a wave is no finite number"),
        (tone(1.0)[:, None].repeat(2, 1), 16_000, "give one channel"),
    ],
)
def test_waves_that_are_not_heard_as_they_are_are_refused(sound, rate, message):
    with pytest.raises(ValueError, match=message):
        LogMel()(sound, rate=rate)
