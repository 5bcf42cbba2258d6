"""How well a model does on examples that it was never trained on: it answers by itself, and answers are right or wrong.

Legend: N images, H rows, W columns, C channels.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from rich.table import Table

import ftrain
from experiments.omni.figures import Answer
from experiments.omni.judge import Judge
from experiments.omni.language import EOS
from experiments.omni.sources import HELD_OUT, Sources
from experiments.omni.tasks import Example, sample
from ftrain.modules.generation import generate_codes, generate_text
from ftrain.modules.omni import OmniModel

GOALS = {
    "image_to_text": 0.95,
    "audio_to_text": 0.95,
    "video_to_text": 0.95,
    "text_to_image": 0.90,
    "audio_to_image": 0.90,
}
_LONGEST_ANSWER = 3  # two words and the end mark


@dataclass(frozen=True)
class Evaluator:
    """Asks `count` held-out examples of each task, `at_once` of them in one pack; drawings are sampled, not greedy."""

    model: OmniModel
    sources: Sources
    judge: Judge
    seed: int
    count: int = 240
    at_once: int = 60
    temperature: float = 0.3

    def answers(self, task: str, params: Any, balance: Any, *, tick: Callable[[], None] = lambda: None) -> list[Answer]:
        """The model's answers to the held-out examples of a task; `tick` is called after each pack."""
        examples = [sample(task, i, sources=self.sources, seed=self.seed, split=HELD_OUT) for i in range(self.count)]
        answers: list[Answer] = []
        for number, part in enumerate(_parts(examples, self.at_once)):
            if task.endswith("_to_image"):
                answers += self._draw(part, params, balance, number)
            else:
                answers += self._say(part, params, balance)
            tick()
        return answers

    def _say(self, examples: Sequence[Example], params: Any, balance: Any) -> list[Answer]:
        words = self.sources.words
        prompts = [e.prompt for e in examples]
        said = generate_text(
            params, prompts, model=self.model, max_new=_LONGEST_ANSWER, stop=words.id(EOS), balance=balance
        )
        return [Answer(e, words=words.decode(ids)) for e, ids in zip(examples, said, strict=True)]

    def _draw(self, examples: Sequence[Example], params: Any, balance: Any, number: int) -> list[Answer]:
        device = params["foundation"]["embedding"]["table_VD"].device
        key = ftrain.fold_in(ftrain.key(self.seed).to(device), 7_000_000 + number)
        codes_BN = generate_codes(
            params,
            [e.prompt for e in examples],
            model=self.model,
            decoder="image",
            key=key,
            temperature=self.temperature,
            balance=balance,
        )
        with torch.no_grad():
            images = self.model.decoder("image").lm_generate(params["decoders"]["image"], codes_BN)
        images_NHWC = images.permute(0, 2, 3, 1).float().cpu().numpy()
        seen_N = self.judge.recognise(images_NHWC)
        return [
            Answer(e, image_HWC=image, recognised=int(digit))
            for e, image, digit in zip(examples, images_NHWC, seen_N, strict=True)
        ]


def accuracy(answers: Sequence[Answer]) -> float:
    """The share of right answers."""
    return float(np.mean([a.right for a in answers]))


def novel_accuracy(answers: Sequence[Answer]) -> float | None:
    """The share of right answers among combinations that training leaves out; None if there are none."""
    novel = [a for a in answers if a.example.novel]
    return accuracy(novel) if novel else None


def summary(answers: Mapping[str, Sequence[Answer]], judge: Judge) -> dict[str, Any]:
    """The final table: accuracy per task, on novel combinations, counts, goals, and the judge's own accuracy."""
    novel = {task: novel_accuracy(given) for task, given in answers.items()}
    return {
        "held_out": {task: accuracy(given) for task, given in answers.items()},
        "novel": {task: value for task, value in novel.items() if value is not None},
        "examples": {task: len(given) for task, given in answers.items()},
        "goals": {task: goal for task, goal in GOALS.items() if task in answers},
        "judge_held_out_accuracy": judge.held_out_accuracy,
    }


def _parts(examples: list[Example], size: int) -> Iterator[list[Example]]:
    for start in range(0, len(examples), size):
        yield examples[start : start + size]


def accuracy_table(
    held_out: Mapping[str, float], *, counts: Mapping[str, int], goals: Mapping[str, float], title: str = "held out"
) -> Table:
    """The final table: each task's accuracy, of how many examples, and whether its goal, if it has one, is met."""
    table = Table(title=title)
    for name, justify in (("task", "left"), ("accuracy", "right"), ("examples", "right"), ("goal", "right")):
        table.add_column(name, justify=justify)  # type: ignore[arg-type]
    for task, accuracy in held_out.items():
        goal = goals.get(task)
        met = "" if goal is None else f">= {goal:.0%} " + ("met" if accuracy >= goal else "missed")
        table.add_row(task, f"{accuracy:.1%}", f"{counts[task]:,}", met)
    return table
