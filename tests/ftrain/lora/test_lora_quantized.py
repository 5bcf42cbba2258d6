"""Bases of 8 and 4 bits: what codes stand for, that a weight is decoded for a product alone, and meshes."""

from dataclasses import replace

import pytest
import torch

import ftrain
from ftrain import lora, tree
from ftrain.kernels.quantiles import NF4
from ftrain.lora.blocks import decode, encode
from ftrain.lora.trees import joined
from ftrain.modules.spec import map_with_paths
from ftrain.sharding import Layout, Mesh, Plan
from tests.helpers.adapted_models import Adapted, bridged, native

CASES = {"dense": lambda: native("dense"), "mixture": lambda: native("mixture"), "experts": lambda: bridged("experts")}


def test_nf4_is_the_nearest_of_its_table_and_packs_the_first_number_high():
    weight = torch.randn(3, 128, generator=torch.Generator().manual_seed(0))
    codes, scales = encode(weight, "nf4")
    assert (codes.shape, codes.dtype, scales.shape) == ((3, 64), torch.uint8, (3, 2))
    blocks, table = weight.reshape(3, 2, 64), torch.tensor(NF4)
    torch.testing.assert_close(scales, blocks.abs().amax(-1))
    nearest = ((blocks / scales[..., None])[..., None] - table).abs().argmin(-1).reshape(3, 128)
    torch.testing.assert_close(torch.stack([codes >> 4, codes & 15], -1).flatten(1).long(), nearest)
    expected = (table[nearest].reshape(3, 2, 64) * scales[..., None]).reshape(3, 128)
    torch.testing.assert_close(decode(codes, scales, "nf4", torch.float32), expected, rtol=0, atol=0)


def test_nf4_has_the_quantiles_that_were_published():
    """Appendix E of arXiv 2305.14314: quantiles of a normal distribution, 8 above zero and 7 below, and zero."""
    last = 0.9677083
    above = torch.special.ndtri(torch.linspace(last, 0.5, 9, dtype=torch.float64)[:-1])
    below = -torch.special.ndtri(torch.linspace(last, 0.5, 8, dtype=torch.float64)[:-1])
    table = torch.cat([above, torch.zeros(1, dtype=torch.float64), below]).sort().values
    torch.testing.assert_close(torch.tensor(NF4, dtype=torch.float64), table / table.max(), rtol=0, atol=1e-6)


def test_int8_is_within_half_a_step():
    weight = torch.randn(4, 96, generator=torch.Generator().manual_seed(0))
    codes, scales = encode(weight, "int8")
    assert scales.shape == (4, 2)  # blocks of 48, which divide 96
    apart = (decode(codes, scales, "int8", torch.float32) - weight).abs().reshape(4, 2, 48)
    assert bool((apart <= scales[..., None] / 254 + 1e-6).all())


def quantized(case: Adapted, form: str):
    """The base in blocks, and the same numbers as plain tensors."""
    delta, base, batch = case.arguments(packs=2)
    targets = [t.path for t in case.adapter.targets]
    small = lora.quantize(base, case.specs, form, targets)
    zero = tree.map(torch.zeros_like, delta)
    return delta, small, lora.merge(small, zero, case.adapter), batch


def as_float64(case: Adapted) -> Adapted:
    """With specs that say the dtype that these tests compute in, which quantized leaves take from there."""
    specs = map_with_paths(lambda _, s: replace(s, dtype=torch.float64), case.specs)
    return replace(case, specs=specs, adapter=replace(case.adapter, base=specs))


@pytest.mark.parametrize(("kind", "form"), [("dense", "int8"), ("mixture", "nf4"), ("experts", "nf4")])
def test_a_quantized_base_is_the_weights_that_it_stands_for(kind, form):
    case = as_float64(CASES[kind]())
    delta, small, plain, batch = quantized(case, form)
    expected = ftrain.value_and_grad(case.of_parts)(delta, plain, batch)
    for plan in (None, Plan(Mesh(shard=2, expert=2, kind="virtual"), Layout())):
        specs = lora.quantized_specs(case.specs, form, [t.path for t in case.adapter.targets])
        options = {} if plan is None else {"plan": plan, "specs": joined(specs, case.adapter.specs)}
        step = ftrain.jit(lambda d, b, batch: ftrain.value_and_grad(case.of_parts)(d, b, batch), **options)
        found = step(delta, small, batch)
        for a, b in zip(tree.leaves(found), tree.leaves(expected), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-8, atol=1e-11)


def test_no_decoded_weight_is_kept_for_the_backward():
    case = native("dense")
    delta, base, batch = case.arguments(packs=2, dtype=torch.float32)  # 64 tokens, more than any weight has rows
    small = lora.quantize(base, case.specs, "nf4", [t.path for t in case.adapter.targets])
    kept, whole = (_kept(case, delta, x, batch) for x in (small, lora.merge(small, _none(delta), case.adapter)))
    assert not kept, "a weight is read in both passes"
    assert whole, "the law would see it"


def _none(delta):
    return tree.map(torch.zeros_like, delta)


def _kept(case, delta, base, batch):
    """What the backward reads that is as large as a weight: computed in the forward, or an input."""
    graph = ftrain.jit(lambda *a: ftrain.value_and_grad(case.of_parts)(*a)).lower(delta, base, batch).graph.graph
    shapes = {target.shape for target in case.adapter.targets}
    shapes |= {shape[::-1] for shape in shapes}
    before = [n for n in graph.nodes if n.meta.get("phase") in ("forward", "input") and n.op != "output"]
    return [n for n in before if tuple(getattr(n.meta.get("val"), "shape", ())) in shapes
            and any(user.meta.get("phase") == "backward" for user in n.users)]  # fmt: skip
