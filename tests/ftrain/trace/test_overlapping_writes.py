"""Writes into a tensor whose elements share memory are what eager code makes of them, or refused as it refuses them."""

import pytest
import torch
import torch.nn.functional as F

import ftrain

N = 5
X = torch.arange(float(N), dtype=torch.float64)
ROWS = torch.arange(8.0 * N, dtype=torch.float64).view(8, N)

REFUSED = {
    "add": lambda g: g.add_(X),
    "in place by an operator": lambda g: g.__imul__(X),
    "copy": lambda g: g.copy_(X),
    "lists": lambda g: torch._foreach_add_([g], [X]),
    "activation": lambda g: F.relu(g.sub_(2), inplace=True),
    "fill with a tensor": lambda g: g.fill_(X[2]),
    "lerp": lambda g: g.lerp_(X, 0.5),
    "out": lambda g: torch.add(X, 1, out=g),
    "some elements": lambda g: g[:2].copy_(X[:2]),
    "statistics of a batch norm": lambda g: F.batch_norm(ROWS, g, torch.ones_like(X), training=True),
}
RIGHT = {
    "zero": lambda g: g.zero_(),
    "fill": lambda g: g.fill_(3.0),
    "one element": lambda g: g.__setitem__(0, 7.0),
    "one element, added to": lambda g: g[1].add_(7.0),
    "a copy": lambda g: g.clone().add_(X),
}


def gradient_of_a_sum(write):
    """A step that writes into the gradient of `w.sum()`, which PyTorch expands from one number."""

    def step(w):
        g = ftrain.grad(lambda w: (2 * w).sum())(w) if write is RIGHT["a copy"] else ftrain.grad(torch.sum)(w)
        out = write(g)
        return g * 1, torch.zeros(()) if out is None or isinstance(out, tuple) else out * 1

    return step


def expanded(write):
    """A step that writes into an expanded view of what it has made."""

    def step(w):
        made = w[:1] * 2
        write(made.expand(N))
        return made * 1

    return step


@pytest.mark.parametrize("name", REFUSED)
def test_what_eager_code_refuses_is_refused_with_its_line(name):
    with pytest.raises(ValueError, match=r"test_overlapping_writes.py:\d+.*elements share memory.*x.clone\(\)"):
        ftrain.jit(gradient_of_a_sum(REFUSED[name]))(torch.ones(N, dtype=torch.float64))


@pytest.mark.parametrize("of", [gradient_of_a_sum, expanded])
@pytest.mark.parametrize("name", RIGHT)
def test_what_eager_code_does_is_done(name, of):
    step, w = of(RIGHT[name]), torch.ones(N, dtype=torch.float64)
    torch.testing.assert_close(ftrain.jit(step)(w), step(w), rtol=0, atol=0)
