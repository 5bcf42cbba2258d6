"""Whole omni models that speak, of Qwen3-Omni and Qwen2.5-Omni: thinker and talker as one `Model`.

What makes waves of codes (`code2wav.`, `token2wav.`) is not trained with them: its tensors stay as they are in a folder
that is saved.

Legend: T tokens of a pack, B rows, L tokens of a row, S tokens of the talker, V vocabulary.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from torch import Tensor

from ftrain.bridge.native import NativeFiles, router_loads
from ftrain.bridge.native_sight import HEARS, LEAVES, NativeSight, towers_of
from ftrain.hf.described import described_with_sight
from ftrain.hf.files import CONFIG, HfFolder
from ftrain.hf.load import load_hf
from ftrain.kernels.mean import WeightedSum, weighted_sum
from ftrain.modules import speech_packs, talking
from ftrain.modules.autoregression import Family
from ftrain.modules.decoder_config import used_experts
from ftrain.modules.families.omni_talkers import TALKERS, TalkerFamily
from ftrain.modules.families.registry import seeing_family_of
from ftrain.modules.families.vision_language import Shapes
from ftrain.modules.hf_fields import Config
from ftrain.modules.hf_names import Names, natural_order, under
from ftrain.modules.model import Leaf, Model
from ftrain.modules.moe import RouterLoad
from ftrain.modules.sight_generation import sight_family
from ftrain.modules.spec import Tree
from ftrain.modules.talking import TalkingConfig
from ftrain.modules.vision_media import RULES

SPEAKS = {
    **LEAVES,
    **HEARS,
    "speech": Leaf(
        "what `model.media(batch)` makes of speech (`ftrain.modules.speech_packs`)", "tokens and rows first"
    ),
}
"""What such a model reads of a batch."""
_MOST = 4096
"""Layers of a model without weights: more are taken for a mistake."""
_WAVES = ("code2wav.", "token2wav.")


def open_talking(
    folder: str | Path | HfFolder, *, flows: bool = False, weights: Mapping[str, float] | None = None
) -> Model:
    """The thinker and the talker of a folder of a whole model, trained together.

    Args:
        folder: holds a `config.json` of `model_type` "qwen3_omni_moe" or "qwen2_5_omni", and its weights.
        flows: the gradient of speech goes on into the thinker.
        weights: of the losses "text", "codes" and "residuals"; 1 each where nothing is said.

    Raises:
        ValueError: the folder is of no such model, it has no talker, or its configuration cannot be followed; a weight
            is of no such loss.

    A loss needs the batch's "labels", or speech, or both: `model.media(batch)` takes the leaves of
    `ftrain.modules.speech_packs` beside the others.
    """
    folder = folder if isinstance(folder, HfFolder) else HfFolder.open(folder)
    cfg, names = _described(folder, flows)
    unknown = sorted({*(weights or {})} - {"text", "codes", "residuals"})
    if unknown:
        raise ValueError(f"weights has {unknown[0]!r}: the losses are 'text', 'codes' and 'residuals'")
    others = tuple(name for name in folder.tensors if name.startswith(_WAVES))
    made = NativeTalking(cfg, dict(weights or {}))
    files = NativeFiles(folder, talking.specs(cfg), {}, tuple(sorted(names, key=natural_order)), others)
    kind = folder.config()["model_type"]
    writes = sight_family(cfg.thinker)
    return Model(
        name=f"{kind} with its talker (native)",
        specs=files.specs,
        batch=SPEAKS,
        loss=made.loss,
        terms=("text", *cfg.talker.terms),
        routed=made.routed if cfg.thinker.text.routers else None,
        logits=made.logits,
        load=files.load,
        read=files.read,
        save=partial(files.save, {}),
        media=made.media,
        towers=towers_of(cfg.thinker, below="thinker."),
        rules={**RULES, **speech_packs.RULES},
        family=Family(
            lambda params, prompts, room: writes.prefill(params["thinker"], prompts, room),
            lambda params, chosen_B, state: writes.extend(params["thinker"], chosen_B, state),
        ),
        why=f"native: {kind} is a family of the library",
        names=files.names,
        top_k=used_experts(cfg.thinker.text),
    )


def talking_config(folder: str | Path | HfFolder, *, flows: bool = False) -> TalkingConfig:
    """What a folder of a whole model describes, for `ftrain.modules.talking`. ValueError as `open_talking`."""
    return _described(folder if isinstance(folder, HfFolder) else HfFolder.open(folder), flows)[0]


def load_player(folder: str | Path | HfFolder) -> tuple[Any, Tree]:
    """What makes waves of codes in a folder of a whole model, its configuration and its parameters: for `decode` of
    `ftrain.modules.families.qwen3_omni_code2wav` or `qwen2_5_omni_token2wav`.

    ValueError for a folder of no such model, or that it cannot follow.
    """
    here = folder if isinstance(folder, HfFolder) else HfFolder.open(folder)
    player = _family_of(here.config(), str(here.path / CONFIG)).player
    cfg = player.of(here.config())
    names = player.names(cfg, prefix=f"{player.part}.")
    return cfg, load_hf(here, player.specs(cfg), names, unexpected="ignore")


def _family_of(config: Config, shown: str) -> TalkerFamily:
    found = TALKERS.get(str(config.get("model_type")))
    if found is None:
        raise ValueError(
            f"{shown}: model_type={config.get('model_type')!r} is no whole model with a talker; known: "
            f"{', '.join(TALKERS)}"
        )
    return found


def _described(folder: HfFolder, flows: bool) -> tuple[TalkingConfig, Names]:
    shapes = {name: stored.shape for name, stored in folder.tensors.items()}
    return described_talking(folder.config(), str(folder.path / CONFIG), shapes, flows=flows)


def described_talking(
    config: Config, shown: str, shapes: Shapes, *, flows: bool = False
) -> tuple[TalkingConfig, Names]:
    """The thinker and talker of the configuration in the file `shown`, and their names in a folder of tensors of these
    `shapes`; without any they are taken for few enough. ValueError as `open_talking`.
    """
    talkers, family = _family_of(config, shown), seeing_family_of(config)
    assert family is not None
    described = described_with_sight(config, shown, layers=len(shapes) or _MOST, describe=family.config)
    thinker = family.laid(config, described, shapes)
    talker, names = talkers.talker(config, thinker, shapes)
    cfg = TalkingConfig(thinker, talker, flows=flows)
    return cfg, (*under(family.names(thinker, shapes), "thinker"), *under(names, "talker"))


@dataclass(frozen=True)
class NativeTalking:
    """The functions of a `Model` that thinks and talks. It drops nothing, so a key makes no difference."""

    cfg: TalkingConfig
    weights: Mapping[str, float]

    def media(
        self,
        batch: Mapping[str, Any],
        *,
        patches: int | None = None,
        places: int | None = None,
        chunks: int | None = None,
        frames: int | None = None,
        states: int | None = None,
        packs: int = 1,
        parts: int = 1,
        rows: bool = False,
    ) -> dict[str, Any]:
        """The batch that the other functions read, of raw leaves: see `ftrain.modules.vision_media.prepare`, and
        where a leaf of speech is given `ftrain.modules.speech_packs.prepare`.
        """
        heard = {name: leaf for name, leaf in batch.items() if name not in speech_packs.LEAVES}
        room = {"patches": patches, "places": places, "chunks": chunks}
        made = self._sight.media(heard, **room, packs=packs, parts=parts, rows=rows)
        if not any(name in batch for name in speech_packs.LEAVES):
            return made
        speech = speech_packs.prepare(
            batch, made, self.cfg.talker.speech, frames=frames, states=states, packs=packs, parts=parts,
            easily=places is not None,
        )  # fmt: skip
        return {**made, "speech": speech}

    def loss(self, params: Tree, batch: Mapping[str, Any], key: Tensor | None = None) -> WeightedSum:
        """The losses of what is written and of what is spoken, weighed. `key`: int64 `[2]`, which nothing draws from.

        ValueError for a batch with neither labels nor speech, or that does not fit.
        """
        return self.routed(params, batch, key)[0]

    def routed(
        self, params: Tree, batch: Mapping[str, Any], key: Tensor | None = None
    ) -> tuple[WeightedSum, Mapping[str, RouterLoad]]:
        """The loss, and what each router did, by the path of its layer. `key`: int64 `[2]`, which nothing draws from.

        ValueError as `loss`.
        """
        del key
        given, segments = self._sight.given({n: leaf for n, leaf in batch.items() if n != "speech"})
        more = {} if batch.get("labels") is None else {"labels": batch["labels"].flatten()}
        more |= {} if batch.get("speech") is None else {"speech": batch["speech"]}
        told = talking.losses(params, {**given, **more}, self.cfg, segments=segments)
        loads = {
            f"thinker.text.{path}": load for path, load in router_loads(self.cfg.thinker.text, told.thinker).items()
        }
        if told.talker is not None:
            spoken = router_loads(self.cfg.talker.stack, told.talker)
            loads |= {f"talker.stack.{path}": load for path, load in spoken.items()}
        return weighted_sum(told.losses, self.weights), loads

    def logits(self, params: Tree, batch: Mapping[str, Any], key: Tensor | None = None) -> Tensor:
        """The scores of words `[T, V]` or `[B, L, V]`. ValueError for a batch that does not fit."""
        return self._sight.logits(params["thinker"], {n: leaf for n, leaf in batch.items() if n != "speech"}, key)

    @property
    def _sight(self) -> NativeSight:
        return NativeSight(self.cfg.thinker)
