"""Ranks that are threads of one process, so that the whole protocol of a save runs in a fast test."""

import threading
from concurrent.futures import ThreadPoolExecutor

from ftrain.checkpoint import Ranks, open_store
from ftrain.checkpoint.arrays import DEFAULT_STORAGE
from ftrain.checkpoint.leaves import Leaves
from ftrain.checkpoint.shard_layout import ShardLayout
from ftrain.checkpoint.write import write_checkpoint
from tests.helpers.checkpoint_layouts import placements, whole_leaves


class ThreadRanks(Ranks):
    """Rank `rank` of `world`; what is said goes through the dictionary `said`, which all share."""

    def __init__(self, rank, world, said, said_more):
        super().__init__()
        self.rank, self.world, self._published, self._more = rank, world, said, said_more

    @staticmethod
    def of_world(world):
        said, more = {}, threading.Condition()
        return [ThreadRanks(rank, world, said, more) for rank in range(world)]

    def publish(self, round_number, topic, text):
        with self._more:
            self._published[round_number, topic, self.rank] = text
            self._more.notify_all()

    def wait_for(self, round_number, topic, rank):
        with self._more:
            if not self._more.wait_for(lambda: (round_number, topic, rank) in self._published, timeout=20):
                raise TimeoutError(f"rank {rank} says nothing about {topic}")
            return self._published[round_number, topic, rank]


def pieces_of(mesh, rank, seed=0):
    """The leaves of `whole_leaves(seed)` as a rank of the mesh holds them, as params."""
    whole, found = whole_leaves(seed), Leaves({}, {"position": seed})
    for name, placement in placements(mesh).items():
        path, box = f"params.{name}", placement.windows(mesh, rank)
        found.tensors[path] = whole[name][tuple(slice(start, start + length) for start, length in box)].clone()
        if placement.splits:
            slices = {other: placement.windows(mesh, other) for other in range(mesh.size)}
            found.layouts[path] = ShardLayout(placement.shape, box, slices)
    return found


def on_all_ranks(world, function):
    """`function(ranks)` in a thread per rank; by rank what it gave, or the error it raised."""

    def call(ranks):
        try:
            return function(ranks)
        except Exception as error:
            return error

    with ThreadPoolExecutor(world) as pool:
        return list(pool.map(call, ThreadRanks.of_world(world)))


def save_pieces(root, mesh, step=1, seed=0, storage=DEFAULT_STORAGE):
    """Save the state of `pieces_of` from all ranks; by rank None or the error."""

    def save(ranks):
        leaves = pieces_of(mesh, ranks.rank, seed)
        write_checkpoint(open_store(root), step, lambda: leaves, storage=storage, metrics={}, ranks=ranks)

    return on_all_ranks(mesh.size, save)
