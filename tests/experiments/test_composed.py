"""Compositions of parts: a step trains what is to be trained, answers are judged, layouts by part change nothing."""

import functools
from dataclasses import replace

import numpy as np
import pytest
import torch

import ftrain
from experiments.composed import __main__ as command
from experiments.composed import documents, training
from experiments.composed.documents import SHARES, Asker
from experiments.composed.model import Folders, Size, compose
from experiments.composed.vocabulary import MARKS, WORDS
from experiments.omni import corpus, digits
from experiments.omni import judge as judge_of_digits
from experiments.omni.corpus import Clips, Delivery
from experiments.omni.digits import Digits
from experiments.omni.training import plan as layout
from ftrain import TrainState
from ftrain.bridge.parts import picture_part
from ftrain.modules import omni
from ftrain.modules.packing import Media, Target
from ftrain.modules.spec import leaves_with_paths
from ftrain.sharding import Mesh
from tests.helpers import mesh_models, part_folders

SMALL = Size(d=16, layers=1, tower=16, tower_layers=1, codec=(8, 8, 8))


@functools.cache
def few():
    time = np.arange(corpus.SAMPLES) / corpus.RATE
    waves = np.stack([np.sin(6.28 * (200 + 90 * n) * time) * (time < 0.4) / 5 for n in range(10)]).astype(np.float32)
    clips = Clips(waves, np.arange(10), np.zeros(10, np.int64), tuple(Delivery("v", 175, 40) for _ in range(10)))
    images = Digits(*(x[:70] for x in digits.split()[0]))
    return documents.things((images, images), (clips, clips))


@functools.cache
def judge():
    return judge_of_digits.train(few()[0].digits, few()[1].digits, copies=0)


def write_parts(folder, kind):
    part_folders.foundation(kind, folder / "foundation", words=["?", *WORDS])
    part_folders.pictures(folder / "pictures")
    part_folders.sounds(folder / "sounds")
    part_folders.tokenizer(folder / "tokenizer")
    return Folders(*(folder / name for name in ("foundation", "pictures", "sounds", "tokenizer")))


@pytest.mark.parametrize("kind", ["llama", "qwen3_moe"])
def test_parts_of_folders_are_trained_but_for_those_that_stay(kind, tmp_path):
    pytest.importorskip("diffusers")
    folders = write_parts(tmp_path, kind)
    to, of = compose(kind, folders), few()[0]
    begun = to.params(ftrain.key(0))
    for path, leaf in leaves_with_paths(picture_part(folders.pictures).load()):
        torch.testing.assert_close(dict(leaves_with_paths(begun["encoders"]["image"]["tower"]))[path], leaf)
    assert begun["foundation"]["embedding"]["table_VD"].shape[0] == 1 + len(WORDS) + len(MARKS)
    assert to.words.decode(to.words.encode(["larger", "two"])) == ("larger", "two")
    tx = training.transform(training.Training(2, 1, 1e-2, frozen=("pictures",)))
    asker = Asker(of, to)
    batch = training.packed(
        documents.batch_of(asker, np.random.default_rng(0), 1), to.model, training.budget_of(asker, 1)
    )
    state, step = TrainState.create(begun, tx), training.train_step(to.model, tx)
    for _ in range(2):  # the first has a rate of 0
        state, terms = step(state, batch)
    assert set(terms) == {*SHARES, *(["balance"] if kind == "qwen3_moe" else [])}
    assert all(bool(term.isfinite()) for term in terms.values())
    after = dict(leaves_with_paths(state.params))
    still = {path for path, leaf in leaves_with_paths(begun) if torch.equal(leaf, after[path])}
    stays = ("encoders.image.tower.", "decoders.image.tokenizer.")
    assert {path for path in after if path.startswith(stays)} <= still
    # an expert that gets no token does not move
    assert all(path.startswith(stays) or "moe" in path for path in still)


@pytest.mark.parametrize("kind", list(SHARES))
def test_a_model_that_knows_nothing_is_seldom_right(kind):
    to = compose("llama", Folders(), SMALL)
    params, asker = to.params(ftrain.key(0)), Asker(few()[1], to)
    assert 0 <= command.measured(params, asker, kind, 4, judge(), seed=0) <= 0.5


@pytest.mark.exhaustive
@pytest.mark.parametrize("kind", ["llama", "qwen3_moe"])
def test_it_trains_and_answers_are_judged(kind, tmp_path):
    options = command.Options(
        kind, steps=2, dozens=1, tokenizer_steps=2, held_out=6, json=tmp_path / "found.json", freeze=("sounds",)
    )
    rows = {row.name: row for row in command.run(options, few(), SMALL)}
    assert {f"{told}: {what}" for told in documents.TOLD.values() for what in ("wrong", "loss")} == set(rows)
    assert all(0 <= row.value <= 1 for name, row in rows.items() if name.endswith("wrong"))
    assert (tmp_path / "found.json").is_file()


def test_questions_are_what_they_say_and_held_out_pairs_are_apart():
    trained, held_out = few()
    assert not set(trained.pairs) & set(held_out.pairs)
    assert {n for pair in held_out.pairs for n in pair} <= {n for pair in trained.pairs for n in pair}
    to = compose("llama", Folders(), SMALL)
    asker, rng = Asker(held_out, to), np.random.default_rng(0)
    for number in range(3):
        one = asker.ask("image_to_text", number, rng)
        picture = next(part for part in one.whole if isinstance(part, Media))
        assert len(picture.features["pixels_NC"]) == 16 * len(one.words) == 16 * (number + 1)
        assert sorted(picture.order) == list(range(4 * len(one.words)))
    sound = next(part for part in asker.ask("audio_to_text", 0, rng).whole if isinstance(part, Media))
    assert sound.order.tolist() == [0, 1, 2, 3, -1]
    drawn = asker.ask("text_to_image", 0, rng)
    target = next(part for part in drawn.whole if isinstance(part, Target)).array
    places = np.flatnonzero((held_out.digits.images_NHWC[..., 0] == target).all((1, 2)))
    assert drawn.words == (WORDS[5 + held_out.digits.labels_N[places[0]]],)
    big = documents.enlarged(held_out.digits.images_NHWC[0], 16, 3)
    np.testing.assert_allclose(
        documents.shrunk(big.transpose(2, 0, 1)[None])[0], held_out.digits.images_NHWC[0], rtol=1e-6
    )


@pytest.mark.exhaustive
def test_a_mesh_of_parts_is_one_device():
    """Towers are divided by FSDP, experts over ranks, sequences too; all losses and gradients are the same."""
    to = compose("qwen3_moe", Folders(), SMALL)
    budget = training.budget_of(Asker(few()[0], to), 1)
    half = replace(budget, rows={"image": 256, "audio": 1000}, targets={"image": 4}, tokens=128)

    def loss(params, batch):
        terms = training.losses(params, batch, to.model)
        return ftrain.weighted_sum(terms, {"balance": 0.1}), terms

    @functools.cache
    def batch(packs):
        asked = documents.batch_of(Asker(few()[0], to), np.random.default_rng(0), 1)
        return training.packed(asked, to.model, half, packs=packs, parts=2)

    plan = layout(Mesh(shard=2, sequence=2, expert=2, kind="virtual"))
    value, gradients = mesh_models.compare(mesh_models.Model(omni.specs(to.model), loss, batch, {}), plan)
    assert value < 1e-6
    assert gradients < 1e-4


def test_what_is_not_understood_is_refused(tmp_path):
    to = compose("llama", Folders(), SMALL)
    with pytest.raises(ValueError, match="kind='text_to_film' is none of"):
        Asker(few()[0], to).ask("text_to_film", 0, np.random.default_rng(0))
    with pytest.raises(ValueError, match="'hello' is none of the words"):
        to.words.encode(["hello"])
    with pytest.raises(ValueError, match="a picture of 12 pixels a side"):
        documents.enlarged(np.zeros((8, 8, 1)), 12, 1)
    part_folders.foundation("llama", tmp_path, words=["?"])
    (tmp_path / "tokenizer.json").unlink()
    (tmp_path / "tokenizer_config.json").unlink()
    with pytest.raises(ValueError, match="holds no tokenizer that can be read"):
        compose("llama", Folders(foundation=tmp_path))
