"""Single questions with their answers: alpaca, ms-swift's query and response, prompt and completion."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from ftrain.data.formats.fields import Fields, is_list, list_of, maybe_text, text_of, words_of
from ftrain.data.formats.messages import messages_of, tools_of
from ftrain.data.formats.sharegpt import with_system
from ftrain.data.rejects import BadRow
from ftrain.data.sample import Chat, Message, Place, say


def read_alpaca(fields: Fields, place: Place) -> Chat:
    """A chat of {"instruction", "input", "output", "system", "history"}. BadRow where it is none."""
    asked = alpaca_prompt(fields, place)
    return Chat((*asked, say("assistant", words_of(fields, "output", place))), place=place)


def alpaca_prompt(fields: Fields, place: Place) -> tuple[Message, ...]:
    """What alpaca's fields ask: system, history, and the instruction with its input below. BadRow without one."""
    asked = words_of(fields, "instruction", place)
    given = maybe_text(fields, "input", place)
    question = say("user", f"{asked}\n{given}" if given else asked)
    before = _history(fields, place)
    return with_system(maybe_text(fields, "system", place), (*before, question))


def _history(fields: Fields, place: Place) -> tuple[Message, ...]:
    if not fields.get("history"):
        return ()
    turns: list[Message] = []
    for pair in list_of(fields, "history", place):
        if not isinstance(pair, Sequence) or len(pair) != 2 or not all(isinstance(text, str) for text in pair):
            raise BadRow(place, "wrong type", f"'history' holds {pair!r}, not a question with its answer")
        turns += [say("user", pair[0]), say("assistant", pair[1])]
    return tuple(turns)


def read_swift(fields: Fields, place: Place) -> Chat:
    """A chat of ms-swift's {"query", "response", "history", "system"}. BadRow where it is none."""
    asked = swift_prompt(fields, place)
    chat = (*asked, say("assistant", words_of(fields, "response", place)))
    return Chat(chat, tools_of(fields, place), place=place)


def swift_prompt(fields: Fields, place: Place) -> tuple[Message, ...]:
    """What ms-swift's fields ask: system, history and query. BadRow without one."""
    question = say("user", words_of(fields, "query", place))
    return with_system(maybe_text(fields, "system", place), (*_history(fields, place), question))


def read_messages(fields: Fields, place: Place) -> Chat:
    """A chat of {"messages": [{"role", "content"}], "system", "tools"}. BadRow where it is none."""
    messages = messages_of(list_of(fields, "messages", place), place)
    messages = with_system(maybe_text(fields, "system", place), messages)
    return Chat(messages, tools_of(fields, place), place=place)


def read_completion(fields: Fields, place: Place) -> Chat:
    """A chat of {"prompt", "completion"}, each a text or messages. BadRow where it is none."""
    prompt, completion = said(fields, "prompt", "user", place), said(fields, "completion", "assistant", place)
    return Chat((*untrained(prompt), *completion), tools_of(fields, place), place=place)


def untrained(messages: Sequence[Message]) -> tuple[Message, ...]:
    """The messages as a prompt, of which nothing is trained on."""
    return tuple(replace(m, train=False) for m in messages)


def said(fields: Fields, name: str, role: str, place: Place) -> tuple[Message, ...]:
    """A field that is a text said by `role`, or messages, or one of them. BadRow where it is none of these."""
    value: Any = fields.get(name)
    if isinstance(value, dict) and "role" in value:
        return messages_of([value], place)
    if is_list(fields, name) and not isinstance(value, str):
        return messages_of(list_of(fields, name, place), place)
    return (say(role, text_of(fields, name, place)),)
