"""A model's folder with an adapter upon it, as the commands that use one take it."""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch

from ftrain import lora
from ftrain.bridge.opened import open as open_model
from ftrain.bridge.tasks import task_of
from ftrain.data.media.families import reads_media
from ftrain.modules.model import Model
from ftrain.modules.spec import Tree

Native = Literal["auto", "always", "never"]


@dataclass(frozen=True)
class Opened:
    """A model and its parameters, with the adapter's deltas merged into them where there is one."""

    model: Model
    params: Tree


def open_with_adapter(
    folder: Path, adapter: Path | None, *, native: Native = "auto", dtype: torch.dtype = torch.float32
) -> Opened:
    """The model of a folder, loaded. `adapter`: a folder that PEFT or this library wrote. ValueError for either that
    cannot be read, or that do not fit each other.
    """
    task = task_of(folder, media=reads_media(folder))
    model = open_model(folder, native=native, dtype=dtype, task=task)
    if model.load is None:
        raise ValueError(f"{folder}: {model.name} has no weights to load")
    params = model.load()
    if adapter is not None:
        made, delta = lora.load(adapter, model)
        params = lora.merge(params, delta, made)
    return Opened(model, params)


def require_new(folder: Path) -> None:
    """ValueError for a folder of `--to` that holds something."""
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ValueError(f"--to {folder} is not empty: give a new folder")
