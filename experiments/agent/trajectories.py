"""Trajectories as rows of a data file: a conversation of screenshots and actions, of which the actions are learned.

The first message holds the task and the first screenshot, each tool message the screenshot after an action; so a
trajectory is one document with its whole history. An action says first what it is for, as in UI-TARS (Qin et al. 2025,
arXiv 2501.12326): `red circle: click(1,3)`.
"""

import json
from pathlib import Path
from typing import Any

import numpy as np

from experiments.agent.desk import Action, Desk, make, parse
from ftrain.data.sample import Chat, Message, Part, Place


def thought(desk: Desk, action: Action) -> str:
    """What the agent says: what the action is for, and the action."""
    if action.kind == "click":
        wanted = desk.task.opens if desk.opened is None else desk.task.sends
        return f"{wanted.name}: {action}"
    return str(action)


def action_of(text: str) -> Action:
    """The action that an agent's words end with. ValueError where they end with none."""
    return parse(text.rpartition(": ")[2])


def write(folder: Path, *, trajectories: int, held_out: int, seed: int = 0) -> tuple[Path, Path]:
    """Write `train.jsonl` and `held_out.jsonl`, and their screenshots as PNG files below `screens/`."""
    (folder / "screens").mkdir(parents=True, exist_ok=True)
    files = []
    for name, count in (("train", trajectories), ("held_out", held_out)):
        rng = np.random.default_rng([seed, name == "held_out"])
        rows = [_row(make(rng, held_out=name == "held_out"), folder, f"{name}-{i}") for i in range(count)]
        files.append(folder / f"{name}.jsonl")
        files[-1].write_text("".join(json.dumps(row) + "\n" for row in rows))
    return files[0], files[1]


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
