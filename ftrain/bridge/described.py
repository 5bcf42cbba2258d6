"""What a `config.json` alone tells of a model of the library: its parameters, before there are weights."""

from pathlib import Path

from ftrain.bridge.native_talking import described_talking
from ftrain.bridge.natives import Described, native_of
from ftrain.hf.files import CONFIG, read_json
from ftrain.modules.families.omni_talkers import TALKERS
from ftrain.modules.talking import specs


def described(folder: str | Path) -> Described:
    """The model of the library that the `config.json` in a folder describes; nothing else is read there.

    ValueError for a folder without the file, and for a model that the library does not compute.
    """
    file = Path(folder) / CONFIG
    config = read_json(file)
    return native_of(config).describe(config, str(file))


def described_whole(folder: str | Path) -> Described:
    """The same of a model that speaks, with its talker and what makes waves of codes. Experts of thinker and talker
    differ in number, so it does not tell how many a token uses.

    ValueError as `described`, and for a model that does not speak.
    """
    file = Path(folder) / CONFIG
    config = read_json(file)
    kind = str(config.get("model_type"))
    found = specs(described_talking(config, str(file), {}, flows=False)[0])
    player = TALKERS[kind].player
    return Described(kind, {**found, player.part: player.specs(player.of(config))}, 0)
