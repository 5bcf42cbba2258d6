"""Kill -9 a training process at random moments of its saves; every time the latest named step must restore to the bit.

    python -m experiments.bench.crash --kills 1000 --json crash.json

A child resumes, then saves one step after another, each state computed from the number of its step. The parent kills it
at a random moment, restores the latest step and compares. Without a device's power cut the page cache survives: this
tests the death of processes; that data reaches the disk before its name does is the order of the syncs (write.py).
"""

import json
import multiprocessing
import os
import random
import shutil
import signal
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path

import torch
import tyro

from ftrain import tree
from ftrain.checkpoint import Checkpointer, Retention, Storage, latest, restore
from ftrain.checkpoint.folders import leftovers


@dataclass(frozen=True)
class Crash:
    """How many `kills`, of saves of how many `mib` of state; `json` receives the result; `seed` fixes the moments."""

    kills: int = 100
    mib: float = 8.0
    database: bool = True
    seed: int = 0
    json: Path | None = None


def state_of(step: int, mib: float) -> dict:
    """A state of about this size that is a function of the step alone."""
    rows = max(1, int(mib * 2**20 / 4 / 256 / 8))
    numbers = torch.Generator().manual_seed(step)
    params = {f"w{i}": torch.randn(rows, 256, generator=numbers) for i in range(4)}
    moments = {f"w{i}": torch.randn(rows, 256, generator=numbers) for i in range(4)}
    return {"params": params, "opt_state": moments, "step": torch.tensor(step), "position": step * 10}


def save_for_ever(root: str, mib: float, database: bool, pipe: Connection) -> None:
    """The child: resume, say from where, and save one step after another until killed, telling when each begins."""
    torch.set_num_threads(1)
    keep = Retention(last=2, every=50)
    with Checkpointer(root, keep=keep, storage=Storage(database=database, chunk_bytes=2**20)) as checkpoints:
        step = checkpoints.latest() or 0
        pipe.send(step)
        while True:
            step += 1
            state = state_of(step, mib)
            checkpoints.wait()
            pipe.send(step)
            checkpoints.save(state, step)


def run_kills(config: Crash, root: Path) -> Iterator[str]:
    """Kill `config.kills` children, one after another; yields what each kill hit: "between saves", "while writing".

    Raises:
        RuntimeError: a kill lost the latest step, or left it with other bits, or a child ended by itself.
    """
    spawn = multiprocessing.get_context("forkserver")
    spawn.set_forkserver_preload(["torch", "tyro", "ftrain.checkpoint"])
    moments = random.Random(config.seed)
    reached = 0
    for kill in range(config.kills):
        hear, tell = spawn.Pipe(duplex=False)
        child = spawn.Process(target=save_for_ever, args=(str(root), config.mib, config.database, tell))
        child.start()
        tell.close()
        try:
            resumed = hear.recv()
            wait_for_the_moment(hear, moments)
        except EOFError:
            child.join()
            raise RuntimeError(f"kill {kill}: the child ended by itself with code {child.exitcode}") from None
        os.kill(child.pid or 0, signal.SIGKILL)
        child.join()
        if resumed != reached:
            raise RuntimeError(f"kill {kill}: the child resumed from step {resumed}, and {reached} was the latest")
        hit = "while writing" if leftovers(root) else "between saves"
        reached = verified_step(root, reached, config.mib)
        yield hit


def wait_for_the_moment(hear: Connection, moments: random.Random) -> None:
    """Let the child begin two to four saves; return at a random moment of the last, or shortly after it."""
    hear.recv()
    begun = time.perf_counter()
    more = moments.randint(1, 3)
    for _ in range(more):
        hear.recv()
    typical = (time.perf_counter() - begun) / more
    time.sleep(moments.uniform(0.0, 1.1 * typical))


def verified_step(root: Path, at_least: int, mib: float) -> int:
    """The latest step, 0 if there is none, after comparing it bit by bit; RuntimeError when it is lost or differs."""
    step = latest(root) or 0
    if step < at_least:
        raise RuntimeError(f"step {at_least} was saved, and now the latest is {step}")
    if step == 0:
        return 0
    expected = state_of(step, mib)
    found = restore(expected, root)
    equal = [torch.equal(torch.as_tensor(a), torch.as_tensor(b)) for a, b in zip_leaves(found, expected)]
    if not all(equal):
        raise RuntimeError(f"step {step} restores with {equal.count(False)} leaves that differ")
    return step


def zip_leaves(a: dict, b: dict) -> Iterator[tuple]:
    """The leaves of two trees of one structure, side by side."""
    tree.require_same(a, b, names=("the restored state", "the saved state"))
    return zip(tree.leaves(a), tree.leaves(b), strict=True)


def main(config: Crash) -> None:
    """Run, print, and write the row in the format of all benches."""
    root = Path(tempfile.mkdtemp(prefix="crash-"))
    begin = time.perf_counter()
    hits: Counter[str] = Counter()
    try:
        for hit in run_kills(config, root):
            hits[hit] += 1
        last = latest(root)
    finally:
        shutil.rmtree(root)
    row = {
        "name": "kill -9 survived to the bit",
        "value": hits.total(),
        "unit": "kills",
        "goal": config.kills,
        "ok": hits.total() == config.kills and hits["while writing"] > 0,
        "peer": None,
        "how": f"{dict(hits)}, the last step is {last}, {time.perf_counter() - begin:.0f} s, {config.mib} MiB of state",
    }
    print(f"{row['name']}: {row['value']} of {row['goal']} ({row['how']})")
    if config.json is not None:
        config.json.write_text(json.dumps([row], indent=1))


if __name__ == "__main__":
    main(tyro.cli(Crash))
