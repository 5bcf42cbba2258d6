"""The library's own encoder of UMT5 as a `Model`, from a folder of transformers' (`UMT5EncoderModel`).

Legend: T tokens of a pack, D width.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor

from ftrain.hf.files import HfFolder
from ftrain.hf.load import fill_hf, load_hf
from ftrain.hf.save import save_hf
from ftrain.kernels.mean import Mean
from ftrain.modules.dit import squared_error
from ftrain.modules.families import umt5
from ftrain.modules.families.umt5 import Umt5Config
from ftrain.modules.hf_fields import Config, size
from ftrain.modules.hf_names import Names
from ftrain.modules.model import Leaf, Model
from ftrain.modules.spec import Tree, map_with_paths

CLASS = "UMT5EncoderModel"
"""What `architectures` of a `config.json` says."""
BATCH: Mapping[str, Leaf] = MappingProxyType(
    {
        "tokens": Leaf("ids of the tokens, texts one after the other", "[T]", needed=True),
        "segments": Leaf("the text of each token", "[T] or Documents"),
        "target": Leaf("what the states are to be", "[T, D]"),
    }
)


def is_encoder(config: Config) -> bool:
    """Whether a `config.json` is of such an encoder alone."""
    return config.get("model_type") == "umt5" and config.get("architectures") == [CLASS]


def native_umt5(source: str | Path | HfFolder | Mapping[str, Any], *, dtype: torch.dtype = torch.float32) -> Model:
    """The text encoder of a folder of weights, or of what its `config.json` says. `dtype`: of the parameters.

    A batch is `tokens` of a pack and their `segments`. `hidden` gives the states of the tokens, `[T, D]`; `loss` is
    their mean squared distance from a `target`.

    Raises:
        ValueError: it is no such encoder, or one that the library does not have.
    """
    if isinstance(source, str | Path):
        source = HfFolder.open(source)
    folder = source if isinstance(source, HfFolder) else None
    told = source.config() if isinstance(source, HfFolder) else dict(source)
    if not is_encoder(told):
        raise ValueError(
            f"config.json: model_type={told.get('model_type')!r} and architectures={told.get('architectures')!r} are "
            f"no text encoder of Wan's: umt5 and [{CLASS!r}]"
        )
    if folder is not None and size(told, "num_layers", 8) > len(folder.tensors):
        raise ValueError(f"{folder.path}: num_layers={told['num_layers']:,} is more than there are weights")
    cfg = umt5.config(told)
    specs = map_with_paths(lambda _, spec: replace(spec, dtype=dtype), umt5.specs(cfg))
    twice = folder is not None and {"shared.weight", "encoder.embed_tokens.weight"} <= folder.tensors.keys()
    made, names = NativeUmt5(cfg), umt5.names(cfg, twice=twice)
    return Model(
        name=f"UMT5's encoder {cfg.layers} x {cfg.d_model} (native)",
        specs=specs,
        batch=BATCH,
        loss=made.loss,
        hidden=made.hidden,
        load=None if folder is None else partial(_load, folder, specs, names),
        save=partial(_save, told, names),
        why="native: UMT5's encoder is a family of the library",
        names=names,
    )


@dataclass(frozen=True)
class NativeUmt5:
    """The functions of a `Model`. Nothing is dropped, so a key makes no difference."""

    cfg: Umt5Config

    def hidden(self, params: Tree, batch: Mapping[str, Any], key: Tensor | None = None) -> Tensor:
        """The states of the tokens, `[T, D]`. `key`: int64 `[2]`, for nothing. ValueError for a batch that does not
        fit.
        """
        del key
        unknown = [name for name in batch if name not in BATCH]
        if "tokens" not in batch or unknown:
            wrong = f"has {unknown[0]!r}, which it does not read" if unknown else "has no 'tokens'"
            raise ValueError(f"UMT5's encoder: the batch {wrong}; it reads {', '.join(BATCH)}")
        tokens_T = batch["tokens"]
        if tokens_T.dim() != 1 or tokens_T.is_floating_point():
            raise ValueError(
                f"UMT5's encoder: tokens are {tokens_T.dtype} {list(tokens_T.shape)}: give int64 [T], texts one after "
                "the other, and their segments"
            )
        return umt5.apply(params, tokens_T, cfg=self.cfg, segments_T=batch.get("segments"))

    def loss(self, params: Tree, batch: Mapping[str, Any], key: Tensor | None = None) -> Mean:
        """The mean squared distance of the states from `target`. `key`: int64 `[2]`, for nothing. ValueError for a
        batch without one, and as `hidden`.
        """
        if "target" not in batch:
            raise ValueError("UMT5's encoder: a loss needs the batch's 'target', the states that are wanted")
        return squared_error(self.hidden(params, batch, key), batch["target"])


def _load(folder: HfFolder, specs: Tree, names: Names, into: Tree | None = None) -> Tree:
    """New parameters, or those of `into` filled."""
    if into is None:
        return load_hf(folder, specs, names)
    fill_hf(into, folder, names)
    return into


def _save(told: Config, names: Names, params: Tree, folder: str | Path) -> None:
    save_hf(params, folder, told, names, max_shard="50GB")
