"""Thinker and talker: what is said is what was trained to be said, and gradients pass between them by choice."""

import dataclasses

import numpy as np
import pytest
import torch

import ftrain
from experiments.omni import vocoder
from experiments.omni.corpus import RATE
from experiments.omni.sources import log_mels
from experiments.spoken import __main__ as command
from experiments.spoken import codec, model, questions
from experiments.spoken.codec import SOUND
from experiments.spoken.model import Both, Talker
from experiments.spoken.questions import QUESTIONS, WORDS
from ftrain.kernels import random
from ftrain.modules.packing import Text

WORDS_OF = model.tokenizer()
TALKER = Talker(16, frames=3, levels=2, entries=8, width=16)
BOTH = Both(model.thinker(WORDS_OF, width=16), TALKER)


@pytest.fixture(scope="module")
def params():
    return ftrain.init(BOTH.specs(), random.key(0))


def batch_of(answers):
    """A batch of questions of noise with these answers."""
    rng = np.random.default_rng(0)
    mels = rng.standard_normal((len(answers), questions.ASKING // 128, 40), np.float32)
    documents = [
        (*command.prompt(WORDS_OF, mel_FM), Text(WORDS_OF.encode((WORDS[i], "<eos>")), train=True))
        for mel_FM, i in zip(mels, answers, strict=True)
    ]
    batch, order = command.laid(BOTH, documents, [2] * len(answers))
    speaker_B, codes_BTQ = torch.arange(len(answers)) % 4, torch.from_numpy(rng.integers(8, size=(len(answers), 3, 2)))
    return {**batch, "speaker_B": speaker_B[order], "codes_BTQ": codes_BTQ[order]}


def test_questions_are_answered_by_words() -> None:
    asked = dict(QUESTIONS)
    assert (asked["after three"], asked["before three"], asked["twice nine"]) == (4, 2, 18)
    assert "before zero" not in asked
    assert len(QUESTIONS) == 29


def test_a_wave_is_codes_and_comes_back() -> None:
    """Two pure tones, as codes of one entry each, are tones of the same pitch again."""
    time_S = np.arange(questions.ANSWERING) / RATE
    tones_NS = np.stack([0.1 * np.sin(2 * np.pi * hz * time_S) for hz in (440.0, 1500.0)]).astype(np.float32)
    tones_NFM = log_mels(tones_NS, SOUND)
    made = codec.fit(tones_NFM, levels=2, entries=4)
    codes_NTQ = made.encode(tones_NFM)
    assert codes_NTQ.shape == (2, questions.ANSWERING // SOUND.hop // codec.TOGETHER, 2)
    assert codes_NTQ.max() < 4
    heard_NS = vocoder.waves(made.decode(codes_NTQ), cfg=SOUND)
    assert heard_NS.shape == tones_NS.shape
    for wave_S, hz in zip(heard_NS, (440.0, 1500.0), strict=True):
        loudest = np.abs(np.fft.rfft(wave_S)).argmax() * RATE / len(wave_S)
        assert abs(loudest - hz) < 60  # a mel band there is as wide
    with pytest.raises(ValueError, match="a multiple of 4"):
        made.encode(tones_NFM[:, :3])


def test_the_answer_is_read_where_its_token_stands(params) -> None:
    batch = batch_of([4, 17, 0])
    assert WORDS_OF.decode(batch["tokens_T"][batch["answer_B"]].tolist()).split() == ["four", "seventeen", "zero"]


def test_scores_step_by_step_are_those_of_training(params) -> None:
    batch = batch_of([4, 17, 0])
    thought_BE, codes_BTQ = BOTH.thoughts(params, batch).detach(), batch["codes_BTQ"]
    family, nats = TALKER.family(), torch.zeros(3)
    scores_BK, state = family.prefill(params["talker"], thought_BE, 6)
    for code_B in codes_BTQ.flatten(1).unbind(1):
        nats -= scores_BK.log_softmax(-1).gather(1, code_B[:, None])[:, 0]
        scores_BK, state = family.extend(params["talker"], code_B, state)
    torch.testing.assert_close(nats.sum(), TALKER.loss(params["talker"], thought_BE, codes_BTQ).total)
    assert TALKER.say(params["talker"], thought_BE).shape == codes_BTQ.shape


@pytest.mark.parametrize("joint", [False, True])
def test_the_talkers_gradient_reaches_the_thinker_by_choice(params, joint) -> None:
    both = dataclasses.replace(BOTH, joint=joint)

    def speech(params, batch):
        return both.losses(params, batch)["speech"]

    loss, grads = ftrain.value_and_grad(speech)(params, batch_of([4, 17, 0]))
    assert float(loss) > 0
    assert any(bool(g.abs().max() > 0) for g in ftrain.tree.leaves(grads["talker"]))
    reached = any(bool(g.abs().max() > 0) for g in ftrain.tree.leaves(grads["thinker"]))
    assert reached is joint


def test_each_question_comes_once_in_a_round() -> None:
    said = questions.Said(np.zeros((10, 4)), np.zeros(10, np.int64), np.zeros(10, np.int64))
    places = np.concatenate([questions.chosen(said, 4, seed=0, number=number) for number in range(5)])
    assert sorted(places[:10]) == sorted(places[10:]) == list(range(10))
    assert (places[:10] != places[10:]).any()
