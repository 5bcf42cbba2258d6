"""Messages as OpenAI's API has them: role and content, where content is a text or parts of text and media.

Also those of transformers' processors, and TRL's.
"""

import json
from collections.abc import Mapping, Sequence
from typing import Any

from ftrain.data.formats.fields import Fields, flag_of, list_of, object_of, parsed
from ftrain.data.rejects import BadRow
from ftrain.data.sample import Kind, Message, Part, Place, Speech

_KEPT = ("tool_calls", "tool_call_id", "name", "reasoning_content", "thinking")
_MEDIA: Mapping[str, Kind] = {
    "image": "image", "image_url": "image", "input_image": "image", "audio": "audio", "audio_url": "audio",
    "input_audio": "audio", "video": "video", "video_url": "video", "input_video": "video",
}  # fmt: skip
_ROLES = {"human": "user", "gpt": "assistant", "model": "assistant", "bot": "assistant", "developer": "developer"}


def messages_of(values: Sequence[Any], place: Place) -> tuple[Message, ...]:
    """Messages of objects with "role" and "content". A part of media without a source stands for a file of the row.

    BadRow where one of them is no message, or there is none.

    >>> messages_of([{"role": "user", "content": "hi"}], Place("a.jsonl", 1))[0].text
    'hi'
    """
    if not values:
        raise BadRow(place, "no messages", "its list of messages is empty")
    return tuple(_message(object_of(value, f"message {i + 1}", place), i + 1, place) for i, value in enumerate(values))


def _message(fields: Fields, number: int, place: Place) -> Message:
    role = fields.get("role")
    if not isinstance(role, str) or not role:
        raise BadRow(place, "null field", f"message {number} has the role {role!r}")
    extra = {name: fields[name] for name in _KEPT if fields.get(name) is not None}
    if "tool_calls" in extra:
        extra["tool_calls"] = _calls(extra["tool_calls"], number, place)
        if not extra["tool_calls"]:
            del extra["tool_calls"]
    content = fields.get("content")
    if content is None and not extra.keys() & {"tool_calls", "reasoning_content"}:
        raise BadRow(place, "null field", f"message {number} ({role}) has no content")
    role = _ROLES.get(role, role)
    content, speech = _without_speech(content, role, number, place)
    return Message(role, _parts(content, number, place), _trained(fields), extra, speech)


def _without_speech(content: Any, role: str, number: int, place: Place) -> tuple[Any, Speech | None]:
    """The content without its part of speech, and that. BadRow for more than one, or one of another role."""
    parts = [content] if isinstance(content, Mapping) else content
    if not isinstance(parts, list | tuple):
        return content, None
    found = [part for part in parts if isinstance(part, Mapping) and part.get("type") == "speech"]
    if not found:
        return content, None
    if len(found) > 1 or role != "assistant":
        raise BadRow(
            place, "speech", f"message {number} ({role}) has {len(found)} parts of speech: one of an assistant"
        )
    (said,) = found
    if (said.get("codes") is None) == (said.get("audio") is None):
        raise BadRow(place, "speech", f"the speech of message {number} needs 'codes' or 'audio', one of them")
    recorded = said.get("codes") is None
    source = media_source(said, "audio") if recorded else said["codes"]
    voice = said.get("voice")
    if voice is not None and not isinstance(voice, str | int):
        raise BadRow(place, "wrong type", f"the voice of message {number} is a {type(voice).__name__}")
    return [part for part in parts if part is not said], Speech(source, recorded, voice)


def _trained(fields: Fields) -> bool | None:
    """What a row says of a message by itself: ms-swift's "loss", OpenAI's "weight", axolotl's "train"."""
    said = next((fields[name] for name in ("train", "loss", "weight") if fields.get(name) is not None), None)
    return None if said is None else bool(said)


def _parts(content: Any, number: int, place: Place) -> tuple[Part, ...]:
    if content is None:
        return ()
    if isinstance(content, str):
        return (Part("text", content),)
    if isinstance(content, Mapping):
        content = [content]
    if not isinstance(content, list | tuple):
        raise BadRow(place, "wrong type", f"the content of message {number} is a {type(content).__name__}")
    return tuple(_part(part, number, place) for part in content)


def _part(value: Any, number: int, place: Place) -> Part:
    if isinstance(value, str):
        return Part("text", value)
    fields = object_of(value, f"a part of message {number}", place)
    kind = fields.get("type", "text")
    if kind in ("text", "input_text", "output_text", "refusal"):
        text = fields.get("refusal") if kind == "refusal" else fields.get("text")
        if not isinstance(text, str):
            raise BadRow(place, "null field", f"a part of message {number} has no text")
        return Part("text", text)
    if kind not in _MEDIA:
        raise BadRow(place, "unknown part", f"a part of message {number} has the type {kind!r}")
    heard = _MEDIA[kind] == "video" and fields.get("audio") is not None and flag_of(fields, "audio", place)
    return Part(_MEDIA[kind], source=media_source(fields, _MEDIA[kind]), sound=heard)


def media_source(fields: Fields, kind: Kind) -> Any:
    """The path, URL or bytes of a part of media, by whatever name it has; None where there is none.

    >>> media_source({"type": "image_url", "image_url": {"url": "a.png"}}, "image")
    'a.png'
    """
    names = (kind, f"{kind}_url", f"input_{kind}", "url", "path", "base64", "bytes", "data")
    name = next((name for name in names if fields.get(name) is not None), None)
    found = None if name is None else fields[name]
    if isinstance(found, Mapping):
        if found.get("bytes") is None and found.get("array") is not None:  # as `datasets` has recordings
            rate = found.get("sampling_rate")
            return found["array"] if rate is None else (found["array"], rate)
        name = next((name for name in ("bytes", "url", "path", "data", "base64") if found.get(name) is not None), None)
        found = None if name is None else found[name]
    in_row = name in ("data", "base64") and isinstance(found, str) and not found.startswith("data:")
    return f"data:{kind};base64,{found}" if in_row else found


def _calls(value: Any, number: int, place: Place) -> list[dict[str, Any]]:
    """Tool calls as chat templates read them: the arguments are an object, not its JSON."""
    if isinstance(value, str):
        value = parsed(value, "tool_calls", place)
    if not isinstance(value, list | tuple):
        raise BadRow(place, "wrong type", f"tool_calls of message {number} are a {type(value).__name__}, not a list")
    return [call_of(object_of(call, f"a tool call of message {number}", place), place) for call in value]


def call_of(fields: Fields, place: Place) -> dict[str, Any]:
    """A tool call, of an object with "function" or of the function itself: name and arguments. BadRow without."""
    function = object_of(fields.get("function", fields), "the function of a tool call", place)
    name, arguments = function.get("name"), function.get("arguments", function.get("parameters", {}))
    if not isinstance(name, str) or not name:
        raise BadRow(place, "null field", f"a tool call has the name {name!r}")
    if isinstance(arguments, str):
        arguments = parsed(arguments, "arguments", place)
    kept = {key: fields[key] for key in ("id",) if fields.get(key) is not None}
    if isinstance(arguments, Mapping):  # files with columns fill fields that other rows have with null
        arguments = {key: value for key, value in arguments.items() if value is not None}
    return {**kept, "type": "function", "function": {"name": name, "arguments": arguments}}


def tools_of(fields: Fields, place: Place) -> tuple[Mapping[str, Any], ...]:
    """The tools of a row, as objects or as JSON of these. BadRow where they are neither."""
    if not fields.get("tools"):
        return ()
    tools = []
    for value in list_of(fields, "tools", place):
        tools.append(object_of(parsed(value, "tools", place) if isinstance(value, str) else value, "a tool", place))
    return tuple(json.loads(json.dumps(tool)) for tool in tools)
