"""Preference pairs (DPO, reward models), judged completions (KTO), texts with classes, and pairs for embeddings."""

from collections.abc import Sequence
from typing import Any

from ftrain.data.formats.fields import Fields, flag_of, is_list, list_of, number_of, object_of, text_of, words_of
from ftrain.data.formats.instructions import alpaca_prompt, said, swift_prompt, untrained
from ftrain.data.formats.messages import messages_of
from ftrain.data.formats.sharegpt import is_sharegpt, turn_of, turns_of
from ftrain.data.rejects import BadRow
from ftrain.data.sample import Classed, Judged, Message, Pair, Place, Preference, say


def read_preference(fields: Fields, place: Place) -> Preference:
    """{"prompt", "chosen", "rejected"}: texts or messages. BadRow where it is none, or both ends are the same."""
    prompt = said(fields, "prompt", "user", place)
    chosen, rejected = (said(fields, name, "assistant", place) for name in ("chosen", "rejected"))
    shared = len(prompt) if chosen[: len(prompt)] == prompt and rejected[: len(prompt)] == prompt else 0
    return _preference(prompt, chosen[shared:], rejected[shared:], place)


def read_implicit(fields: Fields, place: Place) -> Preference:
    """{"chosen", "rejected"}: two whole chats; what they begin with in common is the prompt. BadRow without one."""
    chosen, rejected = (said(fields, name, "assistant", place) for name in ("chosen", "rejected"))
    if len(chosen) == len(rejected) == 1:
        return _of_texts(chosen[0].text, rejected[0].text, place)
    shared = 0
    while shared < min(len(chosen), len(rejected)) and chosen[shared] == rejected[shared]:
        shared += 1
    while shared and chosen[shared - 1].role == "assistant":
        shared -= 1  # a prompt ends before what the assistant says
    return _preference(chosen[:shared], chosen[shared:], rejected[shared:], place)


_SPEAKERS = (("\n\nHuman:", "user"), ("\n\nAssistant:", "assistant"))


def _of_texts(chosen: str, rejected: str, place: Place) -> Preference:
    """Two texts of turns "Human:" and "Assistant:", as Anthropic's hh-rlhf has them."""
    ends = [text.rfind("\n\nAssistant:") for text in (chosen, rejected)]
    if -1 in ends or chosen[: ends[0]] != rejected[: ends[1]]:
        detail = "'chosen' and 'rejected' are texts that begin with no common prompt: give a field 'prompt'"
        raise BadRow(place, "no prompt", detail)
    mark = len("\n\nAssistant:")
    ends_of = [text[end + mark :].strip() for text, end in zip((chosen, rejected), ends, strict=True)]
    prompt = _spoken(chosen[: ends[0]])
    return _preference(prompt, (say("assistant", ends_of[0]),), (say("assistant", ends_of[1]),), place)


def _spoken(text: str) -> tuple[Message, ...]:
    turns: list[Message] = []
    places = sorted((at, mark, role) for mark, role in _SPEAKERS for at in _all_places(text, mark))
    for i, (at, mark, role) in enumerate(places):
        end = places[i + 1][0] if i + 1 < len(places) else len(text)
        turns.append(say(role, text[at + len(mark) : end].strip()))
    return tuple(turns)


def _all_places(text: str, mark: str) -> list[int]:
    found, at = [], text.find(mark)
    while at != -1:
        found.append(at)
        at = text.find(mark, at + 1)
    return found


def _preference(
    prompt: Sequence[Message], chosen: Sequence[Message], rejected: Sequence[Message], place: Place
) -> Preference:
    if not prompt:
        raise BadRow(place, "no prompt", "'chosen' and 'rejected' begin with no common message")
    if not chosen or not rejected:
        raise BadRow(place, "no answer", f"{'chosen' if not chosen else 'rejected'!r} has no message after the prompt")
    if tuple(chosen) == tuple(rejected):
        raise BadRow(place, "nothing to choose", "'chosen' and 'rejected' are the same")
    return Preference(untrained(prompt), tuple(chosen), tuple(rejected), place=place)


def read_alpaca_preference(fields: Fields, place: Place) -> Preference:
    """{"instruction", "input", "chosen", "rejected"}, LLaMA-Factory's. BadRow where it is none."""
    chosen, rejected = (said(fields, name, "assistant", place) for name in ("chosen", "rejected"))
    return _preference(alpaca_prompt(fields, place), chosen, rejected, place)


def read_sharegpt_preference(fields: Fields, place: Place) -> Preference:
    """{"conversations", "chosen": {"from", "value"}, "rejected"}, LLaMA-Factory's. BadRow where it is none."""
    prompt = turns_of(list_of(fields, "conversations", place), place)
    ends = [turn_of(object_of(fields.get(name), name, place), 1, place) for name in ("chosen", "rejected")]
    return _preference(prompt, ends[:1], ends[1:], place)


def read_swift_preference(fields: Fields, place: Place) -> Preference:
    """ms-swift's "rejected_response" beside "messages", or beside "query" and "response". BadRow where it is none."""
    rejected = say("assistant", words_of(fields, "rejected_response", place))
    if "messages" not in fields:
        chosen = say("assistant", words_of(fields, "response", place))
        return _preference(swift_prompt(fields, place), [chosen], [rejected], place)
    messages = messages_of(list_of(fields, "messages", place), place)
    if messages[-1].role != "assistant":
        raise BadRow(place, "no answer", "'messages' do not end with the assistant, whose words are the better ones")
    return _preference(messages[:-1], messages[-1:], [rejected], place)


def read_judged(fields: Fields, place: Place) -> Judged:
    """KTO's {"prompt", "completion", "label"}: texts or messages, and true or false. BadRow where it is none."""
    prompt, completion = said(fields, "prompt", "user", place), said(fields, "completion", "assistant", place)
    return Judged(untrained(prompt), completion, flag_of(fields, "label", place), place=place)


def read_judged_chat(fields: Fields, place: Place) -> Judged:
    """{"messages" or "conversations", "kto_tag" or "label"}: the last turn is what is judged.

    BadRow where it is none.
    """
    if is_sharegpt(fields):
        messages = turns_of(list_of(fields, "conversations", place), place)
    else:
        name = "messages" if "messages" in fields else "conversations"
        messages = messages_of(list_of(fields, name, place), place)
    if messages[-1].role != "assistant" or len(messages) < 2:
        raise BadRow(place, "no answer", "its messages do not end with the assistant's answer to something")
    good = flag_of(fields, "kto_tag" if "kto_tag" in fields else "label", place)
    return Judged(untrained(messages[:-1]), messages[-1:], good, place=place)


def read_classed(fields: Fields, place: Place) -> Classed:
    """{"text", "label"}: the label is a whole number. BadRow where it is none."""
    return Classed(words_of(fields, "text", place), number_of(fields, "label", place), place=place)


QUERIES = ("query", "anchor", "question")
POSITIVES = ("positive", "pos", "answer")
NEGATIVES = ("negative", "negatives", "neg", "hard_negatives")


def read_pair(fields: Fields, place: Place) -> Pair:
    """{"query" or "anchor", "positive", "negative" or "negatives"}; of several positives the first.

    BadRow where it is none.
    """
    query = next(name for name in QUERIES if name in fields)
    positive = next(name for name in POSITIVES if name in fields)
    found = _texts(fields, positive, place)
    if not found:
        raise BadRow(place, "null field", f"{positive!r} is empty")
    negatives = [text for name in NEGATIVES if fields.get(name) is not None for text in _texts(fields, name, place)]
    return Pair(words_of(fields, query, place), found[0], tuple(negatives), place=place)


def _texts(fields: Fields, name: str, place: Place) -> list[str]:
    value: Any = fields.get(name)
    if not is_list(fields, name) or isinstance(value, str):
        return [text_of(fields, name, place)]
    return [text_of({name: one}, name, place) for one in value]
