"""Weights in and out of Hugging Face's format: safetensors with an index, and `config.json`, streamed."""

from ftrain.hf.convert import checkpoint_to_hf, hf_to_checkpoint
from ftrain.hf.files import HfFolder
from ftrain.hf.load import fill_hf, load_hf
from ftrain.hf.save import save_hf

__all__ = ["HfFolder", "checkpoint_to_hf", "fill_hf", "hf_to_checkpoint", "load_hf", "save_hf"]
