"""What a GPU tells about ftrain in a few minutes: is it right, how fast, beside whom, and why as fast as it is.

    python3 -m experiments.bench.gpu --out out                      # on a machine with a card, from the project's root
    CUDA_VISIBLE_DEVICES=0 python3 -m experiments.bench.gpu --only machine speed --out out

Stages come in the order of what they are worth. Each is a process of its own with a box of seconds: a CUDA error, a
capture that fails, an abort or a hang ends that stage alone. After each stage `out` holds what is known so far:
`gpu.json` (all that was told), `rows.json` (the figures, as all benches write them), `stages.log` (the output), and at
the end `op-times-<card>.json`, which `ftrain plan --op-times FILE` prices steps by on any machine.

A rehearsal needs no card: on the null device (`make test-nullgpu` builds it, tests/nullgpu/device) every stage runs or
is stopped by its box, and its figures mean nothing. `--tiny` shrinks the sizes.

    N=$PWD/build/nullgpu; LD_PRELOAD="$N/libnullgpu.so $N/libnvrtc.so.13" LD_LIBRARY_PATH=$N TRITON_LIBCUDA_PATH=$N \\
        .venv-cuda/bin/python -m experiments.bench.gpu --out /tmp/rehearsal

Compile caches that a rehearsal fills (TORCHINDUCTOR_CACHE_DIR, TRITON_CACHE_DIR) may travel to the card.
"""

import json
import os
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

import tyro

from experiments.bench.card import kernels, machine, right, suite, training
from experiments.bench.card.boxed import run_boxed
from experiments.bench.card.telling import Ceilings, Found, Stage, heard
from experiments.bench.table import Row, publish, write_json

ROOT = Path(__file__).resolve().parents[2]
_LEAST, _RESERVE = 10.0, 8.0
"""Seconds under which no stage begins, and those kept to write and print what was found."""
_LOG_LINES, _TAIL_LINES = 400, 12


class Box(NamedTuple):
    """A stage and the seconds that it may take."""

    run: Callable[[Stage], None]
    seconds: float


STAGES = {
    "machine": Box(machine.machine, 35),
    "right": Box(right.right, 50),
    "speed": Box(training.speed, 75),
    "graph": Box(training.graph, 45),
    "profile": Box(training.profiled, 35),
    "op_times": Box(training.op_times, 30),
    "steps": Box(training.steps, 75),
    "memory": Box(training.memory, 35),
    "attention": Box(kernels.attentions, 30),
    "products": Box(kernels.products, 30),
    "peers": Box(training.peers, 60),
    "tests": Box(suite.gpu_tests, 45),
}


@dataclass(frozen=True)
class Options:
    """Command line of the bench."""

    out: Path = Path("gpu-results")
    """folder for what is found; it is made"""
    limit: float = 430.0
    """seconds for everything; the last stages are cut or left out"""
    only: tuple[str, ...] = ()
    """stages to run; default: all"""
    tiny: bool = False
    """small sizes: a rehearsal"""
    stage: str | None = None
    """run this stage here, in this process; what the bench starts for each stage"""
    ceilings: str | None = None
    """what the machine stage found, as JSON, for a stage; default: it measures for itself"""

    def __post_init__(self) -> None:
        unknown = {*self.only, *([self.stage] if self.stage else [])} - set(STAGES)
        if unknown:
            raise ValueError(f"no stage is called {', '.join(sorted(unknown))}; stages are {', '.join(STAGES)}")


@dataclass(frozen=True)
class Outcome:
    """How a stage ended ("ok", "exit 1", "stopped after 60 s"), after how long, what it told, and its last words."""

    ended: str
    seconds: float
    found: Found
    tail: list[str]


def main(options: Options) -> int:
    """Run the stages; the exit code is 1 if one did not end well or a figure misses its goal."""
    if options.stage is not None:
        _here(options.stage, options)
    options.out.mkdir(parents=True, exist_ok=True)
    outcomes: dict[str, Outcome] = {}
    for name in options.only or STAGES:
        left = options.limit - _RESERVE - _age()
        if left < _LEAST:
            print(f"{name}: no time is left", flush=True)
            continue
        ceilings = outcomes["machine"].found.notes.get("ceilings") if "machine" in outcomes else None
        outcomes[name] = _apart(name, min(STAGES[name].seconds, left), ceilings, options)
        _write(outcomes, options.out)
        print(f"{name}: {outcomes[name].ended}, {outcomes[name].seconds:.1f} s", flush=True)
    rows = _rows(outcomes)
    publish(rows, f"gpu, {_device(outcomes)}, {_age():.0f} s", None)
    return int(any(o.ended != "ok" for o in outcomes.values()) or any(r.ok is False for r in rows))


def _age() -> float:
    """Seconds since this process was started, imports included."""
    ticks = int(Path("/proc/self/stat").read_text().rsplit(")", 1)[1].split()[19])
    return time.clock_gettime(time.CLOCK_BOOTTIME) - ticks / os.sysconf("SC_CLK_TCK")


def _here(name: str, options: Options) -> None:
    """Run a stage and end the process at once: Inductor's pool of workers may take minutes to end."""
    known = Ceilings(**json.loads(options.ceilings)) if options.ceilings else None
    STAGES[name].run(Stage(tiny=options.tiny, out=options.out, known=known))
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)


def _apart(name: str, seconds: float, ceilings: Any, options: Options) -> Outcome:
    """Run a stage in a process of its own, and stop it with all that it started when its box is over."""
    command = [sys.executable, "-X", "faulthandler", "-m", "experiments.bench.gpu", "--stage", name]
    command += ["--out", str(options.out.absolute()), *(["--tiny"] if options.tiny else [])]
    command += ["--ceilings", json.dumps(ceilings)] if ceilings else []
    ended, took, lines = run_boxed(command, seconds=seconds, folder=ROOT, environment=_environment(name, options))
    with (options.out / "stages.log").open("a") as log:  # one file: few files are easily brought home
        log.write("\n".join([f"===== {name}: {ended}", *lines[-_LOG_LINES:], ""]))
    tail = [] if ended == "ok" else [line[:300] for line in lines if not line.startswith("@")][-_TAIL_LINES:]
    return Outcome(ended, round(took, 1), heard(lines), tail)


def _environment(name: str, options: Options) -> dict[str, str]:
    path = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
    found = {"PYTHONUNBUFFERED": "1", "PYTHONPATH": path, "PYTORCH_CUDA_ALLOC_CONF": "expandable_segments:True"}
    if name == "op_times":
        found["FTRAIN_CACHE"] = str(options.out.absolute())
    return {**os.environ, **found}


def _write(outcomes: dict[str, Outcome], folder: Path) -> None:
    """Replace the results by those known now, each file at once."""
    fresh = folder / "gpu.json.new"
    fresh.write_text(json.dumps({name: asdict(outcome) for name, outcome in outcomes.items()}, indent=1))
    fresh.replace(folder / "gpu.json")
    write_json(_rows(outcomes), folder / "rows.json", card=_notes(outcomes).get("device"))


def _rows(outcomes: dict[str, Outcome]) -> list[Row]:
    return [figure for outcome in outcomes.values() for figure in outcome.found.rows.values()]


def _notes(outcomes: dict[str, Outcome]) -> dict[str, Any]:
    """What the machine stage found."""
    return outcomes["machine"].found.notes if "machine" in outcomes else {}


def _device(outcomes: dict[str, Outcome]) -> str:
    found = _notes(outcomes)
    return f"{found.get('device', 'card not asked')}, torch {found.get('torch', '?')}"


if __name__ == "__main__":
    try:
        sys.exit(main(tyro.cli(Options)))
    except ValueError as error:
        sys.exit(f"{Path(sys.argv[0]).name}: {error}")
