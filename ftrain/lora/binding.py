"""`bind`: the parameters that a loss sees, of a frozen base and trained deltas; `merge`: their sums, for a folder."""

import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ftrain.kernels import random
from ftrain.lora.adapter import Adapter
from ftrain.lora.blocks import Blocks
from ftrain.lora.dora import gain
from ftrain.lora.dropout import Dropped
from ftrain.lora.low_rank import Parts
from ftrain.lora.pieces import divided, gathered
from ftrain.lora.products import weight
from ftrain.lora.quantized import SCALES, blocks_of, is_quantized
from ftrain.lora.targets import Target
from ftrain.lora.trees import entry, leaf, mapped
from ftrain.modules.spec import ParamSpec, Tree, leaves_with_paths
from ftrain.trace.precision import compute_dtype


def bind(base: Tree, delta: Tree, adapter: Adapter, *, key: Tensor | None = None) -> Tree:
    """The parameters of the model with the deltas, for its loss: `model.loss(bind(base, delta, adapter), batch)`.

    - `base`: the parameters of the model, of any floating dtype, or quantized (`ftrain.lora.quantize`). They get no
      gradient. In a step they are seen in its compute dtype.
    - `delta`: a tree as `adapter.specs` describes, which is differentiated.
    - `key`: int64 `[2]`, for the dropout of the adapter; without one nothing is dropped.

    A changed weight is a `LowRank`: neither its sum nor its gradient is made where it multiplies rows. Nothing is
    copied. ValueError for a tree that lacks what the adapter names.

    >>> import torch, ftrain
    >>> from ftrain import lora
    >>> from ftrain.modules.spec import ParamSpec, fan_in
    >>> specs = {"w": ParamSpec((4, 3), ("embed", "mlp"), fan_in(4))}
    >>> base, adapter = ftrain.init(specs, ftrain.key(0)), lora.add(specs, "w", rank=2)
    >>> params = lora.bind(base, adapter.init(ftrain.key(1)), adapter)
    >>> torch.equal(torch.ones(1, 4) @ params["w"], torch.ones(1, 4) @ base["w"])
    True
    """
    whole = _Shown(dict(leaves_with_paths(adapter.base)))
    changed = {
        t.path: weight(_parts(t, whole.of(t.path, leaf(base, t.path)), delta, adapter, key)) for t in adapter.targets
    }
    return mapped(base, lambda path, x: changed[path] if path in changed else whole.leaf(path, x), is_quantized)


def merge(base: Tree, delta: Tree, adapter: Adapter) -> Tree:
    """The parameters with the deltas added, as plain tensors: each in the dtype of its base, added in float32 or wider.

    Quantized leaves are decoded. Errors are those of `bind`.

    >>> import torch, ftrain
    >>> from ftrain import lora
    >>> from ftrain.modules.spec import ParamSpec, fan_in
    >>> specs = {"w": ParamSpec((4, 3), ("embed", "mlp"), fan_in(4))}
    >>> base, adapter = ftrain.init(specs, ftrain.key(0)), lora.add(specs, "w", rank=2)
    >>> torch.equal(lora.merge(base, adapter.init(ftrain.key(1)), adapter)["w"], base["w"])
    True
    """
    specs = _Shown(dict(leaves_with_paths(adapter.base)))
    targets = {target.path: target for target in adapter.targets}

    def whole(path: str, x: Any) -> Tensor:
        own = mapped(x, lambda _, leaf: gathered(leaf))
        shown = specs.of(path, own)
        if path not in targets:
            return shown.decoded() if isinstance(shown, Blocks) else x
        near = {path: mapped(entry(delta, path), lambda _, leaf: gathered(leaf))}
        parts = _parts(targets[path], shown, adapter.tree(near), adapter, None)
        return divided(summed(parts), x)

    with torch.no_grad():
        return mapped(base, whole, is_quantized)


def summed(parts: Parts) -> Tensor:
    """The weight in the dtype of its base, of any shape, summed in float32 or wider."""
    base = parts.base.decoded() if isinstance(parts.base, Blocks) else parts.base
    if parts.left is None:
        return base
    wide = torch.promote_types(torch.promote_types(base.dtype, torch.float32), parts.left.dtype)
    return parts.map(lambda name, x: base.to(wide) if name == "base" else x.to(wide)).dense().to(base.dtype)


@dataclass(frozen=True)
class _Shown:
    """The leaves of a base as a loss sees them. `specs`: of the model, by path."""

    specs: Mapping[str, ParamSpec]

    def of(self, path: str, found: Any) -> Tensor | Blocks:
        """The leaf in the compute dtype of the step, or the blocks that stand for it."""
        if not is_quantized(found):
            return self._cast(path, found)
        dtype = self.specs[path].dtype
        return blocks_of(found, compute_dtype(found[SCALES], path) if dtype == torch.float32 else dtype)

    def leaf(self, path: str, found: Any) -> Any:
        """As `of`, with quantized leaves as weights."""
        shown = self.of(path, found)
        return weight(Parts(shown)) if isinstance(shown, Blocks) else shown

    def _cast(self, path: str, found: Tensor) -> Tensor:
        return found.detach().to(compute_dtype(found, path)) if found.is_floating_point() else found


def _parts(target: Target, base: Tensor | Blocks, delta: Tree, adapter: Adapter, key: Tensor | None) -> Parts:
    own = entry(delta, target.path)
    a, b = own["A"], own["B"]
    left, right = (a, b) if target.inputs_first else (b.mT, a.mT)
    factor = gain(own["magnitude"], base, a, b, target) if adapter.dora else None
    dropped = None
    if key is not None and adapter.dropout and target.kind != "embedding":
        dropped = Dropped(random.fold_in(key, zlib.crc32(target.path.encode())), adapter.dropout)
    return Parts(base, left, right, target.scale, factor, dropped)
