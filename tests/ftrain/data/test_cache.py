import pickle

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ftrain.data.cache import ByteCache


@settings(deadline=None)
@given(st.lists(st.tuples(st.integers(0, 9), st.integers(0, 30)), max_size=60), st.integers(0, 60))
def test_bytes_stay_below_the_limit_and_values_are_those_of_their_keys(asked, limit):
    cache = ByteCache(limit=limit)
    sizes = {}
    for key, size in asked:
        size = sizes.setdefault(key, size)
        assert cache.get(key, lambda k=key, s=size: bytes([k]) * s, size=len) == bytes([key]) * size
        assert cache.bytes <= limit
        assert cache.bytes == sum(sizes[k] for k in sizes if k in cache)


def test_what_was_used_last_stays():
    cache = ByteCache(limit=2)
    for key in "aba":
        cache.get(key, lambda: b"x", size=len)
    cache.get("c", lambda: b"x", size=len)
    assert ("a" in cache, "b" in cache, "c" in cache) == (True, False, True)


def test_a_copy_for_another_process_is_empty_and_limits_are_no_debts():
    cache = ByteCache(limit=9)
    cache.get("a", lambda: b"xyz", size=len)
    copy = pickle.loads(pickle.dumps(cache))
    assert (copy.limit, copy.bytes, "a" in copy) == (9, 0, False)
    with pytest.raises(ValueError, match="-1 bytes"):
        ByteCache(limit=-1)
