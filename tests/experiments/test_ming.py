"""A router for each modality in a composition: documents are apart, answers are the model's, patches come back."""

import functools
from dataclasses import replace

import numpy as np
import pytest
import torch

import ftrain
from experiments.ming import __main__ as command
from experiments.ming import answer, model
from experiments.omni import corpus, digits
from experiments.omni.corpus import Clips, Delivery
from experiments.stream import fitting
from experiments.stream.words import BOS, EOS, FRAMES, PAD, VOCAB, WINDOW, Said
from ftrain.modules.spec import map_with_paths
from ftrain.sharding import Mesh
from tests.helpers import mesh_models

SMALL = replace(answer.COMPOSED, d=16, layers=1, heads=2, experts=4)


@functools.cache
def pictures():
    images, _ = digits.split()
    few = digits.Digits(*(x[:40] for x in images))
    shades_KP = answer.shades(few)
    return few, shades_KP, answer.pictures(few, shades_KP)


def said(clips=40):
    rng = np.random.default_rng(0)
    heard = rng.normal(size=(clips, FRAMES, WINDOW)).astype(np.float32)
    return Said(heard, rng.integers(0, 48, (clips, 14)), np.arange(clips) % 10, np.array(["v"] * clips))


def params():
    return map_with_paths(lambda _, x: x * 2, ftrain.init(model.specs(SMALL), ftrain.key(0)))


def test_patches_come_back():
    few, shades_KP, seen = pictures()
    assert seen.patches_NCP.shape == (40, 16, 4)
    back = answer.drawn(seen.codes_NC, shades_KP)
    assert back.shape == few.images_NHWC.shape
    assert np.abs(back - few.images_NHWC).mean() < 0.25 * np.abs(few.images_NHWC).mean()
    whole = torch.from_numpy(seen.patches_NCP.reshape(-1, 4))
    np.testing.assert_array_equal(answer.drawn(np.arange(640).reshape(40, 16), whole), few.images_NHWC)


def test_answers_are_what_the_model_makes_of_what_it_has_said():
    heard = said().heard_NLW[:3]
    text, codes = answer.answer(params(), "heard", heard, SMALL)
    batch = answer.lay("heard", heard, np.zeros(3, np.int64), codes)
    batch["tokens_T"].view(3, -1)[:, FRAMES : FRAMES + answer.PLACES] = torch.tensor(text)
    scores_BLV = model.scores(params(), batch, SMALL).unflatten(0, (3, -1))
    first = answer.FIRST[model.PICTURE]
    before = scores_BLV[:, FRAMES + answer.PLACES - 1 : -1, first:].argmax(-1)
    assert np.array_equal(before.numpy(), codes)
    written = scores_BLV[:, FRAMES : FRAMES + answer.PLACES - 1, :VOCAB].argmax(-1).tolist()
    for own, tokens in zip(written, text, strict=True):
        assert tokens[0] == BOS
        kept = [(a, b) for a, b, t in zip(own, tokens[1:], tokens, strict=False) if t not in (EOS, PAD)]
        assert all(a == b for a, b in kept)


def test_documents_are_apart_and_each_has_its_labels():
    batch = answer.batch_of(said(), pictures()[2], np.random.default_rng(0), 4)
    tokens = model.scores(params(), batch, SMALL)
    changed = {**batch, "heard_TW": batch["heard_TW"].clone()}
    length = FRAMES + answer.PLACES + 16
    changed["heard_TW"][:FRAMES] += 1
    other = model.scores(params(), changed, SMALL)
    torch.testing.assert_close(other[length:], tokens[length:])
    assert not torch.equal(other[:length], tokens[:length])
    for name, kind in model.TERMS.items():
        labels = batch["labels_T"][(batch["next_kind_T"] == kind) & (batch["labels_T"] >= 0)]
        assert len(labels), name
        assert (labels >= answer.FIRST[kind]).all()


@pytest.mark.exhaustive
def test_the_losses_are_the_same_on_a_mesh():
    def loss(params, batch):
        terms = model.loss_terms(params, batch, SMALL)
        return ftrain.weighted_sum(terms, {"even": 0.1}), terms

    def batch(packs):
        parts = [answer.batch_of(said(), pictures()[2], np.random.default_rng(i), 4) for i in range(packs)]
        for i, part in enumerate(parts):
            part["documents_T"] += 4 * i
        return {name: torch.cat([part[name] for part in parts]) for name in parts[0]}

    case = mesh_models.Model(model.specs(SMALL), loss, batch, {})
    plan = mesh_models.plan_for(case, Mesh(shard=2, expert=2, kind="virtual"))
    value, gradients = mesh_models.compare(case, plan)
    assert value < 1e-5
    assert gradients < 1e-4


@pytest.mark.exhaustive
def test_it_trains_and_both_judges_are_asked(tmp_path):
    time = np.arange(corpus.SAMPLES) / corpus.RATE
    waves = np.stack([np.sin(6.28 * (200 + 90 * n) * time) * (time < 0.4) / 5 for n in range(10)]).astype(np.float32)
    clips = Clips(waves, np.arange(10), np.zeros(10, np.int64), tuple(Delivery("v", 175, 40) for _ in range(10)))
    images, _ = digits.split()
    few = digits.Digits(*(x[:60] for x in images))
    options = fitting.Options(steps=2, batch=4, json=tmp_path / "found.json")
    rows = {row.name: row for row in command.run(options, command.things((clips, clips), (few, few)), SMALL)}
    assert {"heard, not drawn", "seen, not spoken", "loss of what it draws"} <= set(rows)
    assert all(0 <= row.value <= 1 for name, row in rows.items() if "not" in name)
    assert (tmp_path / "found.json").is_file()
