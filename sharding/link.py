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
    """`latency` in microseconds per collective and `bandwidth` in bytes/s that a rank sends at."""

    latency: float = 20.0
    bandwidth: float = 50e9

    @property
    def bucket_bytes(self) -> int:
        """The size of a message of which the latency is a twentieth: what small ones are joined to."""
        return max(1, int(20 * self.latency * 1e-6 * self.bandwidth))

    def microseconds(self, sent: float) -> float:
        """How long a collective takes in which each rank sends so many bytes."""
        return self.latency + 1e6 * sent / self.bandwidth


def sent_bytes(kind: str, held: int, ranks: int) -> int:
    """Bytes that a rank sends in a collective to which it brings `held` bytes; kinds are those of
    `ftrain.runtime.lockstep`.
    """
    return int(_SENT[kind](ranks) * held)
