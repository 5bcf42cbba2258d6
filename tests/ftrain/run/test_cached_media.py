"""Rows that frozen towers made of media once, in the place of the towers: the same loss, and the same gradients."""

import re

import numpy as np
import pytest
import torch

import ftrain
from ftrain import tree
from ftrain.cli.main import main
from ftrain.data.chat_template import load_tokenizer
from ftrain.data.encoding import ChatEncoder
from ftrain.data.media import ready_rows as leaves
from ftrain.data.media.families import family_of
from ftrain.data.media_finishing import ReadMedia
from ftrain.data.packing import Plan, Shape
from ftrain.data.sample import Chat, Message, Part, Place, say
from ftrain.run import media_rows
from ftrain.run.folder import read_metrics
from ftrain.run.media import layout_of
from ftrain.tasks.rows import TextRows
from tests.helpers.chat_folders import write_rows
from tests.helpers.film_files import write_film
from tests.helpers.hearing_folders import write_sounds, write_thinker
from tests.helpers.seeing_folders import seen_chats, write_pictures, write_qwen

pytest.importorskip("transformers", minversion="5.24")
pytest.importorskip("soundfile")
pytest.importorskip("av")
pytest.importorskip("PIL")
SEES, HEARS = ("qwen2_5_vl", "qwen3_vl"), ("qwen2_5_omni_thinker",)
"""A tower whose rows come in another order than tokens, one with deep layers, and one beside a tower of sound."""


class Case:
    """A model, how it reads media, and groups of documents of pictures, a film, sounds and text."""

    def __init__(self, folder, kind):
        (write_qwen if kind in SEES else write_thinker)(folder, kind)
        self.tokenizer, self.model = load_tokenizer(folder), ftrain.hf.open(folder, task="image_text_to_text")
        self.family, self.place = family_of(folder, self.tokenizer), Place(str(folder / "chat.jsonl"), 1)
        pictures, film = (
            write_pictures(folder, [(40, 70), (33, 50)]),
            write_film(folder / "film.mkv", frames=4, seconds=1.5),
        )
        media = [("image", pictures[0]), ("video", film), ("image", pictures[1])]
        media += [("audio", name) for name in (write_sounds(folder, [0.7]) if kind in HEARS else ())]
        own = [
            (Part(what, source=name, sound=what == "video" and kind in HEARS), Part("text", "?"))
            for what, name in media
        ]
        own += [(*own[0], *own[-1]), (Part("text", "and this?"),)]
        self.chats = [Chat((Message("user", parts), say("assistant", "a cat")), place=self.place) for parts in own]
        rows = TextRows(ChatEncoder(self.tokenizer, media=self.family))
        self.groups = [rows(chat) for chat in self.chats]

    def batch(self, family, *, packs=1, parts=1):
        """The batch of all groups in packs of 768 tokens."""
        ready = [ReadMedia(family)(group) for group in self.groups]
        held = [ready[i::packs] for i in range(packs)]
        room = (512, 256, 64)[: len(family.streams)]
        plan = Plan(np.zeros(len(ready), np.int64), np.full(packs, 768), np.ones(packs), Shape(768, 1, room))
        is_ready = isinstance(family, leaves.ReadyRows)
        layout = layout_of(self.model, family, sequence=parts, rows=is_ready)
        return layout.batch(held, plan, slots=0, leaves=None)


@pytest.mark.parametrize("kind", [*SEES, *HEARS])
def test_rows_give_the_loss_and_the_gradients_of_the_towers(tmp_path, kind):
    """In packs that ranks share; and packs of text have the leaves of others."""
    case = Case(tmp_path, kind)
    ready = media_rows.ready_rows(tmp_path / "kept", case.family, case.model)
    ready.cache.begin({"kind": kind})
    params = case.model.load()
    maker = media_rows._Maker(case.model, params, ready, torch.device("cpu"))
    pieces = {ready.key(*pair): pair for group in case.groups for doc in group.documents for pair in doc.parts}
    media_rows._write([(key, case.family.read(*pair)) for key, pair in pieces.items()], maker)
    ready.cache.look()
    assert len(ready.cache) == len(pieces)
    plain, kept = (case.batch(family, packs=2, parts=2) for family in (case.family, ready))
    assert set(kept["media"]) == {"rows", "index"}
    (loss, grads), (wanted, expected) = (of_text(case.model, params, batch) for batch in (kept, plain))
    torch.testing.assert_close(loss, wanted, rtol=1e-6, atol=0)
    torch.testing.assert_close(grads, expected, rtol=1e-4, atol=1e-6)
    case.groups = case.groups[-1:]
    assert set(case.batch(ready)["media"]) == {"rows", "index"}


def of_text(model, params, batch):
    """The loss, and the gradients of all but the towers."""
    held = {name: node for name, node in params.items() if name not in model.towers.paths}
    value, grads = ftrain.value_and_grad(lambda own, batch: model.loss({**params, **own}, batch))(held, batch)
    return value, tree.leaves(grads)


@pytest.fixture(scope="module")
def chats(tmp_path_factory):
    """Chats about six pictures, one of them twice."""
    folder = tmp_path_factory.mktemp("data")
    names = write_pictures(folder, [(32, 48) if i % 2 else (48, 32) for i in range(6)])
    return write_rows(folder / "chat.jsonl", seen_chats([*names, names[0]], plain=1))


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return write_qwen(tmp_path_factory.mktemp("model"), "qwen3_vl", layers=1)


def command(model, data, out, *more):
    return [
        "train", "sft", "--model", str(model), "--data", str(data), "--out", str(out), "--tokens", "128", "--packs",
        "2", "--epochs", "2", "--rate", "1e-2", "--warmup", "0", "--held-out", "0", "--every.samples", "0", *more,
    ]  # fmt: skip


def test_a_run_by_a_cache_is_the_run_without_it(model, chats, tmp_path, capsys):
    """Whose towers are run for each picture once; what is trained, or another tower or size, is refused by name."""
    out, kept, frozen = tmp_path, ("--cache-media", str(tmp_path / "kept")), ("--freeze", "vision")
    assert main(command(model, chats, out / "plain", *frozen)) == 0
    assert main(command(model, chats, out / "made", *frozen, *kept)) == 0
    assert "media: 0 pieces were in" in (said := capsys.readouterr().out)
    assert "6 more were made" in said
    told = [list(read_metrics(out / name)) for name in ("plain", "made")]
    for name in ("loss", "grad_norm"):
        plain, made = ([row[name] for row in rows if name in row] for rows in told)
        assert made == pytest.approx(plain, rel=1e-5)
    other = write_qwen(tmp_path / "other", "qwen3_vl", layers=1, seed=1)
    for words, message in (
        ((), "the run trains vision.deep.0.b_out_V, of a tower .*: --freeze vision"),
        (("--lora.rank", "2"), "of a tower whose rows would change: choose --lora.targets without it"),
        ((*frozen, "--image-pixels", "1024"), "was made with pictures = .*4096.*, and these options say .*1024"),
        (
            (*frozen, "--model", str(other)),
            "was made with towers = that of .*model.*, and these options say that of .*other",
        ),
        ((*frozen, "--native", "never"), "has no towers that are computed apart from it"),
    ):
        assert main(command(model, chats, out / "refused", *kept, *words)) == 2
        assert re.search(message, capsys.readouterr().err)
        assert not (out / "refused").exists()
