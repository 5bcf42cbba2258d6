"""In which dtype a step computes: what a command line may choose, and what losses then see."""

import pytest
import torch

import ftrain
from ftrain import Precision, lora
from ftrain.modules.spec import ParamSpec, fan_in
from ftrain.sharding import Layout, Mesh, Plan
from ftrain.trace.precision import precision_on

CPU, CUDA = torch.device("cpu"), torch.device("cuda")


@pytest.mark.parametrize(
    ("device", "choice", "compute"),
    [
        (CPU, "auto", "float32"),
        (CUDA, "auto", "bfloat16"),
        (CPU, "bfloat16", "bfloat16"),
        (CUDA, "float32", "float32"),
    ],
)
def test_auto_is_bfloat16_on_cuda_alone(device, choice, compute):
    assert precision_on(device, choice) == Precision(compute=compute)


def test_an_unknown_choice_lists_the_known():
    with pytest.raises(ValueError, match=r"--precision 'float8' is not one of auto, float32, bfloat16"):
        precision_on(CPU, "float8")


@pytest.mark.parametrize("spelled", ["bfloat16", "bf16", torch.bfloat16])
def test_a_dtype_has_several_spellings(spelled):
    assert Precision(spelled) == Precision(compute="bfloat16") == Precision.of(spelled)
    assert Precision(reduce=spelled).reduce == "bfloat16"
    assert hash(Precision(spelled)) == hash(Precision(compute="bfloat16"))


@pytest.mark.parametrize(
    ("value", "words"),
    [
        ("float16", "float16 holds magnitudes .*to 65,504.*without loss scaling.*use 'bfloat16'"),
        (torch.half, "float16 holds magnitudes .*to 65,504"),
        ("fp16", "float16 holds magnitudes .*to 65,504"),
        ("float8_e4m3fn", "float8_e4m3fn needs scaled products, .*use 'bfloat16'"),
        (torch.float8_e5m2, "float8_e5m2 needs scaled products"),
        ("int32", r"'int32' is not one of 'float32', 'bfloat16', 'float64'.*Precision\('bfloat16'\)"),
        (torch.int64, "is not one of"),
        (16, "16 is not one of"),
    ],
)
def test_what_a_step_cannot_compute_in_is_refused_by_name(value, words):
    for make in (lambda: Precision(value), lambda: Precision(reduce=value), lambda: Precision.of(value)):
        with pytest.raises(ValueError, match=words):
            make()


def test_cast_shows_what_a_loss_sees():
    params = {"w": torch.randn(3, 4), "ids": torch.arange(3), "half": torch.randn(2).half()}
    seen = {}

    def loss(params):
        seen.update({name: leaf.dtype for name, leaf in params.items()})
        return params["w"].float().square().sum()

    precision = Precision(compute="bfloat16")
    floats = {name: leaf for name, leaf in params.items() if leaf.is_floating_point()}
    ftrain.jit(ftrain.value_and_grad(loss), precision=precision)(floats)
    cast = precision.cast(params)
    assert {name: leaf.dtype for name, leaf in cast.items() if name in seen} == seen
    assert cast["ids"] is params["ids"]
    assert all(a is b for a, b in zip(Precision().cast(params).values(), params.values(), strict=True))


def test_float32_is_the_same_program_as_no_precision():
    def loss(w, x):
        return (x @ w).square().sum()

    args = torch.randn(4, 3), torch.randn(5, 4)
    graphs = [
        [
            str(node.target)
            for node in ftrain.jit(ftrain.value_and_grad(loss), precision=p).lower(*args).graph.graph.nodes
        ]
        for p in (None, Precision())
    ]
    assert graphs[0] == graphs[1]


@pytest.mark.parametrize("of", ["gradient", "micro-batches", "forward"])
def test_kept_parameters_stay_as_they_are(of):
    """In every way in which a step gives parameters to a function; and in the cast outside of a step."""
    params = {"layers": [{"w": torch.randn(3, 3), "table": torch.randn(3)}], "head": torch.randn(3)}
    precision, seen = Precision("bf16", keep=("layers.*.table", "head")), {}

    def loss(params, x):
        seen.update(zip(ftrain.tree.paths(params), [p.dtype for p in ftrain.tree.leaves(params)], strict=True))
        layer = params["layers"][0]
        return ftrain.Mean.of(((x.to(layer["w"].dtype) @ layer["w"]) * layer["table"] * params["head"]).square())

    step = {
        "gradient": ftrain.value_and_grad(loss),
        "micro-batches": ftrain.value_and_grad(ftrain.accumulate(loss, 2)),
        "forward": ftrain.forward(lambda params, x: loss(params, x).value()),
    }[of]
    ftrain.jit(step, precision=precision)(params, torch.randn(4, 3))
    assert seen == {"head": torch.float32, "layers.0.table": torch.float32, "layers.0.w": torch.bfloat16}
    cast = precision.cast(params)
    assert seen == dict(zip(ftrain.tree.paths(cast), [p.dtype for p in ftrain.tree.leaves(cast)], strict=True))


def test_kept_parameters_stay_as_they_are_on_a_mesh_and_below_an_adapter():
    specs = {n: ParamSpec((4, 4), ("embed", "mlp"), fan_in(4)) for n in ("w", "wide")}
    adapter = lora.add(specs, "w", rank=2)
    params, seen = ftrain.init(specs, ftrain.key(0)), {}

    def loss(params, batch):
        seen.update({name: leaf.dtype for name, leaf in params.items()})
        return ftrain.Mean.of((batch.bfloat16() @ params["w"] + batch.bfloat16() @ params["wide"].bfloat16()).square())

    def of_delta(delta, base, batch):
        return loss(lora.bind(base, delta, adapter), batch)

    precision, x = Precision("bf16", keep=("wide",)), torch.randn(4, 4)
    plan = Plan(Mesh(shard=2, kind="virtual"), Layout())
    ftrain.jit(ftrain.value_and_grad(loss), precision=precision, plan=plan, specs=specs)(params, x)
    assert seen == {"w": torch.bfloat16, "wide": torch.float32}
    seen.clear()
    ftrain.jit(ftrain.value_and_grad(of_delta), precision=precision)(adapter.init(ftrain.key(1)), params, x)
    assert seen == {"w": torch.bfloat16, "wide": torch.float32}


def test_a_glob_that_keeps_nothing_is_refused():
    step = ftrain.jit(ftrain.grad(lambda p: p["head"].sum()), precision=Precision("bf16", keep=("haed",)))
    with pytest.raises(ValueError, match=r"Precision\(keep=...\): 'haed' matches nothing; nearest: 'head'"):
        step({"head": torch.ones(2)})
