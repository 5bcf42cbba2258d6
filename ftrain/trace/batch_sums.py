"""Sums over the whole batch (`ftrain.kernels.mean.sum_over_batch`) in a loss that runs on one micro-batch at a time.

For example, the shares in a balance loss are those of all tokens, but a micro-batch has only its own. So the sums are
computed first: a loop runs the part of the loss that they need, without a backward, and adds up the terms that the loss
passes to `sum_over_batch`. Then every micro-batch gets the whole sums. A sum whose terms depend on another sum is
computed in the next such loop.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager

from torch import Tensor

from ftrain.graph.loop import loop, zeros_like_all
from ftrain.graph.source import user_source
from ftrain.graph.torch_private import node_of
from ftrain.kernels.mean import sum_over_batch
from ftrain.kernels.primitive import bind
from ftrain.trace.provenance import sources
from ftrain.trace.refusals import Untraceable

Run = Callable[[list[Tensor], list[Tensor]], object]
"""The loss, from flat parameters and a flat micro-batch; this file ignores its result."""


class RequestedSums:
    """Records the terms that a loss passes to `sum_over_batch`, and supplies the sums that are computed already.

    `computed`: sums by the number of the call, from 0.
    """

    def __init__(self, computed: Mapping[int, Tensor]) -> None:
        self.requested: list[Tensor] = []
        """The term of each call, in order."""
        self.dependent: set[int] = set()
        """Numbers of the calls whose terms depend on a sum that is not computed yet."""
        self._computed, self._stand_ins = computed, list[Tensor]()

    def supply(self, x: Tensor) -> Tensor:
        """The sum over the whole batch for the term `x` of the next call, or, if not computed yet, a copy of `x`.

        `x` has any shape; the result has the same.
        """
        number = len(self.requested)
        self.requested.append(x)
        if number in self._computed:
            return self._computed[number]
        if _computed_from(x, self._stand_ins):
            self.dependent.add(number)
        self._stand_ins.append(x.clone())
        return self._stand_ins[-1]


def _one_micro_batch(x: Tensor, *, dim: int = 0) -> Tensor:
    raise Untraceable(
        f"{user_source()}: whole_rows in a loss of ftrain.accumulate, which sees the rows of one micro-batch: take one "
        "batch, or recompute (jit(remat=...)) to save memory"
    )


@contextmanager
def supplying_sums(computed: Mapping[int, Tensor]) -> Iterator[RequestedSums]:
    """Within the block, call number i of `sum_over_batch` returns `computed[i]`; yields the record of all calls."""
    sums = RequestedSums(computed)
    with bind({"sum_over_batch": sums.supply, "whole_rows": _one_micro_batch}):
        yield sums


def whole_sums(
    run: Run, micro_batches: int, leaves: list[Tensor], xs: list[Tensor], shapes: Sequence[Tensor]
) -> list[Tensor]:
    """The sums over the whole batch (and all ranks) that `run` requests, in order, as constants.

    - `leaves`: the flat parameters.
    - `xs`: the leaves of the batch, each with a leading dim of `micro_batches`.
    - `shapes`: tensors with the shapes and dtypes of the sums that the first micro-batch requests.
    """
    computed: dict[int, Tensor] = {}
    while len(computed) < len(shapes):
        missing = [i for i in range(len(shapes)) if i not in computed]
        sums, ready = _add_up(run, micro_batches, leaves, xs, computed, [shapes[i] for i in missing], missing)
        computed |= {i: sum_over_batch(total) for i, total in zip(missing, sums, strict=True) if i in ready}
    return [computed[i] for i in range(len(shapes))]


def _add_up(
    run: Run,
    micro_batches: int,
    leaves: list[Tensor],
    xs: list[Tensor],
    computed: Mapping[int, Tensor],
    shapes: Sequence[Tensor],
    missing: Sequence[int],
) -> tuple[list[Tensor], set[int]]:
    """The missing sums over the micro-batches, and the numbers of those that depend on no other missing sum."""
    ready: set[int] = set(missing)
    k, m, n = len(missing), len(xs), len(leaves)

    def body(*flat: Tensor) -> list[Tensor]:
        batch, consts = list(flat[k : k + m]), flat[k + m :]
        with supplying_sums(dict(zip(computed, consts[n:], strict=True))) as sums:
            run(list(consts[:n]), batch)
        ready.difference_update(sums.dependent)
        return [c + sums.requested[i].detach() for c, i in zip(flat[:k], missing, strict=True)]

    start, consts = zeros_like_all(list(shapes)), [*leaves, *computed.values()]
    sums = loop(body, micro_batches, carry=start, xs=xs, consts=consts, preview=True)
    return sums, ready


def require_constant(sums: RequestedSums, count: int) -> None:
    """ValueError if a term depends on the parameters, because its gradient would need all micro-batches at once.

    ValueError too if `sums` does not hold `count` calls, as in the first run.
    """
    if len(sums.requested) != count:
        raise ValueError(
            f"accumulate: the loss called sum_over_batch {count} times for the first micro-batch and "
            f"{len(sums.requested)} times with gradients: it must do the same every time"
        )
    for number, x in enumerate(sums.requested):
        if x.requires_grad:
            raise ValueError(
                f"accumulate: call {number + 1} of sum_over_batch (or of .value()) in the loss sums a tensor "
                f"{list(x.shape)} that depends on the parameters, whose gradient would need all micro-batches at once: "
                "return it as the total of a Mean, detach it, or take one batch"
            )


def _computed_from(x: Tensor, others: Sequence[Tensor]) -> bool:
    """True if `x` depends on one of `others`. Outside of a trace dependence is not known, so it is assumed."""
    start, found = node_of(x), {node_of(other) for other in others}
    if start is None or None in found:
        return bool(others)
    return any(node in found for node in sources(start))
