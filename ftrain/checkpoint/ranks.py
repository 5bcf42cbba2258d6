"""The processes that save together, and what they tell each other: short texts in the store of torch.distributed.

Never through a process group: a save goes on behind the training steps, whose collectives must not meet others in
between. Every rank works on a save under the same number, its round.
"""

import threading
import time
from datetime import timedelta

import torch.distributed as dist

from ftrain.sharding.heartbeat import Heartbeat
from ftrain.sharding.joint_calls import joint_call
from ftrain.sharding.private import default_store

_PATIENCE = 5.0


class Ranks:
    """This process's `rank` among the `world` that call `save` together, in one order. `Ranks()` is a process alone."""

    def __init__(self) -> None:
        self.rank, self.world = 0, 1
        self._round = 0

    @staticmethod
    def of_run(*, timeout: float = 1800.0) -> "Ranks":
        """All ranks of torch.distributed, or this process alone where that is not initialised.

        All ranks call it, in one order.

        Args:
            timeout: seconds after which a rank that lives but has not done its part of a save fails the save.

        >>> from ftrain.checkpoint import Ranks
        >>> Ranks.of_run().world  # in a process alone
        1
        """
        return _Stored(timeout) if dist.is_initialized() and dist.get_world_size() > 1 else Ranks()

    def next_round(self, what: str) -> int:
        """The number of the next round, a save or a decision: each call of this is one on every rank.

        `what`: the round in words, see `ftrain.sharding.joint_calls`.
        """
        if self.world > 1:
            joint_call(what)
        self._round += 1
        return self._round

    def publish(self, round_number: int, topic: str, text: str) -> None:
        """Let the others know something, once per round and topic."""

    def wait_for(self, round_number: int, topic: str, rank: int) -> str:
        """What a rank publishes on a topic of a round; waits for it.

        Raises:
            RuntimeError: the rank no longer answers; it is named.
            TimeoutError: it lives and publishes nothing.
            ValueError: this process is alone.
        """
        raise ValueError(f"rank {rank} was asked for {topic} of save {round_number}, and this process is alone")

    def forget(self, before: int) -> None:
        """Remove from the store what this rank published in rounds below `before`: everybody has read it."""


class _Stored(Ranks):
    def __init__(self, timeout: float) -> None:
        super().__init__()
        self.rank, self.world = dist.get_rank(), dist.get_world_size()
        self._timeout = timeout
        # A connection per thread: one that waits would hold up the other.
        self._local = threading.local()
        number = self._store().add(f"ftrain/checkpoint/made/{self.rank}", 1)
        self._prefix = f"ftrain/checkpoint/{number}"
        self._published: list[tuple[int, str]] = []
        self._heartbeat = Heartbeat()

    def publish(self, round_number: int, topic: str, text: str) -> None:
        key = self._key(round_number, topic, self.rank)
        self._published.append((round_number, key))
        self._store().set(key, text)

    def wait_for(self, round_number: int, topic: str, rank: int) -> str:
        key, begun = self._key(round_number, topic, rank), time.monotonic()
        while True:
            try:
                self._store().wait([key], timedelta(seconds=_PATIENCE))
                return self._store().get(key).decode()
            except dist.DistStoreError:
                if rank in self._heartbeat.silent():
                    raise RuntimeError(f"rank {rank} no longer answers") from None
                if time.monotonic() - begun > self._timeout:
                    raise TimeoutError(
                        f"rank {rank} has not come to {topic!r} of save {round_number} within {self._timeout:.0f} s: "
                        "all ranks must save the same steps"
                    ) from None

    def forget(self, before: int) -> None:
        old = [entry for entry in self._published if entry[0] < before]
        for entry in old:
            self._published.remove(entry)
            self._store().delete_key(entry[1])

    def _store(self) -> dist.Store:
        if not hasattr(self._local, "store"):
            self._local.store = default_store().clone()
        return self._local.store

    def _key(self, round_number: int, topic: str, rank: int) -> str:
        return f"{self._prefix}/{round_number}/{topic}/{rank}"
