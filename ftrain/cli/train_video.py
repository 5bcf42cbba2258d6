"""`ftrain train video --model PIPELINE --data CACHE`: a video transformer of Wan's learns clips of `ftrain encode`."""

import os
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import MappingProxyType
from typing import Any, Literal

import torch
from tyro.conf import OmitArgPrefixes

from ftrain import lora, tree
from ftrain.bridge.native_wan import native_wan
from ftrain.bridge.pipelines import WanFolder, shift_of
from ftrain.cli.config_file import as_config
from ftrain.cli.recipes import jit_options, recipe_with
from ftrain.cli.told import steps_of, telling, trained_by
from ftrain.cli.train import device_of, files_of, folder_of, require_goes_on
from ftrain.cli.train_options import RunOptions
from ftrain.hf.gather import takes_part
from ftrain.run.averages import with_average
from ftrain.run.clip_data import ClipData, ClipOptions, make_clip_data
from ftrain.run.film_sampling import Sampling
from ftrain.run.film_shows import FilmShow
from ftrain.run.progress import Report, SteadyConsole
from ftrain.run.ranks import is_main, of_main
from ftrain.run.recipe import Recipe
from ftrain.run.session import Run, session
from ftrain.run.trackers import TRACKERS, require_trackers
from ftrain.run.training import Training, prepare, train
from ftrain.sharding.batch import BatchRule
from ftrain.tasks.video import VideoFlow

Style = Literal["comfyui", "diffusers", "kohya"]


@dataclass(frozen=True)
class ShowFlags:
    """Films that are made on the way, where held-out losses are measured, by a run on one rank."""

    videos: int = 0
    """Of so many held-out captions; 0: none."""
    sampler: Literal["unipc", "euler", "few"] = "unipc"
    """As `ftrain sample` has them."""
    steps: int = 20
    """Of the sampler."""
    guidance: float = 5.0
    """How far the caption is followed beyond the empty one; 1: no guidance, half the work."""
    times: tuple[float, ...] = ()
    """Of the sampler few: going down to 0."""


@dataclass(frozen=True, kw_only=True)
class VideoTrain(RunOptions):
    """Flow matching of a video transformer of Wan's on the cache that `ftrain encode` made. --model is the folder of
    the whole pipeline, whose encoders must be those of the cache."""

    data: OmitArgPrefixes[ClipOptions]
    part: str = "transformer"
    """Which transformer of the pipeline: transformer, or of two experts transformer_2, that for less noise."""
    video: VideoFlow = field(default_factory=VideoFlow)
    show: ShowFlags = field(default_factory=ShowFlags)
    formats: tuple[Style, ...] = ("comfyui", "diffusers")
    """Files of an adapter beside PEFT's folder: comfyui, diffusers (a pipeline's load_lora_weights), kohya."""


def run(options: VideoTrain) -> int:
    """The command: 0 at the end of the run. ValueError for what the user can mend."""
    require_trackers(options.track)
    options.lora.require_sense()
    bad, device, sizes = options.bad.policy(), device_of(options.device), options.mesh
    several = "RANK" not in os.environ and sizes.replicate * (sizes.shard or 1) * sizes.sequence > 1
    with session(
        replicate=sizes.replicate, shard=sizes.shard, sequence=sizes.sequence, expert=sizes.expert,
        kind="virtual" if several else "process", device=device, timeout=sizes.timeout,
    ) as ranks:  # fmt: skip
        report = Report(1, console=SteadyConsole(quiet=not is_main()))
        path, goes_on = of_main(folder_of(options, "video"))
        if is_main():
            require_goes_on(path, options, goes_on)
        data = make_clip_data(
            options.data, WanFolder.open(options.model), part=options.part, mesh=ranks.mesh, rank=ranks.rank,
            world=ranks.world, drop=options.video.drop, seed=options.seed,
        )  # fmt: skip
        recipe = video_recipe(
            options, device=ranks.device, steps=data.steps, micro_batches=data.micro_batches, rules=data.rules
        )
        for line in (*data.lines, trained_by("video", recipe)):
            report.say(line)
        training = Training(
            recipe, data.loader, path, None, Report(data.steps, every=10, console=report.console), data.steps,
            seed=options.seed, every=options.every, held_out=data.held_out,
            jit=jit_options(options, recipe.model, ranks.device), memory=options.budget or "95%",
            averaged="evaluate" in options.ema_use, bad=bad, show=_show(options, data, ranks, path),
        )  # fmt: skip
        return _train(options, training, ranks, path, goes_on, data.lines)


def _train(options: VideoTrain, training: Training, ranks: Run, path: Path, goes_on: bool, lines: Sequence[str]) -> int:
    recipe, report = training.recipe, training.report
    prepared = prepare(training, ranks)  # what cannot be is refused before the run's folder exists
    with ExitStack() as opened:
        files = opened.enter_context(files_of(path, options, goes_on)) if is_main() else None
        told = opened.enter_context(telling(files, {"trained": trained_by("video", recipe), "data": list(lines)}))
        report.say(f"run folder: {path}")
        tracks = options.track if files else ()
        logs = tuple(opened.enter_context(TRACKERS[t](path, "video", as_config(options))) for t in tracks)
        state = train(replace(training, files=files, trackers=logs), ranks, prepared)
        told["rejected"] = [str(kind) for kind in training.loader.rejects or ()]
        if ranks.stopping:
            told["ended"] = f"stopped by a signal after step {steps_of(state)}; the same command goes on"
            report.say(f"stopped after a save; the same command goes on: --out {path}")
            return 0
        for line in export_video(recipe, state, options, path):
            report.say(line)
        told["ended"] = f"finished after step {steps_of(state)}"
    return 0


def _show(options: VideoTrain, data: ClipData, ranks: Run, path: Path) -> FilmShow | None:
    """What makes films on the way. ValueError for numbers out of range, and on several ranks."""
    flags, folder = options.show, WanFolder.open(options.model)
    if not flags.videos:
        return None
    if flags.videos < 0 or ranks.mesh.size > 1 or ranks.world > 1:
        raise ValueError(
            f"--show.videos {flags.videos}: films are made on one rank, and this run has {ranks.mesh.size}: leave it "
            "out, and take ftrain sample with what the run writes"
        )
    sampling = Sampling(flags.sampler, flags.steps, shift_of(folder), flags.guidance, times=tuple(flags.times))
    if data.cfg.times != (0.0, 1.0):
        raise ValueError(
            f"--show.videos {flags.videos}: {options.part} is for times from {data.cfg.times[0]:g} to "
            f"{data.cfg.times[1]:g}, and a film needs all: take ftrain sample with both experts"
        )
    return FilmShow(
        data.shown(flags.videos), data.empty_text, folder, data.cfg, options.data.first_frame, sampling, path,
        data.fps, ranks.device,
    )  # fmt: skip


def video_recipe(
    options: VideoTrain,
    *,
    device: torch.device,
    steps: int = 1,
    micro_batches: int = 1,
    rules: Mapping[str, BatchRule] = MappingProxyType({}),
) -> Recipe:
    """The recipe of a run of so many steps. `rules`: of its batches. ValueError for times that are not the expert's,
    and for options that do not fit the model or each other.
    """
    folder = WanFolder.open(options.model)
    model, (low, high) = native_wan(folder.part(options.part)), folder.config(options.part).times
    asked = (options.video.low, options.video.high)
    for name, time in zip(("low", "high"), asked, strict=True):
        if time is not None and not low <= time <= high:
            raise ValueError(
                f"--video.{name} {time:g}: {options.part} is for times from {low:g} to {high:g}; take times of this "
                "range, or train the other expert by --part"
            )
    own = tuple(of_model if time is None else time for time, of_model in zip(asked, (low, high), strict=True))
    task = replace(options.video, low=own[0], high=own[1])
    return recipe_with(
        options, task, replace(model, rules=rules), steps=steps, micro_batches=micro_batches, device=device
    )


def export_video(recipe: Recipe, state: Any, options: VideoTrain, path: Path) -> Sequence[str]:
    """Write what was trained into a folder: the transformer as diffusers has it, or an adapter as PEFT's folder and as
    single files. Lines for the log. All ranks call this together. ValueError for targets that a form has no names for.
    """
    if not takes_part(tree.leaves(state)):
        return []
    state = with_average(state) if "export" in options.ema_use else state
    lines = list[str]()
    if recipe.adapter is None or options.save_merged:
        assert recipe.model.save is not None
        recipe.model.save(recipe.parameters(state), path / options.part)
        lines.append(f"wrote {path / options.part}, a folder that diffusers loads")
    if recipe.adapter is not None:
        delta, adapter = recipe.trained_part(state.params), recipe.adapter
        if recipe.pissa:  # upon the model as it is in its folder
            adapter, delta = lora.beyond(state.extra["start"], delta, adapter)
        lora.save(delta, adapter, path / "adapter", base=str(options.model), task=None)
        lines.append(f"wrote {path / 'adapter'}, a folder that PEFT loads")
        for style in options.formats:
            file = path / f"{style}.safetensors"
            lora.save_file(delta, adapter, file, style=style, base=str(options.model))
            lines.append(f"wrote {file}, for {style}")
    return lines


COMMANDS = {"video": (VideoTrain, run)}
