"""Samples as token ids with a mask of what is trained on, checked against the words that they come from.

n tokens of a sample.
"""

import difflib
import unicodedata
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import numpy as np

from ftrain.data.chat_template import ChatTemplate, as_fields
from ftrain.data.documents import IGNORE, Document, shifted
from ftrain.data.media.family import MediaFamily, Seen
from ftrain.data.media.marks import with_media
from ftrain.data.rejects import BadRow
from ftrain.data.sample import Captioned, Chat, Message, Part, Place, Prose, Speech, Tokens, say
from ftrain.data.speech import Speaking
from ftrain.data.turns import Rendered, Turn, TurnFinder

Train = Literal["assistant", "last", "everything"]
Truncate = Literal["refuse", "left", "right"]


@dataclass(frozen=True, eq=False)
class Encoded:
    """`ids` int64 `[n]` and `trained` bool `[n]`: which ids are labels of the token before them. `parts`: media that
    some of the ids stand for, in their order, with their row; `media`: arrays that are read already, of speech.
    """

    ids: np.ndarray
    trained: np.ndarray
    parts: tuple[tuple[Part, Place], ...] = ()
    media: Mapping[str, np.ndarray] = field(default_factory=dict)

    def document(self, leaves: Mapping[str, np.ndarray] | None = None) -> Document:
        """A document of them, with shifted labels and further leaves `[n, ...]`. ValueError for other lengths."""
        labels = shifted(np.where(self.trained, self.ids, IGNORE))
        return Document(self.ids, labels, dict(leaves or {}), self.parts, self.media)


@dataclass(frozen=True)
class Length:
    """How long a sample may be, in tokens, and what happens to a longer one: refused, or cut on the left or right.

    ValueError for other words, or no positive number.
    """

    tokens: int | None = None
    truncate: Truncate = "refuse"

    def __post_init__(self) -> None:
        if self.truncate not in ("refuse", "left", "right"):
            raise ValueError(f"truncate={self.truncate!r} is not 'refuse', 'left' or 'right'")
        if self.tokens is not None and self.tokens < 1:
            raise ValueError(f"a length of {self.tokens} tokens: give at least 1")

    def fit(self, encoded: Encoded, place: Place) -> Encoded:
        """What may stay. BadRow for a sample that is too long and is refused; those with media are never cut."""
        if self.tokens is None or len(encoded.ids) <= self.tokens:
            return encoded
        if self.truncate == "refuse" or encoded.parts or encoded.media:
            media = f", with its {len(encoded.parts)} pictures, recordings or films" if encoded.parts else ""
            media += ", with its speech" if encoded.media else ""
            raise BadRow(place, "too long", f"{len(encoded.ids)} tokens{media}, and at most {self.tokens} are taken")
        kept = slice(-self.tokens, None) if self.truncate == "left" else slice(self.tokens)
        return Encoded(encoded.ids[kept], encoded.trained[kept])


class ChatEncoder:
    """Makes token ids and masks of samples.

    Args:
        tokenizer: of transformers, a fast one (`load_tokenizer`).
        train: which words are trained on: those of each turn of the assistant, of its last one, or everything. What a
            message says of itself (`Message.train`) goes before that.
        length: how long samples may be.
        template: a chat template in place of the tokenizer's.
        options: what the template takes besides messages, such as {"enable_thinking": False}.
        media: how the model sees media (`ftrain.data.media.families.family_of`); None: it does not, and chats with
            media are rejected.
        speaking: how a talker takes the speech of turns; None: chats with speech are rejected.

    ValueError where `train` is none of these, or the tokenizer is a slow one. A template that cannot be used is a
    ValueError when the first chat is encoded.
    """

    def __init__(
        self,
        tokenizer: Any,
        *,
        train: Train = "assistant",
        length: Length | None = None,
        template: str | None = None,
        options: Mapping[str, Any] | None = None,
        media: MediaFamily | None = None,
        speaking: Speaking | None = None,
    ) -> None:
        if train not in ("assistant", "last", "everything"):
            raise ValueError(f"train={train!r} is not 'assistant', 'last' or 'everything'")
        if not tokenizer.is_fast:
            raise ValueError("a slow tokenizer tells no places of tokens: give a fast one (tokenizer.json)")
        self.tokenizer, self.train, self.length = tokenizer, train, length or Length()
        self._template, self._options = template, options
        self.media, self.speaking = media, speaking
        self._control = _control_tokens(tokenizer)
        self._finder: TurnFinder | None = None

    @property
    def turns(self) -> TurnFinder:
        """What finds turns in chats. ValueError where the template cannot be used."""
        if self._finder is None:
            template = ChatTemplate(self.tokenizer, template=self._template, options=self._options)
            opening = [token for token in (self.tokenizer.bos_token,) if token != self.tokenizer.eos_token]
            self._finder = TurnFinder(template, control=self._control, opening=[t for t in opening if t])
        return self._finder

    def encode(self, sample: Chat | Prose | Tokens | Captioned) -> Encoded:
        """The ids and the mask of a sample; media with a caption are the question and its answer.

        BadRow where it is too long, has nothing to train on, the template refuses it, a text of it spells a control
        token, its tokens do not spell its words, or its media cannot be read. ValueError where the template cannot be
        used at all.
        """
        if isinstance(sample, Captioned):
            sample = Chat((Message("user", (sample.media,)), say("assistant", sample.text)), place=sample.place)
        if isinstance(sample, Chat):
            encoded = self._chat(sample)
        else:
            encoded = self._prose(sample) if isinstance(sample, Prose) else _tokens(sample)
        said = self._said(sample) if isinstance(sample, Chat) else []
        spoken = any(said)
        if spoken:
            encoded = self._spoken(encoded, said, sample.place)
        fitted = self.length.fit(encoded, sample.place)
        if self.speaking is not None and not spoken:
            fitted = replace(fitted, media=self.speaking.leaves(fitted.ids, None, sample.place))
        if not fitted.trained[1:].any():
            cut = " after it was cut" if len(fitted.ids) < len(encoded.ids) else ""
            detail = f"none of its {len(fitted.ids)} tokens is trained on{cut}{_without_assistant(sample)}"
            raise BadRow(sample.place, "nothing to train on", detail)
        return fitted

    def ask(self, sample: Chat) -> Encoded:
        """The ids of a chat up to where the assistant begins to speak, none of which is trained on. BadRow and
        ValueError as `encode`.
        """
        seen = self._seen(sample)
        rendered = _asked(self.turns, sample)
        if self.media is not None:
            rendered = with_media(rendered, self.media.marks, seen, sample.place)
        ids = np.asarray(self.tokenizer(rendered.text, add_special_tokens=False, verbose=False)["input_ids"], np.int64)
        return Encoded(ids, np.zeros(len(ids), bool), tuple((part, sample.place) for part, _ in seen))

    def _prose(self, sample: Prose) -> Encoded:
        """A text, with the tokens that the tokenizer puts around texts, and the one that ends them."""
        self._check_words(sample.text, sample.place)
        ids = self.tokenizer(sample.text, add_special_tokens=True, verbose=False)["input_ids"]
        end = self.tokenizer.eos_token_id
        if end is not None and (not ids or ids[-1] != end):
            ids = [*ids, end]
        array = np.asarray(ids, np.int64)
        return Encoded(array, np.ones(len(array), bool))

    def _chat(self, sample: Chat) -> Encoded:
        for message in sample.messages:
            self._check_words(message.text, sample.place)
        seen = self._seen(sample)
        rendered = self.turns.find(sample)
        if self.media is not None:
            rendered = with_media(rendered, self.media.marks, seen, sample.place)
        trained = [turn for turn in rendered.turns if self._is_trained(turn, sample)]
        if self.train == "last":
            trained = trained[-1:]
        encoded = self._whole(rendered, trained) or self._in_pieces(rendered, trained)
        if encoded is None:
            detail = (
                "the tokens of the assistant's turns do not spell their words: the tokenizer joins them with others"
            )
            raise BadRow(sample.place, "mask", detail)
        learned = np.ones(len(encoded.ids), bool) if self.train == "everything" else encoded.trained
        if self.media is None or not seen:
            return Encoded(encoded.ids, learned)
        learned &= ~np.isin(encoded.ids, list(self.media.unlearnt))
        return Encoded(encoded.ids, learned, tuple((part, sample.place) for part, _ in seen))

    def _said(self, sample: Chat) -> list[Speech | None]:
        """The speech of each turn of the assistant that is trained on. BadRow for speech that no talker learns."""
        if self.speaking is None and any(message.speech for message in sample.messages):
            detail = "it has speech, which a talker learns: `ftrain train sft --speech` of a whole Qwen omni model"
            raise BadRow(sample.place, "speech", detail)
        own = [message for message in sample.messages if message.role == "assistant"]
        learned = [number for number, message in enumerate(own) if message.train is not False]
        kept = learned[-1:] if self.train == "last" else learned
        return [message.speech if number in kept else None for number, message in enumerate(own)]

    def _spoken(self, encoded: Encoded, said: Sequence[Speech | None], place: Place) -> Encoded:
        """With the arrays of its speech, and tokens behind it that stand for nothing where its talker needs more."""
        assert self.speaking is not None
        leaves = self.speaking.leaves(encoded.ids, said, place)
        more = max(0, self.speaking.room(encoded.ids, leaves, place) - len(encoded.ids))
        ids, trained = np.pad(encoded.ids, (0, more)), np.pad(encoded.trained, (0, more))
        return Encoded(ids, trained, encoded.parts, leaves)

    def _seen(self, sample: Chat) -> list[tuple[Part, Seen]]:
        """The media of a chat, in reading order, and what the model will see of each."""
        parts = [part for message in sample.messages for part in message.media]
        for part in parts:
            marks = {} if self.media is None else self.media.marks
            if part.kind not in marks:
                if self.media is not None and not marks:
                    self.media.measure(part, sample.place)  # says why
                reads = ", ".join(("text", *marks))
                raise BadRow(
                    sample.place, "media", f"it has media (of the kind {part.kind}), and the model reads {reads} alone"
                )
        return [(part, self.media.measure(part, sample.place)) for part in parts] if self.media is not None else []

    def _is_trained(self, turn: Turn, sample: Chat) -> bool:
        said = sample.messages[turn.message].train
        return sample.messages[turn.message].role == "assistant" if said is None else said

    def _check_words(self, text: str, place: Place) -> None:
        """A control token within words would be one for the model too: a turn that seems to end in its middle."""
        found = next((token for token in self._control if token in text), None)
        if found is not None:
            raise BadRow(place, "control token in a text", f"a text contains {found!r}, which is a control token")

    def _whole(self, rendered: Rendered, trained: Sequence[Turn]) -> Encoded | None:
        """The text in tokens, at once; None where a token lies across the edge of what is trained on."""
        found = self.tokenizer(rendered.text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
        ids = np.asarray(found["input_ids"], np.int64)
        spans = np.asarray(found["offset_mapping"], np.int64).reshape(-1, 2)
        mask = np.zeros(len(ids), bool)
        for turn in trained:
            inside = (spans[:, 0] >= turn.start) & (spans[:, 1] <= turn.end) & (spans[:, 1] > spans[:, 0])
            if not self._spells(ids[inside], rendered.text[turn.start : turn.end]):
                return None
            mask |= inside
        return Encoded(ids, mask)

    def _in_pieces(self, rendered: Rendered, trained: Sequence[Turn]) -> Encoded | None:
        """The text in tokens, cut around what is trained on: as the model sees it when it answers a prompt."""
        ids: list[int] = []
        mask: list[bool] = []
        at = 0
        for turn in trained:
            for start, end, learned in ((at, turn.start, False), (turn.start, turn.end, True)):
                piece = self.tokenizer(rendered.text[start:end], add_special_tokens=False, verbose=False)["input_ids"]
                if learned and not self._spells(piece, rendered.text[start:end]):
                    return None
                ids += piece
                mask += [learned] * len(piece)
            at = turn.end
        rest = self.tokenizer(rendered.text[at:], add_special_tokens=False, verbose=False)["input_ids"]
        return Encoded(np.asarray([*ids, *rest], np.int64), np.asarray([*mask, *[False] * len(rest)], bool))

    def _spells(self, ids: Sequence[int] | np.ndarray, text: str) -> bool:
        """Whether tokens spell a text: as it is, or as the tokenizer normalises it."""
        spelled = self.tokenizer.decode(
            list(map(int, ids)), skip_special_tokens=False, clean_up_tokenization_spaces=False
        )
        if spelled == text or spelled.lstrip(" ") == text.lstrip(" "):
            return True
        return unicodedata.normalize("NFKC", spelled).strip() == unicodedata.normalize("NFKC", text).strip()


def _asked(turns: TurnFinder, chat: Chat) -> Rendered:
    """The text of a chat up to where the assistant begins to speak. BadRow where the template refuses it."""
    try:
        text = turns.template.render(as_fields(chat.messages, parts=turns.parts), chat.tools, prompt=True)
    except ValueError as error:
        raise BadRow(chat.place, "template", str(error)) from error
    return Rendered(text, ())


def _control_tokens(tokenizer: Any) -> tuple[str, ...]:
    added = [token.content for token in tokenizer.added_tokens_decoder.values() if token.special]
    return tuple(dict.fromkeys([*added, *tokenizer.all_special_tokens]))


def _without_assistant(sample: Prose | Chat | Tokens) -> str:
    """Says which roles a chat has, where none is the assistant's, whose turns have labels."""
    roles = list(dict.fromkeys(m.role for m in sample.messages)) if isinstance(sample, Chat) else []
    if not roles or "assistant" in roles:
        return ""
    near = difflib.get_close_matches("assistant", roles, 1)
    meant = f" (did you mean 'assistant' by {near[0]!r}?)" if near else ""
    return f": no turn is the assistant's, its roles are {', '.join(map(repr, roles))}{meant}"


def _tokens(sample: Tokens) -> Encoded:
    """Ids that were made beforehand. BadRow where a label is another id than the one at its place."""
    ids = np.asarray(sample.ids, np.int64)
    if sample.labels is None:
        return Encoded(ids, np.ones(len(ids), bool))
    labels = np.asarray(sample.labels, np.int64)
    trained = labels != IGNORE
    wrong = np.flatnonzero(trained & (labels != ids))
    if len(wrong):
        at = int(wrong[0])
        detail = f"label {labels[at]} at place {at}, where the id is {ids[at]}: labels must not be shifted"
        raise BadRow(sample.place, "labels differ from ids", detail)
    return Encoded(ids, trained)
