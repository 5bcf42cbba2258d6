"""What a message costs: a latency and a bandwidth for each kind of link (the alpha-beta model)."""

from dataclasses import dataclass

# Of what a rank holds before (all_gather: its piece times n) the part that it sends, for n ranks.
_SENT = {
    "all_gather": lambda n: n - 1,
    "reduce_scatter": lambda n: (n - 1) / n,
    "all_reduce": lambda n: 2 * (n - 1) / n,
    "all_to_all": lambda n: (n - 1) / n,
    "exchange_rows": lambda n: (n - 1) / n,
    "shift_ranks": lambda n: 1,
}


@dataclass(frozen=True)
class Link:
    """What a message costs on one kind of link: the alpha-beta model.

    - `latency`: microseconds per collective.
    - `bandwidth`: bytes per second that a rank sends.

    >>> from ftrain.sharding.link import Link
    >>> Link(latency=20.0, bandwidth=50e9).microseconds(1e9)
    20020.0
    """

    latency: float = 20.0
    bandwidth: float = 50e9

    @property
    def bucket_bytes(self) -> int:
        """The bytes of a message of which the latency is a twentieth: small messages are joined up to it."""
        return max(1, int(20 * self.latency * 1e-6 * self.bandwidth))

    def microseconds(self, sent: float) -> float:
        """How long a collective takes, in microseconds, in which each rank sends so many bytes."""
        return self.latency + 1e6 * sent / self.bandwidth


def sent_bytes(kind: str, held: int, ranks: int) -> int:
    """Bytes that a rank sends in a collective of `ranks` to which it brings `held` bytes, by ring algorithms.

    `kind`: "all_gather", "reduce_scatter", "all_reduce", "all_to_all", "exchange_rows" or "shift_ranks"; KeyError for
    another.

    >>> from ftrain.sharding.link import sent_bytes
    >>> sent_bytes("all_gather", 1000, 4), sent_bytes("all_reduce", 1000, 4)
    (3000, 1500)
    """
    return int(_SENT[kind](ranks) * held)
