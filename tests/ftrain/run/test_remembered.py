"""Rows that were counted before a run are not tokenised again."""

import pickle
from dataclasses import dataclass, field

import numpy as np
import pytest

from ftrain.data.documents import Document, Group
from ftrain.data.rejects import BadRow
from ftrain.data.sample import Place, Prose, Tokens
from ftrain.run.remembered import Remembered


@dataclass(frozen=True)
class Letters:
    """Letters as tokens; a text with a "!" cannot be used. `asked`: the texts so far."""

    asked: list = field(default_factory=list)
    takes = (Prose,)

    def __call__(self, sample):
        self.asked.append(sample)
        if isinstance(sample, Prose) and "!" in sample.text:
            raise BadRow(sample.place, "loud", "it shouts")
        ids = (
            np.frombuffer(sample.text.encode(), np.uint8).astype(np.int64) if isinstance(sample, Prose) else sample.ids
        )
        return Group((Document(ids, ids),))


def prose(text, row):
    return Prose(text, place=Place("a.txt", row))


def test_a_row_is_encoded_once_and_one_that_says_something_else_again():
    letters = Letters()
    encode = Remembered(letters)
    first = encode(prose("ab", 1))
    assert encode(prose("ab", 1)) is first
    for _ in range(2):
        with pytest.raises(BadRow, match="it shouts"):
            encode(prose("c!", 2))
    assert len(letters.asked) == 2
    assert encode(prose("xyz", 1)).documents[0].tokens.tolist() == [120, 121, 122]
    assert encode.takes == (Prose,)
    assert not pickle.loads(pickle.dumps(encode))._kept


def test_what_cannot_be_compared_is_encoded_again_and_memory_is_bounded(monkeypatch):
    letters = Letters()
    encode = Remembered(letters)
    row = Tokens(np.array([1, 2]), None, place=Place("b", 1))
    again = Tokens(np.array([1, 2]), None, place=Place("b", 1))
    assert encode(row).documents[0].tokens.tolist() == encode(again).documents[0].tokens.tolist() == [1, 2]
    monkeypatch.setattr("ftrain.run.remembered._ROWS", 3)
    for number in range(10):
        encode(prose("t", number + 10))
    assert len(encode._kept) == 3
