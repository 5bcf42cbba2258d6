"""`ftrain export RUN`: the folders of a run from its last checkpoint, such as of one that was stopped."""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import tyro

from ftrain.bridge.opened import open as open_model
from ftrain.bridge.tasks import task_of
from ftrain.checkpoint import Checkpointer
from ftrain.cli.config_file import with_config
from ftrain.cli.opened import require_new
from ftrain.cli.recipes import export, recipe_of
from ftrain.cli.train import device_of
from ftrain.cli.train_options import KINDS, RunOptions, TrainOptions, kind_of
from ftrain.cli.train_video import VideoTrain, export_video, video_recipe
from ftrain.data.chat_template import load_tokenizer
from ftrain.data.media.families import reads_media
from ftrain.kernels import random
from ftrain.run import folder as run_folder
from ftrain.run.recipe import Recipe, kept, restored
from ftrain.run.training import CHECKPOINTS
from ftrain.step.state import TrainState


@dataclass(frozen=True)
class ExportOptions:
    """Write what a run of `ftrain train` has learned: an adapter's folder, or a model's that transformers loads."""

    run: tyro.conf.Positional[Path]
    """The folder of the run."""
    to: Path
    """A new folder, in which `adapter` or `model` is made."""
    step: int | None = None
    """The checkpoint; default: the last one."""
    merged: bool = False
    """Of an adapter also the model with it."""
    weights: Literal["as-run", "averaged", "last"] = "as-run"
    """Of a run with --ema: its running average, or its last parameters."""


def run(options: ExportOptions) -> int:
    """The command. ValueError for a folder that is no such run, or has no checkpoint, and for a new one that is not."""
    require_new(options.to)
    made = options_of(options.run)
    if options.weights == "averaged" and not made.ema:
        raise ValueError(f"--weights averaged: {options.run} kept no average (--ema)")
    uses: dict[str, Any] = {"as-run": made.ema_use, "averaged": ("export",), "last": ()}
    wanted = replace(made, save_merged=options.merged or made.save_merged, ema_use=uses[options.weights])
    if isinstance(wanted, VideoTrain):
        recipe = video_recipe(wanted, device=device_of(made.device))
        for line in export_video(recipe, _state(recipe, options, made), wanted, options.to):
            print(line)
        return 0
    task = task_of(wanted.model, media=reads_media(wanted.model))
    model, tokenizer = open_model(wanted.model, native=wanted.native, task=task), load_tokenizer(wanted.model)
    recipe = recipe_of(wanted, kind_of(wanted)[1], model, steps=1, micro_batches=1, device=device_of(made.device))
    export(recipe, _state(recipe, options, made), wanted, options.to, tokenizer=tokenizer, say=print)
    return 0


def _state(recipe: Recipe, options: ExportOptions, made: RunOptions) -> TrainState:
    """The state of the checkpoint. ValueError where there is none."""
    state = recipe.init(random.key(0, device=device_of(made.device)))
    recipe.load(state)
    with Checkpointer(options.run / CHECKPOINTS) as checkpoints:
        step = checkpoints.latest() if options.step is None else options.step
        if step is None:
            raise ValueError(f"{options.run} has no checkpoint yet")
        found = checkpoints.restore({"state": kept(state)}, step, partial=True)
    return restored(recipe, found["state"], state)


def options_of(run: Path) -> TrainOptions | VideoTrain:
    """The options of a run of `ftrain train`. ValueError for a folder that is not one."""
    config = run_folder.read_config(run)
    kinds: dict[str, type] = {**{name: kind for name, (kind, _) in KINDS.items()}, "video": VideoTrain}
    task = next((name for name in kinds if name in config), None)
    if task is None:
        raise ValueError(f"{run} is no run of `ftrain train`: its config.json names none of {', '.join(kinds)}")
    words = with_config(kinds[task], ["--config", str(run / run_folder.CONFIG)])
    found: TrainOptions | VideoTrain = tyro.cli(kinds[task], args=words)
    return found


COMMANDS = {"export": (ExportOptions, run)}
