"""Training batches as a pure function of the step, packed to one budget, made ahead by a thread.

Legend: T tokens of the pack.
"""

from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from experiments.omni.tasks import Example, Mixture
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
        examples = [self.mixture.example(step * self.documents + i) for i in range(self.documents)]
        packed = pack([e.document for e in examples], budget=self.budget, model=self.model, absent="pad")
        batch = packed.batch
        numbers = np.array([*(self.tasks.index(examples[i].task) for i in packed.taken), -1])
        batch["task_T"] = torch.from_numpy(numbers[batch["segments_T"].numpy()])
        return _moved(batch, self.device)

    def ahead(self, first: int, last: int) -> Iterator[dict[str, Any]]:
        """The batches of steps `first` to `last - 1` in order, made in a thread while the caller computes."""
        with ThreadPoolExecutor(1) as pool:
            waiting: list[Future] = []
            for step in range(first, last):
                waiting.append(pool.submit(self.at, step))
                if len(waiting) > _AHEAD:
                    yield waiting.pop(0).result()
            for future in waiting:
                yield future.result()


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


def _moved(tree: Any, device: torch.device) -> Any:
    return {k: _moved(v, device) for k, v in tree.items()} if isinstance(tree, dict) else tree.to(device)
