"""Packing: where every token, row and label goes, what fits, and clear words for what cannot."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ftrain import tree
from ftrain.modules.packing import IGNORE, Bound, Budget, Media, Target, Text, exact_budget, measure, pack
from tests.helpers.tiny_omni import MODEL, audio, documents, drawing, image, video

BUDGET = Budget(tokens=96, rows={"image": 48, "video": 16, "audio": 48}, targets={"draw": 3})


def test_one_document_laid_out_by_hand() -> None:
    document = [Text([1, 2]), image(0), Text([3, 4], train=True), drawing(1), Text([5], train=True)]
    budget = Budget(tokens=20, rows={"image": 24}, targets={"draw": 1})
    batch = pack([document], budget=budget, model=MODEL).batch
    # <image> is 30, </image> 31, and an 8 x 8 image gives 4 tokens; <draw> is 36, </draw> 37, with 4 codes.
    assert batch["tokens_T"].tolist() == [1, 2, 30, 0, 0, 0, 0, 31, 3, 4, 36, 0, 0, 0, 0, 37, 5, 0, 0, 0]
    x = IGNORE
    assert batch["labels_T"].tolist() == [x, x, x, x, x, x, x, 3, 4, 36, x, x, x, x, x, 5, x, x, x, x]
    assert batch["positions_T"].tolist() == [*range(17), 0, 1, 2]
    assert batch["segments_T"].ids_T.tolist() == [0] * 17 + [1] * 3
    assert batch["valid_T"].tolist() == [True] * 17 + [False] * 3
    assert batch["encoders"]["image"]["index_n"].tolist() == [3, 4, 5, 6, 20, 20]
    assert batch["encoders"]["image"]["features"]["segments_N"].ids_T.tolist() == [0] * 16 + [1] * 8
    assert batch["decoders"]["draw"]["index_n"].tolist() == [11, 12, 13, 14]
    np.testing.assert_array_equal(batch["decoders"]["draw"]["target"][0].numpy(), document[3].array)


def test_tokens_of_media_are_read_in_their_own_order_and_some_not_at_all() -> None:
    item = replace(image(0, 8, 12), order=np.array([0, 2, 1, 3, -1, -1]))
    document = [Text([1]), item, Text([2], train=True)]
    batch = pack([document], budget=Budget(9, {"image": 32}), model=MODEL).batch
    assert measure(document, model=MODEL).tokens == 8
    assert batch["tokens_T"].tolist() == [1, 30, 0, 0, 0, 0, 31, 2, 0]
    assert batch["encoders"]["image"]["index_n"].tolist() == [2, 4, 3, 5, 9, 9, 9, 9]


def test_the_first_token_of_a_document_is_nobodys_label() -> None:
    batch = pack([[Text([1, 2], train=True)], [Text([3, 4], train=True)]], budget=Budget(5), model=MODEL).batch
    assert batch["labels_T"].tolist() == [2, IGNORE, 4, IGNORE, IGNORE]


@given(st.permutations(range(5)), st.sampled_from(["drop", "pad"]), st.integers(0, 30))
@settings(deadline=None, max_examples=30)
def test_every_packed_document_is_as_it_was_alone(order: list[int], absent: str, spare: int) -> None:
    given_documents = [documents()[i] for i in order]
    exact = exact_budget(given_documents, model=MODEL)
    budget = Budget(exact.tokens + spare, {name: rows + 8 for name, rows in exact.rows.items()}, {"draw": 4})
    packed = pack(given_documents, budget=budget, model=MODEL, absent=absent)
    assert (sorted(packed.taken), packed.left) == ([0, 1, 2, 3, 4], [])
    lengths = [measure(given_documents[i], model=MODEL).tokens for i in packed.taken]
    assert lengths == sorted(lengths, reverse=True)
    for number, document in enumerate(given_documents[i] for i in packed.taken):
        alone = pack([document], budget=exact_budget([document], model=MODEL), model=MODEL).batch
        here = packed.batch["segments_T"].ids_T == number
        start = int(here.nonzero()[0])
        for name in ("tokens_T", "labels_T", "positions_T"):
            assert torch.equal(packed.batch[name][here], alone[name])
        for kind in ("encoders", "decoders"):
            for name, part in alone[kind].items():
                index_n = packed.batch[kind][name]["index_n"]
                inside = (index_n >= start) & (index_n < start + int(here.sum()))
                assert torch.equal(index_n[inside] - start, part["index_n"])


def test_features_lie_in_the_order_of_their_places() -> None:
    batch = pack([[image(0), video(1), image(2, 4, 12)], [image(3)]], budget=BUDGET, model=MODEL).batch
    pictures = [image(0), image(2, 4, 12), image(3)]
    part = batch["encoders"]["image"]
    expected = np.concatenate([p.features["patches_NP"] for p in pictures])
    np.testing.assert_array_equal(part["features"]["patches_NP"][: len(expected)].numpy(), expected)
    assert not part["features"]["patches_NP"][len(expected) :].any()
    assert part["features"]["segments_N"].ids_T.bincount().tolist() == [16, 12, 16, 4]
    assert (part["index_n"][:-1].diff() > 0).all()


def test_padding_is_documents_no_longer_than_the_longest() -> None:
    batch = pack([[Text([1, 2, 3])], [Text([1, 2])]], budget=Budget(13), model=MODEL).batch
    assert batch["segments_T"].ids_T.tolist() == [0, 0, 0, 1, 1, 2, 2, 2, 3, 3, 3, 4, 4]
    assert batch["positions_T"].tolist() == [0, 1, 2, 0, 1, 0, 1, 2, 0, 1, 2, 0, 1]
    assert batch["valid_T"].tolist() == [True] * 5 + [False] * 8


def test_shapes_depend_on_the_budget_alone() -> None:
    def shapes(batch: dict) -> tuple:
        leaves, treedef = tree.flatten(batch)
        return treedef, [(leaf.shape, leaf.dtype) for leaf in leaves]

    media = {name: Bound(9, 24) for name in BUDGET.rows}
    budget = replace(BUDGET, bounds={"tokens": Bound(12, 40), **media})
    many_short = [[Text([1, 2])] for _ in range(11)]
    made = [pack(given, budget=budget, model=MODEL, absent="pad") for given in ([documents()[2]], many_short)]
    assert shapes(made[0].batch) == shapes(made[1].batch)
    assert [packed.left for packed in made] == [[], []]
    offsets_N = made[0].batch["segments_T"].offsets_N
    assert offsets_N.diff().max() <= 40
    assert offsets_N[-1] == BUDGET.tokens


def test_a_bound_of_documents_is_a_budget_too() -> None:
    documents_ = [[Text([1, 2])], [Text([1])], [image(0)], [image(1)]]
    packed = pack(documents_, budget=replace(BUDGET, bounds={"tokens": Bound(3), "image": Bound(1)}), model=MODEL)
    assert (sorted(packed.taken), packed.left) == ([0, 1, 2], [3])
    with pytest.raises(ValueError, match=r"document 1 has 5 tokens, more than the budget's longest, 4: .*'tokens'"):
        pack([[Text([1])], [Text([1] * 5)]], budget=Budget(9, bounds={"tokens": Bound(2, 4)}), model=MODEL)
    with pytest.raises(ValueError, match="document 0 has 16 image rows in one item, more than the budget's longest, 8"):
        pack([[image(0)]], budget=replace(BUDGET, bounds={"image": Bound(2, 8)}), model=MODEL)


@given(st.lists(st.integers(1, 12), min_size=1, max_size=9), st.integers(0, 40), st.integers(9, 12))
def test_padding_never_needs_more_places_than_there_are(lengths: list[int], spare: int, most: int) -> None:
    documents_ = [[Text([1] * n)] for n in lengths]
    for longest in (None, 12):
        budget = Budget(sum(lengths) + spare, bounds={"tokens": Bound(most, longest)})
        told = pack(documents_, budget=budget, model=MODEL).batch["segments_T"]
        assert told.offsets_N[-1] == budget.tokens
        assert int(told.offsets_N.diff().max()) <= told.longest
        assert told.offsets_N.tolist() == sorted(told.offsets_N.tolist())


def test_an_absent_modality_is_not_in_the_batch() -> None:
    batch = pack([documents()[2], documents()[0]], budget=BUDGET, model=MODEL).batch
    assert set(batch["encoders"]) == {"image"}
    assert batch["decoders"] == {}


def test_first_fit_takes_later_documents_that_still_fit() -> None:
    sizes = [4, 5, 3, 2, 1]
    packed = pack([[Text(list(range(size)))] for size in sizes], budget=Budget(8), model=MODEL)
    assert (packed.taken, packed.left) == ([0, 2, 4], [1, 3])
    packed = pack([[image(0)], [image(1)], [Text([1])]], budget=Budget(99, {"image": 16}), model=MODEL)
    assert (packed.taken, packed.left) == ([0, 2], [1])


def test_measure_counts_boundaries_rows_and_targets() -> None:
    size = measure(documents()[4], model=MODEL)
    # 12 x 5 pixels fill 3 x 2 squares; 3 frames of 8 x 4 fill 2 x 2 x 1 squares.
    assert size == (
        2 + 6 + 2 + 4 + 2 + 2 + 4 + 1,
        {"image": 24, "video": 16},
        {"draw": 1},
        {"image": [24], "video": [16]},
    )


@pytest.mark.parametrize(
    ("docs", "words"),
    [
        ([], "no documents"),
        ([[]], "no parts"),
        ([[Text([1])], [Text([1] * 97)]], r"document 1 needs 97 tokens \(the budget holds 96\)"),
        ([[image(0, 16, 16)]], r"document 0 needs 64 image rows \(the budget holds 48\)"),
        ([[drawing(i) for i in range(4)]], r"4 draw targets \(the budget holds 3\)"),
        ([[replace(image(0), order=np.array([0, 1, 3, -1]))]], r"order \[0, 1, 3, -1\]: give each"),
        ([[replace(image(0), order=np.arange(3))]], "'image' item of 4 tokens has the order"),
        ([[replace(image(0), order=np.array([1, 0, 2, 3]))]], r"order \[1, 0, 2, 3\]"),
        ([[Media("smell", {})]], r"no encoder for modality 'smell'; it has \['audio', 'image', 'video'\]"),
        ([[Target("image", np.zeros(1))]], r"no decoder for modality 'image'; it has \['draw'\]"),
        ([[Text([1, 2])], [Text([3, 40])]], r"token id 40 at place 1 of packed document 1 is outside \[0, 40\)"),
        ([[Text([-1])]], "token id -1"),
        ([[Text([1.5])]], "token ids of float64: give whole numbers"),
        ([[Target("draw", np.zeros((1, 8, 8), np.uint8))]], r"target 'draw' is of uint8, the model takes float32"),
        ([[Media("image", {"patches_NP": np.zeros((4, 4)), "positions_N3": np.zeros((4, 3))})]], "takes int64"),
        ([[Target("draw", np.zeros((1, 8, 9)))]], r"target 'draw' has shape \[1, 8, 9\], the model takes \[1, 8, 8\]"),
        ([[Media("audio", {"mel_FM": np.zeros((8, 11))})]], r"audio.mel_FM has shape \[11\], the model takes \[10\]"),
        ([[Media("audio", {"mel_FM": np.zeros((9, 10))})]], "9 rows: not a positive multiple of 8"),
        ([[Media("audio", {"mel": np.zeros((8, 10))})]], r"takes features \['mel_FM'\], got \['mel'\]"),
        ([[Media("image", {"patches_NP": np.zeros((4, 4)), "positions_N3": np.zeros((8, 3))})]], "differ in rows"),
    ],
)
def test_what_cannot_be_packed_is_named(docs: list, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        pack(docs, budget=BUDGET, model=MODEL)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"budget": Budget(9, {"image": 18})}, "18 rows is not a multiple"),
        ({"budget": Budget(9, {"smell": 8})}, "no encoder for modality 'smell'"),
        ({"absent": "maybe"}, "absent='maybe'"),
    ],
)
def test_what_cannot_be_a_budget_is_named(change: dict, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        pack([[Text([1])]], **({"budget": BUDGET, "model": MODEL, "absent": "pad"} | change))


def test_tensors_and_arrays_are_both_taken() -> None:
    as_tensors = Media("audio", {"mel_FM": torch.from_numpy(audio(0).features["mel_FM"])})
    one, other = (pack([[item]], budget=BUDGET, model=MODEL).batch for item in (as_tensors, audio(0)))
    assert torch.equal(one["encoders"]["audio"]["features"]["mel_FM"], other["encoders"]["audio"]["features"]["mel_FM"])
