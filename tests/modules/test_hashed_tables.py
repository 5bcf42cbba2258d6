"""Hashed tables: rows that any process finds again, sums of fields, and tables divided over ranks."""

import numpy as np
import pytest
import torch

import ftrain
from ftrain.kernels import random
from ftrain.modules import hashed_tables, spec
from ftrain.modules.hashed_tables import TablesConfig, hashed

CFG = TablesConfig({"brand": 97, "country": 5}, d_out=4, init_std=0.5)
ROWS = [49, 8, 0, 43]


def test_rows_are_the_same_in_every_process() -> None:
    """Python's own hash of a text is another in each process."""
    assert hashed(["acme", 7, None, "x"], "brand", cfg=CFG).tolist() == ROWS


def test_rows_spread_evenly_and_leave_row_0_to_what_is_absent() -> None:
    rows_n = hashed(range(9600), "brand", cfg=CFG)
    counts = np.bincount(rows_n, minlength=97)
    assert counts[0] == 0
    assert counts[1:].min() > 60
    assert counts[1:].max() < 145  # 100 each, five deviations of 10 and some
    assert hashed([None], "country", cfg=CFG).tolist() == [0]


def test_an_event_is_the_sum_of_its_fields() -> None:
    params = spec.init(hashed_tables.specs(CFG), random.key(0))
    events = {"brand": torch.tensor([3, 0]), "country": torch.tensor([1, 4])}
    got_nD = hashed_tables.lm_encode(params, events, cfg=CFG)
    want_nD = params["brand"]["table_VD"][[3, 0]] + params["country"]["table_VD"][[1, 4]]
    torch.testing.assert_close(got_nD, want_nD)


def test_tables_divided_by_rows_learn_as_one_table_does() -> None:
    params = spec.init(hashed_tables.specs(CFG), random.key(0))
    events = {"brand": torch.tensor([3, 0, 3, 96]), "country": torch.tensor([1, 4, 2, 2])}

    def step(params, batch):
        def loss(params):
            return ftrain.Mean.of(hashed_tables.lm_encode(params, batch, cfg=CFG) ** 3)

        value, grads = ftrain.value_and_grad(loss)(params)
        return ftrain.tree.map(lambda p, g: p - g, params, grads), value

    plan = ftrain.Plan(ftrain.Mesh(shard=2, kind="virtual"), ftrain.Layout())
    on_mesh = ftrain.jit(step, plan=plan, specs={"params": hashed_tables.specs(CFG)})(params, events)
    alone = ftrain.jit(step)(params, events)
    for got, want in zip(ftrain.tree.leaves(on_mesh), ftrain.tree.leaves(alone), strict=True):
        torch.testing.assert_close(got, want, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: TablesConfig({}, d_out=4), "no field"),
        (lambda: TablesConfig({"a": 1}, d_out=4), "'a'.=1: a table needs at least 2 rows"),
        (lambda: hashed(["x"], "shop", cfg=CFG), "no table for the field 'shop'"),
        (lambda: hashed([0.5], "brand", cfg=CFG), "'brand': 0.5 is no text and no whole number"),
    ],
)
def test_what_cannot_be_is_said(call, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        call()
