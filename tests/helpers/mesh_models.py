"""Small models with everything that a mesh can divide, as pure steps that return the loss and every gradient."""

import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor

import ftrain
from ftrain import tree
from ftrain.kernels.documents import Documents, aligned_documents
from ftrain.modules import decoder, dit, moe
from ftrain.modules import omni as omni_model
from ftrain.modules.attention import AttentionConfig
from ftrain.modules.decoder import DecoderConfig
from ftrain.modules.dit import DitConfig
from ftrain.modules.mesh_packing import BATCH, pack_for_mesh
from ftrain.modules.moe import MoEConfig
from ftrain.modules.packing import Budget
from ftrain.modules.spec import Normal, map_with_paths
from ftrain.sharding import Layout, Mesh, Plan, Tokens
from tests.helpers.tiny_omni import MODEL as OMNI
from tests.helpers.tiny_omni import documents

DOCUMENTS = (9, 3, 17, 1, 2)  # lengths that cross the edges of every rank's share


@dataclass(frozen=True, eq=False)
class Model:
    """`loss(params, batch) -> (Mean or WeightedSum, aux)`; `batch(packs)` is the batch of a mesh with so many packs."""

    specs: Any
    loss: Callable
    batch: Callable[[int], dict[str, Any]]
    rules: dict[str, Any]

    def step(self, params: Any, batch: Any) -> tuple[Any, Any, Any]:
        """Loss, auxiliary results, gradients."""
        (loss, aux), grads = ftrain.value_and_grad(self.loss, has_aux=True)(params, batch)
        return loss, aux, grads

    def params(self, dtype: torch.dtype) -> Any:
        """The same numbers in every dtype."""
        return tree.map(lambda p: p.to(dtype), ftrain.init(self.specs, ftrain.key(0)))


def dense(*, heads: int = 8, kv_heads: int = 2, layers: int = 2, tied: bool = True) -> Model:
    """A decoder of the Llama and Qwen3 family."""
    heads_of = AttentionConfig(32, heads=heads, kv_heads=kv_heads, head_dim=4, qk_norm=True, bias=True)
    return language_model(DecoderConfig(61, 32, layers=layers, attention=heads_of, d_hidden=40, tie_embeddings=tied))


def mixture(*, heads: int = 8, kv_heads: int = 4, layers: int = 2, balance: str = "aux") -> Model:
    """A decoder with experts, shared ones included."""
    heads_of = AttentionConfig(32, heads=heads, kv_heads=kv_heads, head_dim=4)
    experts = MoEConfig(32, 12, experts=8, top_k=2, shared_experts=1, balance=balance, aux_coefficient=0.1)
    return language_model(DecoderConfig(64, 32, layers=layers, attention=heads_of, moe=experts))


def language_model(cfg: DecoderConfig) -> Model:
    """Next-token loss over packs of documents, with the balance loss of its experts; with experts as `Documents`."""

    def loss(params: Any, batch: dict[str, Tensor]) -> tuple[Any, Any]:
        hidden_TD, stats = decoder.apply(
            params, batch["tokens_T"], positions=batch["positions_T"], segments=batch["segments_T"], cfg=cfg
        )
        terms = {"text": decoder.loss(params, hidden_TD, batch["labels_T"], cfg)}
        if stats.router is not None:
            terms["balance"] = moe.aux_loss(stats.router)
        return ftrain.weighted_sum(terms, {"balance": 0.1}), terms

    def batch(packs: int) -> dict[str, Any]:
        made = text_batch(cfg.vocab, packs)
        if cfg.moe is None:
            return made
        return {**made, "segments_T": Documents.of(made["segments_T"], packs=packs)}

    return Model(decoder.specs(cfg), loss, batch, {})


def omni() -> Model:
    """The omni MoE: vision, video and audio encoders, a drawing decoder, experts with a balance loss."""
    budget = Budget(64, rows={"image": 128, "video": 128, "audio": 96}, targets={"draw": 4})

    def loss(params: Any, batch: dict[str, Any]) -> tuple[Any, Any]:
        terms, _ = omni_model.loss_terms(params, batch, model=OMNI)
        return ftrain.weighted_sum(terms, {"balance": 0.1}), terms

    @functools.cache
    def batch(packs: int) -> dict[str, Any]:
        given = documents() * (2 * packs)  # more than there is room for
        return pack_for_mesh(given, budget=budget, model=OMNI, packs=packs, parts=4, overflow="leave").batch

    return Model(omni_model.specs(OMNI), loss, batch, dict(BATCH))


def diffusion(*, told: bool = True) -> Model:
    """A diffusion transformer over packed latents that reads text; gates are open. `told`: by `Documents`, not ids."""
    cfg = DitConfig(d_in=6, d_model=48, layers=1, heads=8, d_hidden=40, d_text=10, time_features=16)
    specs = map_with_paths(lambda _, s: replace(s, init=Normal(0.1)), dit.specs(cfg))
    names = ("time_N", "positions_AN", "segments_N", "text_SC", "text_segments_S")

    def loss(params: Any, batch: dict[str, Tensor]) -> tuple[Any, Any]:
        data, noise = batch["data_NP"], batch["noise_NP"]
        dtype = params["patch"]["w"].dtype
        given = {n: batch[n].to(dtype) if n in ("time_N", "text_SC") else batch[n] for n in names}
        x = dit.noised(data.to(dtype), noise.to(dtype), given["time_N"])
        flow = dit.flow_loss(dit.apply(params, x, cfg=cfg, **given), data, noise)
        return flow, {"flow": flow}

    rules = {"positions_AN": Tokens(1), "text_SC": Tokens(), **({} if told else {"text_segments_S": Tokens()})}
    return Model(specs, loss, lambda packs: _latents(packs, told), rules)


def _latents(packs: int, told: bool) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(2)
    rows, texts = (torch.tensor(n * packs) for n in (DOCUMENTS, (3, 1, 8, 2, 2)))
    segments, text_segments = (torch.repeat_interleave(torch.arange(len(n)), n) for n in (rows, texts))
    documents = aligned_documents(segments, text_segments, packs=packs) if told else (segments, text_segments)
    return {
        "data_NP": torch.randn(len(segments), 6, generator=generator),
        "noise_NP": torch.randn(len(segments), 6, generator=generator),
        "time_N": torch.rand(len(rows), generator=generator)[segments],
        "positions_AN": torch.randint(0, 9, (3, len(segments)), generator=generator),
        "segments_N": documents[0],
        "text_SC": torch.randn(int(texts.sum()), 10, generator=generator),
        "text_segments_S": documents[1],
    }


def text_batch(vocab: int, packs: int, documents: tuple[int, ...] = DOCUMENTS) -> dict[str, Tensor]:
    """`packs` packs of the same lengths of documents; ids differ from pack to pack."""
    generator = torch.Generator().manual_seed(1)
    lengths = torch.tensor(documents * packs)
    segments_T = torch.repeat_interleave(torch.arange(len(lengths)), lengths)
    positions_T = torch.cat([torch.arange(n) for n in lengths.tolist()])
    tokens_T = torch.randint(0, vocab, segments_T.shape, generator=generator)
    labels_T = decoder.next_token_labels(tokens_T, segments_T)
    return {"tokens_T": tokens_T, "positions_T": positions_T, "segments_T": segments_T, "labels_T": labels_T}


def compare(model: Model, plan: Plan, *, dtype: torch.dtype = torch.float32, **options: Any) -> tuple[float, float]:
    """The relative differences of the loss, and the largest of the gradients', between one device and the mesh."""
    packs = plan.mesh.replicate * plan.mesh.shard
    params, batch, one = on_one_device(model, packs, dtype)
    many = ftrain.jit(model.step, plan=plan, specs=model.specs, **options)(params, batch)
    for path, a, b in zip(tree.paths(one[1]), tree.leaves(one[1]), tree.leaves(many[1]), strict=True):
        torch.testing.assert_close(b, a, rtol=1e-5, atol=1e-6, msg=lambda m, path=path: f"{path}: {m}")
    gradients = [(a, b) for a, b in zip(tree.leaves(one[2]), tree.leaves(many[2]), strict=True)]
    largest = max(float(a.norm()) for a, _ in gradients)
    worst = max(_relative(a, b, largest) for a, b in gradients)
    return float(((one[0] - many[0]) / one[0]).abs()), worst


def _relative(a: Tensor, b: Tensor, largest: float) -> float:
    """The difference over the norm; of gradients that are zero but for rounding, over the largest one's."""
    nothing = max(float(a.norm()), float(b.norm())) < 1e-5 * largest
    return float((a - b).norm()) / (largest if nothing else float(a.norm()))


@functools.cache
def on_one_device(model: Model, packs: int, dtype: torch.dtype) -> tuple[Any, Any, Any]:
    """Parameters, batch, and what the step makes of them, op by op."""
    batch, params = model.batch(packs), model.params(dtype)
    return params, batch, model.step(params, batch)


def plan_for(model: Model, mesh: Mesh, *args: Layout, components: Mapping[str, Layout] = MappingProxyType({})) -> Plan:
    """A plan with the batch rules of the model."""
    return Plan(mesh, *args, batch=model.rules, components=components)


def accumulated(model: Model, micro_batches: int) -> Model:
    """The same model over micro-batches: its batch for so many packs has as many for each data rank."""
    loss = ftrain.accumulate(model.loss, micro_batches, has_aux=True, batch=model.rules)
    return replace(model, loss=loss, batch=lambda packs: model.batch(packs * micro_batches))


__all__ = ["Model", "accumulated", "compare", "dense", "diffusion", "language_model", "mixture", "omni", "plan_for"]
