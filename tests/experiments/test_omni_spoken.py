"""Words that a model says: waves of mel frames that sound like them, and a listener that knows real words."""

import wave
from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest

import ftrain
from experiments.omni import listener, sources, vocoder
from experiments.omni.corpus import RATE, SAMPLES, SPEAKERS, Clips, Corpus, Delivery
from experiments.omni.evaluation import Evaluator
from experiments.omni.model import SIZES, audio_config, omni_model, readers
from ftrain.modules import decoder as foundation
from ftrain.modules import omni

CFG = audio_config("tiny", 16)


def chirps(count: int, seed: int) -> np.ndarray:
    """Waves `[N, S]` of tones that rise or fall at their own pace, number i from its own pitch."""
    rng = np.random.default_rng(seed)
    time_S = np.arange(SAMPLES) / RATE
    start_N1 = 300 + 250 * (np.arange(count) % 10)[:, None] + rng.uniform(-40, 40, (count, 1))
    wave_NS = np.sin(2 * np.pi * (start_N1 + 150 * time_S) * time_S) * rng.uniform(0.05, 0.2, (count, 1))
    return (wave_NS + rng.normal(0, 0.002, wave_NS.shape)).astype(np.float32)


def speech(count: int, seed: int, languages: int = 1) -> sources.Speech:
    labels_N = np.arange(count) % 10
    languages_N = np.arange(count) // 10 % languages
    clips = Clips(chirps(count, seed), labels_N, languages_N, (Delivery("v", 175, 50),) * count)
    return sources.features(clips, CFG)


def test_a_wave_of_mel_frames_has_these_mel_frames() -> None:
    """But for a few per cent: mel frames do not hold phases, and bands are wider than the bins between them."""
    said_NFM = sources.log_mels(chirps(4, 0), CFG)
    again_NFM = sources.log_mels(vocoder.waves(said_NFM, cfg=CFG), CFG)
    loud = said_NFM > said_NFM.max() - 0.5  # of the loudest band: 20 dB
    assert np.abs(again_NFM - said_NFM)[loud].mean() < 0.06
    assert np.abs(again_NFM - said_NFM.mean((0, 1)))[loud].mean() > 0.2
    assert np.array_equal(vocoder.waves(said_NFM, cfg=CFG), vocoder.waves(said_NFM, cfg=CFG))
    with pytest.raises(ValueError, match=r"waves are made of clips \[N, F, 40\], got \[4, 56, 39\]"):
        vocoder.waves(said_NFM[..., 1:], cfg=CFG)


def test_the_listener_recognises_words_of_voices_it_has_not_heard_and_says_how_many() -> None:
    ear = listener.train(speech(80, 0), speech(20, 1), cfg=CFG)
    assert ear.held_out_accuracy > 0.9
    heard_N = ear.recognise(chirps(30, 2))
    assert (heard_N == np.arange(30) % 10).mean() > 0.9
    assert (ear.recognise(vocoder.waves(sources.log_mels(chirps(30, 2), CFG), cfg=CFG)) == heard_N).mean() > 0.9


def test_a_word_of_another_language_is_another_word() -> None:
    assert listener.word_number(0, 3) != listener.word_number(3, 3)
    assert len({listener.word_number(language, digit) for language in range(6) for digit in range(10)}) == 60


def test_a_word_is_learnt_from_the_speakers_that_say_it_and_where_none_does_from_all() -> None:
    heard = speech(40, 0, languages=2)
    assert sorted(np.concatenate(list(heard.spoken.values())).tolist()) == list(range(40))
    words = list(zip(heard.clips.languages_N.tolist(), heard.clips.labels_N.tolist(), strict=True))
    one, other = words[0], next(word for word in words if word != words[0])
    first = words.index(one)
    by_speaker = {first, *(i for i in range(40) if words[i] not in (one, other))}
    voices = (SPEAKERS[0] if i in by_speaker else "other" for i in range(40))
    some = replace(heard, clips=heard.clips._replace(deliveries=tuple(Delivery(voice, 175, 50) for voice in voices)))
    assert some.spoken[one].tolist() == [first]
    assert some.spoken[other].tolist() == [i for i in range(40) if words[i] == other]
    for (language, digit), places in some.spoken.items():
        assert (heard.clips.languages_N[places] == language).all()
        assert (heard.clips.labels_N[places] == digit).all()


def test_a_wav_file_has_all_words_with_pauses(tmp_path) -> None:
    said = [np.full(1000, 0.5, np.float32), np.full(500, 2.0, np.float32)]
    vocoder.write_wav(tmp_path / "spoken.wav", said, rate=RATE)
    with wave.open(str(tmp_path / "spoken.wav")) as file:
        assert (file.getframerate(), file.getnchannels(), file.getsampwidth()) == (RATE, 1, 2)
        samples_S = np.frombuffer(file.readframes(file.getnframes()), "<i2")
    assert len(samples_S) == 1500 + 2 * (RATE // 4)
    assert samples_S[:1000].tolist() == [16_383] * 1000
    assert samples_S.max() == 32_767  # what is too loud is cut


def test_a_larger_model_is_larger_in_all_and_trained_on_more() -> None:
    ladder = [SIZES[name] for name in ("smoke", "tiny", "small", "medium")]
    for less, more in pairwise(ladder):
        assert less.d_model < more.d_model
        assert less.layers < more.layers
        assert less.documents < more.documents
        assert less.data.copies < more.data.copies
        takes = [len(size.data.speech.trained_voices) * size.data.speech.train_takes for size in (less, more)]
        assert takes[0] < takes[1]


def test_what_a_model_says_is_judged_as_a_wave_and_the_same_each_time() -> None:
    heard = Corpus(speech(120, 0, languages=6).clips, speech(60, 1, languages=6).clips)
    data = sources.load(readers("smoke"), speech=heard, copies=0)
    net = omni_model("smoke", data.words, audio=True)
    params = ftrain.init(omni.specs(net), ftrain.key(0))
    balance = ftrain.init(foundation.balance_specs(net.foundation), ftrain.key(1))
    ear = listener.train(data.train.speech, data.held_out.speech, cfg=data.readers.audio)
    ask = Evaluator(net, data, None, ear, seed=0, count=3)
    answers = ask.answers("text_to_audio", params, balance)
    assert [answer.mel_FM.shape for answer in answers] == [(56, 40)] * 3
    assert [int(ear.recognise(answer.wave_S[None])[0]) for answer in answers] == [a.recognised for a in answers]
    again = ask.answers("text_to_audio", params, balance)
    assert all(np.array_equal(one.wave_S, two.wave_S) for one, two in zip(answers, again, strict=True))
    with pytest.raises(ValueError, match="judged by a listener"):
        replace(ask, listener=None).answers("text_to_audio", params, balance)
