"""Trajectories as rows of a data file: a conversation of screenshots and actions, of which the actions are learned.

The first message holds the task and the first screenshot, each tool message the screenshot after an action; so a
trajectory is one document with its whole history. An action says first what it is for, as in UI-TARS (Qin et al. 2025,
arXiv 2501.12326): `red circle: click(1,3)`.
"""

import json
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from experiments.agent.desk import ICONS, Action, Desk, make, parse
from ftrain.data.sample import Chat, Message, Part, Place

WHERE = "where is what"
"""What is asked of a page that is to be described."""


def thought(desk: Desk, action: Action) -> str:
    """What the agent says: what the action is for, and the action."""
    if action.kind == "click":
        wanted = desk.task.opens if desk.opened is None else desk.task.sends
        return f"{wanted.name}: {action}"
    return str(action)


def action_of(text: str) -> Action:
    """The action that an agent's words end with. ValueError where they end with none."""
    return parse(text.rpartition(": ")[2])


class Files(NamedTuple):
    """Data files: descriptions of pages, trajectories to train on, and those that are held out."""

    pages: Path
    train: Path
    held_out: Path


def write(folder: Path, *, pages: int, trajectories: int, held_out: int, seed: int = 0) -> Files:
    """Write the data files, with so many rows each, and their screenshots as PNG files below `screens/`.

    Pages of training have one icon or more: where an icon is can be learned of a page that has no other, and which one
    is meant of those that have more.
    """
    (folder / "screens").mkdir(parents=True, exist_ok=True)
    files = Files(*(folder / f"{name}.jsonl" for name in Files._fields))
    draws = [np.random.default_rng([seed, stream]) for stream in (4, 0, 1)]
    rows = (
        [_described(draws[0], folder, f"page-{i}") for i in range(pages)],
        [
            _row(make(draws[1], held_out=False, icons=int(draws[1].integers(1, ICONS + 1))), folder, f"train-{i}")
            for i in range(trajectories)
        ],
        [_row(make(draws[2], held_out=True), folder, f"held_out-{i}") for i in range(held_out)],
    )
    for file, own in zip(files, rows, strict=True):
        file.write_text("".join(json.dumps(row) + "\n" for row in own))
    return files


def _described(rng: np.random.Generator, folder: Path, name: str) -> dict[str, Any]:
    """A page, and where each of its icons is, in any order and in the words of actions, as UI-TARS has it too."""
    desk = make(rng, held_out=False, icons=int(rng.integers(1, 2 * ICONS)))
    if rng.integers(2):
        desk = desk.after(desk.right_action())
    file = f"screens/{name}.png"
    desk.screenshot().save(folder / file)
    found = [f"{icon.name}: {Action('click', row, column)}" for icon, row, column in desk.page]
    said = "\n".join(found[int(i)] for i in rng.permutation(len(found)))
    asked = [{"type": "text", "text": WHERE}, {"type": "image", "image": file}]
    return {"messages": [{"role": "user", "content": asked}, {"role": "assistant", "content": said}]}


def _row(desk: Desk, folder: Path, name: str) -> dict[str, Any]:
    """The trajectory of one who knows."""
    messages: list[dict[str, Any]] = []
    while not desk.finished:
        file = f"screens/{name}-{len(messages) // 2}.png"
        desk.screenshot().save(folder / file)
        shown = [{"type": "image", "image": file}]
        messages.append(
            {"role": "tool", "content": shown}
            if messages
            else {"role": "user", "content": [{"type": "text", "text": str(desk.task)}, *shown]}
        )
        action = desk.right_action()
        messages.append({"role": "assistant", "content": thought(desk, action)})
        desk = desk.after(action)
    return {"messages": messages}


def chat(task: str, screens: list[np.ndarray], said: list[str]) -> Chat:
    """A trajectory so far, up to where the agent speaks: one more screenshot (`[H, W, 3]`, uint8) than it has said."""
    messages = []
    for i, screen in enumerate(screens):
        seen = Part("image", source=screen)
        messages.append(Message("tool", (seen,)) if i else Message("user", (Part("text", task), seen)))
        messages += [Message("assistant", (Part("text", text),)) for text in said[i : i + 1]]
    return Chat(tuple(messages), place=Place("desk", 1))
