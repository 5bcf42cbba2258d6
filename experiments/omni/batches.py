"""Training batches as a pure function of the step, packed to one budget, made ahead by another process.

Legend: T tokens of the pack.
"""

import contextlib
import multiprocessing
import signal
from collections.abc import Iterator
from dataclasses import dataclass
from multiprocessing.connection import Connection
from typing import Any

import numpy as np
import torch

from experiments.omni.tasks import Example, Mixture
from ftrain import tree
from ftrain.interrupt import SIGNALS
from modules.mesh_packing import pack_for_mesh
from modules.omni import OmniModel
from modules.packing import Bound, Budget, measure

_ROOM_FOR_TOKENS, _ROOM_FOR_MEDIA, _ROOM_FOR_DOCUMENTS = 1.08, 1.25, 2


@dataclass(frozen=True)
class Batches:
    """Batch `step` holds examples `step * documents` and on: a resumed run sees what an uninterrupted one does.

    `budget` is that of one pack, of which a batch has `packs`, each with its media in `parts` (`modules.mesh_packing`).
    It is meant to hold any `documents / packs` examples; where chance piles up large ones, the last are left out.
    """

    mixture: Mixture
    model: OmniModel
    tasks: tuple[str, ...]
    documents: int
    budget: Budget
    device: torch.device
    packs: int = 1
    parts: int = 1

    def at(self, step: int) -> dict[str, Any]:
        """The batch of a step, with `task_T`: the number of each token's task in `tasks`, -1 on padding."""
        return _as_tensors(self._arrays(step), self.device)

    def ahead(self, first: int, last: int) -> Iterator[dict[str, Any]]:
        """The batches of steps `first` to `last - 1` in order, made by another process while the caller computes.

        A process, since a thread would take turns with the caller's Python; forked, since it then has the data already.
        It is one batch ahead, and ends when the caller stops reading or dies.
        """
        context = multiprocessing.get_context("fork")
        reader, writer = context.Pipe(duplex=False)
        maker = context.Process(target=self._make, args=(reader, writer, first, last), daemon=True)
        maker.start()
        writer.close()
        try:
            for step in range(first, last):
                try:
                    arrays = reader.recv()
                except EOFError:
                    maker.join()
                    raise RuntimeError(
                        f"the process that makes batches ended before step {step} (exit code {maker.exitcode}); "
                        "its error is above"
                    ) from None
                yield _as_tensors(arrays, self.device)
        finally:
            reader.close()
            maker.join()

    def _make(self, reader: Connection, writer: Connection, first: int, last: int) -> None:
        """In the other process: write batches until all are written or nobody reads."""
        reader.close()
        for number in SIGNALS:  # a signal to the whole group is the caller's to answer
            signal.signal(number, signal.SIG_IGN)
        with contextlib.suppress(BrokenPipeError):
            for step in range(first, last):
                writer.send(self._arrays(step))

    def _arrays(self, step: int) -> dict[str, Any]:
        """The batch of a step as numpy arrays, which cross a process border by value."""
        examples = [self.mixture.example(step * self.documents + i) for i in range(self.documents)]
        packed = pack_for_mesh(
            [e.document for e in examples], budget=self.budget, model=self.model, packs=self.packs, parts=self.parts
        )
        batch = _as_arrays(packed.batch)
        taken = np.array([self.tasks.index(examples[i].task) for i in packed.taken])
        segments_T = batch["segments_T"].ids_T
        numbers = np.full(segments_T.max() + 1, -1)
        numbers[np.unique(segments_T[batch["valid_T"]])[: len(taken)]] = taken
        batch["task_T"] = numbers[segments_T]
        for decoder in batch["decoders"].values():
            decoder["task_n"] = np.append(batch["task_T"], -1)[decoder["index_n"]]
        return batch


def fitting_budget(mixture: Mixture, model: OmniModel, *, documents: int, parts: int = 1) -> Budget:
    """A budget for packs of this mixture: the mean need of `documents` examples and some room, rounded up so that each
    of `parts` ranks gets whole items. Media, of which there are few, vary more than tokens.
    """
    examples: list[Example] = [mixture.example(i) for i in range(512)]
    sizes = [measure(e.document, model=model) for e in examples]
    share = documents / len(sizes)

    def rounded(total: float, multiple: int, room: float = _ROOM_FOR_MEDIA) -> int:
        return -(-int(total * share * room) // multiple) * multiple

    per_item = {name: max(s.rows.get(name, 0) for s in sizes) for name in model.encoders}
    rows = {
        n: rounded(sum(s.rows.get(n, 0) for s in sizes), parts * (per_item[n] or e.rows_per_token))
        for n, e in model.encoders.items()
    }
    items = {n: rows[n] // e.rows_per_token for n, e in model.encoders.items()}  # as many as can be
    return Budget(
        tokens=rounded(sum(s.tokens for s in sizes), 64 * parts, _ROOM_FOR_TOKENS),
        rows=rows,
        bounds={"tokens": Bound(_ROOM_FOR_DOCUMENTS * documents), **{n: Bound(most) for n, most in items.items()}},
        targets={n: rounded(sum(s.targets.get(n, 0) for s in sizes), parts) for n in model.decoders},
    )


def _as_arrays(batch: Any) -> Any:
    return tree.map(lambda leaf: leaf.numpy(), batch)


def _as_tensors(batch: Any, device: torch.device) -> Any:
    return tree.map(lambda leaf: torch.from_numpy(leaf).to(device), batch)
