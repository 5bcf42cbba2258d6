"""Recordings of chats as Qwen's omni models hear them: the frames and tokens that transformers' extractor gives."""

from functools import partial
from types import SimpleNamespace

import numpy as np
import pytest
import torch

import ftrain
from ftrain.data.chat_template import load_tokenizer
from ftrain.data.media.families import family_of
from ftrain.data.rejects import BadRow
from ftrain.data.sample import Part, Place
from tests.helpers.film_files import write_film
from tests.helpers.hearing_folders import write_sounds, write_thinker
from tests.helpers.seeing_folders import write_qwen

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


@pytest.mark.parametrize(("frames", "seconds"), [(8, 2.1), (12, 8.0), (4, 0.6)])
def test_films_that_are_heard_are_those_of_transformers(folder, family, frames, seconds):
    """Tokens of the processor, places of the model, frames of sound of the recording by itself; sound that ends before
    the film, behind it, or long before.
    """
    pytest.importorskip("av")
    second = family.name.startswith("qwen2")
    name = write_film(folder / f"heard{frames}.mkv", frames=frames, seconds=seconds)
    part, alone = Part("video", source=name, sound=True), Part("audio", source=name)
    read, seen = family.read(part, at(folder)), family.measure(part, at(folder))
    assert {leaf: len(x) for leaf, x in read.items()} == dict(seen.rows)
    np.testing.assert_array_equal(read["sound"], family.read(alone, at(folder))["sound"])
    assert read["second_per_grid_ts"].tolist() == [1.0]
    heard = family.hearing.tower.tokens_of(len(read["sound"]))
    module = transformers.models.qwen2_5_omni if second else transformers.models.qwen3_omni_moe
    made = module.Qwen2_5OmniProcessor if second else module.Qwen3OmniMoeProcessor
    tokens = {"audio_bos_token": "<|audio_start|>", "audio_eos_token": "<|audio_end|>"}
    tokens |= {"video_token": "<|video_pad|>", "audio_token": "<|audio_pad|>"}
    processor = SimpleNamespace(video_processor=SimpleNamespace(merge_size=2), **tokens)
    processor.get_chunked_index = partial(made.get_chunked_index, processor)
    seconds_of = {"position_id_per_seconds": family.hearing.per_second, "seconds_per_chunk": 2.0}
    given = {"video_grid_thw": read["video_grid_thw"], "video_second_per_grid": read["second_per_grid_ts"]}
    wanted = made.replace_video_with_audio_token(processor, given, 0, {"num_audio_tokens": [heard]}, 0, **seconds_of)
    assert seen.text == wanted

    tokenizer = load_tokenizer(folder)
    text = f"ab<|vision_start|>{seen.text}<|vision_end|>cd"
    one = {"tokens": torch.tensor(tokenizer(text)["input_ids"]), **{n: torch.from_numpy(x) for n, x in read.items()}}
    of = transformers.Qwen2_5OmniThinkerForConditionalGeneration if second else None
    of = of or transformers.Qwen3OmniMoeThinkerForConditionalGeneration
    places = of.from_pretrained(folder).get_rope_index(
        one["tokens"][None], None, one["video_grid_thw"], torch.ones(1, len(one["tokens"])), True, one["sound_frames"],
        one["second_per_grid_ts"],
    )[0]  # fmt: skip
    model = ftrain.hf.open(folder, task="image_text_to_text")
    torch.testing.assert_close(model.media(one)["positions"].float(), places[:, 0].T.float(), atol=1e-4, rtol=0)


def test_films_that_cannot_be_heard_are_refused_by_name(folder, family, tmp_path_factory):
    pytest.importorskip("av")
    silent = Part("video", source=write_film(folder / "silent.mkv", frames=4), sound=True)
    with pytest.raises(BadRow, match=r"silent.mkv has no sound"):
        family.measure(silent, at(folder))
    deaf = write_qwen(tmp_path_factory.mktemp("deaf"))
    with pytest.raises(BadRow, match=r"silent.mkv is to be heard \(audio: true\), and qwen2_5_vl is deaf"):
        family_of(deaf, load_tokenizer(deaf)).measure(silent, at(folder))


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
