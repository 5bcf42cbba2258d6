"""ShareGPT's conversations, and LLaVA's: turns of "from" and "value"."""

from collections.abc import Mapping, Sequence
from typing import Any

from ftrain.data.formats.fields import Fields, list_of, maybe_text, object_of, parsed, text_of
from ftrain.data.formats.messages import call_of, tools_of
from ftrain.data.rejects import BadRow
from ftrain.data.sample import Chat, Message, Place, say

_ROLES = {
    "human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant", "model": "assistant",
    "chatgpt": "assistant", "bing": "assistant", "bard": "assistant", "system": "system", "tool": "tool",
    "observation": "tool", "tool_response": "tool", "function_response": "tool", "function_call": "assistant",
    "tool_call": "assistant",
}  # fmt: skip
_CALLS = ("function_call", "tool_call")


def turns_of(values: Sequence[Any], place: Place) -> tuple[Message, ...]:
    """Messages of objects with "from" and "value". BadRow where one of them is no message, or there is none."""
    if not values:
        raise BadRow(place, "no messages", "its conversation is empty")
    return tuple(turn_of(object_of(value, f"turn {i + 1}", place), i + 1, place) for i, value in enumerate(values))


def turn_of(fields: Fields, number: int, place: Place) -> Message:
    """A message of an object with "from" and "value". BadRow where it is none."""
    said = text_of(fields, "from", place)
    if said not in _ROLES:
        raise BadRow(place, "unknown role", f"turn {number} is from {said!r}; known are {', '.join(sorted(_ROLES))}")
    value = text_of(fields, "value", place)
    train = next((bool(fields[name]) for name in ("train", "loss", "weight") if fields.get(name) is not None), None)
    if said not in _CALLS:
        return say(_ROLES[said], value, train=train)
    calls = parsed(value, f"value of turn {number}", place)
    many = calls if isinstance(calls, list) else [calls]
    found = [call_of(object_of(call, f"a call of turn {number}", place), place) for call in many]
    return Message("assistant", (), train, {"tool_calls": found})


def read(fields: Fields, place: Place) -> Chat:
    """A chat of {"conversations": [{"from", "value"}], "system", "tools"}. BadRow where it is none."""
    messages = turns_of(list_of(fields, "conversations", place), place)
    return Chat(with_system(maybe_text(fields, "system", place), messages), tools_of(fields, place), place=place)


def with_system(system: str, messages: tuple[Message, ...]) -> tuple[Message, ...]:
    """The messages after one of the system, unless that is empty."""
    return (say("system", system), *messages) if system else messages


def is_sharegpt(fields: Mapping[str, Any], name: str = "conversations") -> bool:
    """Whether a field holds turns of "from" and "value"."""
    turns = fields.get(name)
    if isinstance(turns, str):
        return turns.lstrip().startswith("[") and '"from"' in turns
    return isinstance(turns, list | tuple) and all(isinstance(t, Mapping) and "from" in t for t in turns[:1])
