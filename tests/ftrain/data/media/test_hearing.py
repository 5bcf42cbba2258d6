"""Recordings of chats as Qwen's omni models hear them: the frames and tokens that transformers' extractor gives."""

import numpy as np
import pytest

from ftrain.data.chat_template import load_tokenizer
from ftrain.data.media.families import family_of
from ftrain.data.rejects import BadRow
from ftrain.data.sample import Part, Place
from tests.helpers.hearing_folders import write_sounds, write_thinker

transformers = pytest.importorskip("transformers", minversion="5.24")
soundfile = pytest.importorskip("soundfile")

KINDS = ("qwen2_5_omni_thinker", "qwen3_omni_moe_thinker")


@pytest.fixture(scope="module", params=KINDS)
def folder(request, tmp_path_factory):
    return write_thinker(tmp_path_factory.mktemp(request.param), request.param)


@pytest.fixture(scope="module")
def family(folder):
    return family_of(folder, load_tokenizer(folder))


def at(folder):
    return Place(str(folder / "chat.jsonl"), 1)


def test_frames_and_tokens_are_those_of_transformers(folder, family):
    seconds = [0.5, 1.23456, 2.0]
    for name in write_sounds(folder, seconds):
        wave, rate = soundfile.read(folder / name, dtype="float32")
        second = family.name.startswith("qwen2")
        extractor = transformers.WhisperFeatureExtractor(feature_size=family.hearing.mel.bands, chunk_length=9)
        called = extractor(
            wave,
            sampling_rate=rate,
            padding="max_length" if second else True,
            truncation=second,
            return_attention_mask=True,
        )
        frames = int(called["attention_mask"][0].sum())
        part = Part("audio", source=name)
        seen, read = family.measure(part, at(folder)), family.read(part, at(folder))
        assert (
            seen.rows
            == {"sound": frames, "sound_frames": 1}
            == {k: len(v) for k, v in read.items()} | {"sound_frames": 1}
        )
        assert seen.text == "<|audio_pad|>" * family.hearing.tower.tokens_of(frames)
        np.testing.assert_allclose(read["sound"], called["input_features"][0].T[:frames], atol=1e-4)
        assert not family.read(part, at(folder), decoded=False)["sound"].any()


def test_other_rates_are_resampled_and_arrays_are_read(folder, family):
    (name,) = write_sounds(folder, [1.0], rate=44_100, name="fast")
    wave, rate = soundfile.read(folder / name, dtype="float32")
    one, other = (family.read(Part("audio", source=source), at(folder))["sound"] for source in (name, (wave, rate)))
    assert one.shape == (100, family.hearing.mel.bands)
    np.testing.assert_array_equal(one, other)


def test_silence_of_any_number_of_tokens_has_as_many(family):
    for tokens in (1, 12, 13, 14, 60):
        made = family.streams[2].fill(tokens)
        assert family.hearing.tower.tokens_of(int(made["sound_frames"][0])) == tokens
        assert len(made["sound"]) == made["sound_frames"][0]


def test_what_cannot_be_heard_is_refused_by_name(folder, family):
    (long,) = write_sounds(folder, [9.5], name="long")
    with pytest.raises(BadRow, match="160 samples, too few for a token"):
        family.measure(Part("audio", source=(np.zeros(160, np.float32), 16_000)), at(folder))
    if family.hearing.most is None:
        assert family.measure(Part("audio", source=long), at(folder)).rows["sound"] == 950
    else:
        with pytest.raises(BadRow, match=r"long0.wav has 9.5 seconds, and the model hears 9"):
            family.measure(Part("audio", source=long), at(folder))
    (folder / "broken.wav").write_bytes(b"RIFF")
    with pytest.raises(BadRow):
        family.measure(Part("audio", source="broken.wav"), at(folder))


def test_a_bridged_model_is_given_no_recordings(family):
    assert family.arranged({"tokens": 0}) == {"tokens": 0}
    with pytest.raises(ValueError, match="train the library's own model"):
        family.arranged({"tokens": 0, "sound": 0})
