"""A file of safetensors and its JSON written whole or not at all: what an adapter's folder is made of."""

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors.torch import save_file
from torch import Tensor

from ftrain.checkpoint.durable import sync_path, write_text


def write_tensors(file: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> None:
    """Write tensors of any shapes by name, sorted, under a name of their own first. OSError where that fails."""
    file.parent.mkdir(parents=True, exist_ok=True)
    made = file.with_name(f".{file.name}.{os.getpid()}")
    try:
        held = {name: tensors[name].detach().cpu().contiguous() for name in sorted(tensors)}
        save_file(held, made, metadata={"format": "pt", **metadata})
        os.replace(made, file)
    finally:
        made.unlink(missing_ok=True)
    sync_path(file.parent)


def write_json(file: Path, value: Mapping[str, Any]) -> None:
    """Write a JSON object, its keys sorted. OSError where that fails."""
    write_text(file, json.dumps(value, indent=2, sort_keys=True) + "\n")
