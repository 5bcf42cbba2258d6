import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from ftrain.kernels.documents import (
    Documents,
    Pair,
    aligned_documents,
    batches,
    document_index,
    document_offsets,
    document_pairs,
    index_of_offsets,
    offset_pairs,
    rows,
)

LENGTHS = st.lists(st.integers(1, 9), min_size=1, max_size=8)


def ids_of_lengths(lengths):
    return torch.arange(len(lengths)).repeat_interleave(torch.tensor(lengths)) % 2  # ids come again


@given(LENGTHS, st.integers(0, 3))
def test_offsets_are_where_documents_change(lengths, missing):
    segments_T = ids_of_lengths(lengths)
    ends = [sum(lengths[: n + 1]) for n in range(len(lengths))]
    assert document_offsets(segments_T).tolist() == [0, *ends]
    told = Documents.of(segments_T, max_documents=len(lengths) + missing)
    assert told.offsets_N.dtype == torch.int32
    assert told.offsets_N.tolist() == [0, *ends] + [ends[-1]] * missing
    assert index_of_offsets(told.offsets_N, sum(lengths)).tolist() == document_index(segments_T).tolist()
    assert offset_pairs(told.offsets_N, None) == document_pairs(segments_T, None, sum(lengths), sum(lengths))


@given(LENGTHS, st.integers(1, 5))
def test_documents_of_every_nth_token(lengths, stride):
    told = Documents.of(ids_of_lengths(lengths)).every(stride)
    number_T = index_of_offsets(told.offsets_N, len(told.ids_T))
    assert number_T.tolist() == document_index(ids_of_lengths(lengths))[::stride].tolist()
    assert told.longest >= int(told.offsets_N.diff().max())


def test_places_for_documents_are_few_shapes():
    places = {len(Documents.of(torch.arange(n)).offsets_N) - 1 for n in range(1, 65)}
    assert places == {8, 16, 32, 64}


def test_each_pack_has_its_own_places():
    told = Documents.of(torch.tensor([0, 0, 1, 1, 2, 3, 4, 4]), packs=2, max_documents=4)
    assert told.offsets_N.tolist() == [0, 2, 4, 4, 4, 5, 6, 8, 8]
    assert told.longest == 4


@pytest.mark.parametrize(
    ("ids", "options", "message"),
    [
        ([0, 1, 2], {"max_documents": 2}, "a pack has 3 documents, more than max_documents=2"),
        ([0, 0, 0, 1], {"longest": 2}, "a document has 3 tokens, more than longest=2"),
        ([0, 1, 1, 2], {"packs": 2}, "lies in two packs: it goes on over token 2"),
        ([0, 1, 2], {"packs": 2}, "3 tokens are not 2 equal packs"),
        ([0.0], {}, "int64"),
    ],
)
def test_documents_that_do_not_fit_are_refused(ids, options, message):
    with pytest.raises(ValueError, match=message):
        Documents.of(torch.tensor(ids), **options)


@given(st.lists(st.tuples(st.integers(0, 4), st.integers(0, 4)), min_size=1, max_size=6))
def test_aligned_documents_meet_by_number_as_they_meet_by_id(lengths):
    pairs = [(q, k) for q, k in lengths if q or k] or [(1, 1)]
    q, k = ([n for n, pair in enumerate(pairs) for _ in range(pair[i])] for i in (0, 1))
    q, k = torch.tensor(q, dtype=torch.int64), torch.tensor(k, dtype=torch.int64)
    told, kv_told = aligned_documents(q, k)
    assert offset_pairs(told.offsets_N, kv_told.offsets_N) == document_pairs(q, k, len(q), len(k))


def test_documents_in_another_order_cannot_be_aligned():
    with pytest.raises(ValueError, match="document 1 comes in another order"):
        aligned_documents(torch.tensor([0, 1]), torch.tensor([1, 0]))


def test_a_pack_without_tokens_has_no_documents():
    assert document_offsets(torch.zeros(0, dtype=torch.int64)).tolist() == [0]
    assert document_pairs(None, None, 0, 0) == []


def test_an_id_that_comes_again_is_another_document():
    segments_T = torch.tensor([7, 7, 3, 7])
    assert document_index(segments_T).tolist() == [0, 0, 1, 2]
    assert document_pairs(segments_T, None, 4, 4) == [Pair(0, 2, 0, 2), Pair(2, 1, 2, 1), Pair(3, 1, 3, 1)]


def test_keys_of_another_pack_are_found_by_id():
    pairs = document_pairs(torch.tensor([5, 5, 6, 8]), torch.tensor([8, 8, 5]), 4, 3)
    assert pairs == [Pair(0, 2, 2, 1), Pair(3, 1, 0, 2)]


def test_keys_of_another_pack_must_be_unambiguous():
    with pytest.raises(ValueError, match="id 4 names two documents"):
        document_pairs(torch.tensor([4]), torch.tensor([4, 5, 4]), 1, 3)


def test_queries_of_another_pack_must_be_unambiguous():
    with pytest.raises(ValueError, match="segments_T: id 4 names two documents"):
        document_pairs(torch.tensor([4, 5, 4]), torch.tensor([4]), 3, 1)


@given(st.lists(st.integers(1, 5), min_size=1, max_size=30), st.integers(1, 12))
def test_batches_hold_every_document_once(lengths, limit):
    pairs = [Pair(n, length, n, length) for n, length in enumerate(lengths)]
    parts = list(batches(pairs, limit))
    assert sorted(p.q_start for part in parts for p in part) == list(range(len(lengths)))
    assert all(len({p.q_length for p in part}) == 1 for part in parts)
    assert all(len(part) == 1 or len(part) * part[0].q_length <= limit for part in parts)


def test_neighbours_are_a_slice_and_others_an_index():
    cpu = torch.device("cpu")
    assert rows([4, 7, 10], 3, cpu) == slice(4, 13)
    index = rows([0, 5], 2, cpu)
    assert isinstance(index, torch.Tensor)
    assert index.tolist() == [0, 1, 5, 6]
