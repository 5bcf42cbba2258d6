"""Chunks of a diffusion transformer: what they read, and that the cache is a value."""

import pytest
import torch

from ftrain import key, tree, value_and_grad
from ftrain.modules import dit, dit_chunks, spec
from ftrain.modules.dit import DitConfig
from ftrain.modules.dit_chunks import chunks_of, equal_documents, joined_chunks

CFG = DitConfig(d_in=4, d_model=24, layers=2, heads=2, d_hidden=32, d_text=6, time_features=16)
B, CHUNKS, ROWS = 2, 3, 4  # rows of a chunk of one sample
GENERATOR = torch.Generator().manual_seed(0)
PARAMS = tree.map(
    lambda p: torch.randn(p.shape, generator=GENERATOR, dtype=torch.float64) * 0.3, spec.init(dit.specs(CFG), key(0))
)
X = torch.randn(B * CHUNKS * ROWS, 4, generator=GENERATOR, dtype=torch.float64)
TIME = torch.rand(len(X), generator=GENERATOR, dtype=torch.float64)
PLACES = torch.randint(0, 5, (3, len(X)), generator=GENERATOR)
TEXT = torch.randn(B * 2, 6, generator=GENERATOR, dtype=torch.float64)


def cut(x):
    return chunks_of(x, samples=B, chunks=CHUNKS)


def by_chunks(params, x, time):
    """Velocities of all chunks, each after the given rows and times of those before."""
    cache, found = (), []
    for rows, times, places in zip(cut(x), cut(time), cut(PLACES.T), strict=True):
        velocity, cache = dit_chunks.apply(
            params, rows, cache, samples=B, time_n=times, positions_An=places.T, cfg=CFG, text_SC=TEXT
        )
        found.append(velocity)
    return joined_chunks(found, samples=B)


def test_one_chunk_is_the_transformer():
    found, _ = dit_chunks.apply(PARAMS, X, (), samples=B, time_n=TIME, positions_An=PLACES, cfg=CFG, text_SC=TEXT)
    expected = dit.apply(
        PARAMS, X, time_N=TIME, positions_AN=PLACES, segments_N=equal_documents(B, CHUNKS * ROWS), cfg=CFG,
        text_SC=TEXT, text_segments_S=equal_documents(B, 2),
    )  # fmt: skip
    torch.testing.assert_close(found, expected)


def test_the_last_chunk_of_one_layer_reads_what_the_transformer_reads():
    """Keys of earlier chunks depend on no later row in the first layer, so there nothing differs."""
    cfg = DitConfig(d_in=4, d_model=24, layers=1, heads=2, d_hidden=32, time_features=16)
    params = {name: value for name, value in PARAMS.items() if name != "layers"}
    params["layers"] = [{name: value for name, value in PARAMS["layers"][0].items() if name != "text"}]
    cache, found = (), None
    for rows, times, places in zip(cut(X), cut(TIME), cut(PLACES.T), strict=True):
        found, cache = dit_chunks.apply(params, rows, cache, samples=B, time_n=times, positions_An=places.T, cfg=cfg)
    whole = dit.apply(
        params, X, time_N=TIME, positions_AN=PLACES, segments_N=equal_documents(B, CHUNKS * ROWS), cfg=cfg
    )
    torch.testing.assert_close(found, cut(whole)[-1])


def test_a_chunk_reads_what_is_before_it_and_nothing_else():
    changed = X.clone()
    second = cut(torch.arange(len(X)))[1]
    changed[second] += 1
    before, after = by_chunks(PARAMS, X, TIME), by_chunks(PARAMS, changed, TIME)
    first, _, third = cut((before - after).abs().sum(1))
    assert not first.any()
    assert third.all()
    one_sample = X.clone()
    one_sample[: CHUNKS * ROWS] += 1
    assert torch.equal(by_chunks(PARAMS, one_sample, TIME)[CHUNKS * ROWS :], before[CHUNKS * ROWS :])


def test_the_cache_is_a_value_and_differentiable():
    given = {"samples": B, "time_n": cut(TIME)[0], "positions_An": cut(PLACES.T)[0].T, "cfg": CFG, "text_SC": TEXT}
    _, cache = dit_chunks.apply(PARAMS, cut(X)[0], (), **given)
    kept = [entry.k_BRGK.clone() for entry in cache]
    first, _ = dit_chunks.apply(PARAMS, cut(X)[1], cache, **given)
    again, _ = dit_chunks.apply(PARAMS, cut(X)[1], cache, **given)
    assert torch.equal(first, again)
    assert all(torch.equal(a, b.k_BRGK) for a, b in zip(kept, cache, strict=True))

    def last(x):
        return cut(by_chunks(PARAMS, x, TIME))[-1].sum()

    _, grad = value_and_grad(last)(X)
    assert all(part.abs().sum() > 0 for part in cut(grad))
    step = torch.zeros_like(X)
    step[0] = 1e-6
    slope = (last(X + step) - last(X - step)) / 2e-6
    torch.testing.assert_close(grad[0].sum(), slope, rtol=1e-5, atol=1e-6)


def test_what_does_not_fit_is_refused():
    given = {"time_n": TIME, "positions_An": PLACES, "cfg": CFG, "text_SC": TEXT}
    with pytest.raises(ValueError, match="rows are not equal parts of samples=5"):
        dit_chunks.apply(PARAMS, X, (), samples=5, **given)
    _, cache = dit_chunks.apply(PARAMS, X, (), samples=B, **given)
    with pytest.raises(ValueError, match="a cache of 2 samples for samples=3"):
        dit_chunks.apply(PARAMS, X, cache, samples=3, **given)
    with pytest.raises(ValueError, match="a cache of 1 attentions for 2 layers"):
        dit_chunks.apply(PARAMS, X, cache[:1], samples=B, **given)
    with pytest.raises(ValueError, match="text was not given"):
        dit_chunks.apply(PARAMS, X, (), samples=B, **{**given, "text_SC": None})
    with pytest.raises(ValueError, match="not 5 equal chunks"):
        chunks_of(X, samples=B, chunks=5)
