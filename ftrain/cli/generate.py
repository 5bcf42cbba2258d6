"""`ftrain generate --model DIR --prompt "..."`: what a model answers."""

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ftrain.cli.opened import Native, open_with_adapter
from ftrain.data.chat_template import load_tokenizer
from ftrain.data.documents import Document, Group
from ftrain.data.encoding import ChatEncoder
from ftrain.data.media.families import family_of
from ftrain.data.media_finishing import ReadMedia
from ftrain.data.sample import Chat, Kind, Message, Part, Place, say
from ftrain.kernels import random
from ftrain.modules.autoregression import generate
from ftrain.run.media import layout_of
from ftrain.run.media_answers import family_of_documents


@dataclass(frozen=True)
class GenerateOptions:
    """Answer prompts, one after the other: those given, or the lines of standard input."""

    model: Path
    """The folder of a causal language model."""
    adapter: Path | None = None
    """The folder of an adapter for it."""
    prompt: tuple[str, ...] = ()
    """What is asked; default: each line of standard input."""
    system: str | None = None
    """What a chat begins with."""
    plain: bool = False
    """Continue the prompts as texts; default: a prompt is the user's turn of a chat, where the model has a template."""
    max_new: int = 128
    """The most tokens of an answer."""
    temperature: float = 0.0
    """0: always the likeliest token."""
    top_k: int | None = None
    """Draw from so many of the likeliest tokens."""
    top_p: float | None = None
    """Draw from the likeliest tokens that have this probability together."""
    seed: int = 0
    """Of what is drawn."""
    image: tuple[Path, ...] = ()
    """Pictures that stand before the text of each prompt."""
    video: tuple[Path, ...] = ()
    """Films that stand behind the pictures, before the text of each prompt."""
    audio: tuple[Path, ...] = ()
    """Recordings that stand behind pictures and films, before the text of each prompt."""
    image_pixels: int | None = None
    """The most pixels of a picture; default: what the model's folder says."""
    native: Native = "auto"
    """auto: a family of the library where it has the model's."""


def run(options: GenerateOptions) -> int:
    """The command. ValueError for a folder that is no causal language model, or prompts that it cannot take."""
    tokenizer = load_tokenizer(options.model)
    prompts = list(options.prompt) or [line.rstrip("\n") for line in sys.stdin if line.strip()]
    if not prompts:
        raise ValueError('nothing is asked: give --prompt "..." or lines on standard input')
    media = family_of(options.model, tokenizer, image_pixels=options.image_pixels)
    for option, paths in _files(options).items():
        if paths and (options.plain or media is None or option not in media.marks):
            why = (
                "a plain text has none" if options.plain else f"how the model of {options.model} reads them is unknown"
            )
            raise ValueError(f"--{option}: {why}; ask without")
    opened = open_with_adapter(options.model, options.adapter, native=options.native)
    family = family_of_documents(opened.model, layout_of(opened.model, media))
    asked: list[Any]
    if family is not None and not options.plain:
        asked = [_seen(ChatEncoder(tokenizer, media=media), prompt, options) for prompt in prompts]
    else:
        family = opened.model.family
        asked = [prompt_ids(tokenizer, prompt, system=options.system, plain=options.plain) for prompt in prompts]
    if family is None or (any(_files(options).values()) and not isinstance(asked[0], Document)):
        what = "generate" if family is None else "generate from media"
        raise ValueError(f"{options.model}: {opened.model.name} does not {what}")
    made = generate(
        opened.params,
        asked,
        family=family,
        max_new=options.max_new,
        stop=stop_ids(options.model, tokenizer),
        key=random.key(options.seed) if options.temperature else None,
        temperature=options.temperature,
        top_k=options.top_k,
        top_p=options.top_p,
    )
    for prompt, ids in zip(prompts, made, strict=True):
        print(f"> {prompt}\n{tokenizer.decode(ids, skip_special_tokens=True).strip()}\n", flush=True)
    return 0


def _files(options: GenerateOptions) -> dict[Kind, tuple[Path, ...]]:
    """The files of each kind of media, in the order in which they stand before a prompt."""
    return {"image": options.image, "video": options.video, "audio": options.audio}


def _seen(encoder: ChatEncoder, prompt: str, options: GenerateOptions) -> Document:
    """A chat up to where the assistant begins to speak, with its media. ValueError for one that cannot be read."""
    files = _files(options).items()
    media = [Part(kind, source=str(path.absolute())) for kind, paths in files for path in paths]
    turns = [say("system", options.system)] if options.system else []
    chat = Chat((*turns, Message("user", (*media, Part("text", prompt)))), place=Place("--prompt", 1))
    group = Group((encoder.ask(chat).document(),))
    return (group if encoder.media is None else ReadMedia(encoder.media)(group)).documents[0]


def prompt_ids(tokenizer: Any, prompt: str, *, system: str | None = None, plain: bool = False) -> list[int]:
    """The tokens of a prompt: a text where it is `plain` or there is no chat template, else a chat up to where the
    assistant begins to speak.
    """
    if plain or not tokenizer.chat_template:
        found: list[int] = tokenizer(prompt)["input_ids"]
        return found
    chat = [{"role": "system", "content": system}] if system else []
    chat.append({"role": "user", "content": prompt})
    text = tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
    chat_ids: list[int] = tokenizer(text, add_special_tokens=False)["input_ids"]
    return chat_ids


def stop_ids(folder: Path, tokenizer: Any) -> list[int]:
    """The ids that end an answer: those of the folder's generation_config.json, and the tokenizer's."""
    from transformers import GenerationConfig

    found = {tokenizer.eos_token_id}
    if (folder / "generation_config.json").is_file():
        told = GenerationConfig.from_pretrained(str(folder)).eos_token_id
        found |= set(told if isinstance(told, list) else [told])
    return sorted(int(i) for i in found if i is not None)


COMMANDS = {"generate": (GenerateOptions, run)}
