"""`ftrain.hf.open`: the model of a folder: the library's own where it has the family, else a bridged one."""

from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import torch

from ftrain.bridge.config import read_config
from ftrain.bridge.depth import with_layers
from ftrain.bridge.diffusion import from_diffusers
from ftrain.bridge.native_wan import native_wan
from ftrain.bridge.native_wan_vae import CLASS as WAN_VAE
from ftrain.bridge.native_wan_vae import native_wan_vae
from ftrain.bridge.natives import native_of
from ftrain.bridge.pretrained import Task, from_transformers
from ftrain.files.outside import JSON_BYTES
from ftrain.hf.files import CONFIG, HfFolder, parse_json, read_member
from ftrain.modules.model import Model


def open(
    folder: str | Path,
    *,
    native: Literal["auto", "always", "never"] = "auto",
    task: Task = "causal_lm",
    dtype: torch.dtype = torch.float32,
    trust_remote_code: bool = False,
    layers: int | None = None,
) -> Model:
    """The model of a folder in Hugging Face's format; nothing is read but headers. `model.why` says what was taken.

    Args:
        folder: holds `config.json` and safetensors, of transformers or of diffusers (one model, no whole pipeline).
        native: "auto" takes the library's own family where there is one and transformers' or diffusers' model
            elsewhere; "always" and "never" leave no choice.
        task, dtype, trust_remote_code: as for `ftrain.bridge.from_transformers`; a native model is a causal language
            model, one that sees for "image_text_to_text" too, what else `ftrain.bridge.natives` lists, or Wan's
            autoencoder or video transformer, of `dtype` but for what that keeps in float32.
        layers: with so many of its layers alone (`ftrain.bridge.depth`), for a look at shapes: such a model has neither
            `load` nor `save`. None: all.

    Raises:
        ValueError: there is no model in the folder, or none of the kind that was asked for; `native` is another word.

    >>> import tempfile, ftrain
    >>> from transformers import LlamaConfig, LlamaForCausalLM
    >>> sizes = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2}
    >>> folder = tempfile.mkdtemp()
    >>> LlamaForCausalLM(LlamaConfig(vocab_size=11, **sizes)).save_pretrained(folder)
    >>> ftrain.hf.open(folder).why
    'native: llama is a family of the library'
    >>> ftrain.hf.open(folder, native="never").name
    'LlamaForCausalLM of transformers'
    """
    if native not in ("auto", "always", "never"):
        raise ValueError(f'native is "auto", "always" or "never", not {native!r}')
    if _is_of_diffusers(Path(folder)):
        if layers is not None:
            raise ValueError(f"{folder} holds a model of diffusers, which has all of its layers")
        return _of_diffusers(folder, native, task, dtype)
    why = 'native="never"'
    if native != "never":
        try:
            return _without_files(_native(HfFolder.open(folder), task, dtype, layers), layers)
        except ValueError as error:
            if native == "always":
                raise
            why = str(error)
    source = folder if layers is None else with_layers(read_config(Path(folder), trust_remote_code), layers)
    bridged = from_transformers(source, task=task, dtype=dtype, trust_remote_code=trust_remote_code)
    return replace(_without_files(bridged, layers), why=f"bridged: {why}")


def _without_files(model: Model, layers: int | None) -> Model:
    return model if layers is None else replace(model, load=None, read=None, save=None)


def _native(folder: HfFolder, task: Task, dtype: torch.dtype, layers: int | None) -> Model:
    """The library's own model. ValueError where it has none of the folder's family, or for the task."""
    native = native_of(folder.config())
    if task not in native.tasks:
        raise ValueError(f"task {task!r} has no native model")
    if layers is not None and not native.layered:
        raise ValueError(f"{folder.path} holds {native.what}, which has all of its layers")
    return native.open(folder, dtype, layers)


def _is_of_diffusers(folder: Path) -> bool:
    """True for a pipeline, and for a model whose configuration names its class."""
    if not (folder / CONFIG).is_file():
        return (folder / "model_index.json").is_file()
    return _class_of(folder) is not None


def _class_of(folder: Path) -> Any:
    """What the configuration calls its class, as diffusers does; None for other configurations."""
    if not (folder / CONFIG).is_file():
        return None
    return parse_json(read_member(folder, CONFIG, limit=JSON_BYTES), str(folder / CONFIG)).get("_class_name")


def _of_diffusers(folder: str | Path, native: str, task: Task, dtype: torch.dtype) -> Model:
    if task != "causal_lm":
        raise ValueError(f"{folder} holds a model of diffusers, which has no task {task!r}")
    why = 'native="never"'
    if native != "never":
        try:
            family = native_wan_vae if _class_of(Path(folder)) == WAN_VAE else native_wan
            return family(folder, dtype=dtype)
        except ValueError as error:
            if native == "always":
                raise
            why = str(error)
    return replace(from_diffusers(folder, dtype=dtype), why=f"bridged: {why}")
