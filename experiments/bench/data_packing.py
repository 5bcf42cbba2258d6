"""Packs over many simulated ranks, of the same stream of lengths: ours, and first fit in the order of arrival.

Legend: N documents, T tokens of a pack, R ranks.
"""

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np

from ftrain.data.packing import Packing, deal_packs, plan_packs

_CHAT = (350.0, 0.9)  # median and deviation of the logarithm
_TAIL = (0.05, 1000.0, 1.2)  # part of documents, least tokens, exponent
_LEAST = 16
_FIRST_FIT_BUFFER = 200  # VeOmni's


def lengths(count: int, longest: int, *, seed: int = 0) -> np.ndarray:
    """Int64 `[count]`: log-normal chats, and a part of documents with a heavy tail (Pareto) up to `longest` tokens."""
    rng = np.random.default_rng(seed)
    chat = np.exp(rng.normal(np.log(_CHAT[0]), _CHAT[1], count))
    part, least, exponent = _TAIL
    low = (least / longest) ** exponent  # of the tail beyond `longest`, which is left out
    tail = least * (low + (1 - low) * rng.random(count)) ** (-1 / exponent)
    found = np.where(rng.random(count) < part, tail, chat)
    return np.clip(found, _LEAST, longest).astype(np.int64)


@dataclass(frozen=True)
class Packed:
    """Of many steps: the `padding` of the budget; what ranks wait for each other, as a part of the mean (`imbalance`,
    of all steps together, and of the `worst` one); CPU seconds of a document.
    """

    padding: float
    imbalance: float
    worst: float
    seconds: float


StepsOf = Callable[[np.ndarray], Iterator[tuple[np.ndarray, np.ndarray, int, float]]]
"""From a stream of lengths to steps: tokens `[R, M]`, costs `[R, M]`, documents, CPU seconds."""


def measured(stream: np.ndarray, steps_of: StepsOf, *, steps: int, tokens: int) -> Packed:
    """Of the first `steps` steps that the stream gives."""
    found = [step for _, step in zip(range(steps), steps_of(stream), strict=False)]
    slowest = np.array([cost_RM.max(0).sum() for _, cost_RM, _, _ in found])
    mean = np.array([cost_RM.mean(0).sum() for _, cost_RM, _, _ in found])
    used, room = sum(t.sum() for t, _, _, _ in found), sum(t.size * tokens for t, _, _, _ in found)
    seconds = sum(s for *_, s in found) / max(1, sum(n for _, _, n, _ in found))
    return Packed(1 - used / room, slowest.sum() / mean.sum() - 1, float((slowest / mean).max() - 1), seconds)


def ours(packing: Packing) -> StepsOf:
    """Packs of whole steps by `plan_packs`, dealt to ranks, from a buffer as the loader has it."""

    def steps(stream: np.ndarray) -> Iterator[tuple[np.ndarray, np.ndarray, int, float]]:
        costs = packing.cost(stream)
        held, since, at, number = np.zeros(0, np.int64), np.zeros(0, np.int64), 0, 0
        while True:
            ends = np.cumsum(stream[at : at + packing.capacity])
            read = int(np.searchsorted(ends, packing.waiting - stream[held].sum())) + 1
            if at + read > len(stream):
                return
            held = np.concatenate([held, np.arange(at, at + read)])
            since, at = np.concatenate([since, np.full(read, number)]), at + read
            begun = time.thread_time()
            plan = plan_packs(
                stream[held],
                costs[held],
                tokens=packing.tokens,
                packs=packing.packs,
                waited_N=number - since,
                patience=packing.patience,
                tolerance=packing.tolerance,
            )
            dealt_RM = deal_packs(plan.cost_P, ranks=packing.ranks, micro_batches=packing.micro_batches)
            seconds = time.thread_time() - begun
            yield plan.tokens_P[dealt_RM], plan.cost_P[dealt_RM], int((plan.pack_N >= 0).sum()), seconds
            held, since, number = held[plan.pack_N < 0], since[plan.pack_N < 0], number + 1

    return steps


def first_fit(packing: Packing) -> StepsOf:
    """What VeOmni does: each rank has its own part of the stream and a buffer of 200 documents; a pack takes, in the
    order of arrival, whatever still fits. Padding costs what it costs in ours.
    """

    def steps(stream: np.ndarray) -> Iterator[tuple[np.ndarray, np.ndarray, int, float]]:
        parts = [iter(stream[rank :: packing.ranks].tolist()) for rank in range(packing.ranks)]
        buffers: list[list[int]] = [[] for _ in parts]
        floor = float((packing.cost(stream) / stream).min())
        while True:
            tokens_RM = np.zeros((packing.ranks, packing.micro_batches), np.int64)
            cost_RM, documents = np.zeros(tokens_RM.shape), 0
            begun = time.thread_time()
            for rank, (part, buffer) in enumerate(zip(parts, buffers, strict=True)):
                for turn in range(packing.micro_batches):
                    while len(buffer) < _FIRST_FIT_BUFFER or sum(buffer) < packing.tokens:
                        length = next(part, None)
                        if length is None:
                            return
                        buffer.append(length)
                    taken = _fitting(buffer, packing.tokens)
                    tokens_RM[rank, turn], documents = sum(taken), documents + len(taken)
                    rest = packing.tokens - sum(taken)
                    cost_RM[rank, turn] = float(packing.cost(np.array(taken)).sum()) + floor * rest
            yield tokens_RM, cost_RM, documents, time.thread_time() - begun

    return steps


def _fitting(buffer: list[int], tokens: int) -> list[int]:
    """Takes out of the buffer, from its beginning, what fits a pack."""
    taken, left, used = [], [], 0
    for length in buffer:
        if used + length <= tokens:
            taken.append(length)
            used += length
        else:
            left.append(length)
    buffer[:] = left
    return taken
