"""Weights in and out of Hugging Face's format: safetensors with an index, and `config.json`, streamed.

`open` gives the model of a folder. It stands in the room above, which knows models (`ftrain.bridge`), and is only named
here.
"""

from typing import TYPE_CHECKING

from ftrain.hf.convert import checkpoint_to_hf, hf_to_checkpoint
from ftrain.hf.files import HfFolder
from ftrain.hf.load import fill_hf, load_hf
from ftrain.hf.save import save_hf
from ftrain.lazy import lazy_names

if TYPE_CHECKING:
    from ftrain.bridge.opened import open

__all__ = ["HfFolder", "checkpoint_to_hf", "fill_hf", "hf_to_checkpoint", "load_hf", "open", "save_hf"]
__getattr__ = lazy_names("ftrain", {"bridge.opened": ("open",)})
