"""Train an omni-modal sparse-MoE model on real data: it reads images, videos, spoken words and text, draws and speaks.

Handwritten digits (scikit-learn), words in six languages, and speech by espeak-ng; nothing is downloaded. The run ends
with a table of accuracy on held-out writers, voices and combinations, and leaves under `runs/omni_moe/<time>/`:
metrics.jsonl, config.json, summary.json, curves.png, samples.png, spoken.wav, step.html and checkpoints/.
"""

import os
import signal
import sys
import time
from contextlib import nullcontext
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # busy-waiting threads starve each other on a shared machine

import torch
import tyro
from rich.console import Console

from experiments.omni import corpus, figures, font, job, run_length, vocoder
from experiments.omni.evaluation import GOALS, NOVEL_GOALS, Evaluator, accuracy_table, summary
from experiments.omni.job import Job
from experiments.omni.planning import mesh_flags, plan_for_search
from experiments.omni.run_length import Length
from experiments.omni.survival import Guard, SurvivalFlags, spared_output
from experiments.omni.training import schedule
from ftrain import TrainState, checkpoint, tree
from ftrain.analysis.cuda_allocator import prefer_expandable_segments
from ftrain.analysis.flops import Cost
from ftrain.analysis.hardware import peak_flops
from ftrain.checkpoint import Checkpointer, Ranks, Retention
from ftrain.modules import omni
from ftrain.resilience.anomalies import Verdict
from ftrain.resilience.replicas import check_replicas
from ftrain.resilience.signals import EXIT_NOT_FINITE, EXIT_NOT_SAVED, EXIT_RESUMABLE, StopRequest, interruptible
from ftrain.resilience.watchdog import Watchdog
from ftrain.run import folder as run_folder
from ftrain.run.folder import RunFolder
from ftrain.run.late import Done, Issued, LateReader
from ftrain.run.progress import Report, SteadyConsole
from ftrain.run.ranks import MeshFlags, any_rank, asked_of_ranks, is_main, of_main, open_mesh, refuse_foreign_flags
from ftrain.run.saves import Saves
from ftrain.runtime.host_copy import HostCopy
from ftrain.sharding import Mesh
from ftrain.trace.precision import Choice, precision_on

__all__ = ["Options", "main", "plan_for_search"]

EXPERIMENT = "omni_moe"
_SHOWN = 6  # examples of each task in samples.png
_NOVEL = "of these, combinations that training leaves out"


@dataclass(frozen=True)
class Options:
    """Train the omni-modal MoE of the given size, and report how well it does on what it has never seen."""

    size: Literal["smoke", "tiny", "small", "medium", "30b-a3b"] = "tiny"
    """Widths, depths and how much data is made, of which larger models see more. tiny is made for two CPU cores, smoke
    only shows that all parts run."""
    steps: int | None = None
    """Training steps; default 1100, or as many as the run has that goes on. More of them make it longer."""
    decay: Literal["cosine", "constant"] = "cosine"
    """Of the learning rate after its warm-up: down to the end of the run, or not at all, whatever its length."""
    tokenizer_steps: int = 300
    """Steps of the image tokenizer, which is trained first and then frozen."""
    seed: int = 0
    """Of initial weights, data order and sampling: one seed, one result."""
    out: Path | None = None
    """Folder of the run; default runs/omni_moe/<time>."""
    checkpoint_every: int = 250
    """Steps between checkpoints; the last step is always saved. 0: only the last."""
    resume: str = "auto"
    """auto: go on with the run in --out if it has one; none: never; or the folder of a run to go on with."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """auto: CUDA where there is one."""
    backend: Literal["auto", "aten", "inductor", "cudagraph"] = "auto"
    """How the step's graph is run."""
    precision: Choice = "auto"
    """In which dtype losses and answers are computed (parameters and optimizer stay float32). auto: bfloat16 on CUDA,
    float32 on a CPU."""
    remat: Literal["none", "layer", "all"] = "none"
    """What the backward pass computes again instead of keeping it."""
    held_out: int = 240
    """Held-out examples asked of each task at the end."""
    mesh: tyro.conf.OmitArgPrefixes[MeshFlags] = field(default_factory=MeshFlags)
    """Ranks: under torchrun one per process; otherwise sizes above 1 run in lockstep in this process."""
    plan: str | None = None
    """auto: search the best layout of these ranks at start-up; or a file that `ftrain plan --apply` wrote, in the place
    of the mesh's sizes. Either also says what is recomputed."""
    survival: tyro.conf.OmitArgPrefixes[SurvivalFlags] = field(default_factory=SurvivalFlags)
    """Bad steps, hangs, silent corruption."""
    threads: int = 1
    """CPU threads of each op. One leaves the other cores to data and keeps sums in one order on any machine."""

    def __post_init__(self) -> None:
        for name, least in (
            ("steps", 1),
            ("tokenizer_steps", 1),
            ("seed", 0),
            ("checkpoint_every", 0),
            ("held_out", 1),
            ("threads", 1),
        ):
            value = getattr(self, name)
            if value is not None and value < least:
                raise ValueError(f"--{name.replace('_', '-')} must be at least {least}, not {value}")
        if self.device == "cuda" and not torch.cuda.is_available():
            raise ValueError("--device cuda: this machine has no CUDA device")


# What must be the same for a resumed run to give the numbers of an uninterrupted one.
_FIXED = ("size", "decay", "tokenizer_steps", "seed")


def main(options: Options) -> int:
    """Run; the exit code is 0, EXIT_RESUMABLE where a signal other than Ctrl-C stopped the run after a save,
    EXIT_NOT_SAVED where the last save failed, EXIT_NOT_FINITE where the run ended on a loss that is not finite."""
    prefer_expandable_segments()
    torch.set_num_threads(options.threads)
    on_cuda = options.device == "cuda" or (options.device == "auto" and torch.cuda.is_available())
    device = torch.device("cuda" if on_cuda else "cpu")
    with open_mesh(mesh_flags(options.plan, options.mesh), device) as mesh:
        return _run(options, device, mesh)


def _run(options: Options, device: torch.device, mesh: Mesh | None) -> int:
    font.find()  # before hours of training, not after them
    path, resumed, length = of_main(_choose_folder(options))
    config = _config(options, length, device, mesh)
    run = RunFolder.create(path, config) if not resumed and is_main() else None
    report = Report(length.steps, console=_console())
    report.say(f"run folder: {path}")
    work = job.make(
        size=options.size,
        steps=length.steps,
        earlier=length.earlier,
        decay=options.decay,
        tokenizer_steps=options.tokenizer_steps,
        seed=options.seed,
        device=device,
        backend=options.backend,
        remat=options.remat,
        precision=precision_on(device, options.precision),
        mesh=mesh,
        plan=options.plan,
        say=report.say,
    )
    if length.longer:
        report.say(run_length.made_longer(length, work.config))
    ranks = Ranks.of_run() if mesh is not None and mesh.kind == "process" else None
    specs = omni.specs(work.model)
    with Checkpointer(path / "checkpoints", keep=Retention(last=2), ranks=ranks, specs=specs) as checkpoints:
        done = checkpoints.latest() or 0 if resumed else 0
        state = _state_after(done, work, checkpoints, report)
        if is_main():
            run = run or RunFolder.resume(path, step=done)
            if length.longer:
                run.configure({**run_folder.read_config(path), "steps": length.steps, "earlier": length.earlier})
        with run or nullcontext(), interruptible() as stop:
            guard = Guard(options.survival.policy(), path, done=done, last=length.steps)
            saves = Saves(checkpoints, run, say=report.say, most_failed=options.survival.failed_saves)
            with options.survival.watchdog(path) as watchdog:
                training = _Training(work, options, length.steps, run, checkpoints, saves, stop, guard, watchdog)
                state, done = _train(training, state, done)
            code = 0 if saves.held else EXIT_NOT_SAVED
            if any_rank(stop.requested):
                why = stop.signal.name if stop.signal else "another rank"
                said = "saved" if saves.held else "NOT saved: it goes on from the last step that was"
                report.say(f"stopped by {why} after step {done}, {said}; go on with --resume {path}")
                return code or (0 if any_rank(stop.signal == signal.SIGINT) else EXIT_RESUMABLE)
            if not guard.finite:
                report.say(f"the loss or gradient of step {done} is not finite: nothing is evaluated")
                return EXIT_NOT_FINITE
            state = work.step.whole(state)
            if run is not None:
                _finish(work, state, options, run, report)
    return code


def _console() -> Console:
    return SteadyConsole(quiet=not is_main())


def _choose_folder(options: Options) -> tuple[Path, bool, Length]:
    """The run's folder, whether a run in it goes on, and how long the run is."""
    if options.resume not in ("auto", "none"):
        path = Path(options.resume)
        if options.out is not None and options.out != path:
            raise ValueError(f"--resume {path} and --out {options.out} name two folders: give one")
        return path, True, _goes_on(options, path)
    path = options.out or run_folder.default_path(EXPERIMENT)
    if options.resume == "auto" and options.out is not None and (path / run_folder.CONFIG).is_file():
        return path, True, _goes_on(options, path)
    return path, False, Length(run_length.DEFAULT if options.steps is None else options.steps)


def _goes_on(options: Options, path: Path) -> Length:
    before = run_folder.read_config(path)
    for name in _FIXED:
        had = before.get(name, "cosine" if name == "decay" else None)
        if had != getattr(options, name):
            raise ValueError(
                f"the run in {path} has --{name.replace('_', '-')} {had}, not {getattr(options, name)}: a resumed run "
                "keeps its size, decay, tokenizer steps and seed; give the same, or another --out"
            )
    done = checkpoint.latest(path / "checkpoints") or 0
    return run_length.continued(before, options.steps, done=done, run=path)


def _config(options: Options, length: Length, device: torch.device, mesh: Mesh | None) -> dict[str, Any]:
    values = {k: str(v) if isinstance(v, Path) else v for k, v in asdict(options).items()}
    sizes = None if mesh is None else {a: getattr(mesh, a) for a in ("replicate", "shard", "sequence", "expert")}
    precision = precision_on(device, options.precision).compute
    found = {
        "resolved_device": str(device),
        "resolved_precision": precision,
        "resolved_mesh": sizes,
        "torch": torch.__version__,
    }
    return {**values, **found, "steps": length.steps, "replay": "experiments.omni.replay"}


@dataclass(frozen=True)
class _Training:
    """What the loop works with; one rank has the `files`. `steps`: of the whole run."""

    work: Job
    options: Options
    steps: int
    files: RunFolder | None
    checkpoints: Checkpointer
    saves: Saves
    stop: StopRequest
    guard: Guard
    watchdog: Watchdog | None


def _train(t: _Training, state: TrainState, done: int) -> tuple[TrainState, int]:
    """Train to the end or until asked to stop, undoing bad steps; the last step done is saved. Ranks stop together."""
    report = Report(t.steps, console=_console())
    while True:
        state, done, verdict = _train_on(t, state, done)
        if verdict is Verdict.GO_ON:
            return state, done
        done, words = t.guard.go_back(t.checkpoints)
        report.say(words)
        if t.files is not None:
            t.files.go_back(done)
        state = _state_after(done, t.work, t.checkpoints, report)


def _train_on(t: _Training, state: TrainState, done: int) -> tuple[TrainState, int, Verdict]:
    """Train until a step says that the run must go back, or else to the end.

    Each step is judged and logged when the next one is under way, but for one that is saved, which is judged before.
    """
    options, prices = t.options, None
    with Report(t.steps, first=done, console=_console()) as report:
        late = LateReader(lambda step: _judged(t, step, prices, report))
        for number, whole_batch in enumerate(t.guard.batches(t.work.batches, done, t.steps), start=done + 1):
            batch = t.work.step.share(whole_batch)
            prices = prices or _prices(t, state, batch)
            stop_asked = asked_of_ranks(lambda: t.stop.requested)
            began = time.perf_counter()
            state, metrics = t.work.step(state, batch)
            done = number
            verdict = late.issued(Issued(number, whole_batch, HostCopy(metrics), began, time.perf_counter()))
            if verdict is Verdict.ROLL_BACK:
                return state, done, verdict
            if options.survival.check_replicas and number % options.survival.check_replicas == 0:
                check_replicas(state)
            stopping = stop_asked()
            last = stopping or number == t.steps
            wanted = not last and t.saves.wanted(number)
            if last or wanted or _due(options, number):
                verdict = late.flush()
                if verdict is Verdict.ROLL_BACK:
                    return state, done, verdict
                if last:
                    t.saves.save_now(state, number, good=t.guard.calm)
                elif wanted or t.guard.calm:
                    t.saves.save(state, number, good=t.guard.calm)
            if t.watchdog is not None and late.read is not None:
                t.watchdog.step_ended(late.read)
            if stopping:
                break
    return state, done, Verdict.GO_ON


def _judged(t: _Training, step: Done, prices: tuple[float, int] | None, report: Report) -> Verdict:
    """Judge, show and log a step."""
    assert prices is not None
    row = _row(t.work, step, prices)
    verdict = t.guard.look(row, step.batch)
    report.update(row)
    if t.files is not None:
        t.files.log({**row, **t.guard.counts()})
    return verdict


def _due(options: Options, number: int) -> bool:
    return options.checkpoint_every > 0 and number % options.checkpoint_every == 0


def _prices(t: _Training, state: TrainState, batch: Any) -> tuple[float, int]:
    """The step's FLOPs in seconds of the device's peak, and its peak bytes; its report is written."""
    compiled = t.work.step.lower(state, batch)
    if t.files is not None:
        with spared_output("step.html"):
            compiled.report(t.files.path / "step.html", title=_title(t.work, t.files))
    return _counted_flops(compiled.cost()) / peak_flops(t.work.device, t.work.precision.dtype), compiled.memory().total


def _row(work: Job, step: Done, prices: tuple[float, int]) -> dict[str, Any]:
    """The step's metrics as numbers."""
    metrics = step.metrics
    return {
        "step": step.number,
        "loss": float(metrics["loss"]),
        **{f"loss/{task}": float(value) for task, value in metrics["terms"].items()},
        "lr": float(schedule(work.config)(torch.tensor(int(metrics["updates"])))),
        "grad_norm": float(metrics["grad_norm"]),
        "dropped": float(metrics["dropped"]),
        "tokens_per_s": int(metrics["tokens"]) / step.seconds,
        "mfu": prices[0] / step.seconds,
        "peak_bytes": prices[1],
    }


def _state_after(done: int, work: Job, checkpoints: Checkpointer, report: Report) -> TrainState:
    if done == 0:
        return work.fresh_state(report.say)
    state = checkpoints.restore(work.step.abstract(work.abstract_state(), device=work.device), done)
    report.say(f"resumed after step {done}")
    return tree.map(lambda leaf: leaf.to(work.device), state)


def _title(work: Job, run: RunFolder) -> str:
    """What stands over a run's pictures: the model and the run."""
    return f"omni MoE, size {work.size}, run {run.path.name}"


def _counted_flops(cost: Cost) -> int:
    """FLOPs that MFU counts: the model's, each once, but for attention's scores, which depend on the documents and are
    few in short ones. Neither recompute nor the optimizer makes a run look faster."""
    nodes = [node for node in cost.nodes if "attention" not in node.op]
    return replace(cost, nodes=nodes).model_flops


def _finish(work: Job, state: TrainState, options: Options, run: RunFolder, report: Report) -> None:
    """Ask the held-out questions; write the table and the pictures."""
    report.say("asking held-out questions ...")
    evaluator = Evaluator(work.model, work.sources, work.judge, work.listener, work.seed, count=options.held_out)
    params = work.precision.cast(state.params)
    answers = {task: evaluator.answers(task, params, state.extra["balance"]) for task in work.tasks}
    table = summary(answers, work.judge, work.listener)
    run.summarise(table)
    title = _title(work, run)
    figures.curves(run_folder.read_metrics(run.path), run.path / "curves.png", title=title)
    drawn = work.sources.held_out.drawn
    reals = {int(d): drawn.images_NHWC[i] for i, d in reversed(list(enumerate(drawn.labels_N)))}
    shown = {task: given[:_SHOWN] for task, given in answers.items()}
    figures.samples(shown, reals, run.path / "samples.png", title=title)
    said = [a.wave_S for given in shown.values() for a in given if a.wave_S is not None]
    if said:
        vocoder.write_wav(run.path / "spoken.wav", said, rate=corpus.RATE)
    report.show(accuracy_table(table["held_out"], counts=table["examples"], goals=GOALS))
    if table["novel"]:
        report.show(accuracy_table(table["novel"], counts=table["novel_examples"], goals=NOVEL_GOALS, title=_NOVEL))
    also = ", spoken.wav" if said else ""
    report.say(f"wrote {run.path}/ summary.json, metrics.jsonl, curves.png, samples.png{also}, step.html")


if __name__ == "__main__":
    try:
        refuse_foreign_flags(sys.argv[1:])
        sys.exit(main(tyro.cli(Options)))
    except ValueError as error:
        sys.exit(f"{Path(sys.argv[0]).name}: {error}")
