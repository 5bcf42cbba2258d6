"""From the options of `ftrain train` to a recipe, and from a state to the folders that others load."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from ftrain import lora, tree
from ftrain.bridge.opened import open as open_model
from ftrain.bridge.tasks import task_of
from ftrain.cli.train_options import KdTrain, RunOptions, TaskKind, TrainOptions
from ftrain.data.media.families import reads_media
from ftrain.hf.gather import takes_part
from ftrain.hf.score_head import add_score_head, require_causal
from ftrain.modules.model import Model
from ftrain.remat.policy import Remat
from ftrain.run.averages import with_average
from ftrain.run.media import copy_processor
from ftrain.run.parts import trained_paths
from ftrain.run.ranks import is_main
from ftrain.run.recipe import START, STATE, Recipe, optimizer
from ftrain.tasks.heads import Headed
from ftrain.tasks.task import Task
from ftrain.trace.precision import Precision

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def recipe_of(
    options: TrainOptions, kind: TaskKind, model: Model, *, steps: int, micro_batches: int, device: torch.device
) -> Recipe:
    """The recipe of a run of so many steps. ValueError for options that do not fit the model or each other."""
    teacher = _teacher(options) if isinstance(options, KdTrain) else None
    return recipe_with(
        options, kind.task(options), model, teacher=teacher, steps=steps, micro_batches=micro_batches, device=device
    )


def recipe_with(
    options: RunOptions,
    task: Task,
    model: Model,
    *,
    steps: int,
    micro_batches: int,
    device: torch.device,
    teacher: Model | None = None,
) -> Recipe:
    """The recipe of a run of so many steps for any task. ValueError as `recipe_of`."""
    flags = options.lora
    adapter = None
    if flags.rank:
        adapter = lora.add(
            model, flags.targets, rank=flags.rank, alpha=2.0 * flags.rank if flags.alpha is None else flags.alpha,
            rslora=flags.rslora, dora=flags.dora, dropout=flags.dropout,
        )  # fmt: skip
    if isinstance(task, Headed) and (adapter is None or options.save_merged):
        require_causal(options.model)
    rate = options.optimizer.schedule(steps, adapter is not None)
    if not 0 <= options.ema < 1:
        raise ValueError(f"--ema {options.ema} must be at least 0 and below 1, such as 0.999")
    tx = optimizer(
        rate, clip=options.optimizer.clip, weight_decay=options.optimizer.weight_decay, plus=flags.plus,
        ema=options.ema,
    )  # fmt: skip
    wide = "bfloat16" if device.type == "cuda" else "float32"
    base = DTYPES[wide if options.base_dtype == "auto" else options.base_dtype]
    return Recipe(
        model, task, tx, adapter, teacher, micro_batches=micro_batches,
        base_dtype=None if base == torch.float32 else base, seed=options.seed,
        trained=_trained(options, model), quantized=None if flags.quantize == "none" else flags.quantize,
        pissa=flags.pissa,
    )  # fmt: skip


def at_once(options: TrainOptions, kind: TaskKind, model: Model) -> bool:
    """Whether a step's batch is one, without micro-batches: where its loss compares all of it, or where the model's
    state moves by all of it.
    """
    recipe = recipe_of(options, kind, model, steps=1, micro_batches=1, device=torch.device("cpu"))
    return kind.whole_batch or (recipe.changes_state and model.rebalanced is None)


def _teacher(options: KdTrain) -> Model:
    task = task_of(options.teacher, media=reads_media(options.teacher))
    return open_model(options.teacher, native=options.native, task=task)


def _trained(options: RunOptions, model: Model) -> frozenset[str] | None:
    told = options.only or options.lora.rank  # an adapter leaves all of the model as it is
    freeze = options.freeze if told else (*dict.fromkeys((*model.frozen, *options.freeze)),)
    if not (freeze or options.only):
        return None
    return trained_paths(model.specs, freeze=freeze, only=options.only)


def jit_options(options: RunOptions, model: Model, device: torch.device) -> dict[str, Any]:
    """What `ftrain.jit` is told beside the plan."""
    chosen = options.precision
    chosen = ("bfloat16" if device.type == "cuda" else "float32") if chosen == "auto" else chosen
    found: dict[str, Any] = {"backend": options.backend}
    if chosen != "float32":
        found["precision"] = Precision(compute=chosen, keep=model.keep)
    if isinstance(options, TrainOptions) and options.plan is not None:
        return found  # which says what is computed again, too
    if options.budget is not None:
        found["remat"] = Remat(budget=options.budget)
    elif options.remat != "none":
        found["remat"] = options.remat
    return found


def export(
    recipe: Recipe, state: Any, options: TrainOptions, path: Path, *, tokenizer: Any, say: Callable[[str], None]
) -> None:
    """Write what was trained into a folder, as folders that others load. All ranks call this together. ValueError for a
    model that is written to no folder.
    """
    if not takes_part(tree.leaves(state)):
        return
    state = with_average(state) if "export" in options.ema_use else state
    head = recipe.head_weight(state)
    if recipe.adapter is None or options.save_merged:
        if recipe.model.save is None:
            raise ValueError(f"{recipe.model.name} is written to no folder")
        beside = {"state": state.extra[STATE]} if recipe.changes_state else {}
        recipe.model.save(recipe.parameters(state), path / "model", **beside)
        if is_main():
            tokenizer.save_pretrained(path / "model")
            copy_processor(options.model, path / "model")
            if head is not None:
                add_score_head(path / "model", head, pad=tokenizer.pad_token_id)
        say(f"wrote {path / 'model'}, a folder that transformers loads")
    if recipe.adapter is not None:
        delta, adapter = recipe.trained_part(state.params), recipe.adapter
        if recipe.pissa:  # upon the model as it is in its folder
            adapter, delta = lora.beyond(state.extra[START], delta, adapter)
        lora.save(delta, adapter, path / "adapter", base=str(options.model))
        if head is not None and is_main():
            save_file({"score.weight": head.cpu().contiguous()}, path / "adapter" / "score.safetensors")
        say(f"wrote {path / 'adapter'}, a folder that PEFT loads")
