"""Chats with recordings and pictures in packs of a native model: packs side by side give the loss of each alone."""

import numpy as np
import pytest
import torch

import ftrain
from ftrain.data.chat_template import load_tokenizer
from ftrain.data.encoding import ChatEncoder
from ftrain.data.media.families import family_of
from ftrain.data.media_finishing import ReadMedia
from ftrain.data.packing import Plan, Shape
from ftrain.data.sample import Chat, Message, Part, Place, say
from ftrain.run.media import layout_of
from ftrain.tasks.rows import TextRows
from tests.helpers.hearing_folders import write_sounds, write_thinker
from tests.helpers.seeing_folders import write_pictures

pytest.importorskip("transformers", minversion="5.24")
pytest.importorskip("soundfile")
pytest.importorskip("PIL")


@pytest.fixture(scope="module")
def parts(tmp_path_factory):
    """The model, how its documents are laid, and three of them: of a recording, of one and a picture, of text."""
    folder = write_thinker(tmp_path_factory.mktemp("model"))
    pictures, sounds = write_pictures(folder, [(40, 70)]), write_sounds(folder, [0.7, 1.3])
    tokenizer = load_tokenizer(folder)
    family = family_of(folder, tokenizer)
    rows, read = TextRows(ChatEncoder(tokenizer, media=family)), ReadMedia(family)
    place = Place(str(folder / "chat.jsonl"), 1)
    heard = [Part("audio", source=name) for name in sounds]
    asked = [(heard[0], Part("text", "?")), (Part("image", source=pictures[0]), Part("text", "and"), heard[1])]
    asked.append((Part("text", "and this?"),))
    chats = [Chat((Message("user", own), say("assistant", f"a cat{i}")), place=place) for i, own in enumerate(asked)]
    model = ftrain.hf.open(folder, task="image_text_to_text")
    return model, family, [read(rows(chat)) for chat in chats]


def laid(model, family, packs):
    """The batch of these packs of groups, of 192 tokens each, with room for some places of each kind of media."""
    plan = Plan(np.zeros(3, np.int64), np.array([192]), np.ones(1), Shape(192, 1, (48, 0, 48)))
    return layout_of(model, family).batch(packs, plan, slots=0, leaves=None)


def test_packs_side_by_side_give_the_loss_of_their_documents(parts):
    model, family, (one, other, text) = parts
    params = model.load()
    whole = laid(model, family, [[one, text], [other]])
    assert whole["media"]["pixels"].shape[0] == 2 * 4 * 48
    assert whole["audio"]["heard"].tolist() == [70, 0, 100, 30]
    alone = [model.loss(params, laid(model, family, [[group]])) for group in (one, other, text)]
    found = model.loss(params, whole)
    torch.testing.assert_close(found.total, sum(mean.total for mean in alone))
    assert found.count == sum(mean.count for mean in alone)


def test_all_batches_have_the_same_leaves_and_few_shapes(parts):
    model, family, (one, _, text) = parts
    made = [laid(model, family, [[group]])["audio"] for group in (text, one)]
    assert made[0].keys() == made[1].keys()
    assert [audio["mel"].shape[0] for audio in made] == [1, 1]
