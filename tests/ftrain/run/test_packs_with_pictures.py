"""Chats with pictures in packs of a native model: packs side by side, on ranks or one, give the loss of each alone."""

from typing import NamedTuple

import numpy as np
import pytest
import torch

import ftrain
from ftrain.data.chat_template import load_tokenizer
from ftrain.data.documents import Group
from ftrain.data.encoding import ChatEncoder
from ftrain.data.media.families import family_of
from ftrain.data.media_finishing import ReadMedia
from ftrain.data.packing import Packing, Plan, Shape
from ftrain.data.sample import Chat, Message, Part, Place, say
from ftrain.run.media import layout_of
from ftrain.tasks.rows import TextRows
from tests.helpers.seeing_folders import write_pictures, write_qwen

pytest.importorskip("transformers", minversion="5.24")
pytest.importorskip("PIL")


@pytest.fixture(scope="module")
def parts(tmp_path_factory):
    """The model, how its documents are laid, and three of them: two with a picture each, one of text."""
    folder = write_qwen(tmp_path_factory.mktemp("model"))
    names = write_pictures(folder, [(40, 70), (33, 50)])
    tokenizer = load_tokenizer(folder)
    family = family_of(folder, tokenizer)
    rows, read, place = (
        TextRows(ChatEncoder(tokenizer, media=family)),
        ReadMedia(family),
        Place(str(folder / "chat.jsonl"), 1),
    )
    asked = [(Part("image", source=name), Part("text", f"what is {i}?")) for i, name in enumerate(names)]
    asked.append((Part("text", "and this?"),))
    chats = [Chat((Message("user", own), say("assistant", f"a cat{i}")), place=place) for i, own in enumerate(asked)]
    model = ftrain.hf.open(folder, task="image_text_to_text")
    return model, family, [read(rows(chat)) for chat in chats]


def laid(model, family, packs, *, room):
    """The batch of these packs of groups, of 128 tokens each, with room for so many places of pictures."""
    plan = Plan(np.zeros(3, np.int64), np.array([128]), np.ones(1), Shape(128, 1, (room, 0)))
    return layout_of(model, family).batch(packs, plan, slots=0, leaves=None)


def test_packs_side_by_side_give_the_loss_of_their_documents(parts):
    model, family, (one, other, text) = parts
    params = model.load()
    whole = laid(model, family, [[one, text], [other]], room=64)
    assert whole["media"]["pixels"].shape[0] == 2 * 4 * 64
    alone = [model.loss(params, laid(model, family, [[group]], room=64)) for group in (one, other, text)]
    found = model.loss(params, whole)
    torch.testing.assert_close(found.total, sum(mean.total for mean in alone))
    assert found.count == sum(mean.count for mean in alone)


def test_text_alone_has_the_leaves_of_pictures_too(parts):
    model, family, (one, _, text) = parts
    assert set(laid(model, family, [[text]], room=0)["media"]) == set(laid(model, family, [[one]], room=64)["media"])


def test_ranks_that_share_a_pack_encode_frames_of_their_own(parts):
    """In room that the plan of a step makes for them, whichever they are."""
    model, family, (one, other, text) = parts
    params, layout, groups = model.load(), layout_of(model, family, sequence=2), (one, other, text)
    packing = Packing(256)
    sizes = [layout.sizes(Held(group), packing) for group in groups]
    plan = layout.plan(sizes, np.ones(3), np.zeros(3, np.int64), packing)
    batch = layout.batch([groups], plan, slots=0, leaves=None)
    media, places = batch["media"], plan.shape.media[0]
    assert places % 2 == 0
    assert media["pixels"].shape[0] == 4 * places
    for index_n in media["index"].chunk(2):
        assert 0 < (index_n < 256).sum() < sum(sum(size.media) for size in sizes)
    whole = layout_of(model, family).batch([groups], plan, slots=0, leaves=None)
    torch.testing.assert_close(model.loss(params, batch), model.loss(params, whole))


class Held(NamedTuple):
    """A group that waits."""

    found: Group

    @property
    def lengths(self):
        return np.array([len(document) for document in self.found.documents])

    def group(self, tokens):
        return self.found
