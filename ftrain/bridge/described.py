"""What a `config.json` alone tells of a model of the library: its parameters, before there are weights."""

from pathlib import Path

from ftrain.bridge.natives import Described, native_of
from ftrain.hf.files import CONFIG, read_json


def described(folder: str | Path) -> Described:
    """The model of the library that the `config.json` in a folder describes; nothing else is read there.

    ValueError for a folder without the file, and for a model that the library does not compute.
    """
    file = Path(folder) / CONFIG
    config = read_json(file)
    return native_of(config).describe(config, str(file))
