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
from dataclasses import dataclass, replace
from typing import Any

from ftrain.data.chat_template import ChatTemplate, as_fields
from ftrain.data.rejects import BadRow
from ftrain.data.sample import Chat, Message, say

_STAND_IN, _QUESTION = "zqStandInForWordsqz", "2 + 2?"
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


@dataclass(frozen=True)
class _Written:
    """A chat, its messages for the template, its text, and what was put after the template's text."""

    chat: Chat
    fields: Fields
    text: str
    tail: str = ""


@dataclass(frozen=True)
class _Learned:
    """How a template writes chats.

    Args:
        parts: contents must be lists of parts.
        stop: what ends the assistant's words, one control token or several: what follows them both at the end of a chat
            and within it, or else the first that follows them within.
        openers: control tokens between a question and its answer that end no answer: they begin turns.
    """

    parts: bool
    stop: str
    openers: frozenset[str]


def _any_of(control: Sequence[str]) -> re.Pattern[str]:
    """White space and one of these tokens, the longest that is there."""
    return re.compile(r"\s*(" + "|".join(map(re.escape, sorted(control, key=len, reverse=True))) + ")")


class TurnFinder:
    """Finds turns in chats of one template. `parts`: whether contents must be lists of parts for it.

    Args:
        template: how chats are written.
        control: the texts of control tokens, such as <|im_end|>, one of which ends each turn.
        opening: control tokens that begin a text and end none.

    ValueError where the template writes no such token between what the assistant says and the next turn.
    """

    def __init__(self, template: ChatTemplate, *, control: Sequence[str], opening: Sequence[str] = ()) -> None:
        self.template = template
        control = [token for token in control if token not in opening]
        if not control:
            raise ValueError("the tokenizer has no control tokens, so nothing can end a turn of the assistant")
        self._end = _any_of(control)
        learned = self._learn()
        self.parts, self._stop = learned.parts, learned.stop
        ends = [token for token in control if token not in learned.openers]
        self._end = _any_of(ends)
        self._last = re.compile("(?:" + "|".join(map(re.escape, ends)) + r")\s*\Z")
        asked = as_fields([say("user", _QUESTION)], parts=self.parts)
        self._prompts = template.render(asked) != template.render(asked, prompt=True)

    def _learn(self) -> _Learned:
        """What a chat of two questions shows of the template: with texts as contents, or else with lists of parts."""
        wrong = ""
        for parts in (False, True):
            try:
                return self._look(parts)
            except ValueError as error:
                wrong = wrong or str(error)
        raise ValueError(f"{wrong}: give another template")

    def _look(self, parts: bool) -> _Learned:
        fields = as_fields([say("user", _QUESTION), say("assistant", _STAND_IN), say("user", "3 + 3?")], parts=parts)
        before, found, within = self.template.render(fields).partition(_STAND_IN)
        if not found:
            raise ValueError("the chat template does not write what the assistant says as it is")
        last = self.template.render(fields[:2]).partition(_STAND_IN)[2]
        opening, _, between = before.rpartition(_QUESTION)
        openers = set(self._tokens(between))
        first, closing = self._end.match(within), self._end.match(last)
        begins_turns = first is not None and first.group(1) in openers and first.group(1) in opening
        if first is None or (closing is None and begins_turns):
            raise ValueError(
                f"after what the assistant says the chat template writes no control token but {within[:40]!r}, so that "
                "the model does not learn to stop"
            )
        stop = self._common(within.lstrip(), last.lstrip()) or first.group(1)
        ends = {first.group(1), *self._tokens(stop), *([closing.group(1)] if closing else [])}
        return _Learned(parts, stop, frozenset(openers - ends))

    def _tokens(self, text: str) -> list[str]:
        """The control tokens in a text."""
        return [found.group(1) for found in self._end.finditer(text)]

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
        if not chat.messages:
            raise BadRow(chat.place, "no messages", "a chat of no messages")
        fields = as_fields(chat.messages, parts=self.parts)
        try:
            text, marks = self._whole(fields, chat.tools)
        except ValueError as error:
            raise BadRow(chat.place, "template", str(error)) from error
        speakers = [i for i, m in enumerate(chat.messages) if m.role == "assistant"]
        marked = dict(zip(speakers, marks, strict=True)) if len(marks) == len(speakers) else {}
        wanted = [i for i, m in enumerate(chat.messages) if m.role == "assistant" or m.train]
        written = self._closed(_Written(chat, fields, text))
        turns = []
        for number in wanted:
            found = next(self._spelled(written, number, marked.get(number)), None)
            if found is None:
                words = chat.messages[number].text
                detail = f"the chat template hides where message {number + 1} ({words[:40]!r}) begins or ends"
                raise BadRow(chat.place, "turn not found", detail)
            turns.append(found)
        return Rendered(written.text, tuple(turns))

    def _whole(self, fields: Fields, tools: Sequence[Mapping[str, Any]]) -> tuple[str, list[tuple[int, int]]]:
        if self.template.has_marks(tools):
            return self.template.render_marked(fields, tools)
        return self.template.render(fields, tools), []

    def _closed(self, written: _Written) -> _Written:
        """With the token that ends a turn, where the template leaves the last one open."""
        if self._last.search(written.text):
            return written
        around = self._around(written, len(written.fields) - 1)
        still_open = around is not None and not written.text[around[1] :].strip()
        return replace(written, text=written.text + self._stop, tail=self._stop) if still_open else written

    def _spelled(self, written: _Written, number: int, marked: tuple[int, int] | None) -> Iterator[Turn]:
        """Turns that spell the words of a message and the token that ends them."""
        for start, end in self._candidates(written, number, marked):
            closed = self._end_of(written.text, end)
            if closed is not None and start <= end and _says(written.text[start:end], written.chat.messages[number]):
                yield Turn(number, start, closed)

    def _candidates(self, written: _Written, number: int, marked: tuple[int, int] | None) -> Iterator[tuple[int, int]]:
        """Places [start, end) where the words may be, without the token that ends them."""
        if marked is not None:
            yield marked[0], self._without_end(written.text, *marked)
        begun = self._begun(written, number)
        if begun is not None:
            whole = self._prefix(written, number + 1, prompt=False)
            if whole is not None and whole > begun:
                yield begun, self._without_end(written.text, begun, whole)
        around = self._around(written, number)
        if around is not None:
            if begun is not None:
                yield begun, around[1]
            yield around

    def _without_end(self, text: str, start: int, end: int) -> int:
        """Where the control tokens begin that [start, end) ends with: `end` where there are none."""
        for place in (m.start() for m in self._end.finditer(text, start, end)):
            if not self._end.sub("", text[place:end]).strip():
                return place
        return end

    def _begun(self, written: _Written, number: int) -> int | None:
        """Where the assistant begins to speak: after the prompt that the model is given there."""
        if not number or written.chat.messages[number].role != "assistant":
            return None
        return self._prefix(written, number, prompt=True) if self._prompts else None

    def _prefix(self, written: _Written, messages: int, *, prompt: bool) -> int | None:
        """The length of the first messages as text, if the text of all begins so."""
        if messages == len(written.fields) and not prompt:
            return len(written.text)
        try:
            begun = self.template.render(written.fields[:messages], written.chat.tools, prompt=prompt)
        except ValueError:
            return None  # the template takes no chat that ends there
        return len(begun) if written.text.startswith(begun) else None

    def _around(self, written: _Written, number: int) -> tuple[int, int] | None:
        """The words are where a text differs from the same one with a stand-in for them."""
        stand_in, text = _STAND_IN, written.text
        while stand_in in text:
            stand_in += "q"
        fields: dict[str, Any] = {k: v for k, v in written.fields[number].items() if k != "tool_calls"}
        fields["content"] = [{"type": "text", "text": stand_in}] if isinstance(fields["content"], list) else stand_in
        changed = [*written.fields[:number], fields, *written.fields[number + 1 :]]
        try:
            before, found, after = self.template.render(changed, written.chat.tools).partition(stand_in)
        except ValueError:
            return None
        if not found or not text.endswith(after + written.tail):
            return None
        start, end = _shared(before, text), len(text) - len(after + written.tail)
        return (start, end) if not _TAGS.sub("", before[start:]) else (end + 1, end)  # without a beginning


def _shared(one: str, other: str) -> int:
    """How many characters two texts begin with in common."""
    if other.startswith(one):
        return len(one)
    return next((i for i, (a, b) in enumerate(zip(one, other, strict=False)) if a != b), min(len(one), len(other)))


def _says(spelled: str, message: Message) -> bool:
    """Whether a text is what a message says, apart from white space and marks of thoughts.

    Before the words the model may have to write more by itself (a channel, an empty thought), but nothing after them,
    unless it calls tools there.
    """
    calls = message.extra.get("tool_calls")
    if not calls and spelled.strip().endswith(message.text.strip()):
        return True
    words, said = _TAGS.sub("", message.text), _TAGS.sub("", spelled)
    last = _TAGS.sub("", message.text.rpartition("</think>")[2])
    if calls:
        return last in said and all(call["function"]["name"] in spelled for call in calls)
    return said.endswith((words, last))
