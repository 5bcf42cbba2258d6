"""The agent's desktop, its trajectories as chats of which actions are learned, and a run of the whole."""

import json

import numpy as np
import pytest

from experiments.agent import __main__ as command
from experiments.agent import desk, folder, trajectories
from experiments.agent.desk import Action
from ftrain.data.chat_template import load_tokenizer
from ftrain.data.encoding import ChatEncoder
from ftrain.data.media.families import family_of
from ftrain.data.samples import open_samples


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


def test_only_actions_are_learned_of_a_trajectory_of_screenshots(tmp_path) -> None:
    train, _ = trajectories.write(tmp_path / "data", trajectories=2, held_out=1)
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
