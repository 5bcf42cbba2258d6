"""The library's own language models that see, and hear, as a `Model`: where a folder holds a family that it has.

Legend: T tokens of a pack, B rows, L tokens of a row, V vocabulary, D model width, N patches.
"""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from ftrain.bridge.agreement import require_rows_for_tokens
from ftrain.bridge.batches import LANGUAGE, documents_of, positions, require_made, require_tokens
from ftrain.bridge.depth import with_layers
from ftrain.bridge.native import NativeFiles, router_loads
from ftrain.bridge.over_text import OverText
from ftrain.hf.described import described_with_sight
from ftrain.hf.files import CONFIG, HfFolder
from ftrain.kernels.documents import Segments
from ftrain.kernels.mean import Mean
from ftrain.modules import decoder, vision_language
from ftrain.modules.decoder_config import DecoderConfig, used_experts
from ftrain.modules.families.vision_language import VisionLanguageFamily
from ftrain.modules.model import Leaf, Model, Towers
from ftrain.modules.moe import RouterLoad
from ftrain.modules.pictures import LEAVES as RAW
from ftrain.modules.pictures import PIXELS
from ftrain.modules.sight_generation import sight_family
from ftrain.modules.sounds import SOUND
from ftrain.modules.spec import Tree
from ftrain.modules.vision_language import VisionLanguageConfig
from ftrain.modules.vision_media import RULES, prepare
from ftrain.trace.spmd import current_sharded

LEAVES = {
    **LANGUAGE,
    "positions": Leaf("places of the tokens in time, rows and columns; or one of each, of text", "[T, 3] or [B, L, 3]"),
    "replaced": Leaf("which tokens a row of media replaces, of `model.media(batch)`", "[T] or [B, L]"),
    "media": Leaf("what `model.media(batch)` makes of pictures", "patches first"),
}
"""What such a model reads of a batch."""
HEARS = {"audio": Leaf("what `model.media(batch)` makes of recordings", "chunks or rows first")}
"""What one reads that hears too."""


def native_sight(folder: HfFolder, family: VisionLanguageFamily, *, layers: int | None = None) -> Model:
    """The model of a folder of weights of the family. ValueError for a configuration that it cannot follow, or if the
    folder's tokenizer has more ids than the table has rows.

    `layers`: with so many of its decoder's layers alone, for a look at shapes.
    """
    config = folder.config() if layers is None else _with_layers(folder.config(), layers)
    shown = str(folder.path / CONFIG)
    cfg = described_with_sight(config, shown, layers=len(folder.tensors), describe=family.config)
    require_rows_for_tokens(folder.path, config.get("thinker_config") or config)
    shapes = {name: stored.shape for name, stored in folder.tensors.items()}
    cfg = family.laid(config, cfg, shapes)
    names = family.names(cfg, shapes)
    others = tuple(name for name in folder.tensors if name.startswith(family.others))
    files, made = NativeFiles(folder, vision_language.specs(cfg), {}, names, others), NativeSight(cfg)
    kind = config["model_type"]
    return Model(
        name=f"{kind} (native)",
        specs=files.specs,
        batch=LEAVES if cfg.media.sound is None else {**LEAVES, **HEARS},
        loss=made.loss,
        routed=made.routed if cfg.text.routers else None,
        token_losses=made.token_losses,
        logits=made.logits,
        hidden=made.hidden,
        load=files.load,
        read=files.read,
        save=partial(files.save, {}),
        media=made.media,
        towers=towers_of(cfg),
        rules=RULES,
        family=sight_family(cfg),
        why=f"native: {kind} is a family of the library",
        names=names,
        top_k=used_experts(cfg.text),
    )


def towers_of(cfg: VisionLanguageConfig, *, below: str = "") -> Towers:
    """The towers of such a model, whose parameters are `below` this node of the tree that a run trains."""
    heard = cfg.media.sound
    towers = {"vision": asdict(cfg.media.tower)} | ({} if heard is None else {"audio": asdict(heard.tower)})

    def rows(params: Tree, batch: Mapping[str, Any]) -> dict[str, Tensor]:
        own = params[below.removesuffix(".")] if below else params
        return vision_language.tower_rows(own, batch, cfg)

    width: dict[str, tuple[int, ...]] = dict.fromkeys(
        PIXELS.values(), (1 + len(cfg.media.tower.deep_layers), cfg.media.tower.d_out)
    )
    if heard is not None:
        width[SOUND] = (heard.tower.d_out or heard.tower.d_model,)
    return Towers(tuple(f"{below}{name}" for name in towers), rows, width, towers)


def _with_layers(config: Mapping[str, Any], layers: int) -> dict[str, Any]:
    """The configuration with so many layers of the decoder, wherever its entries are."""
    for place in ("thinker_config", "text_config"):
        if config.get(place):
            inner = config[place]
            return {
                **config,
                place: _with_layers(inner, layers) if place == "thinker_config" else with_layers(inner, layers),
            }
    made: dict[str, Any] = with_layers(config, layers)
    return made


@dataclass(frozen=True)
class NativeSight(OverText):
    """The functions of a `Model` of a language model that sees. It drops nothing, so a key makes no difference."""

    cfg: VisionLanguageConfig

    def media(
        self,
        batch: Mapping[str, Any],
        *,
        patches: int | None = None,
        places: int | None = None,
        chunks: int | None = None,
        packs: int = 1,
        parts: int = 1,
        rows: bool = False,
    ) -> dict[str, Any]:
        """The batch that the other functions read, of raw leaves: see `ftrain.modules.vision_media.prepare`."""
        room = {"patches": patches, "places": places, "chunks": chunks}
        return prepare(batch, self.cfg.media, **room, packs=packs, parts=parts, rows=rows)

    def loss(self, params: Tree, batch: Mapping[str, Any], key: Tensor | None = None) -> Mean:
        """The `Mean` cross entropy of the batch's labels. `key`: int64 `[2]`, which nothing draws from.

        ValueError for a batch without labels, or that does not fit.
        """
        return self.routed(params, batch, key)[0]

    def routed(
        self, params: Tree, batch: Mapping[str, Any], key: Tensor | None = None
    ) -> tuple[Mean, Mapping[str, RouterLoad]]:
        """The loss, and what each router did, by the path of its layer. `key`: int64 `[2]`, which nothing draws from.

        ValueError as `loss`.
        """
        del key
        if "labels" not in batch:
            raise ValueError("a loss needs the batch's 'labels'")
        hidden_TD, stats = self._run(params, batch)
        mean = self.mean(params, hidden_TD, batch["labels"])
        return mean, {f"text.{path}": load for path, load in router_loads(self.cfg.text, stats).items()}

    @property
    def text(self) -> DecoderConfig:
        """The decoder."""
        return self.cfg.text

    def states(self, params: Tree, batch: Mapping[str, Any]) -> Tensor:
        """What the head reads of the folded tokens, `[T, D]`. ValueError for a batch that does not fit."""
        return self._run(params, batch)[0]

    def given(self, batch: Mapping[str, Any]) -> tuple[dict[str, Any], Segments | None]:
        """What `ftrain.modules.vision_language` reads of a batch, folded, and its documents. ValueError for a batch
        that does not fit.
        """
        require_made(batch, RAW)
        require_tokens("the model", batch, LEAVES if self.cfg.media.sound is None else {**LEAVES, **HEARS})
        tokens, replaced = batch["tokens"], batch.get("replaced")
        _require_a_pack(tokens)
        given = {
            "tokens": tokens.flatten(),
            "positions": _on_three_axes(batch),
            "replaced": None if replaced is None else replaced.flatten(),
            "media": batch.get("media"),
            "audio": batch.get("audio"),
        }
        return given, documents_of(batch)

    def _run(self, params: Tree, batch: Mapping[str, Any]) -> tuple[Tensor, decoder.DecoderStats]:
        given, segments = self.given(batch)
        return vision_language.hidden(params, given, self.cfg, segments=segments)


def _require_a_pack(tokens: Tensor) -> None:
    trace = current_sharded()
    if trace is not None and trace.plan.mesh.size > 1 and tokens.dim() != 1:
        raise ValueError(
            f"rows {list(tokens.shape)} on a mesh of {trace.plan.mesh.size} ranks, which share the patches of packs: "
            "give packs, tokens [T] with segments"
        )


def _on_three_axes(batch: Mapping[str, Any]) -> Tensor:
    """The places of the folded tokens, `[T, 3]`; those of text are equal on all axes."""
    tokens, place = batch["tokens"], batch.get("positions")
    if place is not None and place.dim() == tokens.dim() + 1:
        return place.reshape(-1, 3)
    place = positions(batch)
    place = torch.arange(tokens.shape[-1], device=tokens.device).expand(tokens.shape) if place is None else place
    return place.reshape(-1, 1).expand(-1, 3)
