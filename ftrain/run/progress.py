"""What a person sees of a run: a bar with the losses, speed, memory and time left, and the table at the end.

On a terminal the bar is redrawn in place; elsewhere (a file, a pipe, CI) it is a plain line every so many steps.
Nobody need read it: where the reader is gone, or the disk under a log is full, the run goes on without.
"""

import math
import os
import sys
import time
from collections.abc import Callable, Mapping
from typing import Any

from rich.console import Console, RenderableType
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

_SMOOTHING = 0.9


class SteadyConsole(Console):
    """A console whose reader may go away: what is printed after that goes nowhere."""

    def on_broken_pipe(self) -> None:
        """What rich calls then; its own ends the process."""
        self.quiet = True
        silence_stdout()


def silence_stdout() -> None:
    """Let standard output go nowhere from now on, also what Python writes of it when it ends."""
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, sys.__stdout__.fileno() if sys.__stdout__ is not None else 1)
    os.close(nowhere)


class Report:
    """Shows the steps of a run from `first` (done before, on a resume) to `total`; use it as a context.

    `every` is how many steps lie between two lines where there is no terminal. ValueError for others.
    """

    def __init__(self, total: int, *, first: int = 0, every: int = 50, console: Console | None = None) -> None:
        if not 0 <= first <= total or every < 1:
            raise ValueError(f"first={first} must lie in [0, total={total}] and every={every} must be at least 1")
        self.console = console or SteadyConsole()
        self._total, self._first, self._every = total, first, every
        self._smooth: dict[str, float] = {}
        self._began = time.monotonic()
        self._bar = Progress(
            TextColumn("[bold]{task.description}"),
            BarColumn(bar_width=24),
            MofNCompleteColumn(),
            TimeRemainingColumn(),
            TextColumn("{task.fields[numbers]}"),
            console=self.console,
        )
        self._task = self._bar.add_task("training", total=total, completed=first, numbers="")

    def __enter__(self) -> "Report":
        if self.console.is_terminal:
            self._output(self._bar.start)
        self._began = time.monotonic()
        return self

    def __exit__(self, *_: object) -> None:
        if self.console.is_terminal:
            self._output(self._bar.stop)

    def update(self, metrics: Mapping[str, Any]) -> None:
        """Show one step's metrics: `step` (from 1), and of `loss`, `loss/<term>`, `tokens_per_s`, `mfu`, `peak_bytes`
        those that are there. Losses and speed are smoothed over some ten steps, those that are not finite left out."""
        for name, value in metrics.items():
            if (name.startswith("loss") or name == "tokens_per_s") and math.isfinite(value):
                self._smooth[name] = _SMOOTHING * self._smooth.get(name, value) + (1 - _SMOOTHING) * value
        step = int(metrics["step"])
        if self.console.is_terminal:
            numbers = describe(metrics, self._smooth)
            self._output(lambda: self._bar.update(self._task, completed=step, numbers=numbers))
        elif step % self._every == 0 or step == self._total:
            left = f"left {duration(self._seconds_left(step))}"
            self.say(f"step {step}/{self._total}  {describe(metrics, self._smooth)}  {left}")

    def _seconds_left(self, step: int) -> float:
        done = max(1, step - self._first)
        return (time.monotonic() - self._began) / done * (self._total - step)

    def say(self, text: str) -> None:
        """A line of text, above the bar where there is one."""
        self._output(lambda: self.console.print(text, markup=False, highlight=False, soft_wrap=True))

    def show(self, what: RenderableType) -> None:
        """A table or the like, above the bar where there is one."""
        self._output(lambda: self.console.print(what))

    def _output(self, write: Callable[[], object]) -> None:
        """Write, if that can be: the run is worth more than its log."""
        try:
            write()
        except BrokenPipeError:
            silence_stdout()
        except OSError:
            return


def describe(metrics: Mapping[str, Any], smooth: Mapping[str, float]) -> str:
    """One line of a step's numbers: the loss, each term's, tokens a second, MFU, share of dropped rows, peak memory."""
    parts = [f"loss {smooth['loss']:.3f}"] if "loss" in smooth else []
    parts += [f"{name.removeprefix('loss/')} {value:.3f}" for name, value in smooth.items() if name.startswith("loss/")]
    if "tokens_per_s" in smooth:
        parts.append(f"{smooth['tokens_per_s']:,.0f} tok/s")
    if metrics.get("mfu") is not None:
        parts.append(f"MFU {metrics['mfu']:.1%}")
    if metrics.get("dropped"):
        parts.append(f"dropped {metrics['dropped']:.1%}")
    if metrics.get("peak_bytes") is not None:
        parts.append(f"peak {metrics['peak_bytes'] / 2**20:,.0f} MiB")
    return "  ".join(parts)


def duration(seconds: float) -> str:
    """Seconds as `m:ss`, or `h:mm:ss` from an hour on."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"
