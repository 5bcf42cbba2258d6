import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from kernels.documents import Pair, batches, document_index, document_offsets, document_pairs, rows


@given(st.lists(st.integers(1, 9), min_size=1, max_size=8), st.integers(0, 3))
def test_offsets_are_where_documents_change(lengths, missing):
    segments_T = torch.arange(len(lengths)).repeat_interleave(torch.tensor(lengths)) % 2  # ids come again
    ends = [sum(lengths[: n + 1]) for n in range(len(lengths))]
    assert document_offsets(segments_T).tolist() == [0, *ends]
    padded = document_offsets(segments_T, max_documents=len(lengths) + missing)
    assert padded.dtype == torch.int32
    assert padded.tolist() == [0, *ends] + [ends[-1]] * missing


def test_a_pack_without_tokens_has_no_documents():
    assert document_offsets(torch.zeros(0, dtype=torch.int64)).tolist() == [0]
    assert document_pairs(None, None, 0, 0) == []


def test_too_many_documents_for_the_bound():
    with pytest.raises(RuntimeError, match="max_documents=2"):
        document_offsets(torch.tensor([0, 1, 2]), max_documents=2)


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
