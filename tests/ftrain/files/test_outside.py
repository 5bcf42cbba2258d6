"""JSON from anybody is what it should be, or a ValueError that names the file and the entry."""

import json
import math

import pytest

from ftrain.files.outside import (
    anything,
    check,
    either,
    flag,
    listed,
    mapped,
    number,
    one_of,
    parse,
    read_json,
    record,
    text,
    whole,
)

SHAPE = record(
    {"name": text(8), "sizes": listed(whole(1, 100)), "on": flag},
    optional={"rate": either(one_of(None), number(0.0)), "more": mapped(number(finite=False))},
)
GOOD = {"name": "a", "sizes": [1, 100], "on": True, "rate": None, "more": {"x": math.inf}}


def test_what_fits_comes_back():
    assert check(GOOD, SHAPE, "f.json") is GOOD
    assert check({**GOOD, "rate": 0.5}, SHAPE, "f.json")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"name": 5}, "name is 5, not a text"),
        ({"name": "a" * 9}, "not a text of at most 8 characters"),
        ({"name": "\ud800"}, "not a text"),
        ({"sizes": "abc"}, "sizes is 'abc', not a list"),
        ({"sizes": [1, True]}, r"sizes\[1\] is True, not a whole number from 1 to 100"),
        ({"sizes": [1.0]}, r"sizes\[0\] is 1.0, not a whole number"),
        ({"sizes": [10**4000]}, "a number of more than 40 digits, not a whole number"),
        ({"on": 1}, "on is 1, not true or false"),
        ({"rate": math.nan}, "rate is nan, not a number of at least 0"),
        ({"rate": -1}, "rate is -1, not a number of at least 0"),
        ({"rate": 10**400}, "not a number of at least 0"),
        ({"more": {"x": "y"}}, "more.x is 'y', not a number"),
        (
            {"further": 1},
            "the object has 'further', which is not known; its entries should be name, sizes, on, rate, more",
        ),
    ],
)
def test_what_does_not_fit_is_named(change, message):
    with pytest.raises(ValueError, match=f"f.json: .*{message}"):
        check({**GOOD, **change}, SHAPE, "f.json")


def test_missing_entries_and_other_kinds():
    with pytest.raises(ValueError, match="the object has no 'on'"):
        check({"name": "a", "sizes": []}, SHAPE, "f.json")
    with pytest.raises(ValueError, match="the value is a list, not an object"):
        check([GOOD], SHAPE, "f.json")
    assert check({"a": 1, "b": []}, record({"a": whole()}, others=True), "f.json")
    assert check([], anything, "f.json") == []


@pytest.mark.parametrize(
    "content",
    [b"", b"[" * 100_000, b'{"a":' * 100_000, b"9" * 100_000, b"\0" * 99, b"\xff\xfe\xfa", b'{"a": 1', b"nothing"],
    ids=["empty", "deep", "deep objects", "long number", "zeros", "binary", "torn", "text"],
)
def test_what_is_no_json_is_named(tmp_path, content):
    with pytest.raises(ValueError, match=r"f\.json"):
        parse(content, "f.json")
    (tmp_path / "f.json").write_bytes(content)
    with pytest.raises(ValueError, match=r"f\.json"):
        read_json(tmp_path / "f.json")


def test_a_file_beyond_the_limit(tmp_path):
    (tmp_path / "f.json").write_text(json.dumps(list(range(100))))
    with pytest.raises(ValueError, match="may have 50"):
        read_json(tmp_path / "f.json", limit=50)
