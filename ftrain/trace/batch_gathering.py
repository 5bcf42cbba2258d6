"""Functions that are done on the rows of all ranks, gathered for them: what reduces rows, or gives as many."""

import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch import Tensor

from ftrain.graph.source import user_source
from ftrain.graph.torch_private import node_of
from ftrain.sharding.batch import TokenOrder
from ftrain.sharding.mesh import Mesh
from ftrain.sharding.whole_rows import PURPOSE, share_of_rows, whole_rows_sharded
from ftrain.trace.batch_kinds import Kind
from ftrain.trace.batch_rows import BatchRows
from ftrain.trace.gathered_copies import tensors_in
from ftrain.trace.whole_arrays import LARGE, map_tensors

Run = Callable[[Sequence[Any], Mapping[str, Any]], Any]

_AS_MANY = {"softmax", "log_softmax", "softmin", "cumsum", "cumprod", "logcumsumexp", "flip", "roll", "normalize"}
"""Functions whose result has a row for each row, so that the share of the whole result is a rank's."""
_REDUCING = {
    "amax", "amin", "max", "min", "all", "any", "std", "var", "std_mean", "var_mean", "logsumexp", "prod", "median",
    "nanmedian", "mode", "kthvalue", "argmax", "argmin", "aminmax", "norm", "linalg_vector_norm",
    "topk", "dist",
}  # fmt: skip
"""Functions whose result has no rows where they mix them, so that all ranks have it alike."""


class RowsOfAll:
    """Runs functions on gathered rows. `rows`: what is known of the trace's tensors."""

    def __init__(self, rows: BatchRows, mesh: Mesh, order: TokenOrder) -> None:
        self._rows, self._mesh, self._order = rows, mesh, order

    def can_take(self, func: Callable[..., Any], args: Sequence[Any], kwargs: Mapping[str, Any]) -> bool:
        """True for a function that may run so, on tensors whose rows can be gathered."""
        kinds = [self._kind(t) for t in tensors_in((args, kwargs))]
        rows = [kind for kind in kinds if kind.what == "rows"]
        known = getattr(func, "__name__", "") in _AS_MANY | _REDUCING
        alone = all(kind.what in ("rows", "same") and (kind.ordered or kind.what == "same") for kind in kinds)
        return known and alone and len(rows) > 0 and kwargs.get("out") is None

    def run(self, func: Callable[..., Any], call: Run, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
        """What a function gives on the rows of all ranks, or this rank's share of it.

        `call(args, kwargs)` calls the function `func`.
        """
        kind = next(k for t in tensors_in((args, kwargs)) if (k := self._kind(t)).what == "rows")
        size = next(t.shape[kind.dim] for t in tensors_in((args, kwargs)) if self._kind(t) == kind)
        whole = map_tensors(self._whole, args), map_tensors(self._whole, kwargs)
        result = call(*whole)
        return self._share(result, kind, size) if func.__name__ in _AS_MANY else result

    def _whole(self, x: Tensor) -> Tensor:
        """The rows of all ranks, of a rank's."""
        kind = self._kind(x)
        if kind.what != "rows":
            return x
        size = x.numel() * x.itemsize * self._mesh.size
        if size > LARGE:
            warnings.warn(
                f"{user_source()}: gathers the batch's rows on every rank ({size / 2**20:.0f} MiB), as what it does "
                f"mixes them; compiled.bytes_moved() has such bytes as {PURPOSE!r}",
                stacklevel=2,
            )
        tokens = kind.order == "tokens"
        return whole_rows_sharded(x, dim=kind.dim, mesh=self._mesh, order=self._order, tokens=tokens)

    def _share(self, whole: Tensor, kind: Kind, size: int) -> Tensor:
        """A rank's rows of those of all."""
        tokens = kind.order == "tokens"
        share = share_of_rows(whole, size, dim=kind.dim, mesh=self._mesh, order=self._order, tokens=tokens)
        node = node_of(share)
        if node is not None:
            self._rows.set(node, kind)
        return share

    def _kind(self, tensor: Any) -> Kind:
        return kind_of(tensor, self._rows)


def kind_of(tensor: Any, rows: BatchRows) -> Kind:
    """What a value of the trace under way is of the batch; unknown for what is no tensor of it."""
    node = node_of(tensor) if isinstance(tensor, Tensor) else None
    return Kind("unknown") if node is None else rows.of(node).kind
