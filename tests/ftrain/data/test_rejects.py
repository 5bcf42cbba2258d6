import logging
import pickle

import pytest

from ftrain.data.rejects import BadRow, Rejects
from ftrain.data.sample import Place


def bad(row, kind="invalid JSON", file="a.jsonl"):
    return BadRow(Place(file, row), kind, "what is wrong")


def test_rows_are_counted_by_file_and_kind_with_the_first_places():
    rejects = Rejects(limit=1.0)
    for row in range(1, 9):
        rejects.add(bad(row))
    rejects.add(bad(3, "null field"))
    rejects.took(91)
    rejects.finish()
    assert (rejects.rows, rejects.count) == (100, 9)
    assert [str(kind) for kind in rejects] == [
        "a.jsonl: 8 x invalid JSON (row 1, 2, 3, 4, 5, ...)", "a.jsonl: 1 x null field (row 3)",
    ]  # fmt: skip
    assert rejects.by_kind() == {"invalid JSON": 8, "null field": 1}


def test_each_file_is_told_once(caplog):
    rejects = Rejects(limit=1.0)
    with caplog.at_level(logging.WARNING):
        for row, file in ((1, "a.jsonl"), (2, "a.jsonl"), (1, "b.jsonl")):
            rejects.add(bad(row, file=file))
    assert [record.getMessage() for record in caplog.records] == [
        f"a row is skipped: {file}, row 1: what is wrong; further ones of this file are counted"
        for file in ("a.jsonl", "b.jsonl")
    ]


def test_past_the_limit_the_run_stops_with_a_sentence():
    rejects = Rejects(limit=0.05, after=100)
    rejects.took(94)
    for row in range(5):
        rejects.add(bad(row))
    with pytest.raises(
        ValueError, match=r"6\.0%, more than 5\.0%, of 100 rows were rejected, most of them a\.jsonl: 6 x"
    ):
        rejects.add(bad(6))


def test_few_rows_are_looked_at_when_the_data_end():
    rejects = Rejects(limit=0.05)
    rejects.took(3)
    rejects.add(bad(4))
    with pytest.raises(ValueError, match=r"25\.0%, more than"):
        rejects.finish()
    with pytest.raises(ValueError, match="no rows"):
        Rejects().finish()
    all_bad = Rejects(limit=1.0)
    all_bad.add(bad(1))
    with pytest.raises(ValueError, match="all of 1 rows were rejected"):
        all_bad.finish()


def test_many_broken_files_take_little_memory():
    rejects = Rejects(limit=1.0, after=10**9)
    for i in range(5000):
        rejects.add(bad(1, file=f"{i}.png"))
    assert sum(kind.count for kind in rejects) == 5000
    assert len(list(rejects)) <= 1001


def test_a_bad_row_comes_back_from_a_worker():
    error = pickle.loads(pickle.dumps(bad(7)))
    assert (str(error), error.place.row, error.kind) == ("a.jsonl, row 7: what is wrong", 7, "invalid JSON")


def test_a_limit_is_a_share():
    with pytest.raises(ValueError, match="share"):
        Rejects(limit=5)
