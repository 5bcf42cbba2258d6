"""Under remat="layer" each further layer keeps its input, once, on a card as on a CPU.

What is kept is counted in the finished graph: memory that the forward pass makes and that is alive when the backward
begins. The models are lowered for CUDA without one: there a norm is written out in many ops.
"""

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor

import ftrain
from ftrain import Aval, Precision, tree
from ftrain.analysis.pieces import Pieces
from ftrain.debug import check_passes
from ftrain.graph.layers import layer_of_node
from ftrain.kernels.rms_norm import rms_norm
from ftrain.modules import decoder, dit, encoder_stack, moe
from ftrain.modules.attention import AttentionConfig
from ftrain.modules.decoder import DecoderConfig
from ftrain.modules.dit import DitConfig
from ftrain.modules.encoder_stack import StackConfig
from ftrain.modules.moe import MoEConfig
from ftrain.remat.policy import Remat

CUDA, CPU = torch.device("cuda", 0), torch.device("cpu")
T, D, EXPERTS = 512, 256, 4
RESIDUAL = 2 * T * D  # bytes, in bfloat16
HEADS = AttentionConfig(D, heads=4, kv_heads=2, head_dim=64)
DTYPES = {"x": torch.float32, "i": torch.int64}


@dataclass(frozen=True)
class Family:
    """`make(layers)` gives a loss and the specs of its parameters; `batch`: shapes, and "x" floats or "i" ids."""

    make: Callable[[int], tuple[Callable[[Any, Any], Any], Any]]
    batch: dict[str, tuple[str, tuple[int, ...]]]

    def step(self, layers: int) -> tuple[Callable[[Any, Any], Any], Any]:
        """The gradient of the loss, and the specs."""
        loss, specs = self.make(layers)
        return ftrain.value_and_grad(loss), specs

    def lowered(self, layers: int, device: torch.device, remat: Any, *, compute: str | None = "bfloat16") -> Any:
        """The step for a device from shapes alone."""
        step, specs = self.step(layers)
        params = tree.map(lambda s: Aval(s.shape, torch.float32, device), specs)
        batch = {name: Aval(shape, DTYPES[kind], device) for name, (kind, shape) in self.batch.items()}
        precision = Precision(compute=compute) if compute else None
        return ftrain.jit(step, remat=remat, precision=precision, backend="aten").lower(params, batch)


def decoder_family(**ffn: Any) -> Family:
    def make(layers: int) -> tuple[Callable[[Any, Any], Any], Any]:
        cfg = DecoderConfig(64, D, layers=layers, attention=HEADS, **ffn)

        def loss(params: Any, batch: Any) -> Any:
            hidden_TD, stats = decoder.apply(
                params, batch["tokens_T"], positions=batch["positions_T"], segments=batch["segments_T"], cfg=cfg
            )
            terms = {"text": decoder.loss(params, hidden_TD, batch["labels_T"], cfg)}
            if stats.router is not None:
                terms["balance"] = moe.aux_loss(stats.router)
            return ftrain.weighted_sum(terms, {"balance": 0.1})

        return loss, decoder.specs(cfg)

    return Family(make, dict.fromkeys(("tokens_T", "positions_T", "segments_T", "labels_T"), ("i", (T,))))


def dit_family(d_text: int) -> Family:
    def make(layers: int) -> tuple[Callable[[Any, Any], Any], Any]:
        cfg = DitConfig(d_in=16, d_model=D, layers=layers, heads=4, d_hidden=4 * D, d_text=d_text, time_features=32)

        def loss(params: Any, batch: Any) -> Any:
            dtype = params["patch"]["w"].dtype
            given = {**batch, "x_NP": batch["x_NP"].to(dtype)}
            if d_text:
                given["text_SC"] = given["text_SC"].to(dtype)
            return dit.apply(params, segments_N=None, cfg=cfg, **given).float().square().sum()

        return loss, dit.specs(cfg)

    batch = {
        "x_NP": ("x", (T, 16)),
        "time_N": ("x", (T,)),
        "positions_AN": ("i", (3, T)),
        "text_SC": ("x", (32, d_text)),
    }
    return Family(make, batch if d_text else {n: v for n, v in batch.items() if n != "text_SC"})


def stack_family() -> Family:
    def make(layers: int) -> tuple[Callable[[Any, Any], Any], Any]:
        cfg = StackConfig(D, layers=layers, heads=4, d_hidden=4 * D, position_axes=2)

        def loss(params: Any, batch: Any) -> Any:
            x_TD, positions = batch["x_TD"].to(params["norm_out"]["weight_D"].dtype), batch["positions_AT"]
            hidden_TD = encoder_stack.apply(params, x_TD, positions=positions, segments_T=batch["segments_T"], cfg=cfg)
            return hidden_TD.float().square().sum()

        return loss, encoder_stack.specs(cfg)

    return Family(make, {"x_TD": ("x", (T, D)), "positions_AT": ("i", (2, T)), "segments_T": ("i", (T,))})


FAMILIES = {
    "dense": decoder_family(d_hidden=704),
    "experts": decoder_family(moe=MoEConfig(D, 128, experts=EXPERTS, top_k=2)),
    "DiT": dit_family(0),
    "DiT that reads text": dit_family(64),
    "encoder": stack_family(),
}


def kept(compiled: Any) -> int:
    """Bytes that the forward pass makes and that are alive when the backward begins."""
    pieces = Pieces.of(compiled.graph)
    phases = [node.meta.get("phase") for node in pieces.nodes]
    begin = phases.index("backward")
    assert "forward" not in phases[begin:]
    made = [p for p in pieces.alive_at(begin) if pieces.owners[p].meta.get("phase") == "forward"]
    return sum(int(pieces.sizes[p]) for p in made if pieces.spans[1][p] > begin)


def more_kept(family: Family, device: torch.device, remat: Any = "layer") -> int:
    """What is kept with three layers and not with two."""
    return kept(family.lowered(3, device, remat)) - kept(family.lowered(2, device, remat))


@pytest.mark.parametrize("device", [CUDA, CPU], ids=str)
@pytest.mark.parametrize("name", FAMILIES)
def test_a_layer_more_keeps_its_input_and_nothing_else(name, device):
    # by design beside it: of a layer of experts, what its balance loss reads outside of layers
    balance = 68 if name == "experts" else 0
    assert more_kept(FAMILIES[name], device) == RESIDUAL + balance


def test_a_layer_that_is_kept_keeps_much_more():
    assert more_kept(FAMILIES["dense"], CUDA, "none") > 20 * RESIDUAL


@pytest.mark.parametrize("name", FAMILIES)
def test_a_cast_at_the_beginning_changes_no_path(name):
    """In bfloat16 all weights are cast before the first op; a product is about its weight all the same."""
    by_path = [
        Counter(n.meta.get("path") for n in compiled.graph.graph.nodes if "mm" in str(n.target))
        for compiled in (FAMILIES[name].lowered(2, CPU, "none", compute=c) for c in ("bfloat16", None))
    ]
    assert by_path[0] == by_path[1]
    assert all(f".layers.{i}." in " ".join(by_path[0]) for i in range(2))


class Prenorm:
    """A pre-norm stack whose norms are written out on every device: the first is read by its layer alone."""

    def __init__(self, layers: int) -> None:
        draw = torch.Generator().manual_seed(0)
        self.params = {
            "stem": torch.ones(D),
            "layers": [{"norm": torch.ones(D), "w": torch.randn(D, D, generator=draw) / D**0.5} for _ in range(layers)],
        }
        self.x_TD = torch.randn(T, D, generator=draw)

    @staticmethod
    def loss(params: Any, x_TD: Tensor) -> Tensor:
        x_TD = x_TD.bfloat16() * params["stem"]
        for layer in params["layers"]:
            x_TD = x_TD + torch.tanh(rms_norm(x_TD, layer["norm"], backend="reference") @ layer["w"])
        return x_TD.float().square().mean()

    def step(self, remat: Any) -> Any:
        return ftrain.jit(ftrain.value_and_grad(self.loss), remat=remat, precision=Precision(compute="bfloat16"))


@pytest.mark.parametrize("remat", ["layer", Remat(us_per_mb=1.0)], ids=str)
def test_every_pass_keeps_every_bit(remat):
    model = Prenorm(3)
    plain, again = (model.step(r)(model.params, model.x_TD) for r in ("none", remat))
    assert all(torch.equal(a, b) for a, b in zip(tree.leaves(plain), tree.leaves(again), strict=True))
    assert not [c for c in check_passes(model.step(remat), model.params, model.x_TD) if c.changed]


def test_what_several_layers_read_stays_where_it_is_made():
    def loss(params: Any, x_TD: Tensor) -> Tensor:
        x_TD = x_TD * params["stem"]
        wave_TD = x_TD.sin()  # no layer's own: two read it
        for layer in params["layers"]:
            x_TD = x_TD + (x_TD.cos() + wave_TD) @ layer["w"]
        return x_TD.square().mean()

    model = Prenorm(2)
    compiled = ftrain.jit(ftrain.value_and_grad(loss), remat="layer").lower(model.params, model.x_TD)
    forward = [n for n in compiled.graph.graph.nodes if n.meta.get("phase") == "forward"]
    layers = {op: [layer_of_node(n) for n in forward if str(n.target) == f"aten.{op}.default"] for op in ("sin", "cos")}
    assert layers == {"sin": [""], "cos": ["params.layers.0", "params.layers.1"]}
