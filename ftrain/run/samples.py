"""What a model answers to held-out prompts while it is trained: lines for a person, and a file of the run."""

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ftrain.data.documents import IGNORE, Document
from ftrain.modules.autoregression import Family, generate
from ftrain.modules.spec import Tree
from ftrain.run.data import HeldOut
from ftrain.run.recipe import Recipe
from ftrain.step.state import TrainState
from ftrain.tasks.document_sums import document_ids

FILE = "samples.jsonl"


@dataclass(frozen=True)
class Samples:
    """Prompts that a model answers. `prompts`: token ids of each, or with `family` documents. `decode`: from ids to
    text. `stop`: ids that end an answer. `longest`: tokens of one. `family`: how the model continues documents; None:
    as it continues ids.
    """

    prompts: tuple[tuple[int, ...], ...] | tuple[Document, ...]
    decode: Callable[[Sequence[int]], str]
    stop: tuple[int, ...]
    longest: int = 48
    family: Family | None = None

    def of(self, recipe: Recipe, state: TrainState) -> list[tuple[str, str]]:
        """Each prompt with its answer, greedily. ValueError for a model that does not generate."""
        family = self.family or recipe.model.family
        if family is None:
            raise ValueError(f"{recipe.model.name} does not generate: take --every.samples 0")
        with torch.no_grad():
            params: Tree = recipe.seen(state)
            prompts: list[Any] = [p if isinstance(p, Document) else list(p) for p in self.prompts]
            found = generate(params, prompts, family=family, max_new=self.longest, stop=self.stop)
        asked = [p.tokens.tolist() if isinstance(p, Document) else p for p in prompts]
        return [(self.decode(prompt), self.decode(ids)) for prompt, ids in zip(asked, found, strict=True)]


def prompts_of(batches: Iterable[Mapping[str, Any]], count: int) -> tuple[tuple[int, ...], ...]:
    """The beginnings of the first `count` documents of packs or rows, up to where labels begin; those without are left
    out.

    >>> pack = {"tokens": torch.tensor([5, 6, 7, 8]), "segments": torch.tensor([0, 0, 0, 1])}
    >>> prompts_of([{**pack, "labels": torch.tensor([-100, 7, -100, -100])}], 2)
    ((5, 6),)
    """
    found: list[tuple[int, ...]] = []
    for batch in batches:
        tokens, labels, ids = batch["tokens"].flatten(), batch["labels"].flatten(), document_ids(batch)
        for document in torch.unique_consecutive(ids).tolist():
            places = (ids == document).nonzero().flatten()
            labelled = places[labels[places] != -100]
            if len(labelled) and int(labelled[0]) > int(places[0]):
                found.append(tuple(tokens[int(places[0]) : int(labelled[0]) + 1].tolist()))
            if len(found) == count:
                return tuple(found)
    return tuple(found)


def documents_of(held_out: HeldOut, count: int) -> tuple[Document, ...]:
    """The beginnings of the first `count` documents that are held out, with their media, up to where labels begin."""
    found: list[Document] = []
    for document in held_out.documents() if count else ():
        labelled = np.flatnonzero(document.labels != IGNORE)
        if len(labelled):
            kept = slice(int(labelled[0]) + 1)
            found.append(replace(document, tokens=document.tokens[kept], labels=document.labels[kept], leaves={}))
        if len(found) == count:
            break
    return tuple(found)


def write(folder: Path, step: int, answered: Sequence[tuple[str, str]]) -> None:
    """Append prompts and answers to the run's file. OSError where the disk does not take them."""
    with (folder / FILE).open("a", encoding="utf-8") as file:
        for prompt, answer in answered:
            file.write(json.dumps({"step": step, "prompt": prompt, "answer": answer}, ensure_ascii=False) + "\n")
