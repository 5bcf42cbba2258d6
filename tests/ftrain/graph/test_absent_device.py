"""A program for a card is lowered without one: the same graph, prices and plan."""

import importlib
import operator
import pkgutil
from collections import Counter
from typing import Any

import pytest
import torch
from torch import Tensor, fx

import ftrain
from ftrain import Aval, Precision, TrainState, optim, tree
from ftrain.analysis.flops import has_flops, is_product
from ftrain.analysis.pieces import Pieces
from ftrain.graph.loop import is_loop, loop_body
from ftrain.modules.attention import AttentionConfig
from ftrain.modules.decoder import DecoderConfig
from ftrain.modules.moe import MoEConfig
from tests.helpers.mesh_models import dense, diffusion, language_model, omni

CUDA = torch.device("cuda", 0)
EXPERTS = DecoderConfig(
    64, 32, layers=2, attention=AttentionConfig(32, heads=4, kv_heads=2, head_dim=8), moe=MoEConfig(32, 16, 8, 2)
)
MODELS = {"dense": dense, "experts": lambda: language_model(EXPERTS), "DiT": diffusion, "omni": omni}
NO_PRODUCTS = {
    "adamw_fused", "adamw_in_place", "combine", "combine_backward", "ctc", "ctc_backward", "embedding",
    "embedding_backward", "exchange_rows",
    "extremes", "fetch_start", "fetch_wait", "gather_ranks", "host_size", "merge_rows", "merge_rows_backward",
    "micro_offsets", "micro_places", "whole_documents", "offload_start",
    "offload_wait", "philox", "philox_key", "rms_norm", "rms_norm_backward", "rope", "shift_ranks",
    "sums_of_squares", "swiglu", "swiglu_backward", "batch_norm_cudnn", "batch_norm_miopen", "to_layout",
    "fill_bernoulli", "fill_bernoulli_each", "fill_cauchy", "fill_exponential", "fill_geometric", "fill_log_normal",
    "fill_normal", "fill_random", "fill_random_below", "fill_random_between", "fill_uniform", "nf4_numbers",
}  # fmt: skip


def lowered(model: Any, device: torch.device, *, compute: str = "bfloat16", backend: str = "aten") -> Any:
    """A whole training step of a model for a device, from shapes alone."""
    tx = optim.chain(optim.clip_by_global_norm(1.0), optim.adamw(1e-3))

    def step(state: TrainState, batch: Any) -> Any:
        (loss, _), grads = ftrain.value_and_grad(model.loss, has_aux=True)(state.params, batch)
        return state.apply(tx, grads), loss

    def shown(leaf: Any) -> Any:
        return Aval(tuple(leaf.shape), leaf.dtype, device) if isinstance(leaf, Tensor) else leaf

    state = tree.map(shown, TrainState.create(model.params(torch.float32), tx))
    precision = Precision(compute=compute)
    return ftrain.jit(step, donate="state", precision=precision, backend=backend).lower(
        state, tree.map(shown, model.batch(1))
    )


def nodes(module: fx.GraphModule) -> list[fx.Node]:
    """All ops of a graph and of the bodies of its loops."""
    found = []
    for node in module.graph.nodes:
        if node.op == "call_function" and node.target is not operator.getitem:
            found += nodes(loop_body(node)) if is_loop(node) else [node]
    return found


def histogram(module: fx.GraphModule) -> Counter[str]:
    return Counter(str(node.target) for node in nodes(module))


def test_kernels_choose_what_they_run_on_the_card():
    found = histogram(lowered(MODELS["experts"](), CUDA).graph)
    on_cpu = histogram(lowered(MODELS["experts"](), torch.device("cpu")).graph)
    assert found["aten._grouped_mm.default"] == on_cpu["ftrain.grouped_mm.default"] * 3  # each with two gradients
    for op in ("ftrain.grouped_mm.default", "ftrain.combine.default", "ftrain.rope.default", "ftrain.rms_norm.default"):
        assert on_cpu[op]
        assert not found[op]


def test_all_values_are_said_to_be_on_the_card():
    compiled = lowered(MODELS["experts"](), CUDA)
    values = [v for n in compiled.graph.graph.nodes for v in [n.meta.get("val")] if isinstance(v, Tensor)]
    assert {v.device for v in values} == {CUDA}
    assert all(v.is_cuda for v in values)
    factories = [n.kwargs["device"] for n in compiled.graph.graph.nodes if "device" in n.kwargs]
    assert factories
    assert {torch.device(d) for d in factories} == {CUDA}


def test_the_plan_is_the_card_s():
    """Runs of elementwise ops are one node, and memory is taken in the allocator's blocks."""
    compiled = lowered(MODELS["experts"](), CUDA, backend="auto")
    assert (compiled.setting.backend, compiled.setting.granularity) == ("inductor", 512)
    assert any("fused" in str(n.target) for n in compiled.executed.graph.nodes)
    live = Pieces.of(compiled.executed, round_to=compiled.setting.granularity).live
    assert live.max() > 0
    assert not (live % 512).any()


@pytest.mark.parametrize("name", MODELS)
def test_every_product_of_a_lowered_program_has_flops(name):
    compiled = lowered(MODELS[name](), CUDA)
    products = {n.target for n in nodes(compiled.graph) if is_product(n.target)}
    assert len(products) > 2
    assert not {str(op) for op in products if not has_flops(op)}
    assert compiled.cost().unpriced == ()


def test_every_op_of_ours_has_flops_or_no_products():
    """A new op is in one of two lists, or this fails. Ops exist once the module that makes them is imported."""
    for module in pkgutil.walk_packages(ftrain.__path__, "ftrain."):
        importlib.import_module(module.name)
    ours = {s.name for s in torch._C._jit_get_all_schemas() if s.name.startswith("ftrain::")}
    unknown = {name for name in ours - {f"ftrain::{n}" for n in NO_PRODUCTS} if not has_flops(_overload(name))}
    assert not unknown


def _overload(name: str) -> Any:
    return getattr(torch.ops.ftrain, name.removeprefix("ftrain::")).default


@pytest.mark.parametrize("name", ["dense", "experts"])
def test_flops_do_not_depend_on_the_device(name):
    """Each device's kernels do the same products of a bfloat16 step; the router's are made by another op on CUDA."""
    model = MODELS[name]()
    assert lowered(model, CUDA).cost().flops == lowered(model, torch.device("cpu")).cost().flops


def test_a_budget_in_bytes_is_kept_on_paper_and_one_of_the_card_s_memory_is_refused(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    aval = Aval((512, 512), torch.float32, torch.device("cuda", 0))

    def loss(w, x):
        for _ in range(8):
            x = (x @ w).sin()
        return x.square().mean()

    step = ftrain.value_and_grad(loss)
    whole = ftrain.jit(step, backend="aten").lower(aval, aval).memory().total
    remat = ftrain.Remat(budget=int(0.8 * whole))
    assert ftrain.jit(step, backend="aten", remat=remat).lower(aval, aval).memory().total <= 0.8 * whole
    with pytest.raises(ValueError, match="this machine has no cuda:0, so its memory is not known: give a budget"):
        ftrain.jit(step, remat=ftrain.Remat(budget="fit")).lower(aval, aval)


@pytest.mark.gpu
@pytest.mark.parametrize(
    ("name", "compute"), [*((name, "bfloat16") for name in MODELS), ("experts", "float32"), ("DiT", "float32")]
)
def test_with_a_card_the_graph_is_the_one_that_was_lowered_without(name, compute, monkeypatch):
    here = lowered(MODELS[name](), CUDA, compute=compute)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    absent = lowered(MODELS[name](), CUDA, compute=compute)
    assert histogram(absent.graph) == histogram(here.graph)
    assert absent.memory() == here.memory()
    # statistics of a layer norm over bfloat16 are float32 on a card
    assert absent.cost().bytes == pytest.approx(here.cost().bytes, rel=1e-3)
    assert absent.cost().by_phase == here.cost().by_phase
