"""Programs in processes of their own: one that dies or hangs is an outcome, and the rest goes on."""

import gc
import logging
import multiprocessing
import time
import warnings
from collections import Counter, deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait

from experiments.bench.fuzzing.check import FAILURES, Result, check, one_thread
from experiments.bench.fuzzing.generate import generate
from experiments.bench.fuzzing.program import Program
from experiments.bench.fuzzing.shrink import shrink
from experiments.bench.fuzzing.source import source_of

_CHUNK, _PER_PROCESS, _HANG_S = 20, 400, 180.0


@dataclass(frozen=True)
class Report:
    """How the program of a seed came out. `source`: of the smallest program that fails alike, for some failures."""

    seed: int
    outcome: str
    kind: str = ""
    detail: str = ""
    features: tuple[str, ...] = ()
    seconds: float = 0.0
    source: str = ""


@dataclass(frozen=True)
class Shrinking:
    """For how many `seconds` a failure is made smaller, and how many failures `of_a_kind` by each process."""

    seconds: float = 30.0
    of_a_kind: int = 2


def fuzz(seed: int, seen: Counter[str], shrinking: Shrinking) -> Report:
    """Make, run and judge the program of one seed; `seen` counts failures by kind."""
    began = time.perf_counter()
    program = generate(seed)
    found = check(program)
    seconds, source, kind = time.perf_counter() - began, "", "" if found.outcome == "equal" else found.kind
    if found.outcome in FAILURES:
        seen[kind] += 1
        if seen[kind] <= shrinking.of_a_kind:
            smallest = shrink(program, lambda p: _fails_alike(p, found), seconds=shrinking.seconds)
            source = source_of(smallest, main=True) + f"\n# {check(smallest).detail}\n"
    return Report(seed, found.outcome, kind, found.detail, tuple(sorted(program.features())), seconds, source)


def _fails_alike(program: Program, found: Result) -> bool:
    result = check(program)
    return result.outcome == found.outcome and (found.outcome == "different" or result.kind == found.kind)


_USUAL = Shrinking()
Judge = Callable[[int, "Counter[str]", Shrinking], Report]


def reports(seeds: Sequence[int], *, jobs: int, shrinking: Shrinking = _USUAL, judge: Judge = fuzz) -> Iterator[Report]:
    """Reports of these seeds, as they come. With 0 jobs they are made by this process, where a crash ends all.

    `judge`: what is done for each seed; a function of a module, since processes are given its name.
    """
    if jobs == 0:
        with one_thread():
            seen = Counter[str]()
            yield from (judge(seed, seen, shrinking) for seed in seeds)
        return
    left = deque(seeds)
    workers = [_Worker(left, shrinking, judge) for _ in range(min(jobs, -(-len(left) // _CHUNK)))]
    try:
        while active := [w for w in workers if w.active]:
            wait([w.pipe for w in active], timeout=5.0)
            for worker in active:
                yield from worker.news()
    finally:
        for worker in workers:
            worker.end()


class _Worker:
    """A process that takes seeds from a common queue, and is replaced when it dies, hangs or has done its share."""

    def __init__(self, left: deque[int], shrinking: Shrinking, judge: Judge) -> None:
        self._left, self._shrinking, self._judge = left, shrinking, judge
        self._pending: deque[int] = deque()
        self._start()

    @property
    def active(self) -> bool:
        """True as long as something is to come."""
        return bool(self._pending or self._left)

    def _start(self) -> None:
        spawn = multiprocessing.get_context("spawn")
        self.pipe, theirs = spawn.Pipe()
        self._process = spawn.Process(target=_work, args=(theirs, self._shrinking, self._judge), daemon=True)
        self._process.start()
        theirs.close()
        self._done, self._heard = 0, time.monotonic()
        self._send()

    def _send(self) -> None:
        while self._left and len(self._pending) < _CHUNK:
            self._pending.append(self._left.popleft())
        self.pipe.send(list(self._pending))

    def news(self) -> Iterator[Report]:
        """What has come since the last time."""
        try:
            while self.pipe.poll():
                report: Report = self.pipe.recv()
                self._pending.remove(report.seed)
                self._done, self._heard = self._done + 1, time.monotonic()
                yield report
        except (EOFError, ConnectionResetError):
            yield from self._lost("the process died")
            return
        if time.monotonic() - self._heard > _HANG_S + self._shrinking.seconds:
            self._process.kill()
            yield from self._lost(f"no end within {_HANG_S:.0f} s")
        elif not self._pending and self._left:
            self._renew() if self._done >= _PER_PROCESS else self._send()

    def _lost(self, words: str) -> Iterator[Report]:
        self._process.join()
        if self._pending:
            seed = self._pending.popleft()
            program = generate(seed)
            detail = f"{words}, exit code {self._process.exitcode}"
            features = tuple(sorted(program.features()))
            yield Report(seed, "crash", f"crash: {words}", detail, features, 0.0, source_of(program, main=True))
        if self.active:
            self._start()

    def _renew(self) -> None:
        self.end()
        self._start()

    def end(self) -> None:
        """Let the process go."""
        self.pipe.close()
        self._process.join(2.0)
        if self._process.is_alive():
            self._process.kill()
            self._process.join()


def _work(pipe: Connection, shrinking: Shrinking, judge: Judge) -> None:
    warnings.simplefilter("ignore")
    logging.disable(logging.CRITICAL)  # torch logs each op that has no shape rule, with a trace
    gc.freeze()  # torch's own objects, which are many, need not be looked at again and again
    gc.set_threshold(100_000, 20, 50)
    seen = Counter[str]()
    with one_thread():
        try:
            while True:
                for seed in pipe.recv():
                    pipe.send(judge(seed, seen, shrinking))
        except (EOFError, BrokenPipeError):
            return
