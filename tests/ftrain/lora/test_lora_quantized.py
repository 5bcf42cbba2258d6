"""Bases of 8 and 4 bits: what codes stand for, that a weight is decoded for a product alone, and meshes."""

import pytest
import torch

import ftrain
from ftrain import lora, tree
from ftrain.lora.blocks import NF4, decode, encode
from ftrain.sharding import Layout, Mesh, Plan
from tests.helpers.adapted_models import Adapted, bridged, native

CASES = {"dense": lambda: native("dense"), "mixture": lambda: native("mixture"), "experts": lambda: bridged("experts")}


def test_nf4_is_the_nearest_of_its_table_and_packs_the_first_number_high():
    weight = torch.randn(3, 128, generator=torch.Generator().manual_seed(0))
    codes, scales = encode(weight, "nf4")
    assert codes.shape == (3, 64) and codes.dtype == torch.uint8 and scales.shape == (3, 2)
    blocks, table = weight.reshape(3, 2, 64), torch.tensor(NF4)
    torch.testing.assert_close(scales, blocks.abs().amax(-1))
    nearest = ((blocks / scales[..., None])[..., None] - table).abs().argmin(-1).reshape(3, 128)
    torch.testing.assert_close(torch.stack([codes >> 4, codes & 15], -1).flatten(1).long(), nearest)
    expected = (table[nearest].reshape(3, 2, 64) * scales[..., None]).reshape(3, 128)
    torch.testing.assert_close(decode(codes, scales, "nf4", torch.float32), expected, rtol=0, atol=0)


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
    from dataclasses import replace

    from ftrain.modules.spec import map_with_paths

    specs = map_with_paths(lambda _, s: replace(s, dtype=torch.float64), case.specs)
    return replace(case, specs=specs, adapter=replace(case.adapter, base=specs))


@pytest.mark.parametrize("form", ["int8", "nf4"])
@pytest.mark.parametrize("kind", CASES)
def test_a_quantized_base_is_the_weights_that_it_stands_for(kind, form):
    case = as_float64(CASES[kind]())
    delta, small, plain, batch = quantized(case, form)
    expected = ftrain.value_and_grad(case.of_parts)(delta, plain, batch)
    for plan in (None, Plan(Mesh(shard=2, expert=2, kind="virtual"), Layout())):
        specs = lora.quantized_specs(case.specs, form, [t.path for t in case.adapter.targets])
        options = {} if plan is None else {"plan": plan, "specs": ftrain.lora.trees.joined(specs, case.adapter.specs)}
        step = ftrain.jit(lambda d, b, batch: ftrain.value_and_grad(case.of_parts)(d, b, batch), **options)
        found = step(delta, small, batch)
        for a, b in zip(tree.leaves(found), tree.leaves(expected), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-8, atol=1e-11)


def test_no_decoded_weight_is_kept_for_the_backward():
    case = native("dense")
    delta, base, batch = case.arguments(dtype=torch.float32)
    small = lora.quantize(base, case.specs, "nf4", [t.path for t in case.adapter.targets])
    graph = ftrain.jit(lambda *a: ftrain.value_and_grad(case.of_parts)(*a)).lower(delta, small, batch).graph.graph
    shapes = {target.shape for target in case.adapter.targets}
    shapes |= {shape[::-1] for shape in shapes}
    forward = [n for n in graph.nodes if n.meta.get("phase") == "forward" and n.op == "call_function"]
    kept = [n for n in forward for user in n.users
            if user.meta.get("phase") == "backward" and tuple(getattr(n.meta.get("val"), "shape", ())) in shapes
            and len(n.meta["val"].shape) == 2 and n.meta["val"].dtype == torch.float32 and n not in _activations(n)]  # fmt: skip
    assert not kept
