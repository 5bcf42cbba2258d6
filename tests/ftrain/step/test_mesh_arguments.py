"""Leaves of a batch that are no rows are not divided in silence: a rule says what they are, or they are refused."""

import pytest
import torch
import torch.nn.functional as F

import ftrain
from ftrain import Mean, Mesh, Plan, accumulate
from ftrain.modules import spec
from ftrain.sharding import BatchRows, Replicated

W_DC = torch.randn(3, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
BATCH = {
    "x": torch.arange(24, dtype=torch.float64).view(8, 3) / 9,
    "label": torch.arange(8) % 4,
    "weight": torch.tensor([1.0, 2.0, 3.0, 4.0], dtype=torch.float64),
}


def loss(params, batch):
    return Mean.of(F.cross_entropy(batch["x"] @ params["w"], batch["label"], weight=batch["weight"], reduction="none"))


@pytest.mark.parametrize("rest", [{}, {"*": BatchRows()}], ids=["no rules", "a rule for all"])
def test_a_table_in_the_batch_is_named_and_right_with_a_rule(rest):
    params = {"w": W_DC}
    step = lambda rules: ftrain.jit(  # noqa: E731
        ftrain.grad(loss), plan=Plan(Mesh(shard=2, kind="virtual"), batch=rules), specs={"params": spec.of(params)}
    )
    words = r"batch leaf 'batch.weight' has 4 entries and 'batch.label' has 8.*in Plan\(batch=\.\.\.\).*Replicated\(\)"
    with pytest.raises(ValueError, match=words):
        step(rest)(params, BATCH)
    found = step({**rest, "weight": Replicated()})(params, BATCH)
    torch.testing.assert_close(found, ftrain.grad(loss)(params, BATCH))


def test_rows_of_another_number_take_a_rule_too():
    batch = {"tokens": torch.arange(8.0), "images": torch.ones(2, 3)}
    step = lambda rules: ftrain.jit(  # noqa: E731
        lambda batch: (Mean.of(batch["tokens"]), Mean.of(batch["images"])),
        plan=Plan(Mesh(shard=2, kind="virtual"), batch=rules),
    )
    with pytest.raises(ValueError, match=r"'batch.(images|tokens)' has . entries"):
        step({})(batch)
    assert [m.item() for m in step({"images": BatchRows()})(batch)] == [3.5, 1.0]


def test_micro_batches_divide_no_table_either():
    step = lambda rules: ftrain.jit(ftrain.grad(accumulate(loss, 2, batch=rules)))  # noqa: E731
    params = {"w": W_DC}
    with pytest.raises(ValueError, match=r"batch leaf 'weight' has 4 entries .*name the leaf in accumulate\(batch="):
        step({})(params, BATCH)
    found = step({"weight": Replicated()})(params, BATCH)
    torch.testing.assert_close(found, ftrain.grad(loss)(params, BATCH))
