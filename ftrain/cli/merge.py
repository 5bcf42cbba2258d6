"""`ftrain merge --model DIR --adapter DIR --to DIR`: one folder of a model and its adapter."""

from dataclasses import dataclass
from pathlib import Path

from ftrain.cli.opened import Native, open_with_adapter, require_new
from ftrain.data.chat_template import load_tokenizer
from ftrain.run.media import copy_processor


@dataclass(frozen=True)
class MergeOptions:
    """Add an adapter's deltas to the weights of its model, and write them as a folder that transformers loads."""

    model: Path
    """The model's folder."""
    adapter: Path
    """The adapter's, as PEFT or this library wrote it."""
    to: Path
    """The new folder."""
    native: Native = "auto"
    """auto: a family of the library where it has the model's."""


def run(options: MergeOptions) -> int:
    """The command. ValueError for folders that do not fit each other, and for a new folder that holds something."""
    require_new(options.to)
    tokenizer = load_tokenizer(options.model)
    opened = open_with_adapter(options.model, options.adapter, native=options.native)
    if opened.model.save is None:
        raise ValueError(f"{opened.model.name} is written to no folder")
    opened.model.save(opened.params, options.to)
    tokenizer.save_pretrained(options.to)
    copy_processor(options.model, options.to)
    print(f"wrote {options.to}")
    return 0


COMMANDS = {"merge": (MergeOptions, run)}
