"""Groups of parameters: masks, labels, frozen leaves."""

from typing import Any

import pytest
import torch

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


def test_decay_reaches_only_masked_leaves():
    params = example()
    zero = tree.map(torch.zeros_like, params)
    for mask in (lambda p: tree.map(lambda x: x.ndim > 1, p), tree.map(lambda x: x.ndim > 1, params)):
        for tx in (optim.adamw(0.1, weight_decay=0.5, mask=mask), optim.lion(0.1, weight_decay=0.5, mask=mask)):
            updates, _ = tx.update(zero, tx.init(params), params)
            assert all(bool((u == 0).all()) == (u.ndim == 1) for u in tree.leaves(updates))
            torch.testing.assert_close(updates["encoder"]["w"], torch.full((2, 2), -0.05))


def test_masked_leaves_others_as_they_are_and_keeps_no_state_for_them():
    mask = {"encoder": {"w": True, "norm": False}, "layers": [{"w": True}, {"w": False}], "head": False}
    tx = optim.masked(optim.sgd(0.5, momentum=0.9), mask)
    assert moved(tx, example()) == {
        "encoder.norm": 1.0,
        "encoder.w": -0.5,
        "head": 1.0,
        "layers.0.w": -0.5,
        "layers.1.w": 1.0,
    }
    assert tree.paths(tx.init(example())) == ["steps", "momentum.encoder.w", "momentum.layers.0.w"]


def patterns() -> list[tuple[str, str]]:
    return [("encoder.**", "frozen"), ("layers.*.w", "fast"), ("**", "slow")]


def by_path(path: str) -> str:
    return "frozen" if path.startswith("encoder") else "fast" if path.startswith("layers") else "slow"


@pytest.mark.parametrize("labels", [patterns(), by_path, optim.label_tree(by_path, example())])
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
        ({"encoder": "sgd"}, r"'head' is only in the parameters"),
    ],
)
def test_labels_that_do_not_fit_are_named(labels: Any, message: str):
    with pytest.raises(ValueError, match=message):
        optim.multi_transform({"sgd": optim.sgd(1.0)}, labels).init(example())


def test_masks_that_do_not_fit_are_named():
    with pytest.raises(ValueError, match="'head' is only in the parameters"):
        optim.masked(optim.sgd(1.0), {"encoder": True}).init(example())
    with pytest.raises(ValueError, match="a mask holds bools; at 'w' it holds 1"):
        optim.masked(optim.sgd(1.0), {"w": 1}).init({"w": torch.ones(1)})


def test_a_chain_refuses_the_state_of_another():
    with pytest.raises(ValueError, match="a chain of 2 transforms got a state of 1"):
        optim.chain(optim.sgd(1.0), optim.freeze()).update(example(), (None,), example())
