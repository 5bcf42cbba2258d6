"""One batch for many ranks: packs one after the other, media in parts, and the same loss as documents one by one."""

import pytest
import torch
from tiny_omni import MODEL, documents

from modules.mesh_packing import BATCH, pack_for_mesh
from modules.packing import Budget
from sharding.batch import Places, Rows

BUDGET = Budget(64, rows={"image": 128, "video": 128, "audio": 96}, targets={"draw": 4})


@pytest.fixture(scope="module")
def packed():
    return pack_for_mesh(documents() * 4, budget=BUDGET, model=MODEL, packs=3, parts=4)


def test_documents_are_taken_in_order_and_none_is_lost(packed):
    assert sorted([*packed.taken, *packed.left]) == list(range(20))
    assert len(set(packed.taken)) == len(packed.taken) > 10


def test_no_document_is_in_two_packs(packed):
    packs = packed.batch["segments_T"].ids_T.view(3, 64)
    ids = [set(p.tolist()) for p in packs]
    assert not ids[0] & ids[1]
    assert not ids[1] & ids[2]


@pytest.mark.parametrize("modality", BUDGET.rows)
def test_no_item_is_in_two_parts(packed, modality):
    runs = packed.batch["encoders"][modality]["features"]["segments_N"].ids_T.view(12, -1)
    ids = [set(run.tolist()) for run in runs]
    assert sum(map(len, ids)) == len(set().union(*ids))


@pytest.mark.parametrize("modality", BUDGET.rows)
def test_places_are_those_of_the_pack_that_holds_the_rows(packed, modality):
    index = packed.batch["encoders"][modality]["index_n"].view(3, -1)
    for pack, places in enumerate(index):
        real = places[places < 3 * 64]
        assert len(real) > 0
        assert bool(((real >= pack * 64) & (real < (pack + 1) * 64)).all())
        assert len(real.unique()) == len(real)


def test_every_code_has_its_place(packed):
    index = packed.batch["decoders"]["draw"]["index_n"]
    assert index.shape[0] % packed.batch["decoders"]["draw"]["target"].shape[0] == 0
    assert bool((index <= 3 * 64).all())


def test_packs_without_documents_are_padding():
    batch = pack_for_mesh(documents()[:1], budget=BUDGET, model=MODEL, packs=2, parts=2).batch
    assert bool((batch["labels_T"].view(2, 64)[1] == -100).all())
    assert torch.equal(batch["encoders"]["image"]["index_n"].view(2, -1)[1].unique(), torch.tensor([128]))


@pytest.mark.parametrize(("budget", "message"), [
    (Budget(64, rows={"image": 6}), "6 image rows does not divide into 4 parts of whole tokens: .* multiple of 16"),
    (Budget(64, targets={"draw": 3}), "3 draw targets does not divide into 4 parts"),
    (Budget(64, rows={"image": 32, "video": 128, "audio": 96}, targets={"draw": 4}), "no item may lie in two parts"),
])  # fmt: skip
def test_budgets_that_do_not_divide_are_refused(budget, message):
    with pytest.raises(ValueError, match=message):
        pack_for_mesh(documents(), budget=budget, model=MODEL, parts=4)


def test_the_rules_name_the_leaves_that_ranks_divide():
    assert BATCH["encoders.*.features.*"] == Rows()
    assert BATCH["decoders.*.index_n"] == Places()
