"""Text and speech at the same time: what each track may read, that talks share packs, and that talking is the model's.

Legend: N clips, B talks, T tokens of a pack.
"""

import functools
from dataclasses import replace

import numpy as np
import pytest
import torch

import ftrain
from experiments.omni import corpus
from experiments.omni.corpus import Clips, Delivery
from experiments.stream import __main__ as command
from experiments.stream import codec, fitting, model, talk, words
from experiments.stream.talk import FRAMES, LENGTH, TEXT, UNITS
from experiments.stream.words import Said
from ftrain.modules.spec import map_with_paths
from ftrain.sharding import Mesh
from tests.helpers import mesh_models

SMALL = replace(talk.TALKER, d=16, heads=2, below=1, trunk=1, above=1)


def said(clips=40):
    """Noise for sounds; each voice says every number."""
    rng = np.random.default_rng(0)
    return Said(
        rng.normal(size=(clips, FRAMES, words.WINDOW)).astype(np.float32),
        rng.integers(0, words.CODES, (clips, UNITS)),
        np.arange(clips) % 10,
        np.array([f"v{i // 10}" for i in range(clips)]),
    )


def pack(talks=4):
    return talk.batch_of(said(), np.arange(3, 3 + talks), np.random.default_rng(1))


@functools.cache
def params():
    """Large enough to tell differences."""
    made = ftrain.init(model.specs(SMALL), ftrain.key(0))
    return map_with_paths(lambda _, x: x * 2, made)


def scores(batch):
    with torch.no_grad():
        found = model.scores(params(), batch, SMALL)
    return [x.unflatten(0, (-1, LENGTH)) for x in found]


def test_talks_of_a_pack_are_apart():
    rng = np.random.default_rng
    alone = [talk.batch_of(said(), np.array([i]), rng(1)) for i in (3, 4)]
    together = {name: torch.cat([x[name] for x in alone]) for name in alone[0] if name != "said"}
    for name in ("tracks_T", "talks_T"):
        together[name][LENGTH:] += 5
    reads = together["reads_TR"]
    together["reads_TR"] = torch.where(reads == LENGTH, 2 * LENGTH, reads)
    together["reads_TR"][LENGTH:] += torch.where(reads[LENGTH:] == LENGTH, 0, LENGTH)
    for whole, *parts in zip(scores(together), *map(scores, alone), strict=True):
        torch.testing.assert_close(whole, torch.cat(parts), rtol=0, atol=1e-4)


def test_a_unit_reads_the_text_that_is_written_by_then_and_no_more():
    batch = pack()
    hears, _, speaks = scores(batch)
    for token in (talk.LEAD, talk.LEAD + 2):
        changed = {**batch, "text_T": batch["text_T"].clone()}
        changed["text_T"].view(-1, LENGTH)[:, FRAMES + token] = 0
        other_hears, _, other = scores(changed)
        first = (token - talk.LEAD) * talk.PACE
        units, others = (x[:, FRAMES + TEXT :] for x in (speaks, other))
        assert torch.equal(units[:, :first], others[:, :first])
        assert not torch.equal(units[:, first], others[:, first])
        assert torch.equal(other_hears[:, :FRAMES], hears[:, :FRAMES])


def test_the_written_text_is_of_what_is_heard():
    batch = pack()
    changed = {**batch, "heard_TW": batch["heard_TW"].flip(1)}
    assert not torch.equal(scores(changed)[1][:, FRAMES], scores(batch)[1][:, FRAMES])


def test_talking_is_what_the_model_makes_of_what_it_has_said():
    heard = said().heard_NLW[:3]
    frames, text, units_BU = talk.talk(params(), heard, SMALL)
    batch = talk.lay(heard, [""] * 3, [""] * 3, units_BU)
    batch["text_T"].view(-1, LENGTH)[:, FRAMES : FRAMES + TEXT] = torch.tensor(text)
    batch["reads_TR"] = torch.from_numpy(talk.reads(np.array(text))).flatten(0, 1)
    hears, writes, speaks = scores(batch)
    assert hears[:, :FRAMES].argmax(-1).tolist() == frames
    assert np.array_equal(speaks[:, FRAMES + TEXT :].argmax(-1).numpy(), units_BU)
    for own, tokens in zip(writes[:, FRAMES : FRAMES + TEXT].argmax(-1).tolist(), text, strict=True):
        ended = [token in (words.EOS, words.PAD) for token in tokens]
        assert all(a == b for a, b, end in zip(own, tokens[1:], ended, strict=False) if not end)


@pytest.mark.exhaustive
def test_the_losses_are_the_same_on_a_mesh():
    def loss(params, batch):
        terms = model.loss_terms(params, batch, SMALL)
        return ftrain.weighted_sum(terms, {}), terms

    case = mesh_models.Model(model.specs(SMALL), loss, lambda packs: pack(2 * packs), talk.RULES)
    value, gradients = mesh_models.compare(case, mesh_models.plan_for(case, Mesh(shard=2, kind="virtual")))
    assert value < 1e-5
    assert gradients < 1e-4


def test_it_trains_and_words_are_counted(tmp_path):
    options = fitting.Options(steps=3, batch=4, json=tmp_path / "found.json")
    rows = command.run(options, (said(), said(10), said(10)), SMALL)
    losses = [row for row in rows if row.name.startswith("loss of")]
    assert len(losses) == 3
    assert (tmp_path / "found.json").is_file()
    judge = words.judge(said(), said())
    assert judge.held_out == 1.0
    found = command.measured(params(), said(10), judge, SMALL)
    assert set(found) == {"heard", "written", "spoken", "spoken as written"}
    assert all(0 <= share <= 1 for share in found.values())


def clips(count=20):
    """Tones for voices; as long as real clips."""
    time = np.arange(corpus.SAMPLES) / corpus.RATE
    labels = np.arange(count) % 10
    waves = np.stack([np.sin(6.28 * (200 + 90 * n) * time) * (time < 0.4) / 5 for n in labels]).astype(np.float32)
    return Clips(
        waves, labels, np.zeros(count, np.int64), tuple(Delivery(f"v{i // 10}", 175, 40) for i in range(count))
    )


def test_clips_become_frames_and_units():
    units_KW = words.learnt_units(clips(), steps=4)
    found = words.said(clips(), units_KW)
    assert units_KW.shape == (words.CODES, words.WINDOW)
    assert (found.heard_NLW.shape, found.units_NU.shape) == ((20, FRAMES, words.WINDOW), (20, UNITS))
    assert np.array_equal(found.units_NU[:10], found.units_NU[10:])
    assert words.judge(found, found).held_out == 1.0
    mels_NFM = words.features(clips(), words.MEL).mels_NFM
    np.testing.assert_allclose(found.heard_NLW[0, 1].reshape(4, -1), mels_NFM[0, 1:5])


@pytest.mark.exhaustive
def test_a_codec_trains_and_what_comes_back_is_judged(tmp_path):
    told = {**codec.SMALL, "hidden_size": 16, "num_filters": 2, "upsample_groups": 16, "intermediate_size": 16}
    options = codec.Options(steps=2, batch=2, json=tmp_path / "found.json")
    rows = {row.name: row for row in codec.run(options, clips(), clips(), told)}
    assert rows["spectrum_2048"].value > 0
    assert 0 <= rows["words not heard"].value <= 1
    assert rows["entries in use, level 3"].value >= 1
    assert (tmp_path / "found.json").is_file()


def test_what_has_no_room_is_refused():
    with pytest.raises(ValueError, match="1 talks need as many words and units, and replies of at most 5 letters"):
        talk.lay(said().heard_NLW[:1], ["one"], ["sevens"], said().units_NU[:1])
