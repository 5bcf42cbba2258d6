"""The library's own residual audio codec as a `Model`, from a folder of transformers' (`MimiModel`).

Legend: B recordings, C channels, S samples, F frames, D width of latents, Q levels, R rows (B * F), Z their width.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor

from ftrain.bridge.batches import require_tokens
from ftrain.hf.files import HfFolder
from ftrain.hf.load import fill_hf, load_hf
from ftrain.hf.save import save_hf
from ftrain.kernels import random
from ftrain.kernels.mean import Mean, WeightedSum, mean_where, weighted_sum
from ftrain.modules import codebook, codebook_averages
from ftrain.modules.families import mimi, mimi_config
from ftrain.modules.families.mimi_config import MimiConfig
from ftrain.modules.hf_fields import Config
from ftrain.modules.hf_names import Names
from ftrain.modules.model import Leaf, Model
from ftrain.modules.spec import Tree, init, map_with_paths
from ftrain.modules.spectral_loss import SpectralConfig, spectral_terms

KIND = "mimi"
"""What `model_type` says in a `config.json`."""
BATCH: Mapping[str, Leaf] = MappingProxyType(
    {
        "audio": Leaf("samples in [-1, 1] at the codec's rate", "[B, C, S]", needed=True),
        "samples": Leaf("how many samples of each recording count, from its start; absent, or more: all", "[B]"),
    }
)
WEIGHTS: Mapping[str, float] = MappingProxyType({"waveform": 0.1, "commitment": 0.25})
"""Of the terms of the loss; those of spectra share the weight 1."""
DECAY = 0.99
"""Of the averages that codebooks are."""


def native_mimi(source: str | Path | HfFolder | Mapping[str, Any], *, dtype: torch.dtype = torch.float32) -> Model:
    """The audio codec of a folder of weights, or of what its `config.json` says. `dtype`: of the parameters.

    A batch is `audio` and maybe `samples`. `loss` is the `WeightedSum` of `waveform` (mean absolute difference of the
    samples that come back), `commitment` and a spectral term for each length of window, by `WEIGHTS`, with straight
    gradients through the quantizers; beside it comes the state, the codebooks moved towards what chose them. `outputs`
    gives the codes `[B, Q, F]`, `hidden` the latents `[B, D, F]`. `save(params, folder, state=None)` writes the state
    of the folder where no other is given.

    Raises:
        ValueError: it is no such codec, or one that the library does not have.
    """
    folder, told = _told(source)
    if told.get("model_type") != KIND:
        raise ValueError(f"config.json: model_type={told.get('model_type')!r} is no residual audio codec: {KIND}")
    cfg = mimi_config.config(told)
    specs = map_with_paths(lambda _, spec: replace(spec, dtype=dtype), mimi.specs(cfg))
    names, beside = mimi.names(cfg), mimi.state_specs(cfg)
    if folder is None:
        state = init(beside, random.key(0))
    else:
        own = [name for name in names if name.leaf.startswith("state.")]
        state = load_hf(folder, {"state": beside}, own, unexpected="ignore")["state"]
    made = NativeMimi(cfg, state)
    return Model(
        name="Mimi (native)",
        specs=specs,
        batch=BATCH,
        loss=made.loss,
        hidden=made.hidden,
        outputs=made.outputs,
        load=None if folder is None else partial(_load, folder, specs, beside, names),
        save=partial(_save, told, names, state),
        state=state,
        packs=False,
        alone="a recording is a row of the batch",
        why="native: mimi is a family of the library",
    )


@dataclass(frozen=True)
class NativeMimi:
    """The functions of a `Model`. `state`: the codebooks that they take where they are given none."""

    cfg: MimiConfig
    state: Tree

    def loss(
        self, params: Tree, batch: Mapping[str, Any], key: Tensor | None = None, state: Tree | None = None
    ) -> tuple[WeightedSum, Tree]:
        """As `native_mimi` says. `key`: int64 `[2]`, which nothing draws from. ValueError for a batch that does not
        fit.
        """
        del key
        terms, after = self.terms(params, batch, state)
        spectra = [name for name in terms if name.startswith("spectrum_")]
        return weighted_sum(terms, {**WEIGHTS, **dict.fromkeys(spectra, 1 / len(spectra))}), after

    def terms(self, params: Tree, batch: Mapping[str, Any], state: Tree | None = None) -> tuple[dict[str, Mean], Tree]:
        """The terms of the loss by name, and the state after it. ValueError for a batch that does not fit."""
        held = state or self.state
        audio_BCS, samples_B, latents_BDF = self._read(params, batch)
        frames_B = self.cfg.frames(samples_B)
        places_F = torch.arange(latents_BDF.shape[-1], device=latents_BDF.device)
        counted_R = (places_F < frames_B[:, None]).flatten()
        found = mimi.quantize(params, held, latents_BDF, self.cfg)
        rows_RZ = {name: codebook.straight_through(*one) for name, one in found.items()}
        made_BCS = mimi.decode_rows(params, rows_RZ, self.cfg, recordings=len(audio_BCS))[..., : audio_BCS.shape[-1]]
        wide = torch.promote_types(made_BCS.dtype, torch.float32)
        apart_BCS = (made_BCS.to(wide) - audio_BCS.to(wide)).abs()
        heard_BS = torch.arange(audio_BCS.shape[-1], device=audio_BCS.device) < samples_B[:, None]
        commitments = [codebook.commitment(one, counted_R) for _, one in found.values()]
        terms = {
            "waveform": mean_where(apart_BCS.flatten(), heard_BS[:, None].expand_as(apart_BCS).flatten()),
            "commitment": Mean.pool(commitments),
            **spectral_terms(made_BCS, audio_BCS, SpectralConfig(self.cfg.rate), samples_B),
        }
        moved = {
            name: codebook_averages.moved(held[name], one, counted_R, decay=DECAY) for name, (_, one) in found.items()
        }
        return terms, moved

    def outputs(
        self, params: Tree, batch: Mapping[str, Any], key: Tensor | None = None, state: Tree | None = None
    ) -> Tensor:
        """Codes `[B, Q, F]` int64; those of frames that do not count are of the silence behind. `key`: int64 `[2]`,
        which nothing draws from. ValueError for a batch that does not fit.
        """
        del key
        require_tokens("the codec", batch, BATCH)
        return mimi.encode(params, state or self.state, batch["audio"], self.cfg)

    def hidden(
        self, params: Tree, batch: Mapping[str, Any], key: Tensor | None = None, state: Tree | None = None
    ) -> Tensor:
        """Latents `[B, D, F]`, before they are quantized. `key`: int64 `[2]`, which nothing draws from. ValueError for
        a batch that does not fit.
        """
        del key, state
        return self._read(params, batch)[2]

    def _read(self, params: Tree, batch: Mapping[str, Any]) -> tuple[Tensor, Tensor, Tensor]:
        """The audio, how much of each recording counts, and the latents."""
        require_tokens("the codec", batch, BATCH)
        audio_BCS = batch["audio"]
        whole_B = torch.full((len(audio_BCS),), audio_BCS.shape[-1], device=audio_BCS.device)
        samples_B = batch.get("samples", whole_B)
        if samples_B.shape != whole_B.shape or samples_B.is_floating_point():
            raise ValueError(
                f"samples {list(samples_B.shape)} of {samples_B.dtype}: give int64 [{len(audio_BCS)}], one for each "
                "recording"
            )
        return audio_BCS, torch.minimum(samples_B, whole_B), mimi.latents(params, audio_BCS, self.cfg)


def _told(source: str | Path | HfFolder | Mapping[str, Any]) -> tuple[HfFolder | None, Config]:
    """The folder, if it is one, and what its `config.json` says."""
    if isinstance(source, Mapping):
        return None, dict(source)
    folder = source if isinstance(source, HfFolder) else HfFolder.open(source)
    return folder, folder.config()


def _load(folder: HfFolder, specs: Tree, beside: Tree, names: Names, into: Tree | None = None) -> Tree:
    """New parameters, or those of `into` filled."""
    if into is None:
        found = load_hf(folder, {**specs, "state": beside}, names)
        return {name: found[name] for name in specs}
    read_again = map_with_paths(lambda _, spec: torch.empty(spec.shape), beside)
    fill_hf({**into, "state": read_again}, folder, names)
    return into


def _save(told: Config, names: Names, held: Tree, params: Tree, folder: str | Path, state: Tree | None = None) -> None:
    save_hf({**params, "state": state or held}, folder, told, names)
