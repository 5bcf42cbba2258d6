"""A chat in which nobody is the assistant says which roles it has."""

import pytest

from ftrain.data.chat_template import load_tokenizer
from ftrain.data.encoding import ChatEncoder
from ftrain.data.formats.messages import messages_of
from ftrain.data.rejects import BadRow
from ftrain.data.sample import Chat, Place
from tests.helpers.chat_folders import write_chat_model


def test_roles_that_are_not_the_assistants_are_named(tmp_path):
    encode = ChatEncoder(load_tokenizer(write_chat_model(tmp_path, layers=1)))
    messages = [{"role": "user", "content": "hi"}, {"role": "asistant", "content": "hello"}]
    place = Place("a.jsonl", 1)
    with pytest.raises(BadRow, match=r"its roles are 'user', 'asistant' \(did you mean 'assistant' by 'asistant'\?\)"):
        encode.encode(Chat(messages_of(messages, place), place=place))
