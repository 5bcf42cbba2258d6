"""The library's own decoder as a `Model`: where a folder holds a family that it has.

Legend: T tokens of a pack, B rows, L tokens of a row, V vocabulary, D model width.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ftrain.bridge.agreement import require_rows_for_tokens
from ftrain.bridge.batches import LANGUAGE, documents_of, places_of, require_tokens
from ftrain.bridge.depth import with_layers
from ftrain.checkpoint.shard_layout import whole
from ftrain.files.outside import JSON_BYTES
from ftrain.hf.described import described_decoder
from ftrain.hf.files import CONFIG, HfFolder, read_member
from ftrain.hf.load import fill_hf, load_hf, read_parts
from ftrain.hf.save import save_hf
from ftrain.hf.shards import Entry
from ftrain.kernels.mean import Mean, WeightedSum, weighted_sum
from ftrain.modules import decoder, multi_token
from ftrain.modules.autoregression import decoder_family
from ftrain.modules.decoder_config import DecoderConfig, layer_block, used_experts
from ftrain.modules.families.registry import family_of
from ftrain.modules.hf_fields import size
from ftrain.modules.hf_names import DERIVED, HfTensor, Names, natural_order
from ftrain.modules.model import Model
from ftrain.modules.moe import RouterLoad, RouterStats, loads_of, update_bias
from ftrain.modules.multi_token import BIASES
from ftrain.modules.spec import Tree, leaves_with_paths, map_with_paths

_AHEAD = "mtp.layers."
"""The path of the modules of multi-token prediction."""


def native_decoder(folder: HfFolder, *, layers: int | None = None) -> Model:
    """The decoder of a folder of weights. ValueError if it is of no family that the library has, or if the
    folder's tokenizer has more ids than the table has rows.

    `layers`: with so many of its layers alone, for a look at shapes; nothing is read then.

    A decoder with loss-free balancing has its routers' biases as `state`, which `load` does not give: they are read at
    once, being small. `save(params, folder, state=None)` writes those of the folder where no others are given. A folder
    with modules of multi-token prediction is trained with their loss beside that of the next token.
    """
    most = len(folder.tensors)
    described = folder.config()
    config = described if layers is None else with_layers(described, layers)
    of = family_of(config)
    experts = None if of.stacked else most
    cfg = described_decoder(config, str(folder.path / CONFIG), layers=most, experts=experts, describe=of.config)
    require_rows_for_tokens(folder.path, config)
    cfg = _as_far_ahead(folder, cfg, behind=size(described, "num_hidden_layers"))
    names = tuple(name for name in of.names(cfg) if not name.written or name.name in folder.tensors)
    files = NativeFiles(folder, decoder.specs(cfg), decoder.balance_specs(cfg), names)
    balance = files.balance() if layers is None else map_with_paths(lambda _, s: torch.zeros(s.shape), files.beside)
    made = NativeDecoder(cfg, balance)
    kind = config.get("model_type", "a decoder")
    return Model(
        name=f"{kind} (native)",
        specs=files.specs,
        batch=LANGUAGE,
        loss=made.loss,
        routed=made.routed if cfg.routers or cfg.mtp_routers else None,
        rebalanced=made.rebalanced if balance else None,
        token_losses=made.token_losses,
        logits=made.logits,
        hidden=made.hidden,
        load=files.load,
        read=files.read,
        save=partial(files.save, balance),
        state=balance,
        family=decoder_family(cfg, balance=balance or None),
        why=f"native: {kind} is a family of the library",
        names=tuple(name for name in names if not name.leaf.startswith("balance.") and not name.written),
        top_k=used_experts(cfg),
    )


def _as_far_ahead(folder: HfFolder, cfg: DecoderConfig, *, behind: int) -> DecoderConfig:
    """The configuration with the modules of multi-token prediction that it describes, or, where the folder holds
    nothing of one (transformers saves none, and describes one), without. `behind`: layers of the folder, which its
    modules lie behind. ValueError for a folder with what it does not describe: it would be lost when it is saved.
    """
    beyond = ("mtp.", f"model.layers.{behind}.")
    found = next((name for name in folder.tensors if name.startswith(beyond)), None)
    if found is None:
        return replace(cfg, mtp=())
    if not cfg.mtp or found.startswith("mtp."):
        raise ValueError(
            f"{folder.path}: {found!r} is of a module of multi-token prediction that the library does not compute "
            f"({CONFIG} describes {len(cfg.mtp)}, as num_nextn_predict_layers of DeepSeek-V3): take such tensors out "
            "of the folder"
        )
    return cfg


GENERATION = "generation_config.json"
"""What a folder says of how its model generates, which `save` keeps."""


@dataclass(frozen=True)
class NativeFiles:
    """A folder, and what of it is parameters and what the state of balancing, which lies at `balance` in its names.

    `others`: its tensors that are neither, which a folder that is saved gets as they are.
    """

    folder: HfFolder
    specs: Tree
    beside: Tree
    names: Names
    others: tuple[str, ...] = ()

    def load(self, into: Tree | None = None) -> Tree:
        """New parameters, or those of `into` filled."""
        self.folder.require_all_known((*(name.name for name in self.names), *self.others), besides=DERIVED)
        if into is None:
            found = load_hf(self.folder, self._with(self.specs, self.beside), self.names, unexpected="ignore")
            return {name: found[name] for name in self.specs}
        beside = map_with_paths(lambda _, s: torch.empty(s.shape), self.beside)
        fill_hf(self._with(into, beside), self.folder, self.names, unexpected="ignore")
        return into

    def read(self, path: str) -> Tensor:
        """One parameter, whole. ValueError as `load_hf`."""
        spec = dict(leaves_with_paths(self.specs))[path]
        names = [name for name in self.names if name.leaf == path]
        part = {path: whole(spec.shape)}
        return read_parts(self.folder, {path: Entry(spec.shape, spec.dtype)}, names, part)[path]

    def balance(self) -> Tree:
        """The state of balancing, `router_bias_LE`; empty without one."""
        if not self.beside:
            return {}
        names = [name for name in self.names if name.leaf.startswith("balance.")]
        found: Tree = load_hf(self.folder, {"balance": self.beside}, names, unexpected="ignore")["balance"]
        return found

    def save(self, balance: Tree, params: Tree, folder: str | Path, state: Tree | None = None) -> None:
        """Write the parameters, and this state or `balance`, to a folder, with the `others`, which are read now."""
        tree, names = self._with(params, state or balance), self.names
        if self.others:
            kept = tuple(HfTensor(name, f"others.{i}") for i, name in enumerate(self.others))
            stored = {one.leaf: self.folder.tensors[one.name] for one in kept}
            entries = {leaf: Entry(one.shape, one.dtype) for leaf, one in stored.items()}
            read = read_parts(self.folder, entries, kept, {leaf: whole(one.shape) for leaf, one in stored.items()})
            tree = {**tree, "others": list(read.values())}
            names = tuple(sorted((*names, *kept), key=natural_order))
        told = self.folder.path / GENERATION
        beside = {GENERATION: read_member(told.parent, GENERATION, limit=JSON_BYTES)} if told.is_file() else {}
        save_hf(tree, folder, self.folder.config(), names, beside=beside)

    def _with(self, tree: Tree, beside: Tree) -> Tree:
        return {**tree, "balance": beside} if beside else tree


@dataclass(frozen=True)
class NativeDecoder:
    """A decoder's functions of a `Model`. It drops nothing, so a key makes no difference.

    `balance`: the state of loss-free balancing that the functions take where they are given none; empty without one.
    """

    cfg: DecoderConfig
    balance: Tree = field(default_factory=dict)

    def loss(self, params: Tree, batch: Mapping[str, Any], key: Tensor | None = None, state: Tree | None = None) -> Any:
        """The `Mean` cross entropy of the batch's labels, or with loss-free balancing `(Mean, new state)`: biases moved
        against the load of this batch at the rate of the configuration. `key`: int64 `[2]`, which nothing draws from.

        With modules of multi-token prediction the `WeightedSum` of that mean and of theirs, each of which weighs
        `mtp_weight` over their number.

        ValueError for a batch without labels, or that does not fit.
        """
        if not self.balance:
            return self._loss(params, batch, key, state)[0]
        loss, loads = self.routed(params, batch, key, state)
        return loss, self.rebalanced(state or self.balance, loads)

    def routed(
        self, params: Tree, batch: Mapping[str, Any], key: Tensor | None = None, state: Tree | None = None
    ) -> tuple[Mean | WeightedSum, Mapping[str, RouterLoad]]:
        """The loss without a state, and what each router did, by the path of its layer. `key`: int64 `[2]`, which
        nothing draws from. ValueError as `loss`.
        """
        loss, stats = self._loss(params, batch, key, state)
        return loss, router_loads(self.cfg, stats)

    def rebalanced(self, state: Tree, loads: Mapping[str, RouterLoad]) -> Tree:
        """The state after a step whose routers did this (`ftrain.modules.moe.update_bias`)."""
        rate = (*self.cfg.routers, *self.cfg.mtp_routers)[0].bias_rate
        ahead = [load.load_E for path, load in loads.items() if path.startswith(_AHEAD)]
        of = {"router_bias_LE": [load.load_E for load in loads.values()][: -len(ahead) or None], BIASES: ahead}
        return {name: update_bias(bias_LE, torch.stack(of[name]), rate=rate) for name, bias_LE in state.items()}

    def _loss(
        self, params: Tree, batch: Mapping[str, Any], key: Tensor | None, state: Tree | None
    ) -> tuple[Mean | WeightedSum, decoder.DecoderStats]:
        del key
        if "labels" not in batch:
            raise ValueError("a loss needs the batch's 'labels'")
        hidden_TD, stats = self._run(params, batch, state)
        mean = decoder.loss(params, hidden_TD, batch["labels"].flatten(), self.cfg)
        if not self.cfg.mtp:
            return mean, stats
        ahead, routed = self._ahead(params, batch, hidden_TD, state)
        weights = dict.fromkeys(ahead, self.cfg.mtp_weight / len(ahead))
        return weighted_sum({"next": mean, **ahead}, weights), stats._replace(mtp=routed)

    def token_losses(
        self, params: Tree, batch: Mapping[str, Any], key: Tensor | None = None, state: Tree | None = None
    ) -> Tensor:
        """The cross entropy of each label, `[T]` or `[B, L]`, 0 where there is none. ValueError for a batch that does
        not fit.
        """
        del key
        hidden_TD = self._run(params, batch, state)[0]
        losses_T = decoder.token_losses(params, hidden_TD, batch["labels"].flatten(), self.cfg)
        return losses_T.unflatten(0, batch["tokens"].shape)

    def logits(
        self, params: Tree, batch: Mapping[str, Any], key: Tensor | None = None, state: Tree | None = None
    ) -> Tensor:
        """The scores `[T, V]` or `[B, L, V]`. ValueError for a batch that does not fit."""
        del key
        scores = decoder.logits(params, self._run(params, batch, state)[0], self.cfg)
        return scores.unflatten(0, batch["tokens"].shape)

    def hidden(
        self, params: Tree, batch: Mapping[str, Any], key: Tensor | None = None, state: Tree | None = None
    ) -> Tensor:
        """What the head reads, `[T, D]` or `[B, L, D]`. ValueError for a batch that does not fit."""
        del key
        return self._run(params, batch, state)[0].unflatten(0, batch["tokens"].shape)

    def _run(self, params: Tree, batch: Mapping[str, Any], state: Tree | None) -> tuple[Tensor, decoder.DecoderStats]:
        require_tokens("the decoder", batch, LANGUAGE)
        return decoder.apply(
            params,
            batch["tokens"].flatten(),
            positions=places_of(batch),
            segments=documents_of(batch),
            cfg=self.cfg,
            balance=state or self.balance or None,
        )

    def _ahead(
        self, params: Tree, batch: Mapping[str, Any], hidden_TD: Tensor, state: Tree | None
    ) -> tuple[dict[str, Mean], RouterStats | None]:
        """The losses of the modules of multi-token prediction by name, and what their routers did."""
        ahead, routed = multi_token.apply(
            params,
            hidden_TD,
            batch["tokens"].flatten(),
            batch["labels"].flatten(),
            positions=places_of(batch),
            segments=documents_of(batch),
            cfg=self.cfg,
            balance=state or self.balance or None,
        )
        return {f"mtp_{k}": decoder.loss(params, *one, self.cfg) for k, one in enumerate(ahead, 1)}, routed


def router_loads(cfg: DecoderConfig, stats: decoder.DecoderStats) -> dict[str, RouterLoad]:
    """What each router did, by the path of its layer; where a layer has several, and their number in it."""
    layers = [(f"layers.{i}", layer_block(cfg, i)) for i in range(cfg.layers)]
    ahead = [(f"{_AHEAD}{i}", block) for i, block in enumerate(cfg.mtp)]
    found = dict[str, RouterLoad]()
    for blocks, recorded in ((layers, stats.router), (ahead, stats.mtp)):
        routers = [(path, n, len(block.routers)) for path, block in blocks for n in range(len(block.routers))]
        names = [path if of == 1 else f"{path}.{n}" for path, n, of in routers]
        found |= zip(names, loads_of(recorded), strict=True) if recorded is not None else {}
    return found
