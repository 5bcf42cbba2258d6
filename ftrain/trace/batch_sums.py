"""What a loss sums over the whole batch (`ftrain.kernels.mean.sum_over_batch`), where it sees one micro-batch at a
time.

The shares of a balance loss, say, are those of all tokens, but micro-batch 0 knows only its own. So the sums are made
first: a loop runs as much of the loss as they need, without a backward, and adds up what it asks for. Then each
micro-batch gets the whole sums. A sum whose terms are computed from another sum waits for the next such loop.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager

from torch import Tensor

from ftrain.graph.loop import loop, zeros_like_all
from ftrain.graph.torch_private import node_of
from ftrain.kernels.mean import sum_over_batch
from ftrain.kernels.primitive import bind
from ftrain.trace.provenance import sources

Run = Callable[[list[Tensor], list[Tensor]], object]
"""The loss, from flat parameters and a flat micro-batch; its result is not looked at here."""


class Questions:
    """The sums that a loss asked for, in order, and which of them were computed from a sum that is not known yet."""

    def __init__(self, known: Mapping[int, Tensor]) -> None:
        self.asked: list[Tensor] = []
        self.too_early: set[int] = set()
        self._known, self._unknown = known, list[Tensor]()

    def answer(self, x: Tensor) -> Tensor:
        """The sum over the whole batch where it is known, else a stand-in of its shape."""
        number = len(self.asked)
        self.asked.append(x)
        if number in self._known:
            return self._known[number]
        if _computed_from(x, self._unknown):
            self.too_early.add(number)
        self._unknown.append(x.clone())
        return self._unknown[-1]


@contextmanager
def answering(known: Mapping[int, Tensor]) -> Iterator[Questions]:
    """Within the block the i-th `sum_over_batch` gives `known[i]`."""
    questions = Questions(known)
    with bind({"sum_over_batch": questions.answer}):
        yield questions


def whole_sums(
    run: Run, micro_batches: int, leaves: list[Tensor], xs: list[Tensor], shapes: Sequence[Tensor]
) -> list[Tensor]:
    """The sums over the whole batch (and all ranks) that `run` asks for, in order, as constants.

    `xs`: the leaves of the batch, each with a leading dim of `micro_batches`; `shapes`: of the sums that the first
    micro-batch asks for. ValueError if others ask for other sums.
    """
    known: dict[int, Tensor] = {}
    while len(known) < len(shapes):
        missing = [i for i in range(len(shapes)) if i not in known]
        sums, ready = _add_up(run, micro_batches, leaves, xs, known, [shapes[i] for i in missing], missing)
        known |= {i: sum_over_batch(total) for i, total in zip(missing, sums, strict=True) if i in ready}
    return [known[i] for i in range(len(shapes))]


def _add_up(
    run: Run,
    micro_batches: int,
    leaves: list[Tensor],
    xs: list[Tensor],
    known: Mapping[int, Tensor],
    shapes: Sequence[Tensor],
    missing: Sequence[int],
) -> tuple[list[Tensor], set[int]]:
    """The missing sums over the micro-batches, and the numbers of those that are right."""
    ready: set[int] = set(missing)
    k, m, n = len(missing), len(xs), len(leaves)

    def body(*flat: Tensor) -> list[Tensor]:
        batch, consts = list(flat[k : k + m]), flat[k + m :]
        questions = _ask(run, list(consts[:n]), batch, dict(zip(known, consts[n:], strict=True)))
        ready.difference_update(questions.too_early)
        return [c + questions.asked[i].detach() for c, i in zip(flat[:k], missing, strict=True)]

    start, consts = zeros_like_all(list(shapes)), [*leaves, *known.values()]
    sums = loop(body, micro_batches, carry=start, xs=xs, consts=consts, preview=True)
    return sums, ready


def _ask(run: Run, leaves: list[Tensor], batch: list[Tensor], known: Mapping[int, Tensor]) -> Questions:
    with answering(known) as questions:
        run(leaves, batch)
    return questions


def require_constant(questions: Questions, count: int) -> None:
    """ValueError where what was summed depends on the parameters: its gradient would need all micro-batches at once."""
    if len(questions.asked) != count:
        raise ValueError(
            f"accumulate: the loss called sum_over_batch {count} times for the first micro-batch and "
            f"{len(questions.asked)} times with gradients: it must do the same every time"
        )
    for number, x in enumerate(questions.asked):
        if x.requires_grad:
            raise ValueError(
                f"accumulate: call {number + 1} of sum_over_batch (or of .value()) in the loss sums a tensor "
                f"{list(x.shape)} that depends on the parameters, whose gradient would need all micro-batches at once: "
                "return it as the total of a Mean, detach it, or take one batch"
            )


def _computed_from(x: Tensor, others: Sequence[Tensor]) -> bool:
    """Whether `x` was computed from one of `others`; outside of a trace nobody knows, and it is taken to be."""
    start, found = node_of(x), {node_of(other) for other in others}
    if start is None or None in found:
        return bool(others)
    return any(node in found for node in sources(start))
