"""Groups of parameters: masks, labels, frozen leaves."""

from typing import Any

import pytest
import torch

import ftrain
from ftrain import optim, tree


def example() -> Any:
    return {
        "encoder": {"w": torch.ones(2, 2), "norm": torch.ones(2)},
        "layers": [{"w": torch.ones(2, 3)}, {"w": torch.ones(2, 3)}],
        "head": torch.ones(3),
    }


def moved(tx: optim.Transform, params: Any) -> dict[str, float]:
    """By how much each leaf moves, for gradients of one."""
    updates, _ = tx.update(tree.map(torch.ones_like, params), tx.init(params), params)
    return {path: float(u.flatten()[0]) for path, u in zip(tree.paths(updates), tree.leaves(updates), strict=True)}


@pytest.mark.parametrize("optimizer", [optim.adamw, optim.lion])
def test_decay_reaches_only_masked_leaves(optimizer: Any):
    params = example()
    grads = tree.map(torch.ones_like, params)
    for mask in (lambda p: tree.map(lambda x: x.ndim > 1, p), tree.map(lambda x: x.ndim > 1, params)):
        with_decay, without = (optimizer(0.1, weight_decay=decay, mask=mask) for decay in (0.5, 0.0))
        (a, _), (b, _) = (tx.update(grads, tx.init(params), params) for tx in (with_decay, without))
        for leaf, u, v in zip(tree.leaves(params), tree.leaves(a), tree.leaves(b), strict=True):
            torch.testing.assert_close(u - v, leaf * (-0.05 if leaf.ndim > 1 else 0.0))


def test_masked_leaves_others_as_they_are_and_keeps_no_state_for_them():
    mask = {"encoder": {"w": True, "norm": False}, "layers": [{"w": True}, {"w": False}], "head": False}
    tx = optim.masked(optim.sgd(0.5, momentum=0.9), mask, rest="pass")
    assert moved(tx, example()) == {
        "encoder.norm": 1.0,
        "encoder.w": -0.5,
        "head": 1.0,
        "layers.0.w": -0.5,
        "layers.1.w": 1.0,
    }
    assert tree.paths(tx.init(example())) == ["steps", "momentum.encoder.w", "momentum.layers.0.w"]


def test_what_a_mask_leaves_out_stands_still_or_passes_and_must_be_said():
    mask = {"encoder": {"w": True, "norm": False}, "layers": [{"w": True}, {"w": False}], "head": False}
    still = moved(optim.masked(optim.sgd(0.5), mask, rest="freeze"), example())
    assert still == {"encoder.norm": 0.0, "encoder.w": -0.5, "head": 0.0, "layers.0.w": -0.5, "layers.1.w": 0.0}
    with pytest.raises(ValueError, match=r"rest='freeze' holds them still, rest='pass' hands their gradients on"):
        optim.masked(optim.sgd(0.5), mask)


def patterns() -> list[tuple[str, str]]:
    return [("encoder.**", "frozen"), ("layers.*.w", "fast"), ("**", "slow")]


def by_path(path: str) -> str:
    return "frozen" if path.startswith("encoder") else "fast" if path.startswith("layers") else "slow"


@pytest.mark.parametrize(
    "labels", [patterns(), patterns()[::-1], dict(patterns()), by_path, optim.label_tree(by_path, example())]
)
def test_multi_transform_gives_each_leaf_to_its_label(labels: Any):
    tx = optim.multi_transform({"fast": optim.sgd(1.0), "slow": optim.sgd(0.1), "frozen": optim.freeze()}, labels)
    assert moved(tx, example()) == pytest.approx(
        {"encoder.norm": 0.0, "encoder.w": 0.0, "head": -0.1, "layers.0.w": -1.0, "layers.1.w": -1.0}
    )


def test_groups_do_not_feel_each_other():
    params = example()
    tx = optim.multi_transform(
        {"fast": optim.adamw(0.1), "slow": optim.adamw(0.01), "frozen": optim.freeze()}, patterns()
    )
    alone = optim.adamw(0.1)
    updates, state = tx.update(params, tx.init(params), params)
    expected, _ = alone.update(params["layers"], alone.init(params["layers"]), params["layers"])
    assert torch.equal(updates["layers"][1]["w"], expected[1]["w"])
    assert tree.paths(state["fast"].mean) == ["layers.0.w", "layers.1.w"]


def test_a_group_without_leaves_is_harmless():
    tx = optim.multi_transform({"all": optim.sgd(1.0), "none": optim.adamw(1.0)}, [("**", "all")])
    assert set(moved(tx, example()).values()) == {-1.0}


def test_freeze_stops_nan():
    tx = optim.freeze()
    updates, _ = tx.update(torch.full((2,), float("nan")), tx.init(torch.ones(2)), torch.ones(2))
    assert torch.equal(updates, torch.zeros(2))


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        (
            [("encoder.**", "sgd"), ("layers.**", "sgd")],
            r"no label for 'head': none of \['encoder.\*\*', 'layers.\*\*'\]",
        ),
        ([("**", "sdg")], r"'encoder.norm' has label 'sdg', not one of \['sgd'\]; did you mean 'sgd'\?"),
        ({"encoder": "sgd", "**": "sgd"}, r"'encoder' matches nothing; all below it are 'encoder\.\*\*'"),
        ([("encoders.**", "sgd"), ("**", "sgd")], r"'encoders\.\*\*' matches nothing; nearest: 'encoder\.w'"),
        ([("encoder.**", "sgd"), ("**.w", "adam"), ("**", "sgd")], r"both match 'encoder\.w' and neither is more spec"),
        ([("**", "sgd"), ("**", "adam")], r"'\*\*' is given twice, as 'sgd' and as 'adam'"),
        ({"encoder": {"w": "sgd"}}, r"'head' is only in the parameters"),
    ],
)
def test_labels_that_do_not_fit_are_named(labels: Any, message: str):
    with pytest.raises(ValueError, match=message):
        optim.multi_transform({"sgd": optim.sgd(1.0)}, labels).init(example())


def test_masks_that_do_not_fit_are_named():
    with pytest.raises(ValueError, match="'head' is only in the parameters"):
        optim.masked(optim.sgd(1.0), {"encoder": True}, rest="pass").init(example())
    with pytest.raises(ValueError, match="a mask holds bools; at 'w' it holds 1"):
        optim.masked(optim.sgd(1.0), {"w": 1}, rest="pass").init({"w": torch.ones(1)})


def test_a_chain_refuses_the_state_of_another():
    with pytest.raises(ValueError, match="a chain of 2 transforms got a state of 1"):
        optim.chain(optim.sgd(1.0), optim.freeze()).update(example(), (None,), example())


def frozen_encoder(inner: optim.Transform) -> optim.Transform:
    return optim.multi_transform({"train": inner, "still": optim.freeze()}, {"encoder.**": "still", "**": "train"})


@pytest.mark.parametrize(
    "recipe",
    [
        lambda: optim.chain(optim.clip_by_global_norm(1.0), frozen_encoder(optim.sgd(1.0))),
        lambda: optim.chain(optim.clip_by_global_norm(1.0), optim.skip_nonfinite(frozen_encoder(optim.sgd(1.0)))),
        lambda: optim.skip_nonfinite(optim.chain(optim.clip_by_global_norm(1.0), frozen_encoder(optim.sgd(1.0)))),
        lambda: optim.chain(optim.chain(optim.clip_by_global_norm(1.0)), optim.chain(frozen_encoder(optim.sgd(1.0)))),
    ],
)
def test_frozen_leaves_count_in_no_norm_and_are_not_looked_at(recipe: Any):
    """Their gradients may be NaN: the trained leaves move as if they were alone."""
    params = example()
    grads = tree.map(torch.ones_like, params)
    grads["encoder"] = tree.map(lambda g: g * torch.nan, grads["encoder"])
    tx = recipe()
    updates, _ = tx.update(grads, tx.init(params), params)
    trained = 6 + 6 + 3
    assert not any(u.any() for u in tree.leaves(updates["encoder"]))
    torch.testing.assert_close(updates["head"], torch.full((3,), -(trained**-0.5)), rtol=1e-5, atol=0)
    assert tree.leaves(optim.trainable(tx, params)) == [False, False, True, True, True]
    norm = optim.global_norm(grads, mask=optim.trainable(tx, params))
    torch.testing.assert_close(norm, torch.tensor(trained**0.5))


@pytest.mark.parametrize(("freezes", "products"), [(True, 3), (False, 5)])
def test_a_frozen_leaf_costs_no_backward(freezes: bool, products: int):
    """Two products forward and one backward where the first of two matrices is frozen."""
    rule = optim.skip_nonfinite(frozen_encoder(optim.sgd(0.1)) if freezes else optim.sgd(0.1))
    tx = optim.chain(optim.clip_by_global_norm(1.0), rule)

    def step(params: Any, x: torch.Tensor) -> Any:
        grads = ftrain.grad(lambda p: ftrain.Mean.of(((x @ p["encoder"]["w"]) @ p["head"]).square()))(params)
        return tx.update(grads, tx.init(params), params)[0]

    params = {"encoder": {"w": torch.randn(8, 8)}, "head": torch.randn(8, 8)}
    assert ftrain.jit(step).lower(params, torch.randn(4, 8)).cost().flops == products * 2 * 4 * 8 * 8


def test_what_comes_after_a_freeze_sees_every_leaf():
    params = example()
    tx = optim.chain(optim.clip_by_global_norm(1.0), frozen_encoder(optim.sgd(1.0)), optim.ema(0.5))
    _, state = tx.update(params, tx.init(params), params)
    assert tree.paths(state[2].average) == tree.paths(params)
    assert torch.equal(state[2].average["encoder"]["w"], params["encoder"]["w"])


def test_a_clip_may_have_a_mask_of_its_own():
    params = example()
    tx = optim.clip_by_global_norm(1.0, mask=lambda p: tree.map_with_path(lambda path, _: path == "head", p))
    updates, state = tx.update(params, tx.init(params), params)
    torch.testing.assert_close(state.norm, torch.tensor(3**0.5))
    assert updates["encoder"]["w"] is params["encoder"]["w"]
