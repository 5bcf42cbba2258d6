"""In which dtype a step computes: what a command line may choose, and what losses then see."""

import pytest
import torch

import ftrain
from ftrain import Precision
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
