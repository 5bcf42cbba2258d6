"""Train an agent on trajectories of screenshots and actions, and let it act in desktops with tasks it has never seen.

python -m experiments.agent [--out FOLDER] [--json FILE] [--small]

The training is one command, `ftrain train sft`, on chats: first on pages, of which it says where each icon is, then on
trajectories (UI-TARS learns in this order, Qin et al. 2025, arXiv 2501.12326). Then the agent's actions are executed.
"""

import sys
from collections import Counter
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import tyro
from rich.console import Console
from rich.table import Table

from experiments.agent import folder, trajectories
from experiments.agent.desk import Action, Desk, make
from experiments.bench.machine import Machine
from ftrain.cli.generate import stop_ids
from ftrain.cli.main import main as ftrain_command
from ftrain.cli.opened import open_with_adapter
from ftrain.data.chat_template import load_tokenizer
from ftrain.data.documents import Document, Group
from ftrain.data.encoding import ChatEncoder
from ftrain.data.media.families import family_of
from ftrain.data.media_finishing import ReadMedia
from ftrain.modules.autoregression import Family, generate
from ftrain.run.folder import read_metrics, write_json
from ftrain.run.media import layout_of
from ftrain.run.media_answers import family_of_documents

_LONGEST = 16  # tokens of an action
_MOST = 6  # actions of an episode


@dataclass(frozen=True)
class Options:
    """What can be chosen."""

    out: Path = Path("runs/agent")
    """Folder of the model, the data, and the run; a run in it is not done again."""
    json: Path | None = None
    """Where figures are written."""
    small: bool = False
    """A few trajectories and steps, to see that all runs."""
    pages: int = 12000
    """That are described."""
    trajectories: int = 4000
    """To train on."""
    page_steps: int = 2000
    """Steps of two packs of 1024 tokens on pages."""
    steps: int = 400
    """Steps of two packs of 1024 tokens on trajectories."""
    episodes: int = 100
    """Held-out tasks that the agent acts in."""
    page_rate: float = 5e-3
    """Learning rate on pages."""
    rate: float = 2e-3
    """Learning rate on trajectories."""
    threads: int = 1
    """CPU threads of each op; ops are small, and threads of several processes on the same cores wait for each other."""
    seed: int = 0
    """Of weights, tasks and order."""


@dataclass(frozen=True)
class Agent:
    """A trained model that answers chats with screenshots: an encoder of chats, parameters, and how they go on."""

    encode: ChatEncoder
    read: ReadMedia
    params: Any
    family: Family
    stop: list[int]

    @staticmethod
    def of(model: Path) -> "Agent":
        """The model of a folder. ValueError for one that does not see."""
        tokenizer = load_tokenizer(model)
        media = family_of(model, tokenizer)
        opened = open_with_adapter(model, None)
        family = family_of_documents(opened.model, layout_of(opened.model, media))
        if media is None or family is None:
            raise ValueError(f"{model}: {opened.model.name} does not answer to pictures")
        encode = ChatEncoder(tokenizer, media=media)
        return Agent(encode, ReadMedia(media), opened.params, family, stop_ids(model, tokenizer))

    def says(self, desks: list[Desk], screens: list[list[np.ndarray]], said: list[list[str]]) -> list[str]:
        """What it says next in each of several trajectories."""
        asked: list[Document] = []
        for desk, seen, texts in zip(desks, screens, said, strict=True):
            group = Group((self.encode.ask(trajectories.chat(str(desk.task), seen, texts)).document(),))
            asked.append(self.read(group).documents[0])
        made = generate(self.params, asked, family=self.family, max_new=_LONGEST, stop=self.stop)
        return [self.encode.tokenizer.decode(ids, skip_special_tokens=True).strip() for ids in made]


def main(options: Options) -> dict[str, Any]:
    """Write the data, train, act, tell."""
    torch.set_num_threads(options.threads)
    console = Console(width=110)
    data, model, seed = options.out / "data", options.out / "model", options.seed
    count, episodes = (32, 4) if options.small else (options.trajectories, options.episodes)
    described = count if options.small else options.pages
    page_steps, steps = (2, 2) if options.small else (options.page_steps, options.steps)
    files = trajectories.write(data, pages=described, trajectories=count, held_out=max(8, count // 40), seed=seed)
    if not (model / "config.json").is_file():
        folder.write(model, words(200, seed), seed=seed)
    pages, run = options.out / "pages", options.out / "run"
    train(model, pages, ["--data", str(files.pages)], steps=page_steps, rate=options.page_rate, seed=seed)
    acts = ["--data", str(files.train), "--held-out-data", str(files.held_out)]
    train(pages / "model", run, acts, steps=steps, rate=options.rate, seed=seed)
    rng = np.random.default_rng([options.seed, 2])
    found = act(Agent.of(run / "model"), [make(rng, held_out=True) for _ in range(episodes)])
    table(found, console)
    result = {**asdict(Machine.here()), "seed": seed, "pages": described, "trajectories": count,
              "page_steps": page_steps, "steps": steps,
              "held_out_loss_of_pages": curve(pages), "held_out_loss": curve(run), "acting": found}  # fmt: skip
    if options.json is not None:
        write_json(options.json, result)
    return result


def train(model: Path, out: Path, data: list[str], *, steps: int, rate: float, seed: int) -> None:
    """Train a folder's model on data files by `ftrain train sft`; the trained model is `out`/model."""
    code = ftrain_command(
        [
            "train", "sft", "--model", str(model), *data, "--out", str(out), "--tokens", "1024", "--packs", "2",
            "--steps", str(steps), "--rate", str(rate), "--every.evaluate", "100", "--every.samples", "0",
            "--seed", str(seed),
        ]
    )  # fmt: skip
    if code:
        raise ValueError(f"the training in {out} ended with code {code}")


def curve(run: Path) -> list[dict[str, float]]:
    """The held-out loss of a run in nats a token, by steps."""
    return [{"step": row["step"], "loss": row["held_out"]} for row in read_metrics(run) if "held_out" in row]


def words(count: int, seed: int) -> list[str]:
    """What is said in so many trajectories, for the tokenizer."""
    rng, texts = np.random.default_rng([seed, 3]), [trajectories.WHERE] * count
    for _ in range(count):
        desk = make(rng, held_out=False)
        texts.append(str(desk.task))
        while not desk.finished:
            texts.append(trajectories.thought(desk, desk.right_action()))
            desk = desk.after(desk.right_action())
    return texts


def act(agent: Agent, desks: list[Desk]) -> dict[str, Any]:
    """Let the agent act in each desktop until it says that it has finished, or for `_MOST` actions.

    `success`: the share of tasks that are done; `opened`, `typed`, `sent`: of those whose part is right; `random`: the
    share that an agent would do that clicks on icons at random.
    """
    screens, said = [[np.asarray(desk.screenshot())] for desk in desks], [list[str]() for _ in desks]
    no_action = 0
    for _ in range(_MOST):
        open_ = [i for i, desk in enumerate(desks) if not desk.finished]
        if not open_:
            break
        texts = agent.says([desks[i] for i in open_], [screens[i] for i in open_], [said[i] for i in open_])
        for i, text in zip(open_, texts, strict=True):
            try:
                desks[i] = desks[i].after(trajectories.action_of(text))
            except ValueError:
                no_action += 1
                desks[i] = desks[i].after(Action("finish"))
            said[i].append(text)
            screens[i].append(np.asarray(desks[i].screenshot()))
    parts = {
        "opened": [desk.opened == desk.task.opens for desk in desks],
        "typed": [desk.typed == desk.task.word for desk in desks],
        "sent": [desk.sent == desk.task.sends for desk in desks],
    }
    return {
        "episodes": len(desks),
        "success": float(np.mean([desk.success for desk in desks])),
        **{name: float(np.mean(right)) for name, right in parts.items()},
        "random": float(np.mean([1 / len(desk.home) / len(desk.form) for desk in desks])),
        "no_action": no_action,
        "actions": dict(Counter(len(desk.done) for desk in desks)),
    }


def table(found: dict[str, Any], console: Console) -> None:
    """What was measured."""
    shown = Table(title=f"{found['episodes']} tasks with pairs of icons that no training trajectory has")
    shown.add_column("")
    shown.add_column("share", justify="right")
    for name, title in (("opened", "opened the right form"), ("typed", "typed the word"),
                        ("sent", "sent by the right icon"), ("success", "done, and said so"),
                        ("random", "done by clicking on icons at random")):  # fmt: skip
        shown.add_row(title, f"{found[name]:.1%}")
    console.print(shown)


if __name__ == "__main__":
    try:
        main(tyro.cli(Options))
    except ValueError as error:
        sys.exit(f"agent: {error}")
