"""Lists of layers are found by what their members are, whatever they are called."""

import pytest
import torch
from torch import nn
from torch.func import functional_call

import ftrain
from ftrain.graph.layers import layers_of


class Stack(nn.Module):
    def __init__(self, name, depth=8):
        super().__init__()
        self.name = name
        part = lambda: nn.Sequential(nn.Linear(32, 128), nn.GELU(), nn.Linear(128, 32))  # noqa: E731
        setattr(self, name, nn.ModuleList(part() for _ in range(depth)))

    def forward(self, x):
        for layer in getattr(self, self.name):
            x = x + layer(x)
        return x


def step(model):
    loss = lambda p, x: functional_call(model, p, (x,)).square().mean()  # noqa: E731
    return ftrain.value_and_grad(loss), {n: p.detach() for n, p in model.named_parameters()}


@pytest.mark.parametrize("name", ["layers", "h", "blocks", "transformer_blocks", "layer", "whatever"])
def test_a_stack_of_any_name_is_recomputed(name):
    fn, params = step(Stack(name))
    plain, by_layer = (ftrain.jit(fn, remat=r).lower(params, torch.randn(256, 32)).memory() for r in ("none", "layer"))
    assert by_layer.peak < 0.4 * plain.peak


def test_a_model_without_a_list_is_told_so():
    fn, params = step(nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 4)))
    with pytest.warns(UserWarning, match="remat='layer' found no list of layers"):
        ftrain.jit(fn, remat="layer").lower(params, torch.randn(2, 4))


def names(pattern, *counts):
    """Paths with every combination of numbers in the places of `#`."""
    paths = [pattern]
    for count in counts:
        paths = [p.replace("#", str(i), 1) for p in paths for i in range(count)]
    return dict.fromkeys(paths, "float32[3]")


@pytest.mark.parametrize(
    ("leaves", "path", "layer"),
    [
        ({"p.layers.0.w": 1, "p.layers.1.w": 2}, "p.layers.1.w", "p.layers.1"),  # by its name, though not alike
        ({"p.parts.0.w": 1, "p.parts.1.w": 2}, "p.parts.1.w", None),
        (names("p.#", 2), "p.1", None),  # leaves are no subtrees
        (names("p.#.h.#.w", 2, 4), "p.1.h.2.w", "p.1.h.2"),  # two models
        (names("p.#.x.#.w", 2, 4), "p.1.x.2.w", "p.1.x.2"),
        (names("p.layers.#.experts.#.w", 2, 4), "p.layers.1.experts.2.w", "p.layers.1"),
        (names("p.a.#.x.#.w", 4, 2), "p.a.3.x.1.w", "p.a.3"),
    ],
)
def test_lists_within_lists(leaves, path, layer):
    assert layers_of(leaves).get(path) == layer
