"""Examples: that they repeat, that nothing held out is trained on, and what is in them."""

from dataclasses import replace
from itertools import combinations, product

import numpy as np
import pytest

from experiments.omni import digits, sources, tasks, training
from experiments.omni.corpus import Clips, Corpus, Delivery
from experiments.omni.language import EOS, LANGUAGES, NUMERALS
from experiments.omni.speech import Silence
from ftrain.modules.audio_encoder import AudioConfig
from ftrain.modules.packing import Media, Target, Text
from ftrain.modules.vision_encoder import VisionConfig

READERS = sources.Readers(
    image=VisionConfig(32, 1, 2, 16, patch=4, channels=1, merge=2),
    video=VisionConfig(32, 1, 2, 16, patch=5, channels=1, frames=3, merge=2),
    audio=AudioConfig(32, 1, 2, 16, rate=11_025, n_fft=256, hop=128, mels=40),
)


def noise(count, seed):
    """Clips that need no espeak-ng."""
    rng = np.random.default_rng(seed)
    labels = np.arange(count) % 10
    how = tuple(Delivery(f"v{seed}", 175, 50) for _ in labels)
    return Clips(rng.normal(0, 0.1, (count, 7_168)).astype(np.float32), labels, np.arange(count) // 10 % 6, how)


SOURCES = sources.load(READERS, speech=Corpus(noise(120, 0), noise(60, 1)), copies=2)


def equal(one, two):
    """Whether two examples are the same to the bit."""
    if (one.task, one.answer, one.digit, one.novel) != (two.task, two.answer, two.digit, two.novel):
        return False
    return [contents(part) for part in one.document] == [contents(part) for part in two.document]


def contents(part):
    """A part of a document as something comparable."""
    match part:
        case Text(ids, train):
            return ("text", tuple(ids), train)
        case Media(modality, features):
            return (modality, *(array.tobytes() for array in features.values()))
        case Target(modality, array):
            return (modality, array.tobytes())


@pytest.mark.parametrize("task", tasks.TASKS)
@pytest.mark.parametrize("split", sources.SPLITS)
def test_an_example_depends_on_its_arguments_alone(task, split):
    forward = [tasks.sample(task, i, sources=SOURCES, seed=3, split=split) for i in range(8)]
    backward = [tasks.sample(task, i, sources=SOURCES, seed=3, split=split) for i in reversed(range(8))]
    assert all(equal(one, two) for one, two in zip(forward, reversed(backward), strict=True))
    others = [tasks.sample(task, i, sources=SOURCES, seed=4, split=split) for i in range(8)]
    assert not all(equal(one, two) for one, two in zip(forward, others, strict=True))


@pytest.mark.parametrize("task", tasks.TASKS)
@pytest.mark.parametrize("split", sources.SPLITS)
def test_a_document_is_a_prompt_and_an_answer_that_alone_is_trained_on(task, split):
    for i in range(20):
        example = tasks.sample(task, i, sources=SOURCES, seed=0, split=split)
        *before, last = example.document
        assert tuple(before) == tuple(example.prompt)
        assert not any(isinstance(part, Target) or (isinstance(part, Text) and part.train) for part in before)
        if training.made_by(task) is not None:
            assert isinstance(last, Target)
            assert last.array.shape == ((1, 8, 8) if last.modality == "image" else (56, 40))
            assert example.answer == ()
        else:
            assert last.train
            assert [SOURCES.words.words[i] for i in last.ids] == [*example.answer, EOS]


@pytest.mark.parametrize("task", ["image_to_text", "audio_to_text", "video_to_text", "arithmetic"])
def test_answers_are_words_of_the_language_that_the_prompt_asks_for(task):
    for i in range(40):
        example = tasks.sample(task, i, sources=SOURCES, seed=0, split="held_out")
        tag = example.shown[0][1].split()[0]
        language = next(language for language in LANGUAGES if language.tag == tag)
        assert example.answer[-1 if task == "arithmetic" else 0] == language.numbers[example.digit]
        assert set(example.answer) <= {*language.words, *NUMERALS}


def images_of(example):
    return [value.tobytes() for kind, value in example.shown if kind == "image"]


def test_held_out_images_are_never_in_training_examples():
    held_out = {image.tobytes() for image in digits.split()[1].images_NHWC}
    mixture = tasks.Mixture(SOURCES, seed=0)
    for i in range(600):
        example = mixture.example(i)
        assert not held_out & set(images_of(example))
        for part in example.document:
            if isinstance(part, Target):
                assert part.modality == "audio" or part.array.transpose(1, 2, 0).tobytes() not in held_out
    assert set(SOURCES.train.images.places_N) == set(range(1438))
    shown = {
        image
        for i in range(359)
        for image in images_of(tasks.sample("image_to_text", i, sources=SOURCES, seed=0, split="held_out"))
    }
    assert shown == held_out


def test_training_reads_only_training_clips_and_held_out_all_held_out_clips():
    kept = {mel.tobytes() for mel in SOURCES.held_out.speech.mels_NFM}
    for i in range(200):
        example = tasks.sample("audio_to_text", i, sources=SOURCES, seed=0, split="train")
        assert example.shown[1][1].tobytes() not in kept
    heard = {
        tasks.sample("audio_to_image", i, sources=SOURCES, seed=0, split="held_out").shown[1][1].tobytes()
        for i in range(60)
    }
    assert heard == kept


@pytest.mark.parametrize("task", ["audio_to_text", "video_to_text", "text_to_audio", "arithmetic"])
def test_held_out_combinations_are_tested_and_never_trained_on(task):
    novel = {"train": 0, "held_out": 0}
    for split in novel:
        for i in range(300):
            novel[split] += tasks.sample(task, i, sources=SOURCES, seed=0, split=split).novel
    assert novel["train"] == 0
    assert novel["held_out"] > 10


def test_every_digit_and_every_sum_is_trained_on_though_pairs_are_held_out():
    kept = {(a, b) for a in range(10) for b in range(a, 10)} - tasks.HELD_OUT_SUMS
    assert {a for a, _ in kept} | {b for _, b in kept} == set(range(10))
    assert {a + b for a, b in kept} == set(range(19))


@pytest.mark.parametrize("sizes", [(10, 4, 6), (10, 6, 6)], ids=["digit-direction-language", "digit-language-language"])
def test_of_a_held_out_combination_any_two_are_trained_on_together(sizes):
    trained = [numbers for numbers in product(*map(range, sizes)) if not tasks.is_held_out(*numbers)]
    assert 0.85 < len(trained) / np.prod(sizes) < 0.95
    for one, two in combinations(range(3), 2):
        assert len({(numbers[one], numbers[two]) for numbers in trained}) == sizes[one] * sizes[two]


def test_sums_are_of_what_is_shown():
    seen = set()
    for i in range(200):
        example = tasks.sample("arithmetic", i, sources=SOURCES, seed=0, split="held_out")
        kinds = tuple(sorted(kind for kind, value in example.shown if not isinstance(value, str)))
        seen.add(kinds)
        assert "image" in kinds
        assert 0 <= example.digit <= 18
    assert seen == {("image",), ("image", "image"), ("audio", "image")}


def test_a_sum_is_answered_by_reading_and_counting():
    for i in range(60):
        example = tasks.sample("arithmetic", i, sources=SOURCES, seed=0, split="held_out")
        language = next(language for language in LANGUAGES if language.tag == example.shown[0][1])
        first, second, *steps = example.answer
        assert language.numbers.index(first) + int(second) == example.digit
        assert steps[::2] == [str(done) for done in range(int(second) + 1)]
        assert steps[1::2] == list(language.numbers[language.numbers.index(first) : example.digit + 1])
        assert len(example.answer) < tasks.LONGEST_ANSWER


def test_training_reads_every_pair_and_counts_from_anywhere_but_never_adds_a_held_out_pair():
    read, counted, added = set(), set(), set()
    for i in range(4000):
        example = tasks.sample("arithmetic", i, sources=SOURCES, seed=0, split="train")
        tag, *words = " ".join(value for kind, value in example.shown if kind == "text").split()
        language = next(language for language in LANGUAGES if language.tag == tag)
        if words[0] == language.count:
            target, count, running = int(words[1]), int(words[2]), language.numbers.index(words[3])
            assert example.answer == tasks.counted(language, target, count, running)[2:]
            counted.add(tuple(sorted((target, running - count))))
            continue
        pair = tuple(sorted((language.numbers.index(example.answer[0]), int(example.answer[1]))))
        (read if words[0] == language.read else added).add(pair)
    assert len(read) == 55
    assert len(added) == 55 - len(tasks.HELD_OUT_SUMS)
    assert not (added | counted) & tasks.HELD_OUT_SUMS
    of_no_sum = [pair for pair in counted if min(pair) < 0 or max(pair) > 9]
    assert len(of_no_sum) > 20


def test_held_out_drawings_go_through_every_prompt():
    asked = {tasks.sample("text_to_image", i, sources=SOURCES, seed=0, split="held_out").shown[0][1] for i in range(60)}
    assert len(asked) == 60


def test_held_out_words_to_be_spoken_go_through_every_written_word():
    asked = [tasks.sample("text_to_audio", i, sources=SOURCES, seed=0, split="held_out") for i in range(60)]
    assert len({(example.digit, example.shown[0][1].split()[-1]) for example in asked}) > 50  # some are spelt alike


def test_a_word_is_spoken_in_the_language_that_the_prompt_asks_for():
    clips = SOURCES.train.speech
    for i in range(60):
        example = tasks.sample("text_to_audio", i, sources=SOURCES, seed=0, split="train")
        tag, verb, word = example.shown[0][1].split()
        language = LANGUAGES[example.spoken]
        assert (tag, verb) == (language.tag, language.say)
        assert word in {other.numbers[example.digit] for other in LANGUAGES}
        spoken = [i for i, clip_FM in enumerate(clips.said_NFM) if np.array_equal(clip_FM, example.document[-1].array)]
        assert [(clips.clips.languages_N[i], clips.clips.labels_N[i]) for i in spoken] == [
            (example.spoken, example.digit)
        ]


def test_the_mixture_follows_its_weights_and_repeats():
    mixture = tasks.Mixture(SOURCES, seed=0, weights={"image_to_text": 3.0, "arithmetic": 1.0})
    names = [mixture.example(i).task for i in range(400)]
    assert set(names) == {"image_to_text", "arithmetic"}
    assert 0.65 < names.count("image_to_text") / 400 < 0.85
    assert equal(mixture.example(7), mixture.example(7))
    assert not equal(mixture.example(7), replace(mixture, seed=1).example(7))


def test_without_speech_the_tasks_that_need_it_are_left_out():
    silent = sources.load(READERS, speech=Silence("no voice"), copies=0)
    assert set(tasks.possible(silent)) == {"image_to_text", "video_to_text", "text_to_image", "arithmetic"}
    mixture = tasks.Mixture(silent, seed=0)
    assert {mixture.example(i).task for i in range(100)} == set(tasks.possible(silent))
    for task in sorted(tasks.NEED_SPEECH):
        with pytest.raises(ValueError, match=f"{task!r} needs speech: no voice"):
            tasks.sample(task, 0, sources=silent, seed=0, split="train")
    with pytest.raises(ValueError, match="leave no task"):
        tasks.Mixture(silent, seed=0, weights={"audio_to_text": 1.0})


def test_bad_arguments_are_named():
    with pytest.raises(ValueError, match="task='smell'"):
        tasks.sample("smell", 0, sources=SOURCES, seed=0, split="train")
    with pytest.raises(ValueError, match="split='test'"):
        tasks.sample("image_to_text", 0, sources=SOURCES, seed=0, split="test")
    with pytest.raises(ValueError, match="index=-1"):
        tasks.sample("image_to_text", -1, sources=SOURCES, seed=0, split="train")
    with pytest.raises(ValueError, match="need numbers"):
        tasks.Mixture(SOURCES, seed=0, weights={"smell": 1.0})
    with pytest.raises(ValueError, match="the audio encoder wants 16000"):
        sources.load(replace(READERS, audio=AudioConfig(32, 1, 2, 16)), speech=Corpus(noise(10, 0), noise(10, 1)))
