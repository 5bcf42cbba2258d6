"""Bases in 8 or 4 bits: a quantized leaf is a dict of its codes, under the name of the format, and its scales.

So it is a tree of arrays as any: a plan divides codes and scales as it divides the weight, and checkpoints hold them.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from ftrain.lora.blocks import Blocks, Format, block_of, encode
from ftrain.lora.targets import matched
from ftrain.lora.trees import leaf, replaced
from ftrain.modules.spec import Constant, ParamSpec, Tree, leaves_with_paths, zeros

SCALES = "scales"
_FORMATS: tuple[Format, ...] = ("int8", "nf4")


def is_quantized(node: Any) -> bool:
    """True for a dict that stands for a leaf."""
    return isinstance(node, Mapping) and len(node) == 2 and SCALES in node and any(f in node for f in _FORMATS)


def blocks_of(node: Mapping[str, Tensor], dtype: torch.dtype) -> Blocks:
    """The weight, of `dtype`, that a quantized leaf stands for."""
    form = next(f for f in _FORMATS if f in node)
    return Blocks.of(node[form], node[SCALES], form, dtype)


def quantize(params: Tree, specs: Tree, format: Format, targets: str | Sequence[str] = "all-linear") -> Tree:
    """The parameters with codes and scales in the place of the matrices that `targets` name (as in `ftrain.lora.add`).

    Blocks of 64 numbers of a row (see `ftrain.lora.blocks`): "int8", or "nf4" with the numbers of bitsandbytes. `specs`
    are those of the model. ValueError, with the path, for a matrix that does not go into blocks, and for an unknown
    format or target.

    >>> import ftrain
    >>> from ftrain import lora
    >>> from ftrain.modules.spec import ParamSpec, fan_in
    >>> specs = {"w": ParamSpec((4, 64), ("embed", "mlp"), fan_in(4))}
    >>> {name: list(x.shape) for name, x in lora.quantize(ftrain.init(specs, ftrain.key(0)), specs, "nf4")["w"].items()}
    {'nf4': [4, 32], 'scales': [4, 1]}
    """
    new = {}
    for path in _paths(specs, format, targets):
        try:
            codes, scales = encode(leaf(params, path), format)
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from error
        new[path] = {format: codes, SCALES: scales}
    return replaced(params, new)


def quantized_specs(specs: Tree, format: Format, targets: str | Sequence[str] = "all-linear") -> Tree:
    """The specs of what `quantize` makes, with the logical axes of the weights. Errors are those of `quantize`."""
    leaves = dict(leaves_with_paths(specs))
    return replaced(specs, {path: _specs_of(path, leaves[path], format) for path in _paths(specs, format, targets)})


def _paths(specs: Tree, format: Format, targets: str | Sequence[str]) -> list[str]:
    if format not in _FORMATS:
        raise ValueError(f"lora: format {format!r} is not one of {', '.join(_FORMATS)}")
    leaves = dict(leaves_with_paths(specs))
    return list(matched(leaves, [targets] if isinstance(targets, str) else targets, ()))


def _specs_of(path: str, spec: ParamSpec, format: Format) -> dict[str, ParamSpec]:
    try:
        size = block_of(spec.shape[-1], format)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error
    above, columns = spec.shape[:-1], spec.shape[-1]
    held = (columns // 2, torch.uint8) if format == "nf4" else (columns, torch.int8)
    return {
        format: ParamSpec((*above, held[0]), spec.axes, zeros(), held[1]),
        SCALES: ParamSpec((*above, columns // size), spec.axes, Constant(1.0)),
    }
