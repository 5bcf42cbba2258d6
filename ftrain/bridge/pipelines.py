"""A folder of Wan's as diffusers writes whole pipelines: which models are in it, and what tells them apart."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ftrain.bridge.native_wan import config_of
from ftrain.files.outside import JSON_BYTES
from ftrain.hf.digests import weights_digest
from ftrain.hf.files import CONFIG, STEM, HfFolder, parse_json, read_member
from ftrain.hf.shards import DIFFUSERS
from ftrain.modules.families.wan_config import WanConfig
from ftrain.modules.hf_fields import number

INDEX = "model_index.json"
KINDS = ("WanPipeline", "WanImageToVideoPipeline")


@dataclass(frozen=True)
class WanFolder:
    """A pipeline's folder: its `path`, and what its `model_index.json` says."""

    path: Path
    index: Mapping[str, Any]

    @staticmethod
    def open(path: Path) -> "WanFolder":
        """ValueError for a folder that is no pipeline of Wan's."""
        if not (path / INDEX).is_file():
            raise ValueError(
                f"{path} has no {INDEX}: give the folder of a whole pipeline, as diffusers writes it, with "
                "transformer, vae, text_encoder and tokenizer in it"
            )
        index = parse_json(read_member(path, INDEX, limit=JSON_BYTES), str(path / INDEX))
        kind = index.get("_class_name")
        if kind not in KINDS:
            raise ValueError(f"{path / INDEX}: _class_name={kind!r} is none of {', '.join(KINDS)}")
        return WanFolder(path, index)

    def has(self, part: str) -> bool:
        """Whether the pipeline has this part."""
        told = self.index.get(part)
        return isinstance(told, list) and None not in told

    def part(self, name: str) -> Path:
        """The folder of a part. ValueError where the pipeline has none of that name."""
        if not self.has(name) or not (self.path / name).is_dir():
            parts = ", ".join(part for part in self.index if self.has(part))
            raise ValueError(f"{self.path} has no {name}: its parts are {parts}")
        return self.path / name

    @property
    def transformers(self) -> tuple[str, ...]:
        """Names of the video transformers, of two experts the one for more noise first."""
        return tuple(name for name in ("transformer", "transformer_2") if self.has(name))

    @property
    def clean_first(self) -> bool:
        """Whether a first frame is given in its own place at time 0, as Wan 2.2's 5B takes it."""
        return bool(self.index.get("expand_timesteps", False))

    def config(self, transformer: str = "transformer") -> WanConfig:
        """What one of its video transformers is. ValueError for one that the library does not have."""
        return config_of(self.part(transformer))


def digest(folder: Path) -> str:
    """What tells the weights of a folder from others: of its `config.json`, and of each tensor its name, shape, dtype
    and 4,096 bytes in 16 blocks spread over it. ValueError for a folder without safetensors.
    """
    stem = DIFFUSERS.stem if any(folder.glob(f"{DIFFUSERS.stem}*")) else STEM
    held = HfFolder.open(folder, stem=stem)
    told = parse_json(read_member(folder, CONFIG, limit=JSON_BYTES), str(folder / CONFIG))
    return weights_digest(held, told, held.tensors)


def shift_of(folder: WanFolder) -> float:
    """The shift that a pipeline's scheduler says, 3 where it says none. ValueError for one that is no number."""
    path, name = folder.path / "scheduler", "scheduler_config.json"
    if not (path / name).is_file():
        return 3.0
    told = parse_json(read_member(path, name, limit=JSON_BYTES), str(path / name))
    return number(told, "flow_shift" if "flow_shift" in told else "shift", 3.0)
