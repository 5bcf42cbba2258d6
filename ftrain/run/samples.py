"""What a model answers to held-out prompts while it is trained: lines for a person, and a file of the run."""

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ftrain.kernels.documents import ids_of
from ftrain.modules.autoregression import generate
from ftrain.modules.spec import Tree
from ftrain.run.recipe import Recipe
from ftrain.step.state import TrainState

FILE = "samples.jsonl"


@dataclass(frozen=True)
class Samples:
    """Prompts that a model answers. `prompts`: token ids of each. `decode`: from ids to text. `stop`: ids that end an
    answer. `longest`: tokens of one.
    """

    prompts: tuple[tuple[int, ...], ...]
    decode: Callable[[Sequence[int]], str]
    stop: tuple[int, ...]
    longest: int = 48

    def of(self, recipe: Recipe, state: TrainState) -> list[tuple[str, str]]:
        """Each prompt with its answer, greedily. ValueError for a model that does not generate."""
        if recipe.model.family is None:
            raise ValueError(f"{recipe.model.name} does not generate: take --every.samples 0")
        with torch.no_grad():
            params: Tree = recipe.seen(state)
            prompts = [list(prompt) for prompt in self.prompts]
            found = generate(params, prompts, family=recipe.model.family, max_new=self.longest, stop=self.stop)
        return [(self.decode(prompt), self.decode(ids)) for prompt, ids in zip(self.prompts, found, strict=True)]


def prompts_of(batches: Sequence[Mapping[str, Any]], count: int) -> tuple[tuple[int, ...], ...]:
    """The beginnings of the first `count` documents of packs, up to where labels begin; those without are left out.

    >>> pack = {"tokens": torch.tensor([5, 6, 7, 8]), "segments": torch.tensor([0, 0, 0, 1])}
    >>> prompts_of([{**pack, "labels": torch.tensor([-100, 7, -100, -100])}], 2)
    ((5, 6),)
    """
    found: list[tuple[int, ...]] = []
    for batch in batches:
        ids = ids_of(batch["segments"])
        for document in torch.unique_consecutive(ids).tolist():
            places = (ids == document).nonzero().flatten()
            labelled = places[batch["labels"][places] != -100]
            if len(labelled) and int(labelled[0]) > int(places[0]):
                found.append(tuple(batch["tokens"][int(places[0]) : int(labelled[0]) + 1].tolist()))
            if len(found) == count:
                return tuple(found)
    return tuple(found)


def write(folder: Path, step: int, answered: Sequence[tuple[str, str]]) -> None:
    """Append prompts and answers to the run's file. OSError where the disk does not take them."""
    with (folder / FILE).open("a") as file:
        for prompt, answer in answered:
            file.write(json.dumps({"step": step, "prompt": prompt, "answer": answer}, ensure_ascii=False) + "\n")
