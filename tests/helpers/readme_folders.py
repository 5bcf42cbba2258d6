"""What the commands of README are run on: small models with random weights, data files, adapters."""

from collections.abc import Callable
from pathlib import Path

import torch

import ftrain
from ftrain import lora
from ftrain.bridge.native_wan import native_wan
from ftrain.hf import save_hf
from ftrain.hf.convert import hf_to_checkpoint
from ftrain.modules import decoder
from ftrain.modules.hf_config import hf_config
from ftrain.modules.hf_names import decoder_names
from ftrain.run.encoding import EncodeJob, encode
from tests.helpers import tiny_wan
from tests.helpers.chat_folders import chats, preferences, write_chat_model, write_rows
from tests.helpers.tiny_wan_pipeline import write_films, write_pipeline


def write_hf(folder: Path) -> Path:
    """A small model in Hugging Face's format, and beneath it as a checkpoint."""
    cfg = decoder.preset("qwen3-moe-tiny")
    save_hf(ftrain.init(decoder.specs(cfg), ftrain.key(0)), folder, hf_config(cfg), decoder_names(cfg))
    hf_to_checkpoint(folder, str(folder / "ckpt"))
    return folder


def write_chat(folder: Path) -> Path:
    """A small chat model, an adapter for it, data files, and the options of a run in a file."""
    write_chat_model(folder)
    write_rows(folder / "chat.jsonl", chats(30))
    write_rows(folder / "pairs.jsonl", preferences(30))
    (folder / "sft.yaml").write_text(f"model: {folder}\ndata: [{folder}/chat.jsonl]\n")
    adapter = lora.add(ftrain.hf.open(folder), "all-linear", rank=2)
    lora.save(adapter.init(ftrain.key(0)), adapter, folder / "adapter")
    return folder


def write_video(folder: Path) -> Path:
    """A small pipeline of Wan's, films, a cache of them, and an adapter."""
    write_pipeline(folder / "wan", transformer={**tiny_wan.TINY, "num_layers": 1})
    write_films(folder / "films", 3)
    job = EncodeJob(folder / "wan", folder / "films", folder / "cache", sizes=("9x32x48",))
    encode(job, device=torch.device("cpu"), say=lambda _: None)
    adapter = lora.add(native_wan(folder / "wan/transformer"), ["to_q"], rank=2)
    lora.save(adapter.init(ftrain.key(0)), adapter, folder / "adapter", task=None)
    return folder


_WRITERS = {"hf": write_hf, "chat": write_chat, "video": write_video}


class Folders(dict[str, Path]):
    """What commands are run on, by the names of `Command`; each is written when it is asked for."""

    def __init__(self, make: Callable[[str], Path]) -> None:
        self._make = make

    def __missing__(self, name: str) -> Path:
        return self.setdefault(name, _WRITERS[name](self._make(name)))
