"""Rows of the tasks that train on text alone."""

import pytest

from ftrain.data.chat_template import load_tokenizer
from ftrain.data.encoding import ChatEncoder
from ftrain.data.rejects import BadRow
from ftrain.data.sample import Chat, Judged, Message, Part, Place, Preference, say
from ftrain.tasks.rows import JudgedRows, PreferenceRows, TextRows
from tests.helpers.chat_folders import write_chat_model

PARTS = (
    "{% for m in messages %}<|start|>{{ m['role'] }}\n{% if m['content'] is string %}{{ m['content'] }}{% else %}"
    "{% for p in m['content'] %}{{ p['text'] or '' }}{% endfor %}{% endif %}<|end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|start|>assistant\n{% endif %}"
)
PLACE = Place("a.jsonl", 3)


@pytest.fixture(scope="module")
def encoder(tmp_path_factory):
    return ChatEncoder(load_tokenizer(write_chat_model(tmp_path_factory.mktemp("model"))), template=PARTS)


def samples(asked):
    answer, other = say("assistant", "a cat"), say("assistant", "a dog")
    judged = Judged((asked,), (answer,), True, place=PLACE)
    return (
        (TextRows, Chat((asked, answer), place=PLACE)),
        (PreferenceRows, Preference((asked,), (answer,), (other,), place=PLACE)),
        (JudgedRows, (judged, judged)),
    )


@pytest.mark.parametrize("which", range(3))
def test_a_picture_is_refused_where_the_template_would_leave_it_out(encoder, which):
    rows, sample = samples(say("user", "what is it?"))[which]
    assert rows(encoder)(sample).documents
    rows, sample = samples(Message("user", (Part("image", source="a.png"), Part("text", "what is it?"))))[which]
    with pytest.raises(BadRow, match=r"a.jsonl, row 3: it has media \(of the kind image\)"):
        rows(encoder)(sample)
