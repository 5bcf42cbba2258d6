"""Samples as their tokens, with what is trained on told apart: for the terminal (rich) and as an HTML page."""

import html
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from ftrain.data.encoding import ChatEncoder, Encoded
from ftrain.data.rejects import BadRow
from ftrain.data.sample import Captioned, Chat, Classed, Judged, Message, Pair, Preference, Prose, Sample, Tokens
from ftrain.data.samples import Samples
from ftrain.data.stats import texts_of

_MANY = re.compile(r"(<[^<>\s]{1,40}>)\1{3,}")


@dataclass(frozen=True)
class Run:
    """A piece of a sample's text, and whether it is trained on (None: nobody asked a tokenizer)."""

    text: str
    trained: bool | None


@dataclass(frozen=True)
class Shown:
    """A row to look at: a line about it, and its pieces; `error` is why it was rejected, else empty."""

    title: str
    runs: tuple[Run, ...] = ()
    error: str = ""


def show_rows(samples: Samples, rows: int, encoder: ChatEncoder | None = None) -> Iterator[Shown]:
    """The first rows, as tokens where there is an encoder. A broken row is shown with what is wrong.

    ValueError where the chat template cannot be used at all, or a file cannot be read.
    """
    for index in range(min(rows, len(samples))):
        try:
            yield from _shown(samples[index], encoder)
        except BadRow as error:
            yield Shown(f"{error.place} ({error.kind})", error=error.detail)


def _shown(sample: Sample, encoder: ChatEncoder | None) -> Iterator[Shown]:
    if encoder is None:
        yield Shown(f"{sample.place}: {type(sample).__name__}", (Run(plain_text(sample), None),))
        return
    names = ("chosen", "rejected") if isinstance(sample, Preference) else ("",)
    for number, text in enumerate(texts_of(sample)):
        encoded = encoder.encode(text)
        which = f" {names[number]}" if len(names) > 1 else ""
        counts = f"{int(encoded.trained[1:].sum())} of {len(encoded.ids)} tokens are trained on"
        yield Shown(
            f"{sample.place}: {type(sample).__name__}{which}, {counts}",
            tuple(_shortened(run) for run in runs_of(encoded, encoder.tokenizer)),
        )


def runs_of(encoded: Encoded, tokenizer: Any) -> Iterator[Run]:
    """Neighbouring tokens of the same kind, as text."""
    start = 0
    for end in range(1, len(encoded.ids) + 1):
        if end == len(encoded.ids) or encoded.trained[end] != encoded.trained[start]:
            ids = [int(token) for token in encoded.ids[start:end]]
            text = tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)
            yield Run(text, bool(encoded.trained[start]))
            start = end


def _shortened(run: Run) -> Run:
    """With one of many equal control tokens that follow each other, as the places of a picture do, and their number."""
    text = _MANY.sub(lambda found: f"{found[1]}*{len(found[0]) // len(found[1])}", run.text)
    return Run(text, run.trained)


def plain_text(sample: Sample) -> str:
    """A sample as text, without a tokenizer."""
    match sample:
        case Prose(text) | Classed(text):
            return text if isinstance(sample, Prose) else f"{text}\n-> class {sample.label}"
        case Chat(messages):
            return _turns(messages)
        case Preference(prompt, chosen, rejected):
            return f"{_turns(prompt)}\n-> chosen\n{_turns(chosen)}\n-> rejected\n{_turns(rejected)}"
        case Judged(prompt, completion, good):
            return f"{_turns(prompt)}\n-> {'good' if good else 'bad'}\n{_turns(completion)}"
        case Tokens(ids):
            return " ".join(str(int(token)) for token in ids)
        case Captioned(media, text):
            return f"<{media.kind}> {text}"
        case Pair(query, positive, negatives):
            return "\n".join([query, f"+ {positive}", *(f"- {text}" for text in negatives)])


def _turns(messages: Sequence[Message]) -> str:
    return "\n".join(f"{m.role}: " + "".join(p.text or f"<{p.kind}>" for p in m.parts) for m in messages)


_STYLE = (
    "body{font:15px/1.5 system-ui,sans-serif;margin:2em auto;max-width:60em;color:#222;background:#fff}"
    "h2{font-size:1em;margin:2em 0 .4em}pre{white-space:pre-wrap;overflow-wrap:anywhere;font:13px/1.5 ui-monospace,"
    "monospace;background:#f6f6f4;padding:1em;border-radius:6px;color:#666}"
    "mark{background:#cdeccf;color:#111}.error{color:#a40000}"
)


def as_html(rows: Sequence[Shown], *, title: str) -> str:
    """A page of the rows; what is trained on is marked green."""
    body = "\n".join(
        f"<h2>{html.escape(row.title)}</h2>"
        + (
            f'<p class="error">{html.escape(row.error)}</p>'
            if row.error
            else f"<pre>{''.join(map(_marked, row.runs))}</pre>"
        )
        for row in rows
    )
    name = html.escape(title)
    return (
        f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><title>{name}</title>'
        f"<style>{_STYLE}</style></head>\n"
        f"<body><h1>{name}</h1>\n<p>What is <mark>marked</mark> is trained on.</p>\n{body}\n</body></html>\n"
    )


def _marked(run: Run) -> str:
    text = html.escape(run.text)
    return f"<mark>{text}</mark>" if run.trained else text
