"""`ftrain train TASK --model DIR --data FILE`: train a model that exists on data that exists."""

import os
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from tyro.conf import OmitArgPrefixes

import ftrain
from ftrain import checkpoint, lora, optim
from ftrain.cli.config_file import as_config
from ftrain.data.chat_template import load_tokenizer
from ftrain.data.encoding import ChatEncoder, Length
from ftrain.modules.model import Model
from ftrain.run import folder as run_folder
from ftrain.run.data import DataOptions, RunData, make_data
from ftrain.run.folder import RunFolder
from ftrain.run.progress import Report, SteadyConsole
from ftrain.run.ranks import MeshFlags, is_main, of_main
from ftrain.run.recipe import Recipe, optimizer
from ftrain.run.session import Run, session
from ftrain.run.trackers import TRACKERS, require_trackers
from ftrain.run.training import CHECKPOINTS, Every, Training, train
from ftrain.tasks import Dpo, Kd, Kto, NextToken, Task
from ftrain.tasks.rows import JudgedRows, PreferenceRows, TextRows, WithNeighbour

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


@dataclass(frozen=True)
class LoraFlags:
    """An adapter of low rank, which is trained in the place of the model's parameters."""

    rank: int = 0
    """0: no adapter, all parameters are trained."""
    alpha: float | None = None
    """Deltas are scaled by alpha / rank; default: twice the rank."""
    targets: tuple[str, ...] = ("all-linear",)
    """Which parameters: all-linear, last parts of names (q_proj), or globs over paths."""
    dropout: float = 0.0
    """Share of a layer's input that its delta does not see."""
    rslora: bool = False
    """Scale by alpha / sqrt(rank)."""
    dora: bool = False
    """Directions and magnitudes apart."""

    def require_sense(self) -> None:
        """ValueError for a negative rank, and for options of an adapter without one."""
        if self.rank < 0:
            raise ValueError(f"--lora.rank {self.rank} must be at least 0")
        given = [f.name for f in fields(self) if f.name != "rank" and getattr(self, f.name) != f.default]
        if given and not self.rank:
            raise ValueError(f"--lora.{given[0]} is of an adapter, and --lora.rank is 0: give a rank, such as 16")


@dataclass(frozen=True)
class OptimizerFlags:
    """AdamW: its rate over the run, and what holds it back."""

    rate: float | None = None
    """The largest learning rate; default 2e-4 with an adapter, 2e-5 without."""
    warmup: float = 0.03
    """The share of the steps in which the rate rises."""
    decay: Literal["cosine", "linear", "constant"] = "cosine"
    """Of the rate after that, to a tenth of it at the end, or not at all."""
    weight_decay: float = 0.0
    """Of matrices."""
    clip: float = 1.0
    """The largest norm of all gradients together."""

    def schedule(self, steps: int, adapter: bool) -> optim.Schedule:
        """The rate of a run of so many steps."""
        peak = self.rate if self.rate is not None else 2e-4 if adapter else 2e-5
        warm = min(round(self.warmup * steps), max(steps - 1, 0))
        if self.decay == "cosine":
            return optim.warmup_cosine(peak, warmup_steps=warm, total_steps=max(steps, warm + 1), floor=peak / 10)
        after = optim.linear(peak, peak / 10, steps=steps - warm) if self.decay == "linear" else optim.constant(peak)
        return optim.join([optim.linear(0.0, peak, steps=warm), after], boundaries=[warm]) if warm else after


@dataclass(frozen=True)
class TrainOptions:
    """What all tasks have."""

    model: Path
    """A folder in Hugging Face's format."""
    data: OmitArgPrefixes[DataOptions]
    out: Path | None = None
    """The run's folder; default runs/<task>/<time>. A folder that holds a run of the same options goes on."""
    resume: Literal["auto", "never"] = "auto"
    """auto: go on with the run in --out if there is one."""
    lora: LoraFlags = field(default_factory=LoraFlags)
    optimizer: OmitArgPrefixes[OptimizerFlags] = field(default_factory=OptimizerFlags)
    every: Every = field(default_factory=Every)
    native: Literal["auto", "always", "never"] = "auto"
    """auto: a family of the library where it has the model's, transformers' own module elsewhere."""
    train_on: Literal["assistant", "last", "everything"] = "assistant"
    """Of a chat: the turns of the assistant, its last one, or all tokens."""
    truncate: Literal["refuse", "left", "right"] = "refuse"
    """What happens to a row of more tokens than a pack."""
    base_dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """Of the parameters that are not trained. auto: bfloat16 on CUDA, float32 on a CPU."""
    precision: Literal["auto", "float32", "bfloat16"] = "auto"
    """In which dtype the loss is computed. auto: bfloat16 on CUDA, float32 on a CPU."""
    remat: Literal["none", "layer", "all"] = "none"
    """What the backward pass computes again instead of keeping it."""
    budget: str | None = None
    """Memory of the step, such as 70GiB: as little is computed again as fits it."""
    backend: Literal["auto", "aten", "inductor", "cudagraph"] = "auto"
    """How the step's graph is run."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """auto: CUDA where there is one."""
    mesh: OmitArgPrefixes[MeshFlags] = field(default_factory=MeshFlags)
    """Ranks: under torchrun one per process; otherwise sizes above 1 run in lockstep in this process."""
    seed: int = 0
    """Of new parameters, the order of the data, and dropout."""
    track: tuple[str, ...] = ()
    """Further logs: tensorboard, trackio, wandb, swanlab, mlflow."""
    save_merged: bool = False
    """With an adapter, also write the model with it, as a folder."""


@dataclass(frozen=True, kw_only=True)
class Sft(TrainOptions):
    """Supervised fine-tuning: chats, of which the assistant's turns are learned, or texts."""

    sft: NextToken = field(default_factory=NextToken)


@dataclass(frozen=True, kw_only=True)
class Pretrain(TrainOptions):
    """Next tokens of plain texts; of chats, all tokens."""

    train_on: Literal["assistant", "last", "everything"] = "everything"
    pretrain: NextToken = field(default_factory=NextToken)


@dataclass(frozen=True, kw_only=True)
class DpoTrain(TrainOptions):
    """Preferences: an answer that was chosen beside one that was rejected. With an adapter, the reference is the base
    without it."""

    dpo: Dpo = field(default_factory=Dpo)


@dataclass(frozen=True, kw_only=True)
class KtoTrain(TrainOptions):
    """Answers that were judged good or bad, one by one."""

    kto: Kto = field(default_factory=Kto)


@dataclass(frozen=True, kw_only=True)
class KdTrain(TrainOptions):
    """A student that learns the distributions of a teacher over the tokens of texts or of an assistant's turns."""

    teacher: Path
    """The teacher's folder, with the same vocabulary."""
    kd: Kd = field(default_factory=Kd)


@dataclass(frozen=True)
class _Kind:
    """How a task's options become its loss and its documents. `leaf`: that documents have beside tokens and labels."""

    task: Callable[[Any], Task]
    rows: Callable[[ChatEncoder], Any]
    leaf: str = ""
    paired: Callable[[Any], Any] | None = None


KINDS: Mapping[str, tuple[type, _Kind]] = {
    "sft": (Sft, _Kind(lambda o: o.sft, TextRows)),
    "pretrain": (Pretrain, _Kind(lambda o: o.pretrain, TextRows)),
    "dpo": (DpoTrain, _Kind(lambda o: o.dpo, PreferenceRows, "side")),
    "kto": (KtoTrain, _Kind(lambda o: o.kto, JudgedRows, "judged", WithNeighbour)),
    "kd": (KdTrain, _Kind(lambda o: o.kd, TextRows)),
}


def run(options: TrainOptions) -> int:
    """The command: 0 at the end of the run. ValueError for what the user can mend."""
    name, kind = next((name, kind) for name, (made, kind) in KINDS.items() if type(options) is made)
    require_trackers(options.track)
    options.lora.require_sense()
    device = _device(options.device)
    sizes = options.mesh
    alone = "RANK" not in os.environ
    several = alone and sizes.replicate * (sizes.shard or 1) * sizes.sequence > 1
    with session(
        replicate=sizes.replicate, shard=sizes.shard, sequence=sizes.sequence, expert=sizes.expert,
        kind="virtual" if several else "process", device=device, timeout=sizes.timeout,
    ) as ranks:  # fmt: skip
        return _run(name, kind, options, ranks)


def _run(name: str, kind: _Kind, options: TrainOptions, ranks: Run) -> int:
    report = Report(1, console=SteadyConsole(quiet=not is_main()))
    tokenizer = load_tokenizer(options.model)
    length = Length(options.data.tokens, options.truncate) if options.data.cut == "never" else Length()
    encoder = ChatEncoder(tokenizer, train=options.train_on, length=length)
    model = ftrain.hf.open(options.model, native=options.native)
    report.say(f"{model.name}: {model.why}")
    mesh = ranks.mesh
    leaves = {kind.leaf: np.dtype(np.int64)} if kind.leaf else None
    data = make_data(
        options.data, kind.rows(encoder), ranks=mesh.replicate * mesh.shard, seed=options.seed, paired=kind.paired,
        leaves=leaves,
    )  # fmt: skip
    for line in data.lines:
        report.say(line)
    if isinstance(options, KdTrain):
        _require_same_tokens(tokenizer, options.teacher)
    recipe = _recipe(options, kind, model, data, ranks.device)
    if recipe.adapter is not None:
        report.say(recipe.adapter.table().splitlines()[-1])
    path, goes_on = of_main(_folder(options, name))
    with ExitStack() as opened:
        files = opened.enter_context(_files(path, options, goes_on)) if is_main() else None
        report.say(f"run folder: {path}")
        logs = (
            tuple(opened.enter_context(TRACKERS[t](path, name, as_config(options))) for t in options.track)
            if files
            else ()
        )
        training = Training(
            recipe, data.loader, path, files, Report(data.steps, every=10, console=report.console), data.steps,
            seed=options.seed, every=options.every, held_out=data.held_out, jit=_jit(options, ranks.device),
            trackers=tuple(logs),
        )  # fmt: skip
        state = train(training, ranks)
        _export(recipe, state, options, path, report, tokenizer)
    return 0


def _recipe(options: TrainOptions, kind: _Kind, model: Model, data: RunData, device: torch.device) -> Recipe:
    flags = options.lora
    adapter = None
    if flags.rank:
        adapter = lora.add(
            model, flags.targets, rank=flags.rank, alpha=2.0 * flags.rank if flags.alpha is None else flags.alpha,
            rslora=flags.rslora, dora=flags.dora, dropout=flags.dropout,
        )  # fmt: skip
    rate = options.optimizer.schedule(data.steps, adapter is not None)
    tx = optimizer(rate, clip=options.optimizer.clip, weight_decay=options.optimizer.weight_decay)
    teacher = ftrain.hf.open(options.teacher, native=options.native) if isinstance(options, KdTrain) else None
    wide = "bfloat16" if device.type == "cuda" else "float32"
    base = DTYPES[wide if options.base_dtype == "auto" else options.base_dtype]
    return Recipe(
        model, kind.task(options), tx, adapter, teacher, micro_batches=data.loader.packing.micro_batches,
        base_dtype=None if base == torch.float32 else base, seed=options.seed,
    )  # fmt: skip


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


def _jit(options: TrainOptions, device: torch.device) -> dict[str, Any]:
    chosen = options.precision
    chosen = ("bfloat16" if device.type == "cuda" else "float32") if chosen == "auto" else chosen
    found: dict[str, Any] = {"backend": options.backend}
    if chosen != "float32":
        found["precision"] = ftrain.Precision(compute=chosen)
    if options.budget is not None:
        found["remat"] = ftrain.Remat(budget=options.budget)
    elif options.remat != "none":
        found["remat"] = options.remat
    return found


def _folder(options: TrainOptions, name: str) -> tuple[Path, bool]:
    """The run's folder, and whether a run in it goes on."""
    path = options.out or run_folder.default_path(name)
    goes_on = options.resume == "auto" and (path / run_folder.CONFIG).is_file()
    return path, goes_on


_MAY_CHANGE = (
    "out", "resume", "steps", "epochs", "every", "track", "workers", "device", "backend", "replicate", "shard",
    "sequence", "expert", "timeout", "remat", "budget", "save_merged", "rejected",
)  # fmt: skip


def _files(path: Path, options: TrainOptions, goes_on: bool) -> RunFolder:
    """The folder's files. ValueError for a run in it that had other options than those that may change, once it has a
    checkpoint.
    """
    config = as_config(options)
    if not goes_on:
        return RunFolder.create(path, config)
    before = run_folder.read_config(path)
    done = checkpoint.latest(path / CHECKPOINTS)
    began_anew = done is None and {"model", "data"} <= before.keys()  # nothing of it would go on
    for name, value in config.items():
        if not began_anew and name not in _MAY_CHANGE and before.get(name) != value:
            raise ValueError(
                f"the run in {path} has {name} = {before.get(name)!r}, and these options say {value!r}: a run goes on "
                "with what it was; give the same, another --out, or --resume never with an empty folder"
            )
    files = RunFolder.resume(path, step=-1 if done is None else done)  # without a checkpoint step 0 is measured again
    files.configure(config)
    return files


def _export(recipe: Recipe, state: Any, options: TrainOptions, path: Path, report: Report, tokenizer: Any) -> None:
    """Write what was trained as folders that others load. All ranks call this together."""
    if recipe.adapter is None or options.save_merged:
        assert recipe.model.save is not None
        recipe.model.save(recipe.parameters(state), path / "model")
        if is_main():
            tokenizer.save_pretrained(path / "model")
        report.say(f"wrote {path / 'model'}, a folder that transformers loads")
    if recipe.adapter is not None:
        lora.save(state.params, recipe.adapter, path / "adapter", base=str(options.model))
        report.say(f"wrote {path / 'adapter'}, a folder that PEFT loads")


def _device(choice: str) -> torch.device:
    if choice == "cuda" and not torch.cuda.is_available():
        raise ValueError("--device cuda: this machine has no CUDA device")
    on_cuda = choice == "cuda" or (choice == "auto" and torch.cuda.is_available())
    return torch.device("cuda" if on_cuda else "cpu")


COMMANDS = {name: (made, run) for name, (made, _) in KINDS.items()}
