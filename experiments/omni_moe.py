"""Train an omni-modal sparse-MoE model on real data: it reads images, videos, spoken words and text, and draws.

Handwritten digits (scikit-learn), words in six languages, and speech by espeak-ng; nothing is downloaded. The run ends
with a table of accuracy on held-out writers, voices and combinations, and leaves under `runs/omni_moe/<time>/`:
metrics.jsonl, config.json, summary.json, curves.png, samples.png, step.html and checkpoints/.
"""

import os
import signal
import sys
import time
from contextlib import nullcontext
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # busy-waiting threads starve each other on a shared machine

import torch
import tyro
from rich.console import Console

from experiments.mesh import MeshFlags, any_rank, is_main, of_main, open_mesh
from experiments.omni import figures, job, run_folder
from experiments.omni.evaluation import GOALS, Evaluator, summary
from experiments.omni.job import Job
from experiments.omni.progress import Report, accuracy_table
from experiments.omni.run_folder import RunFolder
from experiments.omni.training import schedule
from ftrain import TrainState, tree
from ftrain.checkpoint import Checkpointer, Ranks, Retention
from ftrain.cost import Cost
from ftrain.hardware import peak_flops
from ftrain.interrupt import EXIT_RESUMABLE, StopRequest, interruptible
from sharding import Mesh

EXPERIMENT = "omni_moe"
_SHOWN = 6  # examples of each task in samples.png


@dataclass(frozen=True)
class Options:
    """Train the omni-modal MoE of the given size, and report how well it does on what it has never seen."""

    size: Literal["tiny", "small", "medium", "30b-a3b"] = "tiny"
    """Widths and depths; tiny is made for two CPU cores."""
    steps: int = 1050
    """Training steps."""
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
    remat: Literal["none", "layer", "all"] = "none"
    """What the backward pass computes again instead of keeping it."""
    held_out: int = 240
    """Held-out examples asked of each task at the end."""
    mesh: tyro.conf.OmitArgPrefixes[MeshFlags] = field(default_factory=MeshFlags)
    """Ranks: under torchrun one per process; otherwise sizes above 1 run in lockstep in this process."""
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
            if getattr(self, name) < least:
                raise ValueError(f"--{name.replace('_', '-')} must be at least {least}, not {getattr(self, name)}")
        if self.device == "cuda" and not torch.cuda.is_available():
            raise ValueError("--device cuda: this machine has no CUDA device")


# What must be the same for a resumed run to give the numbers of an uninterrupted one.
_FIXED = ("size", "steps", "tokenizer_steps", "seed")


def main(options: Options) -> int:
    """Run; the exit code is 0, or EXIT_RESUMABLE where a signal other than Ctrl-C stopped the run after a save."""
    torch.set_num_threads(options.threads)
    on_cuda = options.device == "cuda" or (options.device == "auto" and torch.cuda.is_available())
    device = torch.device("cuda" if on_cuda else "cpu")
    with open_mesh(options.mesh, device) as mesh:
        return _run(options, device, mesh)


def _run(options: Options, device: torch.device, mesh: Mesh | None) -> int:
    path, resumed = of_main(_choose_folder(options))
    run = RunFolder.create(path, _config(options, device)) if not resumed and is_main() else None
    report = Report(options.steps, console=_console())
    report.say(f"run folder: {path}")
    work = job.make(
        size=options.size,
        steps=options.steps,
        tokenizer_steps=options.tokenizer_steps,
        seed=options.seed,
        device=device,
        backend=options.backend,
        remat=options.remat,
        mesh=mesh,
        say=report.say,
    )
    ranks = Ranks.of_run() if mesh is not None and mesh.kind == "process" else None
    with Checkpointer(path / "checkpoints", keep=Retention(last=2), ranks=ranks) as checkpoints:
        done = checkpoints.latest() or 0 if resumed else 0
        if done:
            state = _to(checkpoints.restore(work.step.abstract(work.abstract_state(), device=device), done), device)
            report.say(f"resumed after step {done}")
        else:
            state = work.fresh_state(report.say)
        if is_main():
            run = run or RunFolder.resume(path, step=done)
        with run or nullcontext(), interruptible() as stop:
            state, done = _train(work, state, done, options, run, checkpoints, stop)
            if stop.requested:
                checkpoints.wait()
                report.say(f"stopped by {stop.signal.name if stop.signal else '?'} after step {done}, saved; "
                           f"go on with --resume {path}")  # fmt: skip
                return 0 if stop.signal == signal.SIGINT else EXIT_RESUMABLE
            state = work.step.whole(state)
            if run is not None:
                _finish(work, state, options, run, report)
    return 0


def _console() -> Console:
    return Console(quiet=not is_main())


def _choose_folder(options: Options) -> tuple[Path, bool]:
    """The run's folder, and whether a run in it goes on."""
    if options.resume not in ("auto", "none"):
        path = Path(options.resume)
        if options.out is not None and options.out != path:
            raise ValueError(f"--resume {path} and --out {options.out} name two folders: give one")
        _check_same(options, path)
        return path, True
    path = options.out or run_folder.default_path(EXPERIMENT)
    if options.resume == "auto" and options.out is not None and (path / run_folder.CONFIG).is_file():
        _check_same(options, path)
        return path, True
    return path, False


def _check_same(options: Options, path: Path) -> None:
    before = run_folder.read_config(path)
    for name in _FIXED:
        if before.get(name) != getattr(options, name):
            raise ValueError(
                f"the run in {path} has --{name} {before.get(name)}, not {getattr(options, name)}: a resumed run keeps "
                "its size, steps, tokenizer steps and seed; give the same, or another --out"
            )


def _config(options: Options, device: torch.device) -> dict[str, Any]:
    values = {k: str(v) if isinstance(v, Path) else v for k, v in asdict(options).items()}
    return {**values, "resolved_device": str(device), "torch": torch.__version__}


def _train(
    work: Job,
    state: TrainState,
    done: int,
    options: Options,
    run: RunFolder | None,
    checkpoints: Checkpointer,
    stop: StopRequest,
) -> tuple[TrainState, int]:
    """Train to the end or until asked to stop; the last step done is saved. Ranks stop together; one has the `run`."""
    rate, peak = schedule(work.config), peak_flops(work.device)
    flops = memory = None
    with Report(options.steps, first=done, console=_console()) as report:
        for number, whole_batch in enumerate(work.batches.ahead(done, options.steps), start=done + 1):
            batch = work.step.share(whole_batch)
            if flops is None or memory is None:
                compiled = work.step.lower(state, batch)
                flops, memory = _counted_flops(compiled.cost()), compiled.memory().total
                if run is not None:
                    compiled.report(run.path / "step.html")
            began = time.perf_counter()
            state, metrics = work.step(state, batch)
            loss, tokens = float(metrics["loss"]), int(metrics["tokens"])
            seconds = time.perf_counter() - began
            row = {
                "step": number,
                "loss": loss,
                **{f"loss/{task}": float(value) for task, value in metrics["terms"].items()},
                "lr": float(rate(torch.tensor(number - 1))),
                "grad_norm": float(metrics["grad_norm"]),
                "tokens_per_s": tokens / seconds,
                "mfu": flops / seconds / peak,
                "peak_bytes": memory,
            }
            report.update(row)
            done = number
            stopping = any_rank(stop.requested)
            due = options.checkpoint_every and number % options.checkpoint_every == 0
            if due or stopping or number == options.steps:
                checkpoints.save(state, number)
            checkpoints.check()
            if run is not None:
                run.log(row)
            if stopping:
                break
    return state, done


def _counted_flops(cost: Cost) -> int:
    """FLOPs that MFU counts: all but attention's scores, which depend on the documents and are few in short ones."""
    return sum(node.flops for node in cost.nodes if "attention" not in node.op)


def _finish(work: Job, state: TrainState, options: Options, run: RunFolder, report: Report) -> None:
    """Ask the held-out questions; write the table and the pictures."""
    report.say("asking held-out questions ...")
    evaluator = Evaluator(work.model, work.sources, work.judge, work.seed, count=options.held_out)
    answers = {task: evaluator.answers(task, state.params, state.extra["balance"]) for task in work.tasks}
    table = summary(answers, work.judge)
    run.summarise(table)
    figures.curves(run_folder.read_metrics(run.path), run.path / "curves.png")
    drawn = work.sources.held_out.drawn
    reals = {int(d): drawn.images_NHWC[i] for i, d in reversed(list(enumerate(drawn.labels_N)))}
    figures.samples({task: given[:_SHOWN] for task, given in answers.items()}, reals, run.path / "samples.png")
    report.console.print(accuracy_table(table["held_out"], counts=table["examples"], goals=GOALS))
    report.say(f"wrote {run.path}/ summary.json, metrics.jsonl, curves.png, samples.png, step.html")


def _to(state: Any, device: torch.device) -> Any:
    return tree.map(lambda leaf: leaf.to(device), state)


if __name__ == "__main__":
    try:
        sys.exit(main(tyro.cli(Options)))
    except ValueError as error:
        sys.exit(f"{Path(sys.argv[0]).name}: {error}")
