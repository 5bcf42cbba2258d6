"""What `ftrain plan --model DIR` searches: the step that `ftrain train TASK --model DIR` would take."""

import difflib
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Literal

import torch

from ftrain.bridge.config import read_config
from ftrain.bridge.depth import stack_of
from ftrain.bridge.opened import open as open_model
from ftrain.cli.lora_flags import LoraFlags
from ftrain.cli.recipes import at_once, jit_options, recipe_of
from ftrain.cli.train_options import KINDS, TrainOptions
from ftrain.run.data import DataOptions
from ftrain.run.planning import RecipeWorkload
from ftrain.run.recipe import Recipe

_GPU = torch.device("cuda")  # whose precision and base dtype a run has by default


@dataclass(frozen=True)
class ModelStep:
    """Which step of which model; the fields are options of `ftrain plan`."""

    model: Path
    task: str = "sft"
    tokens: int = 8192
    packs: int = 8
    lora: LoraFlags = field(default_factory=LoraFlags)
    freeze: tuple[str, ...] = ()
    only: tuple[str, ...] = ()
    teacher: Path | None = None
    native: Literal["auto", "always", "never"] = "auto"

    def workload(self) -> RecipeWorkload:
        """The workload for a search; nothing is loaded. ValueError for options that do not fit the model or each
        other.
        """
        self.lora.require_sense()
        options = self._options()
        kind = KINDS[self.task][1]
        model = open_model(self.model, native=self.native)
        if not model.packs:
            raise ValueError(f"{self.model}: {model.name} takes no packs of documents: {model.alone}")
        adapter = f", LoRA of rank {self.lora.rank}" if self.lora.rank else ""
        return RecipeWorkload(
            f"{self.task} of {self.model.name or self.model}{adapter}",
            partial(_recipe, options, self.task),
            stack_of(read_config(self.model, False)),
            self.tokens,
            self.packs,
            (kind.leaf,) if kind.leaf else (),
            jit_options(options, model, _GPU).get("precision"),
            at_once(options, kind, model),
        )

    def _options(self) -> TrainOptions:
        if self.task not in KINDS:
            near = difflib.get_close_matches(self.task, KINDS, 1)
            meant = f"; did you mean {near[0]}?" if near else ""
            raise ValueError(f"--task {self.task!r} is not one of {', '.join(KINDS)}{meant}")
        beside = {}
        if self.task == "kd":
            if self.teacher is None:
                raise ValueError("--task kd: give --teacher DIR, whose memory counts too")
            beside["teacher"] = self.teacher
        elif self.teacher is not None:
            raise ValueError(f"--teacher {self.teacher}: --task {self.task} has no teacher, kd has")
        made: TrainOptions = KINDS[self.task][0](
            model=self.model, data=DataOptions(()), lora=self.lora, freeze=self.freeze, only=self.only,
            native=self.native, **beside,
        )  # fmt: skip
        return made


def _recipe(options: TrainOptions, task: str, layers: int | None, micro_batches: int) -> Recipe:
    """The recipe of the model with so many layers; None: all."""
    model = open_model(options.model, native=options.native, layers=layers)
    return recipe_of(options, KINDS[task][1], model, steps=1, micro_batches=micro_batches, device=_GPU)
