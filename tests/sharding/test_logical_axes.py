import pytest

from ftrain.sharding import logical_axes


def test_every_word_has_a_meaning():
    assert all(meaning.strip() for meaning in logical_axes.LOGICAL_AXES.values())


def test_known_axes_and_none_pass():
    logical_axes.check(["embed", None, "expert"])


@pytest.mark.parametrize(("typo", "meant"), [("emebd", "embed"), ("experts", "expert"), ("kv_head", "kv_heads")])
def test_a_typo_is_answered_with_the_nearest_word(typo, meant):
    with pytest.raises(ValueError, match=f"unknown logical axis '{typo}'; nearest: '{meant}'"):
        logical_axes.check(["vocab", typo])
