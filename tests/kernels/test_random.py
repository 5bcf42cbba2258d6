"""Philox against its published vectors, windows against the whole, and the statistics of what is drawn."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.fx.experimental.proxy_tensor import make_fx

from ftrain.kernels import philox, random
from ftrain.kernels.random import Window

DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]

DRAWS = {
    "bits": random.bits,
    "uniform": random.uniform,
    "uniform float64": lambda *a, **k: random.uniform(*a, dtype=torch.float64, **k),
    "normal": random.normal,
    "normal float64": lambda *a, **k: random.normal(*a, dtype=torch.float64, **k),
    "normal bfloat16": lambda *a, **k: random.normal(*a, dtype=torch.bfloat16, **k),
    "truncated": lambda *a, **k: random.truncated_normal(*a, std=0.5, **k),
    "randint": lambda *a, **k: random.randint(*a, low=-3, high=100, **k),
    "bernoulli": lambda *a, **k: random.bernoulli(*a, p=0.3, **k),
}


@pytest.fixture(params=DRAWS.values(), ids=DRAWS.keys())
def draw(request):
    return request.param


def test_numbers_are_the_words_of_consecutive_counters():
    key = random.key(0x299F31D0A4093822)
    assert key.tolist() == [0xA4093822, 0x299F31D0]
    for block in (0, 1, 1000):
        expected = philox.philox_words((block, 0, 0, 0), (0xA4093822, 0x299F31D0))
        assert random.bits(key, (4004,))[4 * block : 4 * block + 4].tolist() == list(expected)


def test_indices_beyond_32_bits_use_the_second_counter_word():
    start = (1 << 34) + 8
    found = random.bits(random.key(1), (1 << 40,), window=Window((start,), (4,)))
    assert found.tolist() == list(philox.philox_words(((start // 4) & 0xFFFFFFFF, start >> 34, 0, 0), (1, 0)))


@st.composite
def windows(draw):
    shape = tuple(draw(st.lists(st.integers(1, 9), min_size=1, max_size=4)))
    size = tuple(draw(st.integers(0, n)) for n in shape)
    start = tuple(draw(st.integers(0, n - s)) for n, s in zip(shape, size, strict=True))
    return shape, Window(start, size)


def cut(whole, window):
    return whole[tuple(slice(a, a + n) for a, n in zip(window.start, window.size, strict=True))]


@settings(deadline=None, max_examples=40)
@given(windows(), st.sampled_from(sorted(DRAWS)), st.booleans())
def test_a_window_is_a_slice_of_the_whole(case, name, tensor_start):
    shape, window = case
    key = random.key(3)
    expected = cut(DRAWS[name](key, shape), window)
    if tensor_start:
        window = Window(tuple(torch.tensor(a) for a in window.start), window.size)
    assert torch.equal(DRAWS[name](key, shape, window=window), expected)


def test_numbers_do_not_depend_on_where_passes_begin(draw):
    """More than one pass of work, cut in places that are no multiple of anything."""
    key, n = random.key(5), 3 * (1 << 16) + 5
    whole = draw(key, (n,))
    assert torch.equal(draw(key, (n,), window=Window((70001,), (n - 70001,))), whole[70001:])
    assert torch.equal(draw(key, (3, n // 3), window=Window((0, 1), (3, 65533))).flatten()[:65533], whole[1:65534])


def test_traces_to_one_node_with_the_same_numbers(draw):
    def step(key, start):
        return draw(random.fold_in(key, 7), (6, 5), window=Window((start, 0), (2, 5)))

    key, start = random.key(0), torch.tensor(3)
    graph = make_fx(step, tracing_mode="fake")(key, start)
    assert sum("philox.default" in str(node.target) for node in graph.graph.nodes) == 1
    assert torch.equal(graph(key, start), step(key, start))
    assert torch.equal(graph(key, torch.tensor(1)), draw(random.fold_in(key, 7), (6, 5))[1:3])


def test_vmap_over_keys(draw):
    keys = random.split(random.key(2), 3)
    found = torch.func.vmap(lambda key: draw(random.fold_in(key, 1), (7,)), randomness="error")(keys)
    assert torch.equal(found, torch.stack([draw(random.fold_in(key, 1), (7,)) for key in keys]))


def test_noise_inside_a_gradient():
    key = random.key(2)
    grad = torch.func.grad(lambda x: (x * random.normal(key, (5,))).sum())(torch.ones(5))
    assert torch.equal(grad, random.normal(key, (5,)))


def test_derived_keys_differ():
    key = random.key(0)
    derived = [key, *random.split(key, 5), *random.fold_in(key, torch.arange(100)), random.fold_in(key, -1)]
    derived += [random.fold_in(derived[1], 0), random.fold_in(random.key(1), 0), random.fold_in(key, 1 << 40)]
    assert len({tuple(k.tolist()) for k in derived}) == len(derived)
    assert all(0 <= word < 1 << 32 for k in derived for word in k.tolist())
    assert torch.equal(random.split(key, 3), random.split(key, 5)[:3])


@pytest.mark.parametrize("data", [0, 1, 5, (1 << 40) + 3, -1])
def test_fold_in_takes_ints_and_tensors_alike(data):
    key = random.key(9)
    one = random.fold_in(key, data)
    assert torch.equal(random.fold_in(key, torch.tensor(data)), one)
    many = random.fold_in(key, torch.full((4, 30), data))
    assert torch.equal(many, one.expand(4, 30, 2))


def kolmogorov(sample, cdf):
    """The largest distance between the sample's distribution and `cdf`, times sqrt(n): above 2 once in 1500 times."""
    x = sample.double().sort().values
    n, p = len(x), cdf(x)
    steps = torch.arange(n + 1, dtype=torch.float64) / n
    return float(torch.maximum(steps[1:] - p, p - steps[:-1]).max()) * math.sqrt(n)


def normal_cdf(x):
    return 0.5 * torch.erfc(-x / math.sqrt(2))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("seed", [0, 1, 12345])
def test_distributions(dtype, seed):
    key, n = random.key(seed), 200_000
    assert kolmogorov(random.uniform(key, (n,), dtype=dtype), lambda x: x) < 2
    z = random.normal(key, (n,), dtype=dtype)
    assert kolmogorov(z, normal_cdf) < 2
    assert abs(float(z.mean())) < 4 / math.sqrt(n)
    assert abs(float(z.var()) - 1) < 4 * math.sqrt(2 / n)
    truncated = random.truncated_normal(key, (n,), std=1.0, dtype=dtype)
    assert kolmogorov(truncated, lambda x: 0.5 + (normal_cdf(x) - 0.5) / math.erf(2 / math.sqrt(2))) < 2


def test_streams_and_neighbours_are_independent():
    n = 100_000
    keys = [
        random.key(0),
        random.key(1),
        *random.split(random.key(0), 3),
        *random.fold_in(random.key(0), torch.arange(3)),
    ]
    streams = torch.stack([random.normal(key, (n,)) for key in keys])
    streams = torch.cat([streams, streams[:1].roll(1), streams[:1].roll(2), streams[:1].roll(4)])
    correlation = torch.corrcoef(streams) - torch.eye(len(streams))
    assert float(correlation.abs().max()) < 5 / math.sqrt(n)
    squares = torch.corrcoef(streams.square()) - torch.eye(len(streams))
    assert float(squares.abs().max()) < 5 / math.sqrt(n)


@pytest.mark.parametrize("dtype", DTYPES)
def test_ranges_and_scales(dtype):
    key = random.key(4)
    u = random.uniform(key, (10_000,), low=-2.0, high=6.0, dtype=dtype)
    assert u.dtype == dtype
    assert -2 <= float(u.min()) < -1.9
    assert 5.9 < float(u.max()) <= 6
    z = random.normal(key, (10_000,), mean=3.0, std=0.5, dtype=dtype)
    assert z.dtype == dtype
    assert float(z.double().mean()) == pytest.approx(3, abs=0.02)
    assert float(z.double().std()) == pytest.approx(0.5, abs=0.02)
    t = random.truncated_normal(key, (10_000,), std=0.1, mean=1.0, bound=3.0, dtype=dtype)
    assert float((t.double() - 1).abs().max()) <= 0.3 + 0.01


@pytest.mark.parametrize(("low", "high"), [(0, 1), (-3, 4), (0, 1 << 32), (7, 1000)])
def test_randint_is_uniform(low, high):
    n = 60_000
    drawn = random.randint(random.key(8), (n,), low=low, high=high)
    assert drawn.dtype == torch.int64
    assert int(drawn.min()) >= low
    assert int(drawn.max()) < high
    cells = min(high - low, 7)
    count = torch.bincount((drawn - low) * cells // (high - low), minlength=cells).double()
    expected = n / cells
    assert float(((count - expected) ** 2 / expected).sum()) < cells + 5 * math.sqrt(2 * cells)


def test_bernoulli_meets_its_probability():
    n, key = 100_000, random.key(8)
    assert not random.bernoulli(key, (n,), p=0.0).any()
    assert random.bernoulli(key, (n,), p=1.0).all()
    p = torch.tensor([[0.0], [0.1], [0.5], [1.0]])
    drawn = random.bernoulli(key, (4, n), p=p)
    assert drawn.dtype == torch.bool
    assert float((drawn.double().mean(1, keepdim=True) - p).abs().max()) < 4 * 0.5 / math.sqrt(n)


@pytest.mark.parametrize("dim", [0, 1, -1])
def test_categorical_meets_its_probabilities(dim):
    p = torch.tensor([0.5, 0.3, 0.0, 0.15, 0.05])
    n = 50_000
    logits = p.log().add(3.0).expand(n, 5) if dim else p.log().add(3.0)[:, None].expand(5, n)
    drawn = random.categorical(random.key(6), logits, dim)
    assert drawn.shape == (n,)
    share = torch.bincount(drawn, minlength=5) / n
    assert float((share - p).abs().max()) < 4 * 0.5 / math.sqrt(n)
    assert share[2] == 0


@pytest.mark.parametrize("n", [0, 1, 2, 1000])
def test_permutation(n):
    drawn = random.permutation(random.key(1), n)
    assert drawn.dtype == torch.int64
    assert torch.equal(drawn.sort().values, torch.arange(n))


def test_permutations_are_equally_likely():
    keys = random.split(random.key(1), 6000)
    drawn = torch.func.vmap(lambda key: random.permutation(key, 3))(keys)
    _, count = torch.unique(drawn, dim=0, return_counts=True)
    assert len(count) == 6
    assert float((count - 1000).abs().max()) < 5 * math.sqrt(1000)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: random.key(1 << 64), "64 bits"),
        (lambda: random.bits(torch.zeros(3, dtype=torch.int64), (2,)), r"int64 \[2\], got torch.int64 \[3\]"),
        (lambda: random.bits(torch.zeros(2), (2,)), "float32"),
        (lambda: random.normal(random.key(0), (2,), dtype=torch.int32), "int32"),
        (lambda: random.bits(random.key(0), (4,), window=Window((2,), (3,))), "of 3 from 2 does not lie in a dim of 4"),
        (lambda: random.bits(random.key(0), (4,), window=Window((2, 0), (3,))), "one start and one size"),
        (lambda: random.randint(random.key(0), (4,), low=3, high=3), "has 0 integers"),
        (lambda: random.truncated_normal(random.key(0), (4,), std=1.0, bound=-1.0), "bound=-1.0"),
        (lambda: random.fold_in(random.key(0), 1 << 63), "int64"),
        (lambda: random.split(random.key(0), -1), "there are no -1 keys"),
        (lambda: random.bits(random.key(0), (2, -3)), r"no shape \(2, -3\)"),
    ],
)
def test_bad_requests_are_named(call, message):
    with pytest.raises(ValueError, match=message):
        call()
