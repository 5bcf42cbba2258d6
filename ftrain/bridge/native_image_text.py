"""The library's own pairs of encoders of pictures and texts (CLIP, SigLIP) as a `Model`.

Legend: B pairs, L tokens of a text, C channels, H and W rows and columns of pixels, E width of the common space.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from types import MappingProxyType
from typing import Any

from torch import Tensor

from ftrain.bridge.batches import require_tokens
from ftrain.bridge.native import NativeFiles
from ftrain.hf.described import described_in_parts
from ftrain.hf.files import CONFIG, HfFolder
from ftrain.kernels.mean import Mean
from ftrain.modules import image_text
from ftrain.modules.families.image_text import ImageTextFamily
from ftrain.modules.image_text import ImageTextConfig
from ftrain.modules.model import Leaf, Model
from ftrain.modules.spec import Tree
from ftrain.sharding.batch import BatchRows, BatchRule

LEAVES: Mapping[str, Leaf] = MappingProxyType(
    {
        "tokens": Leaf("the text of each pair, filled up to one length as the model learned it", "[B, L]", needed=True),
        "pixels": Leaf(
            "the picture of each pair, floating, normed as the model learned it", "[B, C, H, W]", needed=True
        ),
    }
)
RULES: Mapping[str, BatchRule] = MappingProxyType({"tokens": BatchRows(), "pixels": BatchRows()})
"""How ranks share the pairs."""
PARTS = ("text_config", "vision_config")
"""The parts of a configuration."""


def native_image_text(folder: HfFolder, family: ImageTextFamily) -> Model:
    """The model of a folder of weights of the family. ValueError for a configuration that it cannot follow.

    `loss` is the family's over all pairs of the step; `hidden` gives points `[2 B, E]`, of texts and then of pictures.
    """
    config = folder.config()
    cfg = described_in_parts(
        config, str(folder.path / CONFIG), layers=len(folder.tensors), describe=family.config, parts=PARTS
    )
    names = family.names(cfg)
    files, made = NativeFiles(folder, image_text.specs(cfg), {}, names), NativeImageText(cfg)
    kind = config["model_type"]
    return Model(
        name=f"{kind} (native)",
        specs=files.specs,
        batch=LEAVES,
        loss=made.loss,
        hidden=made.hidden,
        load=files.load,
        read=files.read,
        save=partial(files.save, {}),
        packs=False,
        alone="a pair is a row of the batch",
        rules=RULES,
        why=f"native: {kind} is a family of the library",
        names=names,
    )


@dataclass(frozen=True)
class NativeImageText:
    """The functions of a `Model`. It drops nothing, so a key makes no difference."""

    cfg: ImageTextConfig

    def loss(self, params: Tree, batch: Mapping[str, Any], key: Tensor | None = None) -> Mean:
        """The mean over pairs of the whole step. `key`: int64 `[2]`, which nothing draws from. ValueError for a batch
        that does not fit.
        """
        del key
        require_tokens("the model", batch, LEAVES)
        return image_text.loss(params, batch["tokens"], batch["pixels"], self.cfg)[0]

    def hidden(self, params: Tree, batch: Mapping[str, Any], key: Tensor | None = None) -> Tensor:
        """Points `[2 B, E]` of length one, of texts and then of pictures. ValueError for a batch that does not fit."""
        del key
        require_tokens("the model", batch, LEAVES)
        return image_text.points(params, batch, self.cfg)
