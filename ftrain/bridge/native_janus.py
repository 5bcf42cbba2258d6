"""The library's own Janus as a `Model`: it sees pictures, draws them, and reads and writes text.

Legend: T tokens of a pack, B rows or pictures, L tokens of a row, V vocabulary, D model width.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

from torch import Tensor

from ftrain.bridge.agreement import require_rows_for_tokens
from ftrain.bridge.batches import LANGUAGE, documents_of, places_of, require_made, require_tokens
from ftrain.bridge.native import NativeFiles
from ftrain.bridge.over_text import OverText
from ftrain.hf.described import described_in_parts
from ftrain.hf.files import CONFIG, HfFolder
from ftrain.kernels.mean import Mean, WeightedSum, weighted_sum
from ftrain.modules import janus
from ftrain.modules.decoder_config import DecoderConfig
from ftrain.modules.families import janus as family
from ftrain.modules.janus import JanusConfig
from ftrain.modules.janus_generation import janus_text
from ftrain.modules.janus_media import LEAVES as RAW
from ftrain.modules.janus_media import RULES, prepare
from ftrain.modules.model import Leaf, Model
from ftrain.modules.spec import Tree

LEAVES = {
    **LANGUAGE,
    "replaced": Leaf("which tokens a picture's row replaces, of `model.media(batch)`", "[T] or [B, L]"),
    "media": Leaf("what `model.media(batch)` makes of pictures, seen and drawn", "pictures first"),
}
"""What such a model reads of a batch."""
KIND = "janus"
"""What `model_type` says in a `config.json`."""
PARTS = ("text_config", "vision_config", "vq_config")
"""The parts of its configuration."""


def native_janus(folder: HfFolder) -> Model:
    """The model of a folder of weights. ValueError for a configuration that it cannot follow, or if the folder's
    tokenizer has more ids than the table has rows.

    A batch's `loss` is that of its labels, and where pictures are drawn that of their codes beside it. No loss reaches
    the tokenizer, which is `frozen`.
    """
    config = folder.config()
    if "tie_word_embeddings" not in config and "lm_head.weight" in folder.tensors:
        config = {**config, "tie_word_embeddings": False}  # folders of transformers 4 do not say it
    shown = str(folder.path / CONFIG)
    cfg = described_in_parts(config, shown, layers=len(folder.tensors), describe=family.config, parts=PARTS)
    require_rows_for_tokens(folder.path, config)
    names = family.names(cfg)
    files, made = NativeFiles(folder, janus.specs(cfg), {}, names), NativeJanus(cfg)
    return Model(
        name=f"{KIND} (native)",
        specs=files.specs,
        batch=LEAVES,
        loss=made.loss,
        token_losses=made.token_losses,
        logits=made.logits,
        hidden=made.hidden,
        load=files.load,
        read=files.read,
        save=partial(files.save, {}),
        media=made.media,
        rules=RULES,
        family=janus_text(cfg),
        why=f"native: {KIND} is a family of the library",
        names=names,
        frozen=("codec",),
    )


@dataclass(frozen=True)
class NativeJanus(OverText):
    """The functions of a `Model`. It drops nothing, so a key makes no difference."""

    cfg: JanusConfig

    def media(
        self,
        batch: Mapping[str, Any],
        *,
        pictures: int | None = None,
        places: int | None = None,
        packs: int = 1,
        parts: int = 1,
    ) -> dict[str, Any]:
        """The batch that the other functions read, of raw leaves: see `ftrain.modules.janus_media.prepare`."""
        return prepare(batch, self.cfg, pictures=pictures, places=places, packs=packs, parts=parts)

    def loss(self, params: Tree, batch: Mapping[str, Any], key: Tensor | None = None) -> Mean | WeightedSum:
        """The `Mean` cross entropy of the batch's labels, and of the codes of what is drawn; their sum where both are
        there. `key`: int64 `[2]`, which nothing draws from.

        ValueError for a batch with neither, or that does not fit.
        """
        del key
        terms = self.terms(params, batch)
        if not terms:
            raise ValueError("a loss needs the batch's 'labels', or pictures that are drawn")
        return weighted_sum(terms, {}) if len(terms) > 1 else next(iter(terms.values()))

    def terms(self, params: Tree, batch: Mapping[str, Any]) -> dict[str, Mean]:
        """The losses by name: "text" where there are labels, "drawn" where pictures are drawn. ValueError for a batch
        that does not fit.
        """
        hidden_TD, codes_n = self._run(params, batch)
        terms = dict[str, Mean]()
        if "labels" in batch:
            terms["text"] = self.mean(params, hidden_TD, batch["labels"])
        if codes_n is not None:
            terms["drawn"] = janus.drawn_loss(params, hidden_TD, codes_n, batch["media"]["drawn"]["index"])
        return terms

    @property
    def text(self) -> DecoderConfig:
        """The decoder."""
        return self.cfg.text

    def states(self, params: Tree, batch: Mapping[str, Any]) -> Tensor:
        """What the heads read of the folded tokens, `[T, D]`. ValueError for a batch that does not fit."""
        return self._run(params, batch)[0]

    def _run(self, params: Tree, batch: Mapping[str, Any]) -> tuple[Tensor, Tensor | None]:
        require_made(batch, RAW)
        require_tokens("the model", batch, LEAVES)
        tokens, replaced = batch["tokens"], batch.get("replaced")
        given = {**batch, "tokens": tokens.flatten(), "replaced": None if replaced is None else replaced.flatten()}
        x_TD, codes_n = janus.embed(params, given, self.cfg)
        return janus.hidden(params, x_TD, places_of(batch), documents_of(batch), self.cfg), codes_n
