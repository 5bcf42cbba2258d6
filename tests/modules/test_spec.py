import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ftrain.kernels import random
from ftrain.modules import spec
from ftrain.modules.spec import Constant, Normal, ParamSpec, TruncatedNormal, Uniform, fan_in, ones, zeros

SPECS = {
    "embedding": {"table": ParamSpec((30, 8), ("vocab", "embed"), Normal(0.02))},
    "layers": [
        {"w": ParamSpec((8, 6), ("embed", "mlp"), fan_in(8)), "b": ParamSpec((6,), ("mlp",), zeros())} for _ in range(2)
    ],
    "norm": ParamSpec((8,), ("embed",), ones(), torch.bfloat16),
}


def test_leaves_come_sorted_with_dotted_paths():
    paths = [path for path, _ in spec.leaves_with_paths(SPECS)]
    assert paths == ["embedding.table", "layers.0.b", "layers.0.w", "layers.1.b", "layers.1.w", "norm"]


def test_leaves_come_in_the_order_of_optree():
    optree = pytest.importorskip("optree")
    assert [leaf for _, leaf in spec.leaves_with_paths(SPECS)] == optree.tree_leaves(SPECS)


def test_count_and_bytes_agree_with_what_init_makes():
    leaves = [leaf for _, leaf in spec.leaves_with_paths(spec.init(SPECS, random.key(0)))]
    assert spec.count(SPECS) == sum(leaf.numel() for leaf in leaves) == 30 * 8 + 2 * (48 + 6) + 8
    assert spec.bytes(SPECS) == sum(leaf.numel() * leaf.element_size() for leaf in leaves)


def test_abstract_has_the_shapes_and_no_memory():
    spec.check(spec.abstract(SPECS), SPECS)
    assert all(leaf.is_meta for _, leaf in spec.leaves_with_paths(spec.abstract(SPECS)))


def test_a_leaf_does_not_depend_on_its_neighbours():
    whole = spec.init(SPECS, random.key(7))
    alone = spec.init({"layers": [{}, {"w": SPECS["layers"][1]["w"]}]}, random.key(7))
    assert torch.equal(whole["layers"][1]["w"], alone["layers"][1]["w"])


def test_leaves_and_keys_differ():
    first, other = spec.init(SPECS, random.key(7)), spec.init(SPECS, random.key(8))
    drawn = [first["layers"][0]["w"], first["layers"][1]["w"], other["layers"][0]["w"]]
    assert not any(torch.equal(a, b) for a, b in itertools.combinations(drawn, 2))


@settings(max_examples=30, deadline=None)
@given(data=st.data(), init=st.sampled_from([Normal(0.5), TruncatedNormal(0.5), Uniform(0.5), Constant(0.5)]))
def test_a_window_holds_the_numbers_of_the_whole(data, init):
    leaf = ParamSpec((12, 9), ("embed", "mlp"), init)
    start = tuple(data.draw(st.integers(0, n - 1)) for n in leaf.shape)
    size = tuple(data.draw(st.integers(1, n - s)) for n, s in zip(leaf.shape, start, strict=True))
    whole = spec.init_leaf(leaf, random.key(3), "a.b")
    part = spec.init_leaf(leaf, random.key(3), "a.b", window=random.Window(start, size))
    assert torch.equal(part, whole[start[0] : start[0] + size[0], start[1] : start[1] + size[1]])


@pytest.mark.parametrize(
    ("init", "std", "largest"),
    [
        (Normal(0.5), 0.5, 3.5),
        (TruncatedNormal(0.5), 0.5 * 0.8796, 1.0),  # a normal cut at two deviations keeps 0.8796 of its own
        (Uniform(0.5), 0.5 / 3**0.5, 0.5),
        (fan_in(16), 0.25, 1.75),
        (fan_in(16, gain=2.0), 0.5, 3.5),
    ],
)
def test_initial_values_have_the_stated_spread(init, std, largest):
    values = spec.init_leaf(ParamSpec((400, 100), (None, None), init), random.key(1), "w")
    assert values.mean().item() == pytest.approx(0, abs=5 * std / 200)
    assert values.std().item() == pytest.approx(std, rel=0.02)
    assert values.abs().max().item() <= largest


def test_init_follows_the_dtype_of_the_spec():
    assert spec.init(SPECS, random.key(0))["norm"].dtype == torch.bfloat16


@pytest.mark.parametrize(
    ("shape", "axes", "message"),
    [
        ((2, 3), ("embed",), "needs 2 logical axes"),
        ((2,), ("emebd",), "nearest: 'embed'"),
        ((0, 3), ("embed", "mlp"), "at least 1"),
    ],
)
def test_a_spec_that_makes_no_sense_is_refused(shape, axes, message):
    with pytest.raises(ValueError, match=message):
        ParamSpec(shape, axes, zeros())


def without(tree, key):
    return {k: v for k, v in tree.items() if k != key}


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda p: without(p, "norm"), "missing parameter 'norm'"),
        (lambda p: {**p, "nrom": p["norm"]}, "unknown parameter 'nrom'; nearest known: 'norm'"),
        (lambda p: {**without(p, "norm"), "nrom": p["norm"]}, "unknown parameter 'nrom'; nearest known: 'norm'"),
        (lambda p: {**p, "layers": p["layers"][:1]}, "missing parameter 'layers.1'"),
        (lambda p: {**p, "layers": {}}, "layers: expected a list, found a dict"),
        (lambda p: {**p, "norm": p["norm"].float()}, r"norm: expected dtype torch.bfloat16, found torch.float32"),
        (lambda p: {**p, "norm": None}, "norm: expected a tensor of shape .8., found a NoneType"),
        (
            lambda p: {**p, "embedding": {"table": p["embedding"]["table"].T}},
            r"embedding.table: expected shape \[30, 8\] \('vocab', 'embed'\), found \[8, 30\]",
        ),
        (lambda p: {**p, "a.b": p["norm"]}, "'a.b' cannot name a parameter"),
    ],
)
def test_check_names_what_is_wrong(damage, message):
    params = spec.init(SPECS, random.key(0))
    spec.check(params, SPECS)
    with pytest.raises(ValueError, match=message):
        spec.check(damage(params), SPECS)
