"""Which characters of a rendered chat each turn of the assistant spells, with the token that ends it.

Three ways, of which the first that gives the words of the message is taken:

1. the template marks them ({% generation %});
2. the turn begins where the chat up to it, rendered with the prompt to speak, ends;
3. the chat is rendered once more with another text in place of the words, and what is the same before and after it
   tells where they are. This holds for templates that write earlier turns in another way than the last one, as those
   do that drop the thoughts of earlier turns.
"""

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from os.path import commonprefix
from typing import Any

from ftrain.data.chat_template import ChatTemplate, as_fields
from ftrain.data.rejects import BadRow
from ftrain.data.sample import Chat, Message, say

_STAND_IN = "zqStandInForWordsqz"
_TAGS = re.compile(r"\s+|</?think>|</?thinking>")

Fields = list[dict[str, Any]]


@dataclass(frozen=True)
class Turn:
    """Message number `message`, from 0, is spelled by the characters [start, end), the token that ends it inside."""

    message: int
    start: int
    end: int


@dataclass(frozen=True)
class Rendered:
    """A chat as text, and its turns in order."""

    text: str
    turns: tuple[Turn, ...]


class TurnFinder:
    """Finds turns in chats of one template.

    Args:
        template: how chats are written.
        control: the texts of control tokens, such as <|im_end|>, one of which ends each turn.
        opening: control tokens that begin a text and end none.

    ValueError where the template writes no such token between what the assistant says and the next turn.
    """

    def __init__(self, template: ChatTemplate, *, control: Sequence[str], opening: Sequence[str] = ()) -> None:
        self.template = template
        ends = sorted((token for token in control if token not in opening), key=len, reverse=True)
        if not ends:
            raise ValueError("the tokenizer has no control tokens, so nothing can end a turn of the assistant")
        self._end = re.compile(r"\s*(" + "|".join(map(re.escape, ends)) + ")")
        self._parts, self._stop = self._learn()

    def _learn(self) -> tuple[bool, str]:
        """Whether contents must be lists of parts, and what ends the assistant's words: one control token, or several.

        It is what follows them both at the end of a chat and within it, or else what follows them within.
        """
        chat = [say("user", "2 + 2?"), say("assistant", _STAND_IN), say("user", "3 + 3?")]
        within = ""
        for parts in (False, True):
            fields = as_fields(chat, parts=parts)
            _, found, within = self.template.render(fields).partition(_STAND_IN)
            first = self._end.match(within)
            if found and first is not None:
                last = self.template.render(fields[:2]).partition(_STAND_IN)[2]
                return parts, self._common(within.lstrip(), last.lstrip()) or first.group(1)
        raise ValueError(
            f"the chat template writes no control token after what the assistant says (but {within[:40]!r}): the model "
            "could not learn to stop; give another template"
        )

    def _common(self, one: str, other: str) -> str:
        """The control tokens, one right after the other, that both texts begin with."""
        at = 0
        while True:
            ending = self._end.match(one, at)
            if ending is None or ending.start(1) > at or not other.startswith(one[: ending.end()]):
                return one[:at]
            at = ending.end()

    def _end_of(self, text: str, words: int) -> int | None:
        """Where the turn ends whose words end at `words`; None where no control token follows."""
        ending = self._end.match(text, words)
        if ending is None:
            return None
        begins = ending.start(1)
        return begins + len(self._stop) if text.startswith(self._stop, begins) else ending.end()

    def find(self, chat: Chat) -> Rendered:
        """The text of a chat and its turns: those of the assistant, and those whose `train` is True.

        BadRow where the template refuses the chat, or where the words of a turn cannot be told from the rest.
        """
        fields = as_fields(chat.messages, parts=self._parts)
        wanted = [i for i, m in enumerate(chat.messages) if m.role == "assistant" or m.train]
        try:
            text, marks = self._whole(fields, chat.tools)
        except ValueError as error:
            raise BadRow(chat.place, "template", str(error)) from error
        speakers = [i for i, m in enumerate(chat.messages) if m.role == "assistant"]
        marked = dict(zip(speakers, marks, strict=True)) if len(marks) == len(speakers) else {}
        turns, text = [], self._closed(text, fields, chat, wanted)
        for number in wanted:
            found = next(self._spelled(text, fields, chat, number, marked.get(number)), None)
            if found is None:
                words = chat.messages[number].text
                detail = f"the chat template hides where message {number + 1} ({words[:40]!r}) begins or ends"
                raise BadRow(chat.place, "turn not found", detail)
            turns.append(found)
        return Rendered(text, tuple(turns))

    def _whole(self, fields: Fields, tools: Sequence[Mapping[str, Any]]) -> tuple[str, list[tuple[int, int]]]:
        if self.template.has_marks(tools):
            return self.template.render_marked(fields, tools)
        return self.template.render(fields, tools), []

    def _closed(self, text: str, fields: Fields, chat: Chat, wanted: Sequence[int]) -> str:
        """The text, with the token that ends a turn where the template leaves the last one open."""
        if not wanted or wanted[-1] != len(chat.messages) - 1:
            return text
        around = self._around(text, fields, chat, wanted[-1])
        return text + self._stop if around is not None and not text[around[1] :].strip() else text

    def _spelled(
        self, text: str, fields: Fields, chat: Chat, number: int, marked: tuple[int, int] | None
    ) -> Iterator[Turn]:
        """Turns that spell the words of a message and the token that ends them."""
        message = chat.messages[number]
        for start, end in self._candidates(text, fields, chat, number, marked):
            closed = self._end_of(text, end)
            if closed is not None and start <= end and _says(text[start:end], message):
                yield Turn(number, start, closed)

    def _candidates(
        self, text: str, fields: Fields, chat: Chat, number: int, marked: tuple[int, int] | None
    ) -> Iterator[tuple[int, int]]:
        """Places [start, end) where the words may be, without the token that ends them."""
        if marked is not None:
            yield marked[0], self._without_end(text, *marked)
        around = self._around(text, fields, chat, number)
        begun = self._begun(text, fields, chat, number)
        ends = [around[1]] if around else []
        if begun is not None:
            yield from ((begun, end) for end in ends)
            whole = self._prefix(text, fields[: number + 1], chat, prompt=False)
            if whole is not None and whole > begun:
                yield begun, self._without_end(text, begun, whole)
        if around:
            yield around

    def _without_end(self, text: str, start: int, end: int) -> int:
        """Where the control tokens begin that [start, end) ends with: `end` where there are none."""
        places = [m.start() for m in self._end.finditer(text, start, end)]
        for place in places:
            rest = self._end.sub("", text[place:end])
            if not rest.strip():
                return place
        return end

    def _begun(self, text: str, fields: Fields, chat: Chat, number: int) -> int | None:
        """Where the assistant begins to speak: after the prompt that the model is given there."""
        if not number or chat.messages[number].role != "assistant":
            return None
        asked = self._prefix(text, fields[:number], chat, prompt=True)
        silent = self._prefix(text, fields[:number], chat, prompt=False)
        return None if asked == silent else asked  # a template without a prompt to speak

    def _prefix(self, text: str, fields: Fields, chat: Chat, *, prompt: bool) -> int | None:
        try:
            begun = self.template.render(fields, chat.tools, prompt=prompt)
        except ValueError:
            return None  # the template takes no chat that ends there
        return len(begun) if text.startswith(begun) else None

    def _around(self, text: str, fields: Fields, chat: Chat, number: int) -> tuple[int, int] | None:
        """The words are where a text differs from the same one with a stand-in for them."""
        stand_in = _STAND_IN
        while stand_in in text:
            stand_in += "q"
        other: dict[str, Any] = {k: v for k, v in fields[number].items() if k != "tool_calls"}
        parts = isinstance(other["content"], list)
        other["content"] = [{"type": "text", "text": stand_in}] if parts else stand_in
        try:
            changed = self.template.render([*fields[:number], other, *fields[number + 1 :]], chat.tools)
        except ValueError:
            return None
        before, found, after = changed.partition(stand_in)
        if not found or not text.endswith(after):
            return None
        start, end = len(commonprefix([before, text])), len(text) - len(after)
        if _TAGS.sub("", before[start:]):
            start = end + 1  # no place; the end is one
        return start, end


def _says(spelled: str, message: Message) -> bool:
    """Whether a text is what a message says, apart from white space and marks of thoughts.

    Before the words the model may have to write more by itself (a channel, an empty thought), but nothing after them,
    unless it calls tools there.
    """
    words = _TAGS.sub("", message.text)
    said = _TAGS.sub("", spelled)
    last = _TAGS.sub("", message.text.rpartition("</think>")[2])
    if message.extra.get("tool_calls"):
        return last in said and all(call["function"]["name"] in spelled for call in message.extra["tool_calls"])
    return said.endswith((words, last))
