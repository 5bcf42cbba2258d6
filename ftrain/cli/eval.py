"""`ftrain eval --model DIR --data FILE`: the mean loss of a model, and of a model with an adapter, on data files."""

import math
from dataclasses import dataclass
from pathlib import Path

import torch
from rich.console import Console

from ftrain.cli.opened import Native, open_with_adapter
from ftrain.data.chat_template import load_tokenizer
from ftrain.data.encoding import ChatEncoder, Length, Train
from ftrain.data.media.families import family_of
from ftrain.data.media_finishing import ReadMedia
from ftrain.kernels.mean import Mean
from ftrain.plan.jit import jit
from ftrain.run.data import DataOptions, make_data
from ftrain.run.media import layout_of
from ftrain.tasks.rows import TextRows


@dataclass(frozen=True)
class EvalOptions:
    """The mean cross entropy of the tokens that a model would be trained on, over all rows; nothing is dropped."""

    model: Path
    """A folder in Hugging Face's format."""
    data: tuple[str, ...]
    """Files, folders, globs or URLs."""
    adapter: Path | None = None
    """The folder of an adapter for the model."""
    format: str | None = None
    """The format of the rows; default: it is found in the first rows."""
    train_on: Train = "assistant"
    """Of a chat: the turns of the assistant, its last one, or everything."""
    tokens: int = 1024
    """Tokens of a pack; longer rows are left out, and counted."""
    image_pixels: int | None = None
    """The most pixels of a picture; default: what the model's folder says."""
    native: Native = "auto"
    """auto: a family of the library where it has the model's."""


def run(options: EvalOptions) -> int:
    """The command. ValueError for folders and files that cannot be read or do not fit each other."""
    tokenizer = load_tokenizer(options.model)
    family = family_of(options.model, tokenizer, image_pixels=options.image_pixels)
    encoder = ChatEncoder(tokenizer, train=options.train_on, length=Length(options.tokens), media=family)
    wanted = DataOptions(options.data, options.format, held_out=0.0, tokens=options.tokens, packs=1, rejected=1.0)
    opened = open_with_adapter(options.model, options.adapter, native=options.native)
    data = make_data(
        wanted, TextRows(encoder), ranks=1, seed=0, layout=layout_of(opened.model, family),
        finish=None if family is None else ReadMedia(family),
    )  # fmt: skip
    console = Console(highlight=False, width=10_000)
    console.print("\n".join(data.lines))
    loss = jit(opened.model.loss)
    found: list[Mean] = []
    documents = rejected = unread = 0
    for step in data.loader:
        with torch.no_grad():
            found.append(loss(opened.params, step.batch))
        documents, rejected = documents + step.facts.documents, step.facts.rejected
        unread += step.unread
    mean = Mean.pool(found)
    console.print(
        f"loss {mean.item():.4f} (perplexity {math.exp(min(mean.item(), 50)):.2f}) over {int(mean.count):,} tokens of "
        f"{documents - unread:,} documents; {rejected + unread:,} rows were left out"
    )
    return 0


COMMANDS = {"eval": (EvalOptions, run)}
