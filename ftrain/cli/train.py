"""`ftrain train TASK --model DIR --data FILE`: train a model that exists on data that exists."""

import math
import os
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ftrain import checkpoint
from ftrain.bridge.native_talking import open_talking
from ftrain.bridge.opened import open as open_model
from ftrain.bridge.tasks import task_of
from ftrain.cli.config_file import as_config
from ftrain.cli.planned import Planned, planned_of
from ftrain.cli.recipes import DTYPES, at_once, export, jit_options, recipe_of
from ftrain.cli.told import steps_of, summed_heads, telling, trained_by
from ftrain.cli.train_options import KINDS, KdTrain, OfPairs, RunOptions, Sft, TaskKind, TrainOptions, kind_of
from ftrain.data.chat_template import load_tokenizer
from ftrain.data.encoding import ChatEncoder, Length
from ftrain.data.media.families import family_of
from ftrain.data.media_finishing import ReadMedia
from ftrain.data.speech import Speaking
from ftrain.modules.model import Model
from ftrain.resilience.anomalies import BadSteps
from ftrain.run import folder as run_folder
from ftrain.run.data import RunData, make_data
from ftrain.run.folder import RunFolder
from ftrain.run.media import layout_of
from ftrain.run.media_answers import family_of_documents
from ftrain.run.media_rows import fill, ready_rows
from ftrain.run.progress import Report, SteadyConsole
from ftrain.run.ranks import is_main, of_main
from ftrain.run.recipe import Recipe
from ftrain.run.remembered import Remembered
from ftrain.run.samples import Samples, documents_of, prompts_of
from ftrain.run.session import Run, session
from ftrain.run.speaking import speaking_of
from ftrain.run.trackers import TRACKERS, require_trackers
from ftrain.run.training import CHECKPOINTS, Training, prepare, train
from ftrain.tasks import Embed
from ftrain.tasks.heads import Headed
from ftrain.tasks.shared_prompts import PREFIX, why_not_shared


def run(options: TrainOptions) -> int:
    """The command: 0 at the end of the run. ValueError for what the user can mend."""
    name, kind = kind_of(options)
    require_trackers(options.track)
    options.lora.require_sense()
    bad = options.bad.policy()
    device = device_of(options.device)
    sizes = options.mesh
    planned = planned_of(options)
    alone = "RANK" not in os.environ
    sizes = sizes if planned is None else planned.sizes(sizes)
    several = alone and sizes.replicate * (sizes.shard or 1) * sizes.sequence > 1
    with session(
        replicate=sizes.replicate, shard=sizes.shard, sequence=sizes.sequence, expert=sizes.expert,
        kind="virtual" if several else "process", device=device, timeout=sizes.timeout,
    ) as ranks:  # fmt: skip
        return _run(name, kind, options, ranks, planned, bad)


def _run(
    name: str, kind: TaskKind, options: TrainOptions, ranks: Run, planned: Planned | None, bad: BadSteps | None
) -> int:
    report = Report(1, console=SteadyConsole(quiet=not is_main()))
    path, goes_on = of_main(folder_of(options, name))
    options = replace(options, data=replace(options.data, packs=_packs(options, path, goes_on, ranks, planned)))
    if is_main():
        require_goes_on(path, options, goes_on)
    tokenizer = load_tokenizer(options.model)
    length = Length(options.data.tokens, options.truncate) if options.data.cut == "never" else Length()
    family = family_of(options.model, tokenizer, image_pixels=options.data.image_pixels)
    speaking = _speaking(options, ranks.device)
    encoder = ChatEncoder(tokenizer, train=options.train_on, length=length, media=family, speaking=speaking)
    model = _model(options, media=family is not None)
    report.say(f"{model.name}: {model.why}")
    mesh = ranks.mesh
    if options.data.tokens % mesh.sequence:
        raise ValueError(
            f"--tokens {options.data.tokens} of a pack do not divide among --sequence {mesh.sequence} ranks: take a "
            "multiple"
        )
    encode, leaves = _rows(kind, encoder, options, model, sequence=mesh.sequence, say=report.say)
    kept = options.data.cache_media
    ready = None if kept is None else ready_rows(kept, family, model)
    seen = family if ready is None else ready
    rows: Any = Remembered(encode)
    data = make_data(
        options.data, rows, ranks=mesh.replicate * mesh.shard, seed=options.seed, paired=kind.paired,
        leaves=leaves, layout=layout_of(model, seen, sequence=mesh.sequence, rows=ready is not None,
                         codes=0 if speaking is None else speaking.speech.groups),
        finish=None if seen is None else ReadMedia(seen), mine=ranks.rank // mesh.sequence,
        others=None if seen is None or ranks.world == 1 or options.plan else ReadMedia(seen, decoded=False),
    )  # fmt: skip
    for line in data.lines:
        report.say(line)
    if isinstance(options, KdTrain):
        _require_same_tokens(tokenizer, options.teacher)
    micro_batches = 1 if at_once(options, kind, model) else _micro_batches(data, planned)
    recipe = recipe_of(options, kind, model, steps=data.steps, micro_batches=micro_batches, device=ranks.device)
    if ready is not None:
        precision = jit_options(options, model, ranks.device).get("precision")
        fill(
            ready, recipe, data, options.model, compute=None if precision is None else DTYPES[precision.compute],
            device=ranks.device, rank=ranks.rank, world=ranks.world, say=report.say,
        )  # fmt: skip
    for line in (trained_by(name, recipe), *(summed_heads(recipe.adapter) if recipe.adapter is not None else ())):
        report.say(line)
    training = Training(
        recipe, data.loader, path, None, Report(data.steps, every=10, console=report.console), data.steps,
        seed=options.seed, every=options.every, held_out=data.held_out, jit=jit_options(options, model, ranks.device),
        plan=options.plan, memory=options.budget or "95%", samples=_samples(options, recipe, data, tokenizer, ranks),
        averaged="evaluate" in options.ema_use, bad=bad,
    )  # fmt: skip
    prepared = prepare(training, ranks)  # what cannot be is refused before the run's folder exists
    with ExitStack() as opened:
        files = opened.enter_context(files_of(path, options, goes_on)) if is_main() else None
        told = opened.enter_context(telling(files, {"trained": trained_by(name, recipe), "data": list(data.lines)}))
        report.say(f"run folder: {path}")
        logs = tuple(opened.enter_context(TRACKERS[t](path, name, as_config(options))) for t in options.track if files)
        state = train(replace(training, files=files, trackers=logs), ranks, prepared)
        told |= {"rejected": [str(kind) for kind in data.loader.rejects or ()]}
        if ranks.stopping:
            told["ended"] = f"stopped by a signal after step {steps_of(state)}; the same command goes on"
            report.say(f"stopped after a save; the same command goes on: --out {path}")
            return 0
        export(recipe, state, options, path, tokenizer=tokenizer, say=report.say)
        told["ended"] = f"finished after step {steps_of(state)}"
    return 0


def _model(options: TrainOptions, *, media: bool) -> Model:
    if isinstance(options, Sft) and options.speech:
        return open_talking(options.model, flows=options.speech_flows)
    return open_model(options.model, native=options.native, task=task_of(options.model, media=media))


def _speaking(options: TrainOptions, device: torch.device) -> Speaking | None:
    """How the model's talker takes speech, if it is trained. ValueError for options that do not fit."""
    if not isinstance(options, Sft):
        return None
    if not options.speech:
        if options.speech_flows or options.speech_codec is not None:
            raise ValueError("--speech-flows and --speech-codec say how a talker is trained: give --speech too")
        return None
    if options.data.cut != "never" or options.native == "never":
        raise ValueError("--speech: rows are not cut (--cut), and a talker is the library's own (--native never)")
    if options.speech_codec is not None and options.data.workers:
        raise ValueError("--speech-codec: a codec is run by this process alone: give --workers 0")
    return speaking_of(options.model, options.speech_codec, device=device)


def _rows(
    kind: TaskKind,
    encoder: ChatEncoder,
    options: TrainOptions,
    model: Model,
    *,
    sequence: int,
    say: Callable[[str], None],
) -> tuple[Any, dict[str, np.dtype] | None]:
    """From a sample to documents, and which leaves those have beside tokens and labels."""
    encode, names = kind.rows(encoder), (kind.leaf,) if kind.leaf else ()
    if isinstance(options, OfPairs) and options.share_prompts:
        why = "ranks share documents" if sequence > 1 else why_not_shared(model)
        say(f"questions are computed for each answer: {why}" if why else "questions are computed once for both answers")
        if not why:
            encode, names = replace(encode, share=True), (*names, PREFIX)
    return encode, {name: np.dtype(np.int64) for name in names} or None


def _require_same_tokens(tokenizer: Any, teacher: Path) -> None:
    """ValueError for a teacher whose tokenizer gives a token of the student's another id."""
    if not (teacher / "tokenizer.json").is_file():
        return  # the sizes of both vocabularies are compared all the same
    theirs = load_tokenizer(teacher).get_vocab()
    for token, number in sorted(tokenizer.get_vocab().items(), key=lambda item: item[1]):
        if theirs.get(token) != number:
            said = f"the id {theirs[token]}" if token in theirs else "none"
            raise ValueError(
                f"--teacher {teacher}: the token {token!r} has the id {number} for the student, and {said} for the "
                "teacher: distributions are compared id by id, so take a teacher with the student's tokenizer"
            )


def _samples(options: TrainOptions, recipe: Recipe, data: RunData, tokenizer: Any, ranks: Run) -> Samples | None:
    """What a run of one process answers on its way; models with a head of another kind answer nothing."""
    if ranks.world > 1 or isinstance(recipe.task, Headed | Embed):
        return None
    stop = () if tokenizer.eos_token_id is None else (int(tokenizer.eos_token_id),)
    family = family_of_documents(recipe.model, data.loader.layout)
    if family is not None:
        seen = documents_of(data.held_out, options.every.samples)
        longest = 48 if recipe.model.family is not None else 16  # without a cache each token costs as all before it
        return Samples(seen, tokenizer.decode, stop, longest, family)
    if recipe.model.family is None:
        return None
    prompts = prompts_of(data.held_out, options.every.samples) if options.every.samples else ()
    return Samples(prompts, tokenizer.decode, stop)


def _micro_batches(data: RunData, planned: Planned | None) -> int:
    """Into how many a step's batch is divided: a plan file says it, else each has one pack of a rank."""
    return data.loader.packing.micro_batches if planned is None else planned.plan.candidate.micro_batches


def _packs(options: TrainOptions, path: Path, goes_on: bool, ranks: Run, planned: Planned | None) -> int:
    """Packs of a step: as given, those of the plan file, those of the run that goes on, or by the ranks that it begins
    with.
    """
    if options.data.packs is not None:
        return options.data.packs
    if planned is not None:
        return planned.plan.packs
    before = run_folder.read_config(path).get("packs") if goes_on else None
    shares = ranks.mesh.replicate * ranks.mesh.shard
    return int(before) if before else shares * math.ceil(4 / shares)


def folder_of(options: RunOptions, name: str) -> tuple[Path, bool]:
    """The run's folder, and whether a run in it goes on."""
    path = options.out or run_folder.default_path(name)
    goes_on = options.resume == "auto" and (path / run_folder.CONFIG).is_file()
    return path, goes_on


_MAY_CHANGE = (
    "out", "resume", "steps", "epochs", "every", "track", "workers", "device", "backend", "replicate", "shard",
    "sequence", "expert", "timeout", "plan", "remat", "budget", "save_merged", "rejected", "cache_media",
    "ema_use", "skip_bad", "bad_steps", "spike", "show", "formats",
)  # fmt: skip


def files_of(path: Path, options: RunOptions, goes_on: bool) -> RunFolder:
    """The folder's files; errors are those of `require_goes_on`."""
    config = as_config(options)
    if not goes_on:
        return RunFolder.create(path, config)
    done = checkpoint.latest(path / CHECKPOINTS)
    files = RunFolder.resume(path, step=-1 if done is None else done)  # without a checkpoint step 0 is measured again
    files.configure(config)
    return files


def require_goes_on(path: Path, options: RunOptions, goes_on: bool) -> None:
    """ValueError for a folder that is in use, and for a run in it that had other options than those that may change,
    once it has a checkpoint.
    """
    if not goes_on:
        run_folder.require_empty(path)
        return
    config = as_config(options)
    before = run_folder.read_config(path)
    done = checkpoint.latest(path / CHECKPOINTS)
    began_anew = done is None and {"model", "data"} <= before.keys()  # nothing of it would go on
    for name, value in config.items():
        if not began_anew and name not in _MAY_CHANGE and before.get(name) != value:
            raise ValueError(
                f"the run in {path} has {name} = {before.get(name)!r}, and these options say {value!r}: a run goes on "
                "with what it was; give the same, another --out, or --resume never with an empty folder"
            )


def device_of(choice: str) -> torch.device:
    """The device of a run. ValueError for CUDA where there is none."""
    if choice == "cuda" and not torch.cuda.is_available():
        raise ValueError("--device cuda: this machine has no CUDA device")
    on_cuda = choice == "cuda" or (choice == "auto" and torch.cuda.is_available())
    return torch.device("cuda" if on_cuda else "cpu")


COMMANDS = {name: (made, run) for name, (made, _) in KINDS.items()}
