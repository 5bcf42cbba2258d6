"""The training of the omni MoE as a search of layouts sees it: shapes alone, at any depth and of any size."""

import math
import os
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, NamedTuple

import torch

from experiments.decoder_plan import active_weights
from experiments.omni import model as sizes
from experiments.omni import training
from experiments.omni.language import tokenizer
from experiments.omni.training import TrainConfig
from ftrain import AutoPlan, Aval, Precision, SavedPlan, TrainState, tree
from ftrain.kernels.documents import Documents
from ftrain.modules import audio_encoder, omni, spec, vision_encoder
from ftrain.modules import decoder as foundation
from ftrain.modules.mesh_packing import BATCH
from ftrain.modules.omni import OmniModel
from ftrain.plan.auto import require_ranks
from ftrain.plan.file import load_plan
from ftrain.plan.space import Candidate, ModelShape
from ftrain.plan.workload import WorkloadStep
from ftrain.run.ranks import MeshFlags
from ftrain.sharding import BatchRows, Layout, Mesh, Plan
from ftrain.sharding.mesh import Kind

AUTO = "auto"
WHOLE = Layout(sequence=None)
"""Each rank holds whole items of media."""
_CPU = torch.device("cpu")
_TASKS = ("text", "text_to_image", "text_to_audio")  # what reads, draws, speaks: the names only tell which is which
_READ = 0.25  # of a pack's tokens
_DRAWN = 0.125
_DOCUMENTS = 64  # places for documents, or for items of a modality, in a pack


def plan_for_search(*, tokens: int, packs: int, size: str = "30b-a3b") -> "OmniWorkload":
    """What `ftrain plan` searches: `packs` packs of `tokens` tokens a step."""
    return OmniWorkload(size, tokens=tokens, packs=packs)


class Laid(NamedTuple):
    """How a run is laid out: what `ftrain.jit` takes as its plan, and how batches are made for it: in how many packs,
    each with its media in how many parts.
    """

    plan: Plan | AutoPlan | SavedPlan | None
    packs: int
    parts: int


def laid_out(plan: str | None, mesh: Mesh | None) -> Laid:
    """The layout of a run on the ranks of a mesh (None: a single one): by its sizes, by "auto", or by a plan file.

    Batches for "auto" divide over any layout: they have a pack and a part for each rank.
    """
    if plan is None:
        return Laid(None, 1, 1) if mesh is None else Laid(training.plan(mesh), *_packs_and_parts(mesh))
    kind: Kind = "process" if mesh is None else mesh.kind
    ranks = 1 if mesh is None else mesh.size
    if plan == AUTO:
        fixed = training.plan(Mesh(kind="fake"))
        auto = AutoPlan(ranks=ranks, kind=kind, packs=ranks, batch=fixed.batch, components=fixed.components)
        return Laid(auto, ranks, ranks)
    return Laid(SavedPlan(plan, kind=kind), *((1, 1) if mesh is None else _packs_and_parts(mesh)))


def mesh_flags(plan: str | None, given: MeshFlags) -> MeshFlags:
    """The sizes of the mesh: as given, or those of a plan file. ValueError if that is for another number of ranks."""
    if plan is None or plan == AUTO:
        return given
    found = load_plan(plan)
    if found.candidate.micro_batches > 1:
        raise ValueError(
            f"{plan} has {found.candidate.micro_batches} micro-batches, and this experiment's step has none: search "
            "with as many --packs as GPUs, or fewer"
        )
    if "RANK" in os.environ:
        require_ranks(found, plan, "process")
    c = found.candidate
    return replace(given, replicate=c.replicate, shard=c.shard, sequence=c.sequence, expert=c.expert)


def _packs_and_parts(mesh: Mesh) -> tuple[int, int]:
    return mesh.replicate * mesh.shard, mesh.sequence


@dataclass(frozen=True)
class OmniWorkload:
    """The omni MoE of a size with the experiment's own step and optimizer, in bfloat16 over float32 masters.

    A quarter of a pack's tokens come from encoders, each of which reads as many rows, and an eighth each are codes of
    drawings and of sounds. The foundation shares packs and experts; the layouts of encoders and decoders are `parts`.
    """

    size: str
    tokens: int
    packs: int
    parts: Layout = WHOLE
    compute: str = "bfloat16"

    @property
    def name(self) -> str:
        """What it is called in tables."""
        return f"omni MoE {self.size}"

    @cached_property
    def model(self) -> OmniModel:
        """The whole model."""
        return self.shallow(self.stacks)

    @cached_property
    def stacks(self) -> Mapping[str, int]:
        """The foundation's layers, and those of each encoder."""
        return {"foundation": sizes.foundation(self.size, 1).layers, "encoders": sizes.parts(self.size).encoder_layers}

    @cached_property
    def model_shape(self) -> ModelShape:
        """As of the foundation, with the encoders' products."""
        base = self.model.foundation
        heads = base.attention
        encoders = sum(6.0 * spec.count(e.specs) for e in self.model.encoders.values()) * _rows(self.model)
        return ModelShape(
            tokens=self.tokens,
            packs=self.packs,
            layers=base.layers,
            d_model=base.d_model,
            heads=heads.heads,
            kv_heads=heads.kv_heads,
            head_dim=heads.head_dim,
            weight_flops=6.0 * active_weights(base) + encoders,
            attention_flops=12.0 * self.tokens * heads.heads * heads.head_dim * base.layers,
            experts=base.moe.experts if base.moe else 0,
            top_k=base.moe.top_k if base.moe else 0,
            most_micro=1,
        )

    def make(self, depths: Mapping[str, int], candidate: Candidate) -> WorkloadStep:
        """The step with so many layers in the foundation and in each encoder."""
        net = self.shallow(depths)
        tx = training.transform(TrainConfig(steps=1000))
        balance = foundation.balance_specs(net.foundation)
        specs = omni.specs(net)
        state = TrainState.create(spec.abstract(specs), tx, extra={"balance": spec.abstract(balance)})
        return WorkloadStep(
            step=training.train_step(net, tx, _TASKS, training.loss_weights(_TASKS)),
            state=tree.map(lambda x: Aval(tuple(x.shape), x.dtype, _CPU), state),
            batch=self.batch(net, candidate),
            specs=specs,
            rules={**BATCH, "decoders.*.task_n": BatchRows()},
            components={"encoders": self.parts, "decoders": self.parts},
            precision=Precision(compute=self.compute),
            init=lambda key: training.init_state(net, tx, key),
        )

    def shallow(self, depths: Mapping[str, int]) -> OmniModel:
        """The model with so many layers in each stack."""
        words = tokenizer()
        whole = sizes.omni_model(self.size, words, audio=True)
        configs = sizes.readers(self.size)
        made = {
            "image": vision_encoder.encoder(replace(configs.image, layers=depths["encoders"]), begin=0, end=0),
            "video": vision_encoder.encoder(replace(configs.video, layers=depths["encoders"]), begin=0, end=0),
        }
        if configs.audio is not None:
            made["audio"] = audio_encoder.encoder(replace(configs.audio, layers=depths["encoders"]), begin=0, end=0)
        return OmniModel(replace(whole.foundation, layers=depths["foundation"]), made, whole.decoders)

    def batch(self, net: OmniModel, candidate: Candidate) -> dict[str, Any]:
        """The arrays of a step (see `ftrain.modules.mesh_packing`), their media rounded up to what all ranks share
        evenly.
        """
        T = self.tokens * self.packs
        ids: dict[str, Any] = dict.fromkeys(("tokens_T", "labels_T", "positions_T", "task_T"), _ids(T))
        ids["segments_T"] = _documents(T, self.packs)
        encoders = {}
        for name, encoder in net.encoders.items():
            n = _whole_ranks(T * _rows(net) / encoder.rows_per_token, candidate.ranks)
            N = n * encoder.rows_per_token
            features = {
                f: Aval((N, *row.shape), getattr(torch, row.dtype), _CPU) for f, row in encoder.features.items()
            }
            segments_N = _documents(N, candidate.ranks)
            encoders[name] = {"features": {**features, "segments_N": segments_N}, "index_n": _ids(n)}
        decoders = {}
        for name, decoder in net.decoders.items():
            B = _whole_ranks(T * _DRAWN / decoder.codes_per_target, candidate.ranks)
            n = B * decoder.codes_per_target
            target = Aval((B, *decoder.target.shape), getattr(torch, decoder.target.dtype), _CPU)
            decoders[name] = {"target": target, "index_n": _ids(n), "task_n": _ids(n)}
        return {**ids, "valid_T": Aval((T,), torch.bool, _CPU), "encoders": encoders, "decoders": decoders}


def _rows(net: OmniModel) -> float:
    """Rows that each encoder reads for a token of the pack."""
    return _READ / sum(1 / encoder.rows_per_token for encoder in net.encoders.values())


def _whole_ranks(number: float, ranks: int) -> int:
    return max(1, math.ceil(number / ranks)) * ranks


def _documents(n: int, packs: int) -> Any:
    """Of `packs` packs of n tokens in all, each one document or as many as there are places."""
    offsets_N = Aval((packs * _DOCUMENTS + 1,), torch.int32, _CPU)
    return Documents(_ids(n), offsets_N, n // packs)  # type: ignore[arg-type]


def _ids(n: int) -> Aval:
    return Aval((n,), torch.int64, _CPU)
