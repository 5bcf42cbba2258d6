"""Needles stand where they are said to, split by split, and documents of a pack do not see each other."""

from dataclasses import replace

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
from ftrain import tree
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


@pytest.mark.parametrize("kinds", [KINDS[:1], KINDS[1:]], ids=" and ".join)
def test_a_batch_hides_what_it_is_asked_to_and_nothing_else(of, kinds) -> None:
    net = model.omni_model(of)
    made = haystack.batch(of, net, split=TRAIN, documents=2, tokens=96, needles=6, seed=0, number=2, kinds=kinds)
    hidden = [KINDS[kind] for kind in made.batch["kind_A"].tolist()]
    assert {kind: hidden.count(kind) for kind in hidden} == dict.fromkeys(kinds, 12 // len(kinds))
    media = {"picture": "image", "sound": "audio"}
    assert set(made.batch.get("encoders", {})) == {media[kind] for kind in kinds if kind in media}


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


def test_the_first_layer_joins_a_name_to_a_token_from_wherever_it_stands_in_the_window(of) -> None:
    net = model.omni_model(of)
    cfg = replace(net.foundation, layers=1)
    params = ftrain.init(decoder.specs(cfg), random.key(0))
    balance = ftrain.init(decoder.balance_specs(cfg), random.key(1))

    def last(text: str) -> torch.Tensor:
        tokens_T = torch.tensor(of.words.encode(text))
        positions, segments = torch.arange(len(tokens_T)), torch.zeros_like(tokens_T)
        return decoder.apply(params, tokens_T, positions=positions, segments=segments, cfg=cfg, balance=balance)[0][-1]

    torch.testing.assert_close(last("that red is this four"), last("that this is red four"))
    assert (last("that red is this four") - last("red that is this four")).abs().max() > 0.01


def test_media_enter_as_large_as_words_whatever_their_encoders_make(of) -> None:
    net = model.omni_model(of)
    params = ftrain.init(omni.specs(net), random.key(0))
    for encoder in params["encoders"].values():
        for x in tree.leaves(encoder):
            x.mul_(3.0)
    batch = haystack.batch(of, net, split=TRAIN, documents=2, tokens=96, needles=6, seed=0, number=3).batch
    size_T = model.entering(params, batch, model=net).square().mean(-1).sqrt()
    place_n = torch.cat([part["index_n"] for part in batch["encoders"].values()])
    assert len(place_n) == 8
    torch.testing.assert_close(size_T[place_n], torch.full((8,), model.EMBEDDING))
    assert size_T.mean() == pytest.approx(model.EMBEDDING, rel=0.05)


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
