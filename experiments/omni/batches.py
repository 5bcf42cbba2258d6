"""Training batches as a pure function of the step, packed to one budget, made ahead by another process.

Legend: T tokens of the pack.
"""

import multiprocessing
import signal
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from experiments.omni.tasks import Example, Mixture
from ftrain.interrupt import SIGNALS
from modules.omni import OmniModel
from modules.packing import Budget, measure, pack

_AHEAD = 2


@dataclass(frozen=True)
class Batches:
    """Batch `step` holds examples `step * documents` and on: a resumed run sees what an uninterrupted one does.

    `budget` is meant to hold any `documents` examples; where chance piles up large ones, the last of them are left out.
    """

    mixture: Mixture
    model: OmniModel
    tasks: tuple[str, ...]
    documents: int
    budget: Budget
    device: torch.device

    def at(self, step: int) -> dict[str, Any]:
        """The batch of a step, with `task_T`: the number of each token's task in `tasks`, -1 on padding."""
        return _as_tensors(self._arrays(step), self.device)

    def ahead(self, first: int, last: int) -> Iterator[dict[str, Any]]:
        """The batches of steps `first` to `last - 1` in order, made by another process while the caller computes.

        A process, since a thread would take turns with the caller's Python; forked, since it then has the data already.
        """
        with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("fork"), initializer=_alone) as pool:
            waiting: deque[Future] = deque()
            try:
                for step in range(first, last):
                    waiting.append(pool.submit(self._arrays, step))
                    if len(waiting) > _AHEAD:
                        yield _as_tensors(waiting.popleft().result(), self.device)
                while waiting:
                    yield _as_tensors(waiting.popleft().result(), self.device)
            finally:
                pool.shutdown(wait=True, cancel_futures=True)

    def _arrays(self, step: int) -> dict[str, Any]:
        """The batch of a step as numpy arrays, which cross a process border by value."""
        examples = [self.mixture.example(step * self.documents + i) for i in range(self.documents)]
        packed = pack([e.document for e in examples], budget=self.budget, model=self.model, absent="pad")
        batch = _as_arrays(packed.batch)
        numbers = np.array([*(self.tasks.index(examples[i].task) for i in packed.taken), -1])
        return {**batch, "task_T": numbers[batch["segments_T"]]}


def _alone() -> None:
    """In the data process: one thread, and Ctrl-C is the parent's business."""
    torch.set_num_threads(1)
    for number in SIGNALS:
        signal.signal(number, signal.SIG_IGN)


def fitting_budget(mixture: Mixture, model: OmniModel, *, documents: int, spare: float = 1.25) -> Budget:
    """A budget for batches of this mixture: the mean need of `documents` examples, times `spare`, rounded up."""
    examples: list[Example] = [mixture.example(i) for i in range(512)]
    sizes = [measure(e.document, model=model) for e in examples]
    share = documents / len(sizes) * spare

    def rounded(total: float, multiple: int) -> int:
        return -(-int(total * share) // multiple) * multiple

    per_item = {name: max(s.rows.get(name, 0) for s in sizes) for name in model.encoders}
    return Budget(
        tokens=rounded(sum(s.tokens for s in sizes), 64),
        rows={
            n: rounded(sum(s.rows.get(n, 0) for s in sizes), per_item[n] or e.rows_per_token)
            for n, e in model.encoders.items()
        },
        targets={n: rounded(sum(s.targets.get(n, 0) for s in sizes), 1) for n in model.decoders},
    )


def _as_arrays(tree: Any) -> Any:
    return {k: _as_arrays(v) for k, v in tree.items()} if isinstance(tree, dict) else tree.numpy()


def _as_tensors(tree: Any, device: torch.device) -> Any:
    if isinstance(tree, dict):
        return {k: _as_tensors(v, device) for k, v in tree.items()}
    return torch.from_numpy(tree).to(device)
