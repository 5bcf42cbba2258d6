"""One batch for many ranks: packs one after the other, media in parts, and the same documents whatever the packs."""

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ftrain.modules.budget import Bound, Budget
from ftrain.modules.mesh_packing import BATCH, pack_for_mesh
from ftrain.modules.packing import lay
from ftrain.sharding.batch import BatchRows, TokenIndices
from tests.helpers.tiny_omni import MODEL, documents

BUDGET = Budget(64, rows={"image": 128, "video": 128, "audio": 96}, targets={"draw": 4})


@pytest.fixture(scope="module")
def packed():
    return pack_for_mesh(documents() * 4, budget=BUDGET, model=MODEL, packs=3, parts=4, overflow="leave")


def test_documents_that_have_no_room_are_named_if_one_asks_for_it(packed):
    assert sorted([*packed.taken, *packed.left]) == list(range(20))
    assert len(set(packed.taken)) == len(packed.taken) > 10
    assert packed.batch["tokens_T"].shape == (3 * 64,)


@given(
    st.lists(st.integers(0, 4), max_size=24),
    st.sampled_from([1, 2, 4, 8]),
    st.sampled_from([1, 2, 4]),
    st.sampled_from([BUDGET, replace(BUDGET, bounds={"tokens": Bound(2), "image": Bound(2), "audio": Bound(1)})]),
)
@settings(deadline=None, max_examples=60)
def test_all_documents_are_in_the_batch_as_they_are_alone(kinds, packs, parts, budget):
    """Whatever the numbers of packs and parts, tokens, labels and media of all documents are the same."""
    given_documents = [documents()[kind] for kind in kinds]
    packed = pack_for_mesh(given_documents, budget=budget, model=MODEL, packs=packs, parts=parts)
    assert (sorted(packed.taken), packed.left) == (list(range(len(kinds))), [])
    assert contents(packed.batch) == contents(pack_for_mesh(given_documents, budget=budget, model=MODEL).batch)
    assert int(packed.batch["segments_T"].ids_T[packed.batch["valid_T"]].unique().numel()) == len(kinds)


def contents(batch):
    """Each document's tokens, labels, positions and the sums of the media at its places, in an order of their own."""
    ids_T, valid_T = batch["segments_T"].ids_T, batch["valid_T"]
    found = []
    for document in ids_T[valid_T].unique():
        here = (ids_T == document).nonzero().flatten()
        rows = [tuple(batch[name][here].tolist()) for name in ("tokens_T", "labels_T", "positions_T")]
        found.append((*rows, *media(batch, int(here[0]), int(here[-1]))))
    return sorted(found)


def media(batch, first, last):
    """Rows of features at the places from `first` to `last`, in the order of the places."""
    for encoder in batch["encoders"].values():
        index_n = encoder["index_n"]
        tokens = ((index_n >= first) & (index_n <= last)).nonzero().flatten()
        ordered = tokens[index_n[tokens].argsort()]
        for name, array in encoder["features"].items():
            if name != "segments_N":
                yield tuple(array.unflatten(0, (len(index_n), -1))[ordered].flatten().tolist())
    for decoder in batch["decoders"].values():
        per_target = len(decoder["index_n"]) // len(decoder["target"])
        starts = decoder["index_n"][::per_target]
        yield tuple(decoder["target"][(starts >= first) & (starts <= last)].flatten().tolist())


def test_packs_without_room_grow_only_in_what_they_lack():
    grown = pack_for_mesh(documents() * 4, budget=replace(BUDGET, tokens=60), model=MODEL, packs=3, parts=4).batch
    assert grown["tokens_T"].shape == (3 * 76,)  # a quarter of 60, to a multiple of 4
    assert int(grown["valid_T"].view(3, -1).sum(1).max()) <= 76
    assert grown["encoders"]["video"]["index_n"].shape == (3 * 32,)
    assert grown["decoders"]["draw"]["target"].shape[0] == 3 * 4


def test_the_unknown_way_to_overflow_is_refused():
    with pytest.raises(ValueError, match="overflow='drop' is not 'grow' or 'leave'"):
        pack_for_mesh(documents(), budget=BUDGET, model=MODEL, overflow="drop")


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
    assert batch["valid_T"].view(2, 64).sum(1).tolist() == [len(batch["valid_T"].nonzero()), 0]
    assert torch.equal(batch["encoders"]["image"]["index_n"].view(2, -1)[1].unique(), torch.tensor([128]))


def test_a_modality_without_room_is_not_in_the_batch():
    """Documents of text alone are packed by any budget, and media that have no place are refused."""
    budget = Budget(64, rows={"image": 0, "audio": 96}, targets={"draw": 0})
    batch = pack_for_mesh(documents()[2:3], budget=budget, model=MODEL, packs=2, parts=4).batch
    assert (set(batch["encoders"]), set(batch["decoders"])) == ({"audio"}, set())
    for absent in ("drop", "pad"):
        with pytest.raises(ValueError, match=r"document 0 needs 16 image rows \(the budget holds 0\)"):
            lay(documents()[:1], budget=budget, model=MODEL, absent=absent)


@pytest.mark.parametrize(("budget", "message"), [
    (Budget(64, rows={"image": 6}), "6 image rows does not divide into 4 parts of whole tokens: .* multiple of 16"),
    (Budget(64, targets={"draw": 3}), "3 draw targets does not divide into 4 parts"),
    (Budget(64, rows={"image": 32, "video": 128, "audio": 96}, targets={"draw": 4}), "no item may lie in two parts"),
])  # fmt: skip
def test_budgets_that_do_not_divide_are_refused(budget, message):
    with pytest.raises(ValueError, match=message):
        pack_for_mesh(documents(), budget=budget, model=MODEL, parts=4)


def test_the_rules_name_the_leaves_that_ranks_divide():
    assert BATCH["encoders.*.features.*"] == BatchRows()
    assert BATCH["decoders.*.index_n"] == TokenIndices()
