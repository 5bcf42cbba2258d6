"""The loop of a training run: steps, numbers, held-out losses, saves; from a fresh state or from the last save.

It is one page on purpose. A script that needs another loop copies it.
"""

import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, NamedTuple

from ftrain.checkpoint import Checkpointer, Retention
from ftrain.data.loader import Loader
from ftrain.data.loader import Step as Read
from ftrain.data.position import Position
from ftrain.kernels import random
from ftrain.kernels.mean import Mean
from ftrain.plan.auto import AutoPlan, SavedPlan
from ftrain.plan.jit import jit
from ftrain.resilience.anomalies import BadSteps, Verdict
from ftrain.resilience.skipped import read_skipped
from ftrain.run.averages import with_average
from ftrain.run.example import example_of
from ftrain.run.folder import RunFolder
from ftrain.run.guard import Guard
from ftrain.run.late import Done, Issued, LateReader
from ftrain.run.progress import Report
from ftrain.run.ranks import of_main
from ftrain.run.recipe import Recipe, kept, restored
from ftrain.run.samples import FILE, Samples, write
from ftrain.run.saves import NotSaved, Saves
from ftrain.run.session import Run
from ftrain.run.trackers import Log
from ftrain.runtime.host_copy import HostCopy
from ftrain.sharding import Plan
from ftrain.step.api import Step
from ftrain.step.state import TrainState

CHECKPOINTS, AUTO = "checkpoints", "auto"
_FAILED_SAVES = 10  # in a row, as on a full disk, before the run ends


@dataclass(frozen=True)
class Every:
    """How often things happen, in steps. ValueError for numbers below what makes sense."""

    save: int = 250
    """A checkpoint; the last step is always saved. 0: only that."""
    evaluate: int = 100
    """The held-out loss, which is measured at the start and the end too. 0: only there."""
    keep: int = 2
    """So many of the last checkpoints stay, and the one with the best held-out loss."""
    samples: int = 2
    """So many held-out prompts are answered then, into samples.jsonl, in a run of one process."""
    give_up: int = 10
    """So many steps in a row with gradients that are not finite end the run; each changes nothing."""

    def __post_init__(self) -> None:
        for name, least in (("save", 0), ("evaluate", 0), ("keep", 1), ("samples", 0), ("give_up", 1)):
            if getattr(self, name) < least:
                raise ValueError(f"{name}={getattr(self, name)} must be at least {least}")


@dataclass(frozen=True)
class Training:
    """What `train` works with.

    - `recipe`: the pure functions. `loader`: the steps' batches, with all packs in each.
    - `held_out`: batches of which the mean loss is taken. `steps`: the last step, where the loader does not end before.
    - `plan`: "auto" searches the fastest layout within `memory` of a rank; a file that `ftrain plan --apply` wrote has
      it; None takes the sizes of the run's mesh.
    - `jit`: options of `jit` for the step, such as remat and precision.
    - `samples`: what is answered where the held-out loss is measured; None for nothing, as on several processes.
    - `show`: writes what the model makes of a recipe, a state and the number of the step, where held-out losses are
      measured; a line for the log.
    - `averaged`: held-out losses and answers are those of the running average, where the optimizer keeps one.
    - `bad`: which steps are bad, and when the run goes back to before them and leaves out their batches; None: never.
    - `files`: the run's folder, on the rank that writes. `report`: what a person sees. `trackers`: further logs.
    """

    recipe: Recipe
    loader: Loader
    folder: Path
    files: RunFolder | None
    report: Report
    steps: int
    seed: int = 0
    every: Every = Every()
    held_out: Iterable[Mapping[str, Any]] = ()
    jit: Mapping[str, Any] = field(default_factory=dict)
    plan: str | None = None
    memory: int | str = "95%"
    trackers: tuple[Log, ...] = ()
    samples: Samples | None = None
    show: Callable[[Recipe, TrainState, int], str] | None = None
    averaged: bool = False
    bad: BadSteps | None = None


class Prepared(NamedTuple):
    """A step that is ready to run: its `plan`, the jitted `step`, the state that the run begins with, and `peak`, the
    most bytes of a rank that a step is planned to hold.
    """

    plan: Plan
    step: Step
    state: TrainState
    peak: int


def prepare(t: Training, run: Run) -> Prepared:
    """Lay out the step, make and load its state, and trace it: nothing is written yet. All ranks call this together.

    ValueError for a layout that cannot be, for what a step refuses, and for weights that do not fit.
    """
    plan, step = laid_out(t, run)
    state = fresh(t, run, step)
    compiled = step.lower(state, run.share(example_of(t.loader), plan=plan))
    return Prepared(plan, step, state, compiled.memory().total)


def train(t: Training, run: Run, prepared: Prepared | None = None) -> TrainState:
    """Train to the end, or until a signal stops the run; the last step is saved. Returns the state.

    All ranks call this together. `prepared`: by `prepare`, whose state is used up. NotSaved, which ends the process,
    where the disk takes no checkpoint. ValueError for what a step refuses, for a checkpoint of other parameters, and
    for data that the loader refuses.
    """
    ready = prepared or prepare(t, run)
    evaluate = evaluator(t, run, ready.plan)
    best = {"best": 1, "metric": "loss"} if t.held_out else {}
    keep = Retention(last=t.every.keep, **best)  # type: ignore[arg-type]
    checkpoints = run.checkpointer(t.folder / CHECKPOINTS, keep=keep, specs=t.recipe.specs)
    saves = Saves(checkpoints, t.files, say=t.report.say, most_failed=_FAILED_SAVES)
    going = Going(t, run, ready, evaluate, saves)
    state, position, done = resumed(t, checkpoints, ready.state)
    if done == 0 and (t.held_out or t.show is not None):
        note(t, 0, evaluate(state) if t.held_out else {})
        answer(t, 0, state)
    going.guard = None if t.bad is None else Guard(t.bad, t.folder, done=done, last=t.steps)
    with t.report:
        while True:
            state, verdict = train_on(going, state, position, done)
            if verdict is Verdict.GO_ON or going.guard is None:
                break
            done, words = going.guard.go_back(checkpoints)
            t.report.say(words)
            if t.files is not None:
                t.files.go_back(done)
            state, position, done = resumed(t, checkpoints, state if done else fresh(t, run, ready.step))
    if not saves.held:
        raise NotSaved
    return state


def train_on(g: "Going", state: TrainState, position: Position, done: int) -> tuple[TrainState, Verdict]:
    """Train after step `done` until a step says that the run must go back, or else to the end, which is saved."""
    t, run, guard = g.t, g.run, g.guard
    late = LateReader(lambda step: shown(g, step))  # the numbers of a step are read when the next one is under way
    for number, (data, is_end) in zip(run.steps(done, t.steps), ending(batches(g, position)), strict=False):
        began = time.perf_counter()
        state, metrics = g.ready.step(state, run.share(data.batch, plan=g.ready.plan))
        position, over = data.position, is_end or run.is_last
        verdict = late.issued(Issued(number, data, HostCopy(metrics), began, time.perf_counter()))
        looked = over or is_due(number, t.every.evaluate)
        saved = not over and (g.saves.wanted(number) or is_due(number, t.every.save))
        if verdict is Verdict.GO_ON and (looked or (saved and guard is not None)):
            verdict = late.flush()
        if verdict is Verdict.ROLL_BACK:
            return state, verdict
        loss = note(t, number, g.evaluate(state)) if looked and t.held_out else None
        if looked:
            answer(t, number, state)
        calm = guard is None or guard.calm
        if over:
            g.saves.save_now(kept_of(t, state, position), number, metrics=loss, good=calm)
            break
        if saved:
            g.saves.save(kept_of(t, state, position), number, metrics=loss, good=calm)
    return state, Verdict.GO_ON


@dataclass
class Going:
    """A run that is under way: what is `ready` of it, what can `evaluate` a state, its `saves`, and its `guard`."""

    t: Training
    run: Run
    ready: Prepared
    evaluate: Callable[[TrainState], dict[str, float]]
    saves: Saves
    guard: Guard | None = None


def batches(g: "Going", position: Position) -> Iterator[Read]:
    """The steps' batches after a position, without those that the run leaves out."""
    loader = g.t.loader
    left_out = (of_main(read_skipped(g.t.folder)) if g.guard is None else g.guard.skipped).positions
    if loader.steps is not None:
        loader = replace(loader, steps=loader.steps + len(left_out))
    steps = loader.read(position)
    try:
        for read in steps:
            if read.position.step - 1 not in left_out:
                yield read
    finally:
        steps.close()  # type: ignore[attr-defined]


def fresh(t: Training, run: Run, step: Step) -> TrainState:
    """The state at step 0, with the weights of folders."""
    state = step.init(t.recipe.init, random.key(t.seed).to(run.device))
    t.recipe.load(state)
    return state


def is_due(number: int, every: int) -> bool:
    """Whether something that happens `every` so many steps, or never for 0, does after step `number`."""
    return every > 0 and number % every == 0


def laid_out(t: Training, run: Run) -> tuple[Plan, Step]:
    """The plan of the run, and the jitted step: by the sizes of the run's mesh, by a plan file, or by a search."""
    options: dict[str, Any] = {"specs": t.recipe.specs, "donate": "state", **t.jit}
    rules = t.recipe.model.rules if t.loader.finish is not None else {}
    if t.plan is None:
        plan = run.plan(batch=rules)
        return plan, jit(t.recipe.train_step, plan=plan, **options)
    kind: Any = run.mesh.kind
    if t.plan == AUTO:
        packs = t.loader.packing.packs // t.recipe.micro_batches
        source: Any = AutoPlan(ranks=run.mesh.size, kind=kind, packs=packs, memory=t.memory, batch=rules)
    else:
        source = SavedPlan(t.plan, kind=kind)
    step = jit(t.recipe.train_step, plan=source, **options)
    chosen = step.choose(t.recipe.abstract(), example_of(t.loader))
    plan = Plan(run.mesh, batch=rules) if chosen is None else chosen
    t.report.say(f"plan: {plan.mesh}, of {t.plan}")
    return plan, step


def ending(steps: Iterator[Read]) -> Iterator[tuple[Read, bool]]:
    """Each step, and whether it is the last one that the data has."""
    try:
        before = next(steps, None)
        while before is not None:
            after = next(steps, None)
            yield before, after is None
            before = after
    finally:
        steps.close()  # type: ignore[attr-defined]


def evaluator(t: Training, run: Run, plan: Plan) -> Callable[[TrainState], dict[str, float]]:
    """The mean held-out loss of a state, `held_out`, and each of its terms, on the plan of the run."""
    options = {name: value for name, value in t.jit.items() if name in ("precision", "backend")}
    function = jit(t.recipe.evaluate, plan=plan, specs=t.recipe.specs, **options)

    def evaluate(state: TrainState) -> dict[str, float]:
        state = with_average(state) if t.averaged else state
        found = [function(state, run.share(batch, plan=plan)) for batch in t.held_out]
        pooled = {
            name: Mean.pool([Mean(of[name].total.cpu(), of[name].count.cpu()) for of in found]).item()
            for name in (found[0] if found else ())
        }
        return {("held_out" if name == "loss" else f"held_out/{name}"): value for name, value in pooled.items()}

    return evaluate


def kept_of(t: Training, state: TrainState, position: Position) -> dict[str, Any]:
    """What a checkpoint holds: the state without parameters that a folder has, and the position in the data."""
    return {"state": kept(state), "data": position.tree(t.loader.packing.capacity)}


def resumed(t: Training, checkpoints: Checkpointer, state: TrainState) -> tuple[TrainState, Position, int]:
    """The state and position of the last checkpoint, and its step; those of the start where there is none."""
    done = checkpoints.latest()
    if not done:
        return state, t.loader.start(), 0
    wanted = kept_of(t, state, t.loader.start()) | {"data": Position.abstract(t.loader.packing.capacity)}
    found = checkpoints.restore(wanted, done)
    t.report.say(f"goes on after step {done}")
    return restored(t.recipe, found["state"], state), Position.of(found["data"]), done


def shown(g: Going, step: Done) -> Verdict:
    """Show and log a step's numbers, and judge it. ValueError once too many steps in a row changed nothing."""
    t, found, facts = g.t, step.metrics, step.batch.facts
    row = {
        "step": step.number,
        "loss": float(found["loss"]),
        **{f"loss/{name}": float(value) for name, value in found["terms"].items()},
        "grad_norm": float(found["grad_norm"]),
        "tokens_per_s": facts.tokens / max(step.seconds, 1e-9),
        "labels": int(found["labels"]),
        "documents": facts.documents,
        "filled": facts.tokens / facts.budget,
        "epochs": round(facts.epochs, 4),
        "rejected": facts.rejected,
        "shapes": facts.shapes,
        "peak_bytes": g.ready.peak,
    }
    t.report.update(row)
    verdict = Verdict.GO_ON if g.guard is None else g.guard.look(row, step.batch.batch)
    if t.files is not None:
        t.files.log(row if g.guard is None else {**row, **g.guard.counts()})
    for log in t.trackers:
        log(step.number, {name: value for name, value in row.items() if name != "step"})
    skipped = int(found["skipped_in_a_row"])
    if skipped >= t.every.give_up:
        raise ValueError(
            f"{skipped} steps in a row up to step {step.number} had gradients that are not finite and changed "
            "nothing: take a lower rate, or look for the row or op that makes them (ftrain.debug.check_finite)"
        )
    return verdict


def answer(t: Training, number: int, state: TrainState) -> None:
    """Answer the run's prompts; a disk that does not take them is said, and ends nothing."""
    if t.show is not None:
        try:
            t.report.say(t.show(t.recipe, with_average(state) if t.averaged else state, number))
        except OSError as error:
            t.report.say(f"what the model makes cannot be written: {error}")
    if t.samples is None or not t.samples.prompts:
        return
    answered = t.samples.of(t.recipe, with_average(state) if t.averaged else state)
    prompt, words = answered[0]
    t.report.say(f"  {prompt.rpartition(chr(10))[2][-60:]!r} -> {words!r}")
    if t.files is not None:
        try:
            write(t.folder, number, answered)
        except OSError as error:
            t.report.say(f"{t.folder / FILE} cannot be written: {error}")


def note(t: Training, number: int, found: dict[str, float]) -> dict[str, float] | None:
    """Show and log held-out numbers; as metrics of a checkpoint."""
    if not found:
        return None
    t.report.say(f"step {number}: held-out loss {found['held_out']:.4f}")
    if t.files is not None:
        t.files.log({"step": number, **found})
    for log in t.trackers:
        log(number, found)
    return {"loss": found["held_out"]}
