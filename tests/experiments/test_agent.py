"""The agent's desktop, its trajectories as chats of which actions are learned, and a run of the whole."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image

import ftrain
from experiments.agent import __main__ as command
from experiments.agent import desk, folder, trajectories
from experiments.agent.desk import Action
from ftrain.data.chat_template import load_tokenizer
from ftrain.data.encoding import ChatEncoder
from ftrain.data.media.families import family_of
from ftrain.data.media_finishing import ReadMedia
from ftrain.data.packing import Plan, Shape
from ftrain.data.samples import open_samples
from ftrain.run.media import layout_of
from ftrain.tasks.rows import TextRows


def played(at: desk.Desk) -> desk.Desk:
    while not at.finished:
        at = at.after(at.right_action())
    return at


def test_who_knows_succeeds_and_a_wrong_click_does_not() -> None:
    rng = np.random.default_rng(0)
    for held_out in (False, True):
        start = desk.make(rng, held_out=held_out)
        end = played(start)
        assert end.success
        assert [action.kind for action in end.done] == ["click", "type", "click", "finish"]
        other = next(icon for icon in start.home if icon[0] != start.task.opens)
        assert not played(start.after(Action("click", other[1], other[2]))).success
        assert not start.after(Action("finish")).success


def test_an_action_changes_what_is_seen_and_a_click_on_nothing_does_not() -> None:
    at = desk.make(np.random.default_rng(1), held_out=False)
    taken = {(row, column) for _, row, column in at.home}
    free = next((r, c) for r in range(desk.GRID) for c in range(desk.GRID) if (r, c) not in taken)
    assert at.after(Action("click", *free)).screenshot().tobytes() == at.screenshot().tobytes()
    seen = [at.screenshot().tobytes()]
    while not at.finished:
        at = at.after(at.right_action())
        seen.append(at.screenshot().tobytes())
    assert len(set(seen)) == 4  # home, form, form with a word, sent; finishing shows nothing new


def test_no_pair_of_icons_is_on_both_sides() -> None:
    sides = []
    for held_out in (False, True):
        rng = np.random.default_rng(2)
        tasks = [desk.make(rng, held_out=held_out).task for _ in range(400)]
        sides.append({(task.opens, task.sends) for task in tasks})
    assert not sides[0] & sides[1]
    assert {opens for opens, _ in sides[1]} <= {opens for opens, _ in sides[0]}


def test_actions_are_read_as_they_are_written() -> None:
    for action in (Action("click", 1, 3), Action("type", text="moon"), Action("finish")):
        assert desk.parse(str(action)) == action
    assert trajectories.action_of("red circle: click(1,3)") == Action("click", 1, 3)
    for text in ("click(1)", "click(a,b)", "type()", "finish(1)", "moon", "click(1,3) and so on"):
        with pytest.raises(ValueError, match="is no action"):
            desk.parse(text)


def test_a_page_is_described_as_it_is_drawn(tmp_path) -> None:
    for line in trajectories.write(tmp_path, pages=4, trajectories=0, held_out=0).pages.read_text().splitlines():
        asked, answer = json.loads(line)["messages"]
        picture = Image.open(tmp_path / asked["content"][1]["image"])
        for said in answer["content"].split("\n"):
            action, middle = trajectories.action_of(said), desk.CELL // 2 - 1
            seen = picture.getpixel((action.column * desk.CELL + middle, action.row * desk.CELL + middle))
            assert seen == desk.COLOURS[said.split()[0]]


def test_only_actions_are_learned_of_a_trajectory_of_screenshots(tmp_path) -> None:
    train = trajectories.write(tmp_path / "data", pages=0, trajectories=2, held_out=1).train
    model = folder.write(tmp_path / "model", command.words(20, 0))
    tokenizer = load_tokenizer(model)
    encode = ChatEncoder(tokenizer, media=family_of(model, tokenizer))
    document = encode.encode(open_samples(str(train))[0]).document()
    said = [m["content"] for m in json.loads(train.read_text().splitlines()[0])["messages"] if m["role"] == "assistant"]
    # a label is the token after its place: what is learned is what the agent says, and where it ends
    learned = tokenizer.decode(document.labels[document.labels != -100].tolist())
    assert learned == "".join(text + "<|im_end|>" for text in said)
    pictures = document.tokens == tokenizer.convert_tokens_to_ids("<|image_pad|>")
    assert pictures.sum() == 4 * desk.GRID**2  # four screenshots, a token for each cell


def test_thirty_screenshots_share_a_pack_and_have_the_loss_of_transformers(tmp_path) -> None:
    """Clicks on nothing, which are read and not learned, then what is right; beside a short trajectory."""
    transformers = pytest.importorskip("transformers", minversion="5.24")
    model = folder.write(tmp_path, command.words(20, 0))
    tokenizer = load_tokenizer(model)
    family = family_of(model, tokenizer)
    long, short = (lost(desk.make(np.random.default_rng(i), held_out=False), n) for i, n in ((3, 26), (4, 0)))
    rows, read = TextRows(ChatEncoder(tokenizer, media=family)), ReadMedia(family)
    groups = [read(rows(chat)) for _, chat in (long, short)]
    net = ftrain.hf.open(model, task="image_text_to_text")
    tokens = 2048
    shape = Shape(tokens, 1, (34 * desk.GRID**2, 0))
    plan = Plan(np.zeros(2, np.int64), np.array([tokens]), np.ones(1), shape)
    found = net.loss(net.load(), layout_of(net, family).batch([groups], plan, slots=0, leaves=None))

    theirs = transformers.AutoModelForImageTextToText.from_pretrained(model).double()
    looked = transformers.AutoImageProcessor.from_pretrained(model)
    image, total, count = tokenizer.convert_tokens_to_ids("<|image_pad|>"), 0.0, 0
    for (screens, _), group in zip((long, short), groups, strict=True):
        tokens_T, labels_T = (torch.from_numpy(leaf) for leaf in (group.documents[0].tokens, group.documents[0].labels))
        pictures = looked(images=screens, return_tensors="pt")
        pictures["pixel_values"] = pictures["pixel_values"].double()
        with torch.no_grad():
            seen = theirs(
                input_ids=tokens_T[None], mm_token_type_ids=(tokens_T == image).int()[None], use_cache=False, **pictures
            )
        total += torch.nn.functional.cross_entropy(seen.logits[0], labels_T, reduction="sum").item()
        count += int((labels_T != -100).sum())
    assert len(long[0]) == 30
    assert len(groups[0].documents[0].tokens) > 30 * desk.GRID**2
    assert found.count.item() == count
    assert found.total.item() == pytest.approx(total, rel=1e-5)


def lost(at: desk.Desk, misses: int):
    """The screenshots and the chat of one who clicks on nothing so often, without learning it, and then knows."""
    taken = {(row, column) for _, row, column in at.home}
    nothing = next(Action("click", r, c) for r in range(desk.GRID) for c in range(desk.GRID) if (r, c) not in taken)
    screens, said, start = [], [], at
    while not at.finished:
        action = nothing if len(said) < misses else at.right_action()
        screens.append(np.asarray(at.screenshot()))
        said.append(str(action))
        at = at.after(action)
    chat = trajectories.chat(str(start.task), screens, said)
    spoken = [i for i, message in enumerate(chat.messages) if message.role == "assistant"]
    old = set(spoken[:misses])
    messages = tuple(replace(m, train=False) if i in old else m for i, m in enumerate(chat.messages))
    return screens, replace(chat, messages=messages)
