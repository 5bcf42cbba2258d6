"""The vocabulary of six languages."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from experiments.omni.language import BOS, EOS, LANGUAGES, PAD, SPECIAL, Tokenizer, tokenizer

WORDS = tokenizer()


def test_each_language_has_all_words():
    assert [language.tag for language in LANGUAGES] == ["en:", "de:", "fr:", "es:", "it:", "zh:"]
    for language in LANGUAGES:
        assert len(language.numbers) == len(set(language.numbers)) == 19
        assert len(set(language.directions)) == 4
        assert len(set(language.words)) == len(language.words)


def test_special_tokens_come_first_and_no_word_twice():
    assert WORDS.words[: len(SPECIAL)] == SPECIAL
    assert WORDS.id(PAD) == 0
    assert len(set(WORDS.words)) == len(WORDS)


@given(st.lists(st.sampled_from(WORDS.words[3:])))
def test_text_returns_from_its_tokens(words):
    text = " ".join(words)
    assert WORDS.decode(WORDS.encode(text)) == text
    assert WORDS.decode([WORDS.id(BOS), *WORDS.encode(words), WORDS.id(EOS), WORDS.id("three")]) == text


def test_unknown_words_and_ids_are_named():
    with pytest.raises(ValueError, match=r"'threee'.*did you mean 'three'"):
        WORDS.encode("en: draw threee")
    with pytest.raises(ValueError, match=rf"token id {len(WORDS)} is outside"):
        WORDS.decode([len(WORDS)])
    with pytest.raises(ValueError, match=r"twice: \['a'\]"):
        Tokenizer(("a", "b", "a"))
