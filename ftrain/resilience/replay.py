"""Run a step of a finished, broken or running run again, from the nearest checkpoint, and compare its numbers.

An experiment whose steps can be replayed writes `"replay": "<module>"` into its run's `config.json`. That module has a
function `replayable(config) -> Replayable`, which makes from the options in the config what the run was made of. A run
of several processes is made on the virtual mesh of the same sizes.

A run's folder may come from anybody, and its config must not choose which code runs here: only the modules of the
package `experiments` are imported by that name, any other must be named by who asks for the replay.
"""

import importlib
import re
import struct
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ftrain import checkpoint, tree
from ftrain.debug.finite import Finding, check_finite
from ftrain.files.beneath import Folder
from ftrain.files.outside import JSON_BYTES, anything, check, mapped, parse, record, whole
from ftrain.files.outside import number as real_number
from ftrain.resilience.failure_dump import FailureDump, read_batch, read_failure_dump
from ftrain.resilience.skipped import Skipped, read_skipped
from ftrain.step.api import Step

CHECKPOINTS, METRICS, CONFIG = "checkpoints", "metrics.jsonl", "config.json"
KEY = "replay"
"""The entry of `config.json` that names the module."""

_OWN = "experiments"
_METRICS_BYTES = 2**31
_ROW = record({"step": whole(1), "loss": real_number(finite=False)}, others=True)


@dataclass(frozen=True)
class Replayable:
    """What a run is made of, in one process.

    `step`: `(state, batch) -> (state, metrics)`, jitted, on the mesh of the run; `metrics` has a scalar `loss`, and
    further scalars are compared where `metrics.jsonl` has the same names. `abstract_state`: its leaves give shapes and
    dtypes. `fresh_state()`: the state at step 0, as the run began. `batch_at(position)`: the whole batch at a position
    in the order of the data. `device`: of the run.
    """

    step: Step
    abstract_state: Any
    fresh_state: Callable[[], Any]
    batch_at: Callable[[int], Any]
    device: torch.device


@dataclass(frozen=True)
class Replayed:
    """One step's numbers, by name: those of the replay and those of the run (None: the run has not noted them)."""

    step: int
    found: Mapping[str, float]
    recorded: Mapping[str, float] | None

    @property
    def equal(self) -> bool | None:
        """Whether all numbers that both have are the same to the bit; None if there is nothing to compare."""
        if self.recorded is None:
            return None
        return all(
            _bits(value) == _bits(self.recorded[name]) for name, value in self.found.items() if name in self.recorded
        )

    def __str__(self) -> str:
        if self.recorded is None:
            return f"step {self.step}: loss {self.found['loss']!r}, which the run has not noted"
        return f"step {self.step}: loss {self.found['loss']!r}, the run's {self.recorded['loss']!r}: " + (
            "equal to the bit" if self.equal else "DIFFERENT"
        )


def load_run(run: Path, experiment: str | None = None) -> Replayable:
    """What the run in the folder is made of, by the module `experiment`; default: the one that its config names, if it
    is one of `experiments`.

    Raises:
        ValueError: the folder has no `config.json`, or one that is no JSON object or names no module that may be run;
            or the module has no `replayable`.
        ImportError: there is no such module.
    """
    file = run / CONFIG
    try:
        with Folder(run) as folder:
            config = parse(folder.read(CONFIG, limit=JSON_BYTES), str(file))
    except (FileNotFoundError, NotADirectoryError):
        raise ValueError(f"{run} is not the folder of a run (it has no {CONFIG})") from None
    check(config, mapped(anything), str(file))
    module = importlib.import_module(experiment or _allowed(config.get(KEY), file))
    if not hasattr(module, "replayable"):
        raise ValueError(f"{module.__name__}, which {file} names, has no function replayable(config)")
    return module.replayable(config)


def _allowed(name: Any, file: Path) -> str:
    """The module that a config names, if it is one of our own experiments and not one that came with the run."""
    if not isinstance(name, str):
        raise ValueError(
            f"{file} has no {KEY!r}: it should name the module of the experiment that has replayable(config); runs "
            "from before there was one can be replayed with --experiment MODULE"
        )
    parts = name.split(".")
    known = len(parts) > 1 and parts[0] == _OWN and all(re.fullmatch(r"[A-Za-z_]\w*", part, re.ASCII) for part in parts)
    if not known or not _is_own(parts[1:], file.parent):
        raise ValueError(
            f"{file} names the module {name!r}, which is not one of {_OWN}.*: code that a run's folder names is not "
            "run; if you trust it, name it yourself with --experiment MODULE"
        )
    return name


def _is_own(parts: Sequence[str], run: Path) -> bool:
    """Whether the package of experiments has such a module, in a folder that is not the run's."""
    try:
        roots = importlib.import_module(_OWN).__path__
    except ModuleNotFoundError:
        return False
    for root in (Path(root).resolve() for root in roots):
        module = root.joinpath(*parts)
        for source in (module.with_name(f"{module.name}.py"), module / "__init__.py"):
            found = source.resolve()
            if found.is_file() and found.is_relative_to(root) and not found.is_relative_to(run.resolve()):
                return True
    return False


def replay(
    made: Replayable,
    run: Path,
    step: int,
    *,
    check: bool = False,
    kept: bool = False,
    say: Callable[[str], None] = print,
) -> Iterator[Replayed | Finding]:
    """Restore the nearest checkpoint before the step, and run on from there to the step; yields each step's numbers.

    A bad step is run as it was met, with the batch that it left and on the batches that led to it, also if the run has
    gone back since then and left them out; `kept`: as it was run after that. With `check`, before the numbers of the
    last step comes a `Finding`: the first node of its graph that made a value which is not finite, if there is one; on
    a mesh with the rank.

    Raises:
        ValueError: the run has not come to this step, a file of it is not what was written, or its checkpoint has
            other leaves.
    """
    rows, dump = recorded(run), None if kept else read_failure_dump(run, step)
    if step < 1 or (step not in rows and dump is None):
        raise ValueError(f"{run} has not come to step {step}: it has noted steps 1 to {max(rows, default=0)}")
    now = read_skipped(run)
    then = now if dump is None else dump.skipped
    # Up to here the steps of both histories are the same, and from then on none is.
    common = next((n for n in range(step, 0, -1) if now.position(n) == then.position(n)), 0)
    start = max((s for s in checkpoint.steps(run / CHECKPOINTS) if s < step and s <= common), default=0)
    say(f"from {f'the checkpoint of step {start}' if start else 'the fresh state'}")
    state = _state_at(made, run, start)
    for number in range(start + 1, step + 1):
        batch = _batch_of(made, run, number, then, dump, say)
        if check and number == step:
            found = check_finite(made.step, state, batch)
            if found is not None:
                yield found
        state, metrics = made.step(state, batch)
        row = rows.get(number) if number <= common else None
        if dump is not None and number == step:
            row = {"loss": dump.loss}
        yield Replayed(number, {name: float(value) for name, value in metrics.items() if _is_scalar(value)}, row)


def recorded(run: Path) -> dict[int, dict[str, float]]:
    """The numbers that the run has noted in `metrics.jsonl`, by step; a torn last line is left out.

    Raises:
        ValueError: another line is no JSON, or lacks its step or loss, or has a number that no float holds.

    >>> import pathlib, tempfile
    >>> from ftrain.resilience.replay import recorded
    >>> run = pathlib.Path(tempfile.mkdtemp())
    >>> _ = (run / "metrics.jsonl").write_text('{"step": 1, "loss": 2.5}\\n{"step": 2, "lo')
    >>> recorded(run)
    {1: {'step': 1, 'loss': 2.5}}
    """
    shown = str(run / METRICS)
    try:
        with Folder(run) as folder:
            lines = folder.read(METRICS, limit=_METRICS_BYTES).splitlines(keepends=True)
    except FileNotFoundError:
        return {}
    whole_lines = [line for line in lines if line.endswith(b"\n")]
    rows = [check(parse(line, f"{shown}, line {i}"), _ROW, shown) for i, line in enumerate(whole_lines, start=1)]
    numbers = [{name: n for name, n in row.items() if type(n) in (int, float)} for row in rows]
    return {row["step"]: check(row, mapped(real_number(finite=False)), shown) for row in numbers}


def _state_at(made: Replayable, run: Path, start: int) -> Any:
    if start == 0:
        return made.fresh_state()
    state = checkpoint.restore(made.abstract_state, run / CHECKPOINTS, start)
    return tree.map(lambda leaf: leaf.to(made.device), state)


def _batch_of(
    made: Replayable, run: Path, number: int, skipped: Skipped, dump: FailureDump | None, say: Callable[[str], None]
) -> Any:
    if dump is None or number != dump.step:
        return made.batch_at(skipped.position(number))
    given = made.batch_at(dump.position)
    left = read_batch(run, number, like=given)
    pairs = zip(tree.paths(given), tree.leaves(given), tree.leaves(left), strict=True)
    other = [path for path, a, b in pairs if isinstance(a, torch.Tensor) and not _same(a, b)]
    say(f"step {number} was bad: {dump.why}; with the batch it left, from position {dump.position}"
        + (f", which the data no longer gives: {', '.join(other[:4])} differ" if other else ""))  # fmt: skip
    return left


def _same(a: torch.Tensor, b: torch.Tensor) -> bool:
    return a.shape == b.shape and a.dtype == b.dtype and torch.equal(_bytes(a), _bytes(b))


def _bytes(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.contiguous().reshape(-1).view(torch.uint8)


def _is_scalar(value: Any) -> bool:
    return isinstance(value, torch.Tensor) and value.numel() == 1


def _bits(value: float) -> bytes:
    """All NaNs are one."""
    return struct.pack("<d", value) if value == value else b"NaN"
