import numpy as np
import pytest

pytest.importorskip("transformers")

from ftrain.data.encoding import ChatEncoder
from ftrain.data.samples import open_samples
from ftrain.data.show import as_html, show_rows
from ftrain.data.stats import count

ROWS = [
    {"messages": [{"role": "user", "content": "2 + 2?"}, {"role": "assistant", "content": "4 <b>bold</b>"}]},
    {"messages": [{"role": "user", "content": None}]},
    {"messages": [{"role": "user", "content": "nobody answers"}]},
]


def test_rows_are_counted_with_their_tokens(write, tokenizer):
    samples = open_samples(write("chat.jsonl", ROWS))
    stats = count(samples, ChatEncoder(tokenizer))
    encoded = ChatEncoder(tokenizer).encode(samples[0])
    assert (stats.format, stats.rows, stats.taken) == ("openai", 3, 1)
    assert [kind.kind for kind in stats.rejected] == ["null field", "nothing to train on"]
    assert (stats.tokens, stats.trained, stats.longest) == (
        len(encoded.ids), int(encoded.trained.sum()), len(encoded.ids),
    )  # fmt: skip
    assert stats.share_trained == np.mean(encoded.trained)
    (bar,) = stats.bars
    assert bar.rows == 1
    assert bar.above < len(encoded.ids) <= bar.upto


def test_without_a_tokenizer_only_rows_are_counted(write):
    stats = count(open_samples(write("chat.jsonl", ROWS)), rows=2)
    assert (stats.rows, stats.taken, stats.tokens, stats.bars, stats.share_trained) == (2, 1, 0, (), 0.0)


def test_bars_hold_all_rows(write, tokenizer):
    samples = open_samples(write("text.jsonl", [{"text": "word " * n} for n in (1, 2, 3, 40, 400)]))
    stats = count(samples, ChatEncoder(tokenizer))
    assert sum(bar.rows for bar in stats.bars) == 5
    assert sum(bar.tokens for bar in stats.bars) == stats.tokens
    assert all(a.upto == b.above for a, b in zip(stats.bars, stats.bars[1:], strict=False))


def test_rows_are_shown_with_what_is_trained_on(write, tokenizer):
    samples = open_samples(write("chat.jsonl", ROWS))
    first, broken, silent = show_rows(samples, 9, ChatEncoder(tokenizer))
    assert [(run.text, run.trained) for run in first.runs] == [
        ("<|im_start|>user\n2 + 2?<|im_end|>\n<|im_start|>assistant\n", False), ("4 <b>bold</b><|im_end|>", True),
        ("\n", False),
    ]  # fmt: skip
    assert "tokens are trained on" in first.title
    assert broken.error == "message 1 (user) has no content"
    assert "is trained on" in silent.error


def test_a_page_marks_what_is_trained_on_and_escapes_texts(write, tokenizer):
    samples = open_samples(write("chat.jsonl", ROWS))
    page = as_html(list(show_rows(samples, 3, ChatEncoder(tokenizer))), title="a <title>")
    assert "<mark>4 &lt;b&gt;bold&lt;/b&gt;&lt;|im_end|&gt;</mark>" in page
    assert "<b>" not in page
    assert "a &lt;title&gt;" in page


@pytest.mark.parametrize(
    ("row", "pieces"),
    [
        ({"text": "hi"}, ["hi"]),
        ({"prompt": "q", "chosen": "good", "rejected": "bad"}, ["user: q", "-> chosen", "assistant: good", "bad"]),
        ({"prompt": "q", "completion": "c", "label": False}, ["user: q", "-> bad", "assistant: c"]),
        ({"input_ids": [1, 2]}, ["1 2"]),
        ({"image": "a.png", "text": "cat"}, ["<image> cat"]),
        ({"query": "q", "positive": "p", "negative": "n"}, ["q", "+ p", "- n"]),
        ({"text": "hi", "label": 3}, ["hi", "class 3"]),
    ],
)
def test_samples_of_every_kind_are_shown_without_a_tokenizer_and_counted_with_one(write, tokenizer, row, pieces):
    samples = open_samples(write("rows.jsonl", [row]))
    (shown,) = show_rows(samples, 1)
    for piece in pieces:
        assert piece in shown.runs[0].text
    assert shown.runs[0].trained is None
    found = count(samples, ChatEncoder(tokenizer))
    assert found.taken == ("image" not in row)
    assert [kind.kind for kind in found.rejected] == ["media"] * ("image" in row)  # a model of text sees none


def test_both_ends_of_a_preference_are_shown(write, tokenizer):
    samples = open_samples(write("rows.jsonl", [{"prompt": "q", "chosen": "good", "rejected": "bad"}]))
    chosen, rejected = show_rows(samples, 1, ChatEncoder(tokenizer))
    assert ("chosen" in chosen.title, chosen.runs[1].text) == (True, "good<|im_end|>")
    assert ("rejected" in rejected.title, rejected.runs[1].text) == (True, "bad<|im_end|>")
