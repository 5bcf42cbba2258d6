"""The library's own Wan video transformer as a `Model`, from a folder of diffusers' or of the authors'.

Legend: N rows of a pack, P numbers of a row of the input, Q of the output, M times, S text rows, C width of text, I
rows of pictures, B clips of equal size.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor

from ftrain.files.outside import JSON_BYTES
from ftrain.hf.files import CONFIG, HfFolder, parse_json, read_member
from ftrain.hf.load import fill_hf, load_hf
from ftrain.hf.save import save_hf
from ftrain.hf.shards import DIFFUSERS as FORM
from ftrain.kernels.mean import Mean
from ftrain.modules.dit import squared_error
from ftrain.modules.families import wan, wan_config, wan_names
from ftrain.modules.families.wan_config import AUTHORS, DIFFUSERS, WanConfig
from ftrain.modules.families.wan_latents import grid, patchify, places, unpatchify
from ftrain.modules.hf_fields import Config, size
from ftrain.modules.model import Leaf, Model
from ftrain.modules.spec import Tree, map_with_paths
from ftrain.sharding.paths import match
from ftrain.trace.spmd import current_sharded

BATCH: Mapping[str, Leaf] = MappingProxyType(
    {
        "latents": Leaf("patches of noised latents, conditions behind them", "[N, P]", needed=True),
        "times": Leaf("times in [0, 1], of which 1 is noise", "[M]", needed=True),
        "time_rows": Leaf("which time each row has; not needed with one", "[N]"),
        "positions": Leaf("frame, row and column of each patch in its clip", "[N, 3]", needed=True),
        "segments": Leaf("the clip of each row", "[N] or Documents"),
        "text": Leaf("states of the text, filled up with zeros for each clip", "[S, C]", needed=True),
        "text_segments": Leaf("the clip of each text row", "[S] or Documents"),
        "image": Leaf("rows of the image encoder", "[I, C]"),
        "image_segments": Leaf("the clip of each of them", "[I] or Documents"),
        "target": Leaf("what the velocity is to be: noise less data", "[N, Q]"),
        "valid": Leaf("which rows count in the loss", "[N]"),
    }
)
"""The leaves that `ftrain.modules.families.wan_latents.lay` makes."""
_THEIRS = ("hidden_states", "timestep", "encoder_hidden_states", "encoder_hidden_states_image", "target")
_CLIPS: Mapping[str, Leaf] = MappingProxyType(
    {name: Leaf("as diffusers has it: clips of equal size in rows", "[B, ...]") for name in _THEIRS[:-1]}
)
_INDEX = "model_index.json"


def native_wan(source: str | Path | Mapping[str, Any], *, dtype: torch.dtype = torch.float32) -> Model:
    """The Wan transformer of a folder of weights, or of what a `config.json` of either layout says.

    - `dtype`: of the parameters, but for those that `wan_config.keep_float32` lists.

    A batch is that of `ftrain.modules.families.wan_latents.lay`, clips of any sizes in packs; or it has diffusers'
    leaves, clips of one size in rows (`hidden_states`, `timestep`, `encoder_hidden_states`, ..., `target`). `outputs`
    gives velocities in the same form. `save(params, folder, layout=None)` writes the layout that was opened, or
    "diffusers" or "authors".

    Raises:
        ValueError: it is no Wan transformer, or one that the library does not have.
    """
    folder = None if isinstance(source, Mapping) else HfFolder.open(source, stem=FORM.stem)
    told = dict(source) if isinstance(source, Mapping) else _read(Path(source), CONFIG)
    if folder is not None:
        _bound_layers(folder, told)
    return model_of(described(told, folder), told, folder, dtype=dtype)


def described(config: Config, folder: HfFolder | None = None) -> WanConfig:
    """What a `config.json` describes. `folder`: where it lies; weights and the pipeline around it tell what the file
    does not: whether there is an image branch, and the range of an expert. ValueError as `wan_config.config`.
    """
    if folder is None:
        return wan_config.config(config)
    has_image = any(name.startswith("img_emb.") for name in folder.tensors)
    return wan_config.config(config, image=has_image, times=_times(folder.path))


def config_of(folder: str | Path) -> WanConfig:
    """What the Wan transformer of a folder is, for `wan_latents.lay`. ValueError as `native_wan`."""
    return described(_read(Path(folder), CONFIG), HfFolder.open(folder, stem=FORM.stem))


def model_of(cfg: WanConfig, told: Config, folder: HfFolder | None, *, dtype: torch.dtype = torch.float32) -> Model:
    """The model of a configuration, which `told` describes in a folder's words. ValueError where it cannot be told."""
    specs, names = _in_dtype(wan.specs(cfg), cfg, dtype), wan_names.LAYOUTS[told["_class_name"]](cfg)
    made = NativeWan(cfg)
    low, high = cfg.times
    expert = "" if cfg.times == (0.0, 1.0) else f", for times from {low:g} to {high:g}"
    return Model(
        name=f"Wan {cfg.layers} x {cfg.d_model} (native{expert})",
        specs=specs,
        batch={**BATCH, **_CLIPS},
        loss=made.loss,
        outputs=made.outputs,
        load=None if folder is None else partial(_load, folder, specs, names),
        save=partial(_save, cfg, told),
        why="native: Wan is a family of the library",
        names=wan_names.diffusers(cfg),
        other_names={"comfyui": wan_names.authors(cfg), "kohya": wan_names.authors(cfg)},
        keep=wan_config.keep_float32(cfg),
    )


@dataclass(frozen=True)
class NativeWan:
    """The functions of a `Model`. Nothing is dropped, so a key makes no difference."""

    cfg: WanConfig

    def loss(self, params: Tree, batch: Mapping[str, Any], key: Tensor | None = None) -> Mean:
        """The mean squared error of the velocity over the rows that are valid, or over all elements of clips in rows.
        `key`: int64 `[2]`, which nothing draws from.

        ValueError for a batch without a target of the velocity's shape, and as `outputs`.
        """
        if "target" not in batch:
            raise ValueError("wan: a loss needs the batch's 'target' (noise less data)")
        return squared_error(self.outputs(params, batch, key), batch["target"], batch.get("valid"))

    def outputs(self, params: Tree, batch: Mapping[str, Any], key: Tensor | None = None) -> Tensor:
        """Velocities `[N, Q]`, or `[B, C, F, H, W]` for clips in rows. `key`: int64 `[2]`, for nothing.

        ValueError for a batch that does not fit, and for clips in rows on a mesh whose ranks share a sequence.
        """
        del key
        if "hidden_states" in batch:
            _require(batch, _THEIRS, _THEIRS[:3])
            sizes = batch["hidden_states"].shape[2:]
            rows_BN = self._run(params, self._folded(batch)).chunk(len(batch["hidden_states"]))
            return torch.stack([unpatchify(x_NQ, sizes, self.cfg.patch) for x_NQ in rows_BN])
        _require(batch, tuple(BATCH), tuple(name for name, leaf in BATCH.items() if leaf.needed))
        return self._run(params, batch)

    def _run(self, params: Tree, batch: Mapping[str, Any]) -> Tensor:
        return wan.apply(
            params,
            batch["latents"],
            times_M=batch["times"],
            time_rows_N=batch.get("time_rows"),
            positions_AN=batch["positions"].mT,
            text_SC=batch["text"],
            segments_N=batch.get("segments"),
            text_segments_S=batch.get("text_segments"),
            image_IC=batch.get("image"),
            image_segments_I=batch.get("image_segments"),
            cfg=self.cfg,
        )

    def _folded(self, batch: Mapping[str, Any]) -> dict[str, Any]:
        """Clips of one size in rows as a pack."""
        trace = current_sharded()
        if trace is not None and trace.plan.mesh.sequence > 1:
            raise ValueError(
                "wan: ranks of a sequence axis share the rows of a pack, not clips: lay clips out by "
                "ftrain.modules.families.wan_latents.lay, or divide them among data axes (shard, replicate)"
            )
        clips = batch["hidden_states"]
        patches = grid(clips.shape[2:], self.cfg.patch)
        many, each = len(clips), patches[0] * patches[1] * patches[2]
        number_B = torch.arange(many, device=clips.device)
        times = batch["timestep"].to(torch.float64).reshape(-1) / 1000
        rows = number_B.repeat_interleave(each) if len(times) == many else torch.arange(many * each).to(clips.device)
        found = {
            "latents": torch.cat([patchify(x, self.cfg.patch) for x in clips]),
            "positions": places(patches).to(clips.device).repeat(many, 1),
            "segments": number_B.repeat_interleave(each),
            "times": times,
            "time_rows": rows,
        }
        for kind, name in (("text", "encoder_hidden_states"), ("image", "encoder_hidden_states_image")):
            if batch.get(name) is not None:
                whole = batch[name].flatten(0, 1)
                found[kind] = whole
                found[f"{kind}_segments"] = number_B.repeat_interleave(len(whole) // many)
        return found


def _require(batch: Mapping[str, Any], known: tuple[str, ...], needed: tuple[str, ...]) -> None:
    missing = [name for name in needed if name not in batch]
    unknown = [name for name in batch if name not in known]
    if missing:
        raise ValueError(f"wan: a batch needs {missing[0]!r}, and this one has {', '.join(batch)}")
    if unknown:
        raise ValueError(
            f"wan: the batch has {unknown[0]!r}, which the model does not read; it reads {', '.join(known)}"
        )


def _in_dtype(specs: Tree, cfg: WanConfig, dtype: torch.dtype) -> Tree:
    globs = wan_config.keep_float32(cfg)
    return map_with_paths(
        lambda path, spec: spec if any(match(path, glob) for glob in globs) else replace(spec, dtype=dtype), specs
    )


def _load(folder: HfFolder, specs: Tree, names: wan_names.Names, into: Tree | None = None) -> Tree:
    """New parameters, or those of `into` filled."""
    if into is None:
        return load_hf(folder, specs, names)
    fill_hf(into, folder, names)
    return into


def _save(cfg: WanConfig, told: Config, params: Tree, folder: str | Path, *, layout: str | None = None) -> None:
    """Write the parameters as diffusers or the authors do."""
    known = {"diffusers": DIFFUSERS, "authors": AUTHORS, None: told["_class_name"]}
    if layout not in known:
        raise ValueError(f'wan: layout is "diffusers" or "authors", not {layout!r}')
    kind = known[layout]
    write = wan_config.diffusers_config if kind == DIFFUSERS else wan_config.authors_config
    content = told if kind == told["_class_name"] else write(cfg)
    save_hf(params, folder, content, wan_names.LAYOUTS[kind](cfg), max_shard="10GB", form=FORM)


def _bound_layers(folder: HfFolder, told: Config) -> None:
    """Work grows with the number of layers, long before a weight is looked for."""
    layers = size(told, "num_layers", 40)
    if layers > len(folder.tensors):
        raise ValueError(
            f"{folder.path / CONFIG}: num_layers is {layers:,}, and there are {len(folder.tensors)} weights: give the "
            "config.json that belongs to these weights"
        )


def _times(folder: Path) -> wan_config.Range:
    """The range of an expert, by its name in a pipeline of two; all times for any other folder."""
    around = folder.resolve().parent
    if folder.name not in ("transformer", "transformer_2") or not (around / _INDEX).is_file():
        return (0.0, 1.0)
    told = _read(around, _INDEX)
    boundary, second = told.get("boundary_ratio"), told.get("transformer_2")
    if boundary is None or not isinstance(second, list) or None in second:
        return (0.0, 1.0)
    if isinstance(boundary, bool) or not isinstance(boundary, int | float) or not 0 < boundary < 1:
        raise ValueError(f"{around / _INDEX}: boundary_ratio={boundary!r} must be a number between 0 and 1")
    return wan_config.expert_times(float(boundary), high=folder.name == "transformer")


def _read(folder: Path, name: str) -> dict[str, Any]:
    return parse_json(read_member(folder, name, limit=JSON_BYTES), str(folder / name))
