"""The mesh: how the ranks of a run are arranged, and which of them talk to each other.

Rank `((r * shard) + d) * sequence + s` stands at replicate `r`, shard `d`, sequence `s`. Experts are folded over
shard x sequence: of the `shard * sequence` ranks of a replica, number `f = d * sequence + s` holds the expert slice
`f % expert`, and the `shard * sequence / expert` ranks with the same slice divide its parameters among them (axis
`expert_shard`). With hybrid sequence parallelism the sequence axis is itself divided: `ring x ulysses`, ulysses inside.
"""

import itertools
import math
from dataclasses import KW_ONLY, InitVar, dataclass
from typing import Literal, NamedTuple

from ftrain.sharding.foreign_axes import require_own_axes

Kind = Literal["process", "virtual", "fake"]
BASE_AXES = ("replicate", "shard", "sequence")
EXPERT_AXES = ("replicate", "expert_shard", "expert")


class Group(NamedTuple):
    """The ranks that differ in some axes only: `name` is the same text on every rank, `size` the number of members."""

    name: str
    size: int


@dataclass(frozen=True)
class Mesh:
    """Sizes of the axes of a run's ranks, and what stands behind them.

    - `replicate`: copies of the model (HSDP).
    - `shard`: ranks over which parameters and the batch are divided (FSDP).
    - `sequence`: ranks that share the tokens of one pack.
    - `expert`: slices of the experts, folded over `shard * sequence`, which it divides.
    - `kind`: "process" (one rank per process, torch.distributed), "virtual" (all ranks in lockstep in this process), or
      "fake" (shapes only: a step can be lowered, not run).

    The other parameters are axes of other trainers: any size but 1 is a ValueError that says what to take here.
    ValueError names sizes that do not fit together, and an unknown kind.

    >>> from ftrain import Mesh
    >>> mesh = Mesh(replicate=2, shard=4, sequence=2, expert=4, kind="virtual")
    >>> mesh.size, mesh.expert_shard
    (16, 2)
    >>> Mesh(shard=4, expert=3)
    Traceback (most recent call last):
    ValueError: Mesh: expert=3 does not divide shard * sequence = 4 * 1 = 4; ... may be 1, 2, 4
    """

    replicate: int = 1
    shard: int = 1
    sequence: int = 1
    expert: int = 1
    kind: Kind = "process"
    _: KW_ONLY
    tensor: InitVar[int] = 1
    pipeline: InitVar[int] = 1
    tp: InitVar[int] = 1
    pp: InitVar[int] = 1
    cp: InitVar[int] = 1
    ep: InitVar[int] = 1
    dp: InitVar[int] = 1
    fsdp: InitVar[int] = 1

    def __post_init__(self, tensor: int, pipeline: int, tp: int, pp: int, cp: int, ep: int, dp: int, fsdp: int) -> None:
        foreign = {"tensor": tensor, "pipeline": pipeline, "tp": tp, "pp": pp, "cp": cp, "ep": ep}
        require_own_axes({**foreign, "dp": dp, "fsdp": fsdp})
        for axis in (*BASE_AXES, "expert"):
            size = getattr(self, axis)
            if not isinstance(size, int) or size < 1:
                raise ValueError(f"Mesh({axis}={size!r}): the size of an axis is a whole number of at least 1")
        if self.kind not in ("process", "virtual", "fake"):
            raise ValueError(f"Mesh(kind={self.kind!r}) is not one of 'process', 'virtual', 'fake'")
        if (self.shard * self.sequence) % self.expert:
            legal = [n for n in range(1, self.shard * self.sequence + 1) if (self.shard * self.sequence) % n == 0]
            raise ValueError(
                f"Mesh: expert={self.expert} does not divide shard * sequence = {self.shard} * {self.sequence} = "
                f"{self.shard * self.sequence}; experts are folded over these axes, so expert may be {_words(legal)}"
            )

    @staticmethod
    def over(
        world: int,
        *,
        replicate: int = 1,
        shard: int | None = None,
        sequence: int = 1,
        expert: int = 1,
        kind: Kind = "process",
    ) -> "Mesh":
        """A mesh of `world` ranks; `shard=None` takes what the other axes leave.

        ValueError lists what would fit where the axes do not make up `world`.

        >>> from ftrain import Mesh
        >>> str(Mesh.over(8, sequence=2, kind="fake"))
        'replicate 1 x shard 4 x sequence 2, expert 1'
        """
        rest = replicate * sequence
        if shard is None:
            shard = max(1, world // rest)
        if replicate * shard * sequence != world:
            raise ValueError(
                f"replicate * shard * sequence = {replicate} * {shard} * {sequence} = {replicate * shard * sequence}, "
                f"but there are {world} ranks; {legal_sizes(world)}"
            )
        return Mesh(replicate, shard, sequence, expert, kind)

    @property
    def size(self) -> int:
        """How many ranks there are: `replicate * shard * sequence`."""
        return self.replicate * self.shard * self.sequence

    @property
    def expert_shard(self) -> int:
        """How many ranks divide the parameters of one slice of experts among them, within a replica."""
        return self.shard * self.sequence // self.expert

    def __str__(self) -> str:
        return f"replicate {self.replicate} x shard {self.shard} x sequence {self.sequence}, expert {self.expert}"

    def axis_size(self, axis: str) -> int:
        """The size of an axis: one of the base axes, "expert", "expert_shard", "ulysses:N", "ring:N" (N ranks of
        Ulysses inside).

        ValueError for an axis that the mesh lacks, and an N that does not divide `sequence`.
        """
        if ":" in axis:
            kind, inner = axis.split(":")
            if kind not in ("ulysses", "ring") or self.sequence % int(inner):
                raise ValueError(f"axis {axis!r}: sequence={self.sequence} is not divisible by {inner}")
            return int(inner) if kind == "ulysses" else self.sequence // int(inner)
        if axis not in (*BASE_AXES, "expert", "expert_shard"):
            raise ValueError(f"the mesh has no axis {axis!r}; it has {', '.join((*BASE_AXES, 'expert'))}")
        return getattr(self, axis)

    def group(self, *axes: str) -> Group:
        """The group of ranks that differ in `axes`; members are in the order of those axes, the last one fastest.

        ValueError for an axis that the mesh lacks.

        >>> from ftrain import Mesh
        >>> Mesh(shard=2, sequence=2).group("shard", "sequence")
        Group(name='axis_shard+sequence@r1d2s2e1', size=4)
        """
        size = math.prod(self.axis_size(a) for a in axes)
        sizes = f"r{self.replicate}d{self.shard}s{self.sequence}e{self.expert}"
        return Group(f"axis_{'+'.join(axes)}@{sizes}", size)

    def coordinate(self, rank: int, axis: str) -> int:
        """The position of a rank on an axis (as in `axis_size`), from 0.

        >>> from ftrain import Mesh
        >>> [Mesh(shard=2, sequence=2).coordinate(3, axis) for axis in ("replicate", "shard", "sequence")]
        [0, 1, 1]
        """
        s, d, r = rank % self.sequence, rank // self.sequence % self.shard, rank // (self.sequence * self.shard)
        f = d * self.sequence + s
        if ":" in axis:
            inner = int(axis.split(":")[1])
            return s % inner if axis.startswith("ulysses") else s // inner
        places = {
            "replicate": r,
            "shard": d,
            "sequence": s,
            "expert": f % self.expert,
            "expert_shard": f // self.expert,
        }
        return places[axis]

    def members(self, *axes: str) -> tuple[tuple[int, ...], ...]:
        """All groups of ranks that differ in `axes` only, each in the order of those axes. ValueError for an unknown
        axis.

        >>> from ftrain import Mesh
        >>> Mesh(shard=2, sequence=2).members("shard")
        ((0, 2), (1, 3))
        """
        for axis in axes:
            self.axis_size(axis)
        found: dict[tuple[int, ...], list[int]] = {}
        for rank in range(self.size):
            found.setdefault(self._others(rank, axes), []).append(rank)
        return tuple(
            tuple(sorted(ranks, key=lambda rank: tuple(self.coordinate(rank, a) for a in axes)))
            for ranks in found.values()
        )

    def _others(self, rank: int, axes: tuple[str, ...]) -> tuple[int, ...]:
        """Where a rank stands on the axes that are not in `axes`: equal for the members of one group."""
        folded = any(a in ("expert", "expert_shard") for a in axes)
        rest = [a for a in EXPERT_AXES if a not in axes] if folded else [a for a in BASE_AXES if a not in axes]
        divided = next((a for a in axes if ":" in a), None)
        if divided is not None:
            kind, inner = divided.split(":")
            rest = [a for a in rest if a != "sequence"] + [f"{'ring' if kind == 'ulysses' else 'ulysses'}:{inner}"]
        return tuple(self.coordinate(rank, a) for a in rest)


def legal_sizes(world: int) -> str:
    """The combinations of replicate x shard x sequence that make up `world` ranks, for messages; the first 16.

    >>> from ftrain.sharding.mesh import legal_sizes
    >>> legal_sizes(2)
    'replicate x shard x sequence may be 1x1x2, 1x2x1, 2x1x1'
    """
    divisors = [n for n in range(1, world + 1) if world % n == 0]
    found = [c for c in itertools.product(divisors, repeat=3) if math.prod(c) == world]
    shown = ", ".join("x".join(map(str, c)) for c in found[:16])
    return f"replicate x shard x sequence may be {shown}{', ...' if len(found) > 16 else ''}"


def _words(numbers: list[int]) -> str:
    return ", ".join(map(str, numbers))
