"""How often each of several sources is drawn from: weights of documents, by which a mixture is ordered.

S sources.
"""

from collections.abc import Sequence

_PARTS = 2**24  # weights are whole numbers that add up to about this many
_SMALLEST = 1e-4  # of the largest weight: less, and a source would not be seen in most runs


def checked_weights(weights: Sequence[float], sources: int) -> tuple[float, ...]:
    """Weights as parts of 1, one for each source. ValueError for another number of them, or for one not above 0.

    >>> checked_weights([3, 1], 2)
    (0.75, 0.25)
    """
    if len(weights) != sources:
        raise ValueError(f"{len(weights)} weights for {sources} sources: give one for each")
    for i, weight in enumerate(weights):
        if not 0 < weight < float("inf"):
            raise ValueError(f"the weight of source {i} is {weight}: weights are numbers above 0; leave a source out")
    if min(weights) < _SMALLEST * max(weights):
        raise ValueError(
            f"weights from {min(weights):g} to {max(weights):g}: the smallest is below 1/10000 of the largest"
        )
    whole = float(sum(weights))
    return tuple(weight / whole for weight in weights)


def by_temperature(sizes: Sequence[int], temperature: float) -> tuple[float, ...]:
    """Weights `size ** (1 / temperature)`: 1 draws by size, and the higher it is, the more alike sources are drawn.

    `sizes`: documents of each source. ValueError for a temperature that is not above 0, and for an empty source.

    >>> by_temperature([900, 100], 2.0)
    (0.75, 0.25)
    """
    if not temperature > 0:
        raise ValueError(f"a temperature of {temperature}: it must be above 0 (1: by size; higher: more alike)")
    largest = max(sizes, default=1)
    return checked_weights([(size / max(1, largest)) ** (1 / temperature) for size in sizes], len(sizes))


def by_tokens(shares: Sequence[float], mean_tokens: Sequence[float]) -> tuple[float, ...]:
    """Weights with which the tokens of a run come from sources in these shares, whose documents differ in length.

    `mean_tokens`: of a document of each source. ValueError for unlike numbers of them, or for one that is not above 0.

    >>> by_tokens([0.5, 0.5], [100.0, 300.0])
    (0.75, 0.25)
    """
    if len(shares) != len(mean_tokens):
        raise ValueError(f"shares of {len(shares)} sources and mean tokens of {len(mean_tokens)}: give one for each")
    for i, mean in enumerate(mean_tokens):
        if not mean > 0:
            raise ValueError(f"source {i} has documents of {mean} tokens on average: it must be above 0")
    return checked_weights([share / mean for share, mean in zip(shares, mean_tokens, strict=True)], len(shares))


def whole_weights(weights: Sequence[float]) -> list[int]:
    """Weights that add up to 1 as whole numbers, each at least 1."""
    return [max(1, round(weight * _PARTS)) for weight in weights]


def turn(place: int, counts: Sequence[int]) -> tuple[int, int]:
    """Whose turn it is at a place of an interleaving by these whole weights, and how often it was its turn before.

    Evenly: after k places the sources before any given one had their part of them, to within one.

    >>> [turn(place, [2, 1])[0] for place in range(6)]
    [0, 0, 1, 0, 0, 1]
    """
    left, here, after = sum(counts), place, place + 1
    for source, count in enumerate(counts[:-1]):
        others, others_after = here * (left - count) // left, after * (left - count) // left
        if here - others != after - others_after:
            return source, here - others
        left, here, after = left - count, others, others_after
    return len(counts) - 1, here
