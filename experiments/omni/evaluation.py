"""How well a model does on examples that it was never trained on: it answers by itself, and answers are right or wrong.

Legend: N images or sounds, H rows, W columns, C channels, F mel frames, M mel bands.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from rich.table import Table

import ftrain
from experiments.omni import vocoder
from experiments.omni.figures import Answer
from experiments.omni.judge import Judge
from experiments.omni.language import EOS
from experiments.omni.listener import Listener
from experiments.omni.sources import HELD_OUT, Sources
from experiments.omni.tasks import LONGEST_ANSWER, Example, sample
from experiments.omni.training import made_by
from ftrain.modules.generation import generate_codes, generate_text
from ftrain.modules.omni import OmniModel

GOALS = {
    "image_to_text": 0.95,
    "audio_to_text": 0.95,
    "video_to_text": 0.95,
    "text_to_image": 0.90,
    "audio_to_image": 0.90,
    "text_to_audio": 0.90,
}
NOVEL_GOALS = {"arithmetic": 0.50}
"""Of combinations that training leaves out."""


@dataclass(frozen=True)
class Evaluator:
    """Asks `count` held-out examples of each task, `at_once` of them in one pack; drawings are sampled at
    `temperature`; words and sounds are greedy. `listener` judges sounds, of which there are none without it.
    """

    model: OmniModel
    sources: Sources
    judge: Judge
    listener: Listener | None
    seed: int
    count: int = 240
    at_once: int = 60
    temperature: float = 0.3

    def answers(self, task: str, params: Any, balance: Any, *, tick: Callable[[], None] = lambda: None) -> list[Answer]:
        """The model's answers to the held-out examples of a task; `tick` is called after each pack."""
        examples = [sample(task, i, sources=self.sources, seed=self.seed, split=HELD_OUT) for i in range(self.count)]
        answers: list[Answer] = []
        for number, part in enumerate(_parts(examples, self.at_once)):
            made = made_by(task)
            if made == "image":
                answers += self._draw(part, params, balance, number)
            elif made == "audio":
                answers += self._speak(part, params, balance, number)
            else:
                answers += self._write(part, params, balance)
            tick()
        return answers

    def _write(self, examples: Sequence[Example], params: Any, balance: Any) -> list[Answer]:
        words = self.sources.words
        prompts = [e.prompt for e in examples]
        said = generate_text(
            params, prompts, model=self.model, max_new=LONGEST_ANSWER, stop=words.id(EOS), balance=balance
        )
        return [Answer(e, words=words.decode(ids)) for e, ids in zip(examples, said, strict=True)]

    def _draw(self, examples: Sequence[Example], params: Any, balance: Any, number: int) -> list[Answer]:
        images_NHWC = self._make("image", examples, params, balance, self.temperature, number).transpose(0, 2, 3, 1)
        seen_N = self.judge.recognise(images_NHWC)
        return [
            Answer(e, image_HWC=image, recognised=int(digit))
            for e, image, digit in zip(examples, images_NHWC, seen_N, strict=True)
        ]

    def _speak(self, examples: Sequence[Example], params: Any, balance: Any, number: int) -> list[Answer]:
        """What is judged is the wave, as a person hears it."""
        if self.listener is None:
            raise ValueError("sounds are judged by a listener, and without speech there is none")
        mels_NFM = self._make("audio", examples, params, balance, 0.0, number)
        waves_NS = vocoder.waves(mels_NFM, cfg=self.listener.cfg)
        heard_N = self.listener.recognise(waves_NS)
        return [
            Answer(e, mel_FM=mel, wave_S=wave, recognised=int(word))
            for e, mel, wave, word in zip(examples, mels_NFM, waves_NS, heard_N, strict=True)
        ]

    def _make(
        self, decoder: str, examples: Sequence[Example], params: Any, balance: Any, temperature: float, number: int
    ) -> np.ndarray:
        """What a decoder makes after each prompt of pack `number`, float32 `[N, ...]`."""
        device = params["foundation"]["embedding"]["table_VD"].device
        codes_BN = generate_codes(
            params,
            [e.prompt for e in examples],
            model=self.model,
            decoder=decoder,
            key=ftrain.fold_in(ftrain.key(self.seed).to(device), 7_000_000 + number),
            temperature=temperature,
            balance=balance,
        )
        with torch.no_grad():
            made = self.model.decoder(decoder).lm_generate(params["decoders"][decoder], codes_BN)
        return made.float().cpu().numpy()


def accuracy(answers: Sequence[Answer]) -> float:
    """The share of right answers."""
    return float(np.mean([a.right for a in answers]))


def novel_accuracy(answers: Sequence[Answer]) -> float | None:
    """The share of right answers among combinations that training leaves out; None if there are none."""
    novel = [a for a in answers if a.example.novel]
    return accuracy(novel) if novel else None


def summary(answers: Mapping[str, Sequence[Answer]], judge: Judge, listener: Listener | None = None) -> dict[str, Any]:
    """The final table: accuracy per task, on novel combinations, counts, goals, and the judges' own accuracy."""
    novel = {task: novel_accuracy(given) for task, given in answers.items()}
    return {
        "held_out": {task: accuracy(given) for task, given in answers.items()},
        "novel": {task: value for task, value in novel.items() if value is not None},
        "examples": {task: len(given) for task, given in answers.items()},
        "novel_examples": {task: sum(a.example.novel for a in given) for task, given in answers.items()},
        "goals": {task: goal for task, goal in GOALS.items() if task in answers},
        "novel_goals": {task: goal for task, goal in NOVEL_GOALS.items() if novel.get(task) is not None},
        "judge_held_out_accuracy": judge.held_out_accuracy,
        "listener_held_out_accuracy": None if listener is None else listener.held_out_accuracy,
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
