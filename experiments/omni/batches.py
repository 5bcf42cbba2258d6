"""Training batches as a pure function of the step, packed to one budget, made ahead by another process.

What a step trains on (`choice.Choice`) does not depend on the layout; how many packs it is dealt to does.

Legend: T tokens of the pack.
"""

import contextlib
import multiprocessing
import signal
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from multiprocessing.connection import Connection
from typing import Any

import torch

from experiments.omni.choice import WINDOW, Choice
from experiments.omni.sources import TRAIN
from experiments.omni.tasks import Mixture, sample
from ftrain import tree
from ftrain.modules.budget import Bound, Budget, Size
from ftrain.modules.mesh_packing import pack_for_mesh
from ftrain.modules.omni import OmniModel
from ftrain.modules.packing import measure
from ftrain.resilience.signals import SIGNALS

_ROOM_FOR_TOKENS, _ROOM_FOR_MEDIA, _ROOM_FOR_DOCUMENTS = 1.08, 1.25, 2
_MEASURED = 512  # examples whose mean need stands for all
_OF_A_TASK = 32  # examples of a task, however rare, whose largest need there is room for
_TOKENS_TOGETHER = 64  # a part of a pack is whole blocks of so many tokens


@dataclass(frozen=True)
class Batches:
    """Batch `step` holds what `Choice` says: examples `step * documents` and on, but for those that another step of the
    same window has more room for. None is left out, and neither the layout nor a resume changes which they are.

    `budget` is that of one pack, of which a batch has `packs`, each with its media in `parts`
    (`ftrain.modules.mesh_packing`). It should be the `fitting_budget` of the same numbers; where it has no room for a
    step's examples, that batch has larger arrays.
    """

    mixture: Mixture
    model: OmniModel
    tasks: tuple[str, ...]
    documents: int
    budget: Budget
    device: torch.device
    packs: int = 1
    parts: int = 1

    @cached_property
    def choice(self) -> Choice:
        """Which examples each step trains on: by what a step of one pack has room for, whatever the packs are."""
        whole = fitting_budget(self.mixture, self.model, documents=self.documents)
        return Choice(self.mixture, self.model, documents=self.documents, budget=whole)

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
                if step + WINDOW < last:
                    self.choice.prepare(step + WINDOW)

    def _arrays(self, step: int) -> dict[str, Any]:
        """The batch of a step as numpy arrays, which cross a process border by value."""
        examples = self.choice.at(step)
        packed = pack_for_mesh(
            [e.document for e in examples], budget=self.budget, model=self.model, packs=self.packs, parts=self.parts
        )
        return _as_arrays(with_tasks(packed.batch, [self.tasks.index(examples[i].task) for i in packed.taken]))


def with_tasks(batch: dict[str, Any], tasks: Sequence[int]) -> dict[str, Any]:
    """A packed batch with the number of each token's task, `task_T`, and of each code's, `task_n`; -1 on padding.

    `tasks`: the number of each document, in the order of the pack.
    """
    segments_T = batch["segments_T"].ids_T
    numbers = torch.full((int(segments_T.max()) + 1,), -1)
    numbers[segments_T[batch["valid_T"]].unique()] = torch.tensor(tasks)
    task_T = numbers[segments_T]
    of_code = torch.cat([task_T, torch.tensor([-1])])
    decoders = {name: {**own, "task_n": of_code[own["index_n"]]} for name, own in batch["decoders"].items()}
    return {**batch, "task_T": task_T, "decoders": decoders}


def fitting_budget(mixture: Mixture, model: OmniModel, *, documents: int, packs: int = 1, parts: int = 1) -> Budget:
    """A budget for each of `packs` packs to which a step of `documents` examples is dealt.

    All packs together have room for the mean need of so many examples and some more; media, of which there are few,
    vary more than tokens. One of several packs has its share of that, room for the largest example, and one example's
    tokens more, since examples are not divided: then what fits the step fits its packs but in the rarest cases. Sizes
    are rounded up so that each of `parts` ranks gets whole items. What no example has gets room for one item of
    padding, so that the batches of all mixtures have the same arrays.
    """
    sizes, rare = _measured(mixture, model)
    longest = max(size.tokens for size in (*sizes, *rare))
    tokens = _up(_mean_need([s.tokens for s in sizes], documents, _ROOM_FOR_TOKENS), _TOKENS_TOGETHER)
    if packs > 1:
        tokens = -(-tokens // packs) + longest
    rows = {name: _rows(name, sizes, rare, model, documents, packs, parts) for name in model.encoders}
    items = {name: rows[name] // e.rows_per_token for name, e in model.encoders.items()}  # as many as can be
    most = _ROOM_FOR_DOCUMENTS * -(-documents // packs)
    return Budget(
        tokens=_up(max(tokens, longest), _TOKENS_TOGETHER * parts),
        rows=rows,
        bounds={"tokens": Bound(most), **{name: Bound(count) for name, count in items.items()}},
        targets={
            name: _share_of_media(
                [s.targets.get(name, 0) for s in sizes],
                documents,
                packs,
                least=max((s.targets.get(name, 0) for s in rare), default=0),
                multiple=parts,
            )
            for name in model.decoders
        },
    )


def _measured(mixture: Mixture, model: OmniModel) -> tuple[list[Size], list[Size]]:
    """Sizes of examples as the mixture draws them, and of some of each task that is hardly among these."""
    drawn = [mixture.example(i) for i in range(_MEASURED)]
    seen = Counter(example.task for example in drawn)
    more = [
        sample(task, i, sources=mixture.sources, seed=mixture.seed, split=TRAIN)
        for task in mixture.drawn
        for i in range(_OF_A_TASK - seen[task])
    ]
    sizes, rare = ([measure(e.document, model=model) for e in examples] for examples in (drawn, more))
    return sizes, rare


def _rows(
    name: str, sizes: list[Size], rare: list[Size], model: OmniModel, documents: int, packs: int, parts: int
) -> int:
    """One pack's rows of an encoder: whole items in each of `parts` parts."""
    found = [*sizes, *rare]
    item = max((n for s in found for n in s.items.get(name, ())), default=model.encoder(name).rows_per_token)
    least = max(s.rows.get(name, 0) for s in found)
    return _share_of_media([s.rows.get(name, 0) for s in sizes], documents, packs, least=least, multiple=parts * item)


def _share_of_media(needs: Sequence[int], documents: int, packs: int, *, least: int, multiple: int) -> int:
    """What one pack has of what the step has room for, at least one example's, and `least`, and not nothing; the step
    has whole examples' rows.
    """
    largest = max(1, least, *needs)
    whole = _up(_mean_need(needs, documents, _ROOM_FOR_MEDIA), largest)
    return _up(max(-(-whole // packs), largest), multiple)


def _mean_need(needs: Sequence[int], documents: int, room: float) -> int:
    return int(sum(needs) * documents / len(needs) * room)


def _up(number: int, multiple: int) -> int:
    return -(-number // multiple) * multiple


def _as_arrays(batch: Any) -> Any:
    return tree.map(lambda leaf: leaf.numpy(), batch)


def _as_tensors(batch: Any, device: torch.device) -> Any:
    return tree.map(lambda leaf: torch.from_numpy(leaf).to(device), batch)
