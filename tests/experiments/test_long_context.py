"""Needles stand where they are said to, split by split, and documents of a pack do not see each other."""

import numpy as np
import pytest
import torch

import ftrain
from experiments.long_context import haystack, model, plan
from experiments.long_context.haystack import KINDS, Needle, Sources, Split
from experiments.omni import corpus, digits
from experiments.omni.corpus import Clips
from experiments.omni.language import LANGUAGES, SPECIAL, Tokenizer
from experiments.omni.sources import HELD_OUT, TRAIN, Speech
from ftrain.kernels import random
from ftrain.modules import decoder, omni
from ftrain.plan.space import Candidate

NUMBERS = LANGUAGES[0].numbers[:10]


@pytest.fixture(scope="module")
def of() -> Sources:
    """Real digits; noise for speech and text, so that nothing is synthesised."""
    image, audio = model.readers()
    words = Tokenizer((*SPECIAL, *NUMBERS, *haystack.NAMES, haystack.IS, haystack.ASKED, "this", "that", "then"))
    rng = np.random.default_rng(0)
    mels = rng.standard_normal((20, corpus.SAMPLES // 128, 40), np.float32)
    clips = Clips(np.zeros((20, 1)), np.arange(20) % 10, np.zeros(20, np.int64), ())
    text, sides = np.array(words.encode("this that then")), digits.split()
    made = [
        Split(n, rng.choice(text, 500), d, Speech(mels, mels, clips))
        for n, d in zip((TRAIN, HELD_OUT), sides, strict=True)
    ]
    return Sources(*made, words, image, audio)


def test_a_document_has_its_length_and_its_needles_where_they_are_said_to_be(of) -> None:
    net = model.omni_model(of)
    made = haystack.batch(of, net, split=TRAIN, documents=3, tokens=200, needles=6, seed=0, number=1)
    tokens_DT = made.batch["tokens_T"].reshape(3, 200)
    assert len(made.needles) == 18
    asked = iter(made.needles)
    for tokens_T in tokens_DT:
        for _ in range(6):
            needle = next(asked)
            there = of.words.decode([int(tokens_T[round(needle.depth * 200)])])
            assert there == (NUMBERS[needle.digit], "<image>", "<audio>")[needle.kind]
    told = of.words.decode(made.batch["answer_A"].tolist()).split()
    assert told == [NUMBERS[needle.digit] for needle in made.needles]
    before = of.words.decode(made.batch["tokens_T"][made.batch["place_A"]].tolist()).split()
    assert set(before) == {haystack.ASKED}
    assert made.batch["kind_A"].tolist() == [needle.kind for needle in made.needles]
    assert sorted(made.batch["kind_A"].tolist()) == sorted([*range(len(KINDS))] * 6)
    with pytest.raises(ValueError, match="room for fewer"):
        haystack.hide(of, split=TRAIN, tokens=40, needles=6, rng=np.random.default_rng(0))


def test_batches_are_functions_of_their_number_and_split(of) -> None:
    net = model.omni_model(of)

    def tokens(split: str, number: int) -> list[int]:
        made = haystack.batch(of, net, split=split, documents=1, tokens=64, needles=3, seed=0, number=number)
        return made.batch["tokens_T"].tolist()

    assert tokens(TRAIN, 0) == tokens(TRAIN, 0)
    assert tokens(TRAIN, 0) != tokens(TRAIN, 1)
    assert tokens(TRAIN, 0) != tokens(HELD_OUT, 0)


def test_a_document_reads_the_same_alone_and_behind_another(of) -> None:
    net = model.omni_model(of)
    params = ftrain.init(omni.specs(net), random.key(0))
    balance = ftrain.init(decoder.balance_specs(net.foundation), random.key(1))
    tokens_T = torch.randint(0, len(of.words), (600,), generator=torch.Generator().manual_seed(0))
    hidden = []
    for segments_T in (torch.arange(600) // 300, torch.zeros(300, dtype=torch.int64)):
        part_T = tokens_T[-len(segments_T) :]
        positions_T = torch.arange(len(segments_T)) % 300
        found, _ = decoder.apply(
            params["foundation"],
            part_T,
            positions=positions_T,
            segments=segments_T,
            cfg=net.foundation,
            balance=balance,
        )
        hidden.append(found[-300:])
    torch.testing.assert_close(hidden[0], hidden[1])


def test_shares_are_told_by_depth() -> None:
    needles = [Needle(0, depth, 1) for depth in (0.05, 0.15, 0.5, 0.99)]
    assert haystack.depths(needles, np.array([1, 0, 1, 0]), parts=5) == [0.5, None, 1.0, None, 0.0]


def test_a_million_tokens_are_planned_with_what_windows_leave_to_do() -> None:
    some, every = (plan.plan_for_search(tokens=1 << 20, packs=1, size=size) for size in ("windows", "every"))
    assert some.stacks == {"turns": 8}
    kinds = [some.cfg.own(i) is not None for i in range(6)]
    assert kinds == [False] * 5 + [True]
    share = some.model_shape.attention_flops / every.model_shape.attention_flops
    assert share == pytest.approx((1 + 5 * 2048 / (1 << 20)) / 6)
    assert some.model_shape.weight_flops == every.model_shape.weight_flops
    candidate = Candidate(1, 8, 1, 1, None, 1, "none")
    assert len(some.make({"turns": 1}, candidate).specs["layers"]) == plan.TURN
    with pytest.raises(ValueError, match="windows"):
        plan.plan_for_search(tokens=64, packs=1, size="all")
