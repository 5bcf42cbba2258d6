import numpy as np
import pytest
import torch

from ftrain.data.documents import IGNORE, Document, Group, lay, shifted
from ftrain.modules.packs import join_packs


def document(*ids, leaves=None):
    tokens = np.array(ids, np.int64)
    return Document(tokens, shifted(tokens), leaves or {})


def test_documents_lie_one_after_the_other_and_padding_is_documents_of_its_own():
    pack = lay([Group((document(5, 6, 7), document(8))), Group((document(9, 9),))], tokens=12)
    assert pack["tokens"].tolist() == [5, 6, 7, 8, 9, 9, 0, 0, 0, 0, 0, 0]
    assert pack["labels"].tolist() == [6, 7, IGNORE, IGNORE, 9] + [IGNORE] * 7
    assert pack["positions"].tolist() == [0, 1, 2, 0, 0, 1, 0, 1, 2, 0, 1, 2]
    assert pack["segments"].tolist() == [0, 0, 0, 1, 2, 2, 3, 3, 3, 4, 4, 4]
    assert {leaf.dtype for leaf in pack.values()} == {torch.int64}


def test_further_leaves_go_along_and_are_zero_on_padding():
    weights = np.array([[1.0, 2.0], [3.0, 4.0]], np.float32)
    pack = lay([Group((document(1, 2, leaves={"weights": weights}),))], tokens=3)
    assert pack["weights"].tolist() == [[1.0, 2.0], [3.0, 4.0], [0.0, 0.0]]
    empty = lay([], tokens=2, leaves={"weights": np.dtype(np.float32)})
    assert empty["weights"].tolist() == [0.0, 0.0]
    assert empty["labels"].tolist() == [IGNORE] * 2


def test_packs_with_numbers_of_their_own_stay_apart_when_they_are_joined():
    packs = [lay([Group((document(1, 2),))], tokens=2, first=2 * i) for i in range(2)]
    assert join_packs(packs)["segments"].tolist() == [0, 0, 2, 2]


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda: lay([Group((document(1, 2),))], tokens=1), "1 documents have 2 tokens, and a pack holds 1"),
        (lambda: Document(np.array([1]), np.array([1, 2])), "lengths"),
        (lambda: Document(np.array([1.0]), np.array([1])), "float64"),
        (lambda: Document(np.zeros(0, np.int64), np.zeros(0, np.int64)), "at least 1"),
        (lambda: document(1, leaves={"tokens": np.zeros(1)}), "its own"),
        (lambda: lay([Group((document(1), document(1, leaves={"x": np.zeros(1)})))], tokens=9), "has leaves"),
    ],
)
def test_what_does_not_fit_is_an_error(make, said):
    with pytest.raises(ValueError, match=said):
        make()
