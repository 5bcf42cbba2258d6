"""Adapters out of PEFT's folders, which may come from anybody: nothing is unpickled, links lead nowhere, and what does
not fit the model is named.
"""

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ftrain.files.outside import JSON_BYTES, check, either, flag, listed, mapped, number, one_of, record, text, whole
from ftrain.hf.files import member, opened, parse_json, read_member
from ftrain.lora.adapter import Adapter, target_of
from ftrain.lora.peft import CONFIG, WEIGHTS
from ftrain.lora.peft_names import PREFIX, Place, places_of
from ftrain.lora.targets import Target, biases_say_inputs_first, inputs_first, kind_of
from ftrain.lora.trees import beside
from ftrain.modules.hf_names import HfTensor
from ftrain.modules.spec import ParamSpec, Tree, leaves_with_paths
from ftrain.sharding.paths import nearest

_NUMBERS = mapped(number(0.0))
_CONFIG = record(
    {"peft_type": one_of("LORA"), "r": whole(1, 2**20)},
    optional={
        "lora_alpha": number(0.0),
        "rank_pattern": either(one_of(None), _NUMBERS),
        "alpha_pattern": either(one_of(None), _NUMBERS),
        "lora_dropout": number(0.0),
        "use_rslora": flag,
        "use_dora": flag,
        "bias": one_of("none"),
        "modules_to_save": either(one_of(None), listed(text())),
    },
    others=True,
)
_NOT_HERE = (
    "modules_to_save", "layer_replication", "trainable_token_indices", "lora_bias", "alora_invocation_tokens",
    "use_qalora", "use_bdlora", "kasa_config", "velora_config", "monteclora_config", "arrow_config",
)  # fmt: skip
_PARTS = {
    ".lora_A.weight": "A", ".lora_B.weight": "B", ".lora_embedding_A": "A", ".lora_embedding_B": "B",
    ".lora_magnitude_vector": "magnitude", ".lora_magnitude_vector.weight": "magnitude",
}  # fmt: skip


def load(
    folder: str | Path, model: Any, *, like: Adapter | None = None, names: Sequence[HfTensor] = ()
) -> tuple[Adapter, Tree]:
    """The adapter of a folder, and its deltas, in float32 or the wider dtype of the file.

    - `model`: a `Model`, or the tree of its specs; `names`: as in `ftrain.lora.add`.
    - `like`: an adapter whose targets and ranks the folder must have.

    ValueError, which names the file and the tensor: for a folder without safetensors (pickled files are not read), a
    link, a configuration with what is not known here, a module that the model has not (with the nearest), an adapter of
    another base (shapes), of other targets or of another rank than `like`.
    """
    where = Path(folder)
    _require_no_pickle(where)
    shown = str(where / CONFIG)
    config = check(parse_json(read_member(where, CONFIG, limit=JSON_BYTES), shown), _CONFIG, shown)
    unknown = next((name for name in _NOT_HERE if config.get(name)), None)
    if unknown is not None:
        raise ValueError(f"{shown}: {unknown!r} is {config[unknown]!r}, which is not read here: export it without")
    with opened(member(where, WEIGHTS)) as file:
        held = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  # no dict
    return _Reading(where / WEIGHTS, config, model, tuple(names or getattr(model, "names", ()))).adapter(held, like)


def _require_no_pickle(folder: Path) -> None:
    if os.path.lexists(folder / WEIGHTS):
        return
    pickled = next((p.name for p in sorted(folder.glob("adapter_model.*"))), None) if folder.is_dir() else None
    found = f"; {pickled} is pickled and is not opened: save it as safetensors with PEFT" if pickled else ""
    raise ValueError(f"{folder} holds no {WEIGHTS}{found}")


@dataclass
class _Reading:
    """One folder: `shown` is the file for messages."""

    shown: Path
    config: Mapping[str, Any]
    model: Any
    names: tuple[HfTensor, ...]
    leaves: dict[str, ParamSpec] = field(init=False)

    def __post_init__(self) -> None:
        self.leaves = dict(leaves_with_paths(getattr(self.model, "specs", self.model)))

    def adapter(self, held: Mapping[str, Tensor], like: Adapter | None) -> tuple[Adapter, Tree]:
        """The adapter that these tensors are, and its deltas."""
        ranks = self._ranks(held)
        made = Adapter(
            tuple(self._target(path, ranks[path]) for path in self.leaves if path in ranks),
            getattr(self.model, "specs", self.model),
            dict.fromkeys(ranks, "the folder"),
            self.names,
            dict(getattr(self.model, "other_names", {})),
            rslora=bool(self.config.get("use_rslora")),
            dora=bool(self.config.get("use_dora")),
            dropout=float(self.config.get("lora_dropout", 0.0)),
        )
        if like is not None:
            self._require_like(made, like)
        return made, self._deltas(made, held)

    def _ranks(self, held: Mapping[str, Tensor]) -> dict[str, int]:
        """The rank of each of our parameters that the file has a delta of."""
        modules = self._modules()
        found: dict[str, int] = {}
        for key, x in held.items():
            parsed = self._parsed(key, x)
            if parsed is None:
                continue
            module, what, depth = parsed
            path = self._path(module, depth, modules, key, held)
            if what != "A":
                continue
            rank = x.shape[0] // (self.leaves[path].shape[0] if self._is_stack(module, modules) else 1)
            if found.setdefault(path, rank) != rank or not rank:
                raise ValueError(f"{self.shown}: {key!r} has rank {rank}, and other parts of {path!r} {found[path]}")
        if not found:
            raise ValueError(f"{self.shown} holds no delta of low rank")
        return found

    def _parsed(self, key: str, x: Tensor) -> tuple[str, str, int] | None:
        """Module, part and depth of a tensor; None for a copy of the model's own weight."""
        plain = key.removeprefix(PREFIX)
        end = next((e for e in _PARTS if plain.endswith(e)), None)
        if end is None:
            own = plain.replace(".base_layer", "")
            if own in self.leaves and tuple(x.shape) == self.leaves[own].shape:
                return None
            raise ValueError(f"{self.shown}: {key!r} of shape {list(x.shape)} is no part of a delta that is known here")
        module = plain.removesuffix(end)
        return module.replace(".base_layer", ""), _PARTS[end], module.count(".base_layer")

    def _modules(self) -> dict[str, list[str]]:
        """Our paths by the name of a module, several where a module holds several stacks of experts."""
        found: dict[str, list[str]] = {}
        own = self.names or [HfTensor(path, path) for path in self.leaves]
        for name in own:
            if name.leaf not in self.leaves or len(self.leaves[name.leaf].shape) < 2:
                continue
            is_stack = name.index is None and kind_of(name.leaf, self.leaves[name.leaf]) == "experts"
            module = name.name.rpartition(".")[0] if is_stack else name.name.removesuffix(".weight")
            found.setdefault(module, []).append(name.leaf)
        return found

    def _is_stack(self, module: str, modules: Mapping[str, list[str]]) -> bool:
        path = modules[module][0]
        indexed = any(n.leaf == path and n.index is not None for n in self.names)
        return kind_of(path, self.leaves[path]) == "experts" and not indexed

    def _path(
        self, module: str, depth: int, modules: Mapping[str, list[str]], key: str, held: Mapping[str, Tensor]
    ) -> str:
        if module not in modules:
            near = nearest(module, modules, cutoff=0.0)
            raise ValueError(f"{self.shown}: {key!r} is of a module that the model has not; nearest: {near!r}")
        paths = modules[module]
        if len(paths) == 1:
            return paths[0]
        return self._stacked(paths, depth, module, held)

    def _stacked(self, paths: list[str], depth: int, module: str, held: Mapping[str, Tensor]) -> str:
        """Which of a module's stacks a wrapper is: the configuration names them, and the last one lies outermost."""
        wanted = self.config.get("target_parameters") or ()
        changed = [p for p in paths if any(p == w or p.endswith(f".{w}") for w in wanted)]
        above = paths[0].rpartition(".")[0]
        tree = getattr(self.model, "specs", self.model)
        order = list(_at(tree, above))
        changed.sort(key=lambda p: order.index(p.rpartition(".")[2]))
        if depth >= len(changed):
            raise ValueError(f"{self.shown}: {module!r} has more wrappers than the target_parameters of {CONFIG}")
        return changed[len(changed) - 1 - depth]

    def _target(self, path: str, rank: int) -> Target:
        alphas, own = self.config.get("alpha_pattern") or {}, self.config.get("lora_alpha", 8)
        module = next((n.name for n in self.names if n.leaf == path), path).removesuffix(".weight")
        alpha = next((a for name, a in alphas.items() if module == name or module.endswith(f".{name}")), own)
        by_biases = biases_say_inputs_first(self.leaves)

        def first(path: str, spec: ParamSpec) -> bool:
            return inputs_first(path, spec, kind_of(path, spec), (), by_biases)

        rslora = bool(self.config.get("use_rslora"))
        return target_of(path, self.leaves[path], rank, float(alpha), first, rslora=rslora)

    def _deltas(self, adapter: Adapter, held: Mapping[str, Tensor]) -> Tree:
        parts = ("A", "B", "magnitude") if adapter.dora else ("A", "B")
        entries = {}
        for target in adapter.targets:
            own = list(places_of(adapter, target))
            entries[target.path] = {what: self._joined(what, own, held) for what in parts}
        return beside(adapter.base, entries)

    def _joined(self, what: str, own: list[Place], held: Mapping[str, Tensor]) -> Tensor:
        read = [place.read(what, self._tensor(place, what, held)) for place in own]
        if own[0].index is not None:
            return torch.stack([x for _, x in sorted(zip([p.index or 0 for p in own], read, strict=True), key=_first)])
        tied = next((p for p, x in zip(own, read, strict=True) if not torch.equal(x, read[0])), None)
        if tied is not None:
            raise ValueError(
                f"{self.shown}: {tied.module!r} and {own[0].module!r} are one weight of this model, and have two deltas"
            )
        return read[0].contiguous()

    def _tensor(self, place: Place, what: str, held: Mapping[str, Tensor]) -> Tensor:
        key, shape = place.keys()[what], place.shapes()[what]
        x = held.get(key, held.get(f"{key}.weight"))
        if x is None:
            raise ValueError(f"{self.shown} lacks {key!r}, a part of the delta of {place.target.path!r}")
        if tuple(x.shape) != shape:
            raise ValueError(
                f"{self.shown}: {key!r} has shape {list(x.shape)}, and {place.target.path!r} of this model, "
                f"{list(place.target.shape)}, needs {list(shape)}: the adapter is of another base"
            )
        return x.to(torch.promote_types(x.dtype, torch.float32))

    def _require_like(self, made: Adapter, like: Adapter) -> None:
        mine, theirs = ({t.path: t.rank for t in a.targets} for a in (made, like))
        for path in sorted(mine.keys() | theirs.keys()):
            if mine.get(path) != theirs.get(path):
                here, there = (f"rank {x[path]}" if path in x else "no delta" for x in (mine, theirs))
                raise ValueError(f"{self.shown}: {path!r} has {here} in the folder and {there} in the adapter given")
        if (made.dora, made.rslora) != (like.dora, like.rslora):
            raise ValueError(
                f"{self.shown}: use_dora={made.dora}, use_rslora={made.rslora}; the adapter given has "
                f"dora={like.dora}, rslora={like.rslora}"
            )


def _first(pair: tuple[int, Tensor]) -> int:
    return pair[0]


def _at(tree: Tree, path: str) -> Any:
    for name in path.split(".") if path else ():
        tree = tree[int(name)] if isinstance(tree, list) else tree[name]
    return tree
