"""Documents as rows of their own: every one once an epoch, on any ranks, and on from any step."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

pytest.importorskip("grain")

from ftrain.data.documents import IGNORE, Document, Group
from ftrain.data.layout import RowLayout, Stream
from ftrain.data.loader import Loader
from ftrain.data.order import Order
from ftrain.data.packing import Packing
from ftrain.data.row_plan import RowGroup, plan_rows, shape_of

EYE = 9


def dots(tokens):
    return {"dots": np.zeros((2 * tokens, 1), np.float32)}


EYES = RowLayout((Stream(EYE, 1, dots),))


def document(number, words, places):
    """Word `number` so many times behind places of a picture."""
    ids = np.array([EYE] * places + [10 + number] * words, np.int64)
    return Group((Document(ids, np.where(ids == EYE, IGNORE, ids)),))


def seen(group):
    """With the picture, whose dots are the number of its word."""
    (found,) = group.documents
    places = int((found.tokens == EYE).sum())
    dots = np.full((2 * places, 1), found.tokens[-1] - 9, np.float32)
    return Group((replace(found, media={"dots": dots} if places else {}),))


def loader(groups, *, ranks=1, micro_batches=1, **more):
    packing = Packing(16, ranks=ranks, micro_batches=micro_batches, buffer=64)
    return Loader(Order([len(groups)], key=0), [groups], lambda g: g, packing, layout=EYES, finish=seen, **more)


def rows_of(batch):
    """The documents of a batch, as their number, words and dots."""
    dots_BN = batch["dots"].unflatten(0, (len(batch["tokens"]), -1)) if "dots" in batch else None
    for i, (tokens, labels) in enumerate(zip(batch["tokens"], batch["labels"], strict=True)):
        words = labels[labels != IGNORE]
        if len(words):
            own = 0 if dots_BN is None else int((dots_BN[i] == int(words[0]) - 9).sum())
            yield int(words[0]) - 10, len(words), own
        if dots_BN is not None:
            assert int((tokens == EYE).sum()) * 2 == dots_BN.shape[1]


sizes = st.lists(st.tuples(st.integers(1, 9), st.sampled_from([0, 0, 1, 3, 6])), min_size=1, max_size=14)


@settings(deadline=None, max_examples=25)
@given(sizes, st.sampled_from([(1, 1), (2, 1), (1, 3), (2, 2)]))
def test_every_document_comes_once_with_its_media_and_a_run_goes_on_from_any_step(sizes, packs):
    groups = [document(i, *size) for i, size in enumerate(sizes)]
    made = loader(groups, ranks=1, micro_batches=packs[0] * packs[1])
    steps = list(made)
    found = sorted(row for step in steps for row in rows_of(step.batch))
    assert found == [(i, words, 2 * places) for i, (words, places) in enumerate(sizes)]
    for step in steps:
        assert len(step.batch["tokens"]) % (packs[0] * packs[1]) == 0
        assert step.facts.budget == step.batch["tokens"].numel()
    half = len(steps) // 2
    if half:
        again = list(made.read(steps[half - 1].position))
        assert len(again) == len(steps) - half
        for one, other in zip(again, steps[half:], strict=True):
            assert all(torch.equal(one.batch[name], other.batch[name]) for name in other.batch)


def test_ranks_get_their_rows_of_the_same_step():
    groups = [document(i, 1 + i % 5, 3 * (i % 2)) for i in range(16)]
    whole = [step.batch for step in loader(groups, ranks=2, rank=None)]
    parts = [[step.batch for step in loader(groups, ranks=2, rank=rank)] for rank in range(2)]
    for at, batch in enumerate(whole):
        for name, leaf in batch.items():
            assert torch.equal(leaf, torch.cat([part[at][name] for part in parts]))


@settings(deadline=None, max_examples=60)
@given(st.lists(st.tuples(st.integers(1, 60), st.integers(0, 40)), min_size=1, max_size=30), st.integers(1, 3))
def test_a_step_takes_the_oldest_and_what_fits_into_its_shape(sizes, packs):
    groups = [RowGroup(words + places, words, (places,), 1) for words, places in sizes if words + places <= 64]
    if not groups:
        return
    plan = plan_rows(groups, tokens=64, packs=packs, units=(1,))
    assert plan.pack_N[0] == 0
    assert plan.shape == shape_of(groups[0], tokens=64, units=(1,))
    assert plan.shape.rows * plan.shape.length <= 64 * 1.1
    for group, pack in zip(groups, plan.pack_N, strict=True):
        if pack >= 0:
            assert group.media[0] <= plan.shape.media[0]
            assert group.text + plan.shape.media[0] + (plan.shape.media[0] > 0) <= plan.shape.length
    assert np.bincount(plan.pack_N[plan.pack_N >= 0], minlength=packs).max() <= plan.shape.rows
