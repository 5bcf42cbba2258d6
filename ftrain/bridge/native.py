"""The library's own decoder as a `Model`: where a folder holds a family that it has.

Legend: T tokens of a pack, B rows, L tokens of a row, V vocabulary, D model width.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from ftrain.bridge.agreement import require_rows_for_tokens
from ftrain.bridge.batches import LANGUAGE, folded, positions, require_tokens, row_documents
from ftrain.hf.described import described_decoder
from ftrain.hf.files import CONFIG, HfFolder
from ftrain.hf.load import fill_hf, load_hf
from ftrain.hf.save import save_hf
from ftrain.kernels.documents import Segments
from ftrain.kernels.mean import Mean
from ftrain.modules import decoder
from ftrain.modules.autoregression import decoder_family
from ftrain.modules.decoder_config import DecoderConfig
from ftrain.modules.hf_names import decoder_names
from ftrain.modules.model import Model
from ftrain.modules.spec import Tree


def native_decoder(folder: HfFolder) -> Model:
    """The decoder of a folder of weights. ValueError if it is of no family that the library has, or if the folder's
    tokenizer has more ids than the table has rows.
    """
    most = len(folder.tensors)
    config = folder.config()
    cfg = described_decoder(config, str(folder.path / CONFIG), layers=most, experts=most)
    require_rows_for_tokens(folder.path, config)
    made, names, specs = NativeDecoder(cfg), decoder_names(cfg), decoder.specs(cfg)
    kind = config.get("model_type", "a decoder")
    return Model(
        name=f"{kind} (native)",
        specs=specs,
        batch=LANGUAGE,
        loss=made.loss,
        logits=made.logits,
        hidden=made.hidden,
        load=partial(_load, folder, specs, names),
        save=lambda params, to: save_hf(params, to, config, names),
        family=decoder_family(cfg),
        why=f"native: {kind} is a family of the library",
    )


def _load(folder: HfFolder, specs: Tree, names: Any, into: Tree | None = None) -> Tree:
    if into is None:
        return load_hf(folder, specs, names)
    fill_hf(into, folder, names)
    return into


@dataclass(frozen=True)
class NativeDecoder:
    """A decoder's functions of a `Model`. It drops nothing, so a key makes no difference."""

    cfg: DecoderConfig

    def loss(self, params: Tree, batch: Mapping[str, Any], key: Tensor | None = None) -> Mean:
        """The mean cross entropy of the batch's labels. `key`: int64 `[2]`, which nothing draws from. ValueError for a
        batch without labels, or that does not fit.
        """
        del key
        if "labels" not in batch:
            raise ValueError("a loss needs the batch's 'labels'")
        return decoder.loss(params, self._hidden_T(params, batch), batch["labels"].flatten(), self.cfg)

    def logits(self, params: Tree, batch: Mapping[str, Any], key: Tensor | None = None) -> Tensor:
        """The scores `[T, V]` or `[B, L, V]`. ValueError for a batch that does not fit."""
        del key
        scores = decoder.logits(params, self._hidden_T(params, batch), self.cfg)
        return scores.unflatten(0, batch["tokens"].shape)

    def hidden(self, params: Tree, batch: Mapping[str, Any], key: Tensor | None = None) -> Tensor:
        """What the head reads, `[T, D]` or `[B, L, D]`. ValueError for a batch that does not fit."""
        del key
        return self._hidden_T(params, batch).unflatten(0, batch["tokens"].shape)

    def _hidden_T(self, params: Tree, batch: Mapping[str, Any]) -> Tensor:
        require_tokens("the decoder", batch, LANGUAGE)
        tokens = batch["tokens"]
        place = positions(batch)
        place = torch.arange(tokens.shape[-1], device=tokens.device).expand(tokens.shape) if place is None else place
        hidden_TD, _ = decoder.apply(
            params,
            tokens.flatten(),
            positions=place.reshape(-1),
            segments=_documents(batch),
            cfg=self.cfg,
        )
        return hidden_TD


def _documents(batch: Mapping[str, Any]) -> Segments | None:
    """The documents of the folded tokens: a row is one, where nothing is said."""
    tokens = batch["tokens"]
    if batch.get("segments") is None and tokens.dim() > 1:
        return row_documents(len(tokens), tokens.shape[1], tokens.device)
    return folded(batch.get("segments"), tokens)
