"""The fast path of a step on a mesh of processes: from the second call on, one guard checks the arguments, as on one
device.

A state is a tree of DTensors, and making a DTensor takes longer than everything else that a call does for a leaf. So a
step that donates its state keeps two DTensors for each donated leaf and alternates between them: the one that came in
is invalidated and loses its memory, the other is returned with it. A DTensor that somebody else still holds is left
alone, and a new one is made.
"""

from collections.abc import Callable, Sequence
from operator import attrgetter
from sys import getrefcount
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from ftrain.graph.collectives import groups_of
from ftrain.runtime.donation import DONATED_PATH, DonatedDTensor, give_away
from ftrain.sharding.placement import Placement
from ftrain.sharding.private import dtensor_like, local_of, set_local, spec_of
from ftrain.sharding.processes import PIECE
from ftrain.step.artifact import Compiled

_piece_of = attrgetter(PIECE)
_NOTHING = torch.empty(0)
_DTENSOR = {DTensor}


class MeshCall:
    """What a rank remembers of the last call of a compiled step.

    `wrap(piece, placement)` makes the DTensor of a padded piece. `coordinates_3`: int64[3], the rank's coordinates, the
    last input of its graph. `meets_others`: whether the graph has collectives; `words`: of its calls, see
    `ftrain.sharding.joint_calls`.
    """

    def __init__(self, compiled: Compiled, wrap: Callable[[Tensor, Placement], Tensor], coordinates_3: Tensor) -> None:
        self._compiled, self._wrap, self._coordinates_3 = compiled, wrap, coordinates_3
        self.meets_others = bool(groups_of(compiled.graph))
        self.words = f"called the step {compiled.name}"
        donation, placements = compiled.donation, compiled.placements
        written = set(donation.outputs.values())
        self._kept = [p for i, p in enumerate(placements) if i not in written]
        # For each donated leaf: its position among the leaves and among the inputs, its path, its placement.
        self._donated = [
            (at, slot, path, placements[output])
            for at, (slot, output), path in zip(
                compiled.donated_leaves, donation.outputs.items(), donation.paths, strict=True
            )
        ]
        self._treedef: Any = None
        self._divided: list[int] = []
        self._specs: list[Any] = []
        self._spares: dict[int, DTensor] = {}
        self.renewed = False
        """Whether the last results have other tensors around their pieces than the leaves that they came from."""

    def learn(self, leaves: Sequence[Any], treedef: Any, inputs: Sequence[Any]) -> None:
        """Remember the arguments of this call, so that the next call with arguments like these takes the fast path.

        `leaves` with `treedef`: of the call's arguments. `inputs`: of the rank's graph, with its coordinates last.
        """
        divided = [i for i, leaf in enumerate(leaves) if type(leaf) is DTensor]
        reusable = all(leaves[i].__dict__.get(PIECE) is inputs[i] for i in divided)
        self._treedef, self._divided = treedef if reusable else None, divided
        self._specs = [spec_of(leaves[i]) for i in divided]
        self._spares.clear()
        if reusable:
            signature = self._compiled.signature
            signature.learn(signature.tensors(list(inputs)))

    def inputs(self, leaves: list[Any], treedef: Any, around: tuple[Any, ...] | None) -> list[Any] | None:
        """The inputs of the rank's graph, its coordinates last; None where the arguments need a closer look.

        `leaves` with `treedef`: of a call's arguments. `around`: see `TraceCache.around`.
        """
        if self._treedef is None or treedef != self._treedef:
            return None
        arrays = [leaves[i] for i in self._divided]
        if not set(map(type, arrays)) <= _DTENSOR or [*map(spec_of, arrays)] != self._specs:
            return None
        try:
            pieces = [*map(_piece_of, arrays)]
        except AttributeError:  # one that no step has made
            return None
        inputs = [*leaves, self._coordinates_3]
        for i, piece in zip(self._divided, pieces, strict=True):
            inputs[i] = piece
        signature = self._compiled.signature
        return inputs if signature.matches_fast(inputs, signature.treedef, around) else None

    def results(self, leaves: list[Any], inputs: list[Any], outputs: list[Tensor]) -> list[Tensor]:
        """The tensors of the result in order. The leaves that they came from are invalidated.

        `leaves`: of the call's arguments. `inputs`: of the rank's graph, whose donated members hold the new state.
        `outputs`: of the graph.
        """
        others = [self._wrap(*pair) for pair in zip(outputs, self._kept, strict=True)]
        spares = self._spares
        self.renewed = False
        donated: list[Tensor] = []
        for at, slot, path, placement in self._donated:
            old, piece = leaves[at], inputs[slot]
            if type(old) is not DTensor or old.__dict__.get(PIECE) is not piece:
                self.renewed = True
                donated.append(self._renewed(old, piece, path, placement))
                continue
            new, spares[at] = spares.get(at), old
            local = local_of(old)
            _invalidate(old, path)
            if getrefcount(local) > 2:
                self.renewed = True
                local = _invalidated(local, path)
            # 2 references: this variable and getrefcount's argument; a second attribute is one that the user set
            if new is None or getrefcount(new) > 2 or len(new.__dict__) > 1:
                new = dtensor_like(local, spec_of(old))
            else:
                set_local(new, local)
            new.__dict__[PIECE] = piece
            new.__class__ = DTensor
            donated.append(new)
        return self._compiled.donation.ordered(donated, others)

    def _renewed(self, leaf: Any, piece: Tensor, path: str, placement: Placement) -> Tensor:
        """The new value of a leaf that is whole, or whose piece is memory that no step has made."""
        if type(leaf) is DTensor:
            _invalidated(local_of(leaf), path)
            _invalidate(leaf, path)
            return self._wrap(piece, placement)
        (fresh,) = give_away([leaf], [path])
        return fresh if piece is leaf else piece


def _invalidate(array: DTensor, path: str) -> None:
    """Take its memory from a DTensor, and make every use of it an error."""
    set_local(array, _NOTHING)
    array.__dict__.pop(PIECE, None)
    array.__dict__[DONATED_PATH] = path
    array.__class__ = DonatedDTensor


def _invalidated(local: Tensor, path: str) -> Tensor:
    """Invalidate a tensor that `to_local` has returned to the user, and return another tensor on its memory."""
    (fresh,) = give_away([local], [path])
    return fresh
