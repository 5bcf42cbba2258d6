"""PiSSA (Meng et al., arXiv 2404.02948): deltas begin as the largest singular directions, which the base gives up.

Legend: I inputs, O outputs, r rank.
"""

import math
from dataclasses import replace

import torch
from torch import Tensor

from ftrain.lora.adapter import Adapter
from ftrain.lora.pieces import gathered, write
from ftrain.lora.targets import Target
from ftrain.lora.trees import SUFFIX, entry, leaf, replaced
from ftrain.modules.spec import Tree


def pissa(base: Tree, delta: Tree, adapter: Adapter) -> tuple[Tree, Tree]:
    """A base and deltas that add up to the weights of `base`: `A` and `B` hold the `rank` largest singular values.

    - `base`: whole parameters, as loaded. `delta`: of `adapter.init`, whose dtypes are kept.

    The sum is that of the old weights but for the rounding of their dtype. ValueError for tables, experts and DoRA, and
    for a rank beyond a weight's smaller side. Quantize the base afterwards, if at all.

    >>> import torch, ftrain
    >>> from ftrain import lora
    >>> from ftrain.modules.spec import ParamSpec, fan_in
    >>> specs = {"w": ParamSpec((4, 3), ("embed", "mlp"), fan_in(4))}
    >>> params, adapter = ftrain.init(specs, ftrain.key(0)), lora.add(specs, "w", rank=2)
    >>> base, delta = lora.pissa(params, adapter.init(ftrain.key(1)), adapter)
    >>> torch.allclose(lora.merge(base, delta, adapter)["w"], params["w"]), torch.allclose(base["w"], params["w"])
    (True, False)
    """
    if adapter.dora:
        raise ValueError("lora: PiSSA is a start of deltas without magnitudes: take dora=False")
    new_base, new_delta = {}, {}
    for target in adapter.targets:
        old, own = leaf(base, target.path), entry(delta, target.path)
        a_Ir, b_rO, rest = _split(target, old)
        new_base[target.path] = rest
        new_delta[f"{target.path}{SUFFIX}.A"] = a_Ir.to(own["A"])
        new_delta[f"{target.path}{SUFFIX}.B"] = b_rO.to(own["B"])
    return replaced(base, new_base), replaced(delta, new_delta)


def pissa_into(base: Tree, delta: Tree, adapter: Adapter) -> None:
    """As `pissa`, written into the leaves of `base` and `delta`, one after the other, each rank its own parts.

    Ranks call this together, and one's singular directions are taken by all. Errors are those of `pissa`.
    """
    if adapter.dora:
        raise ValueError("lora: PiSSA is a start of deltas without magnitudes: take dora=False")
    with torch.no_grad():
        for target in adapter.targets:
            held, own = leaf(base, target.path), entry(delta, target.path)
            a_Ir, b_rO, rest = _split(target, gathered(held))
            for into, new in ((held, rest), (own["A"], a_Ir), (own["B"], b_rO)):
                write(into, new)


def shift_base(base: Tree, old: Tree, new: Tree, adapter: Adapter) -> None:
    """Write into a base, which with the deltas `old` adds up to a model, what adds up to it with the deltas `new`.

    So a run that goes on has the start that it saved, also where singular directions come out with other signs. Where
    both are the same to the bit nothing is written.
    """
    with torch.no_grad():
        for target in adapter.targets:
            held = leaf(base, target.path)
            before, after = ([gathered(entry(x, target.path)[n]) for n in "AB"] for x in (old, new))
            if all(map(torch.equal, before, after)):
                continue
            whole = gathered(held)
            wide = torch.promote_types(whole.dtype, torch.float32)
            more_IO = target.scale * (before[0].to(wide) @ before[1].to(wide) - after[0].to(wide) @ after[1].to(wide))
            moved = more_IO if target.inputs_first else more_IO.mT
            write(held, (whole.to(wide) + moved.reshape(whole.shape)).to(whole.dtype))


def _split(target: Target, weight: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The factors, and what is left of the weight without them in the shape and dtype of the weight."""
    if target.kind not in ("linear", "convolution"):
        raise ValueError(f"lora: {target.path!r} is of kind {target.kind}, which PiSSA does not begin: leave it out")
    if target.rank > min(target.inputs, target.outputs):
        raise ValueError(f"lora: {target.path!r} {list(target.shape)} has no {target.rank} singular values: lower rank")
    shape = (target.inputs, target.outputs) if target.inputs_first else (target.outputs, target.inputs)
    flat = weight.detach().reshape(shape).to(torch.promote_types(weight.dtype, torch.float32))
    w_IO = flat if target.inputs_first else flat.mT
    u_IR, s_R, v_RO = torch.linalg.svd(w_IO, full_matrices=False)
    root_r = (s_R[: target.rank] / target.scale).sqrt()
    a_Ir, b_rO = u_IR[:, : target.rank] * root_r, root_r[:, None] * v_RO[: target.rank]
    rest_IO = w_IO - target.scale * a_Ir @ b_rO
    rest = (rest_IO if target.inputs_first else rest_IO.mT).reshape(weight.shape)
    return a_Ir, b_rO, rest.to(weight.dtype).contiguous()


def beyond(start: Tree, delta: Tree, adapter: Adapter) -> tuple[Adapter, Tree]:
    """The adapter of twice the rank that does to the *original* weights what `delta` does to the base of `pissa`.

    `start`: the deltas that `pissa` gave. So that an adapter can be exported without its base.
    """
    targets = tuple(_doubled(target, rslora=adapter.rslora) for target in adapter.targets)
    entries = {}
    for target in adapter.targets:
        new, old = entry(delta, target.path), entry(start, target.path)
        entries[target.path] = {
            "A": torch.cat([new["A"], old["A"]], -1),
            "B": torch.cat([new["B"], -old["B"]], -2),
        }
    return replace(adapter, targets=targets), adapter.tree(entries)


def _doubled(target: Target, *, rslora: bool) -> Target:
    """Twice the rank and the same scale."""
    return replace(target, rank=2 * target.rank, alpha=target.alpha * (math.sqrt(2) if rslora else 2))
