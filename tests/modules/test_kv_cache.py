"""The cache by itself against the definition of attention, and the decoder with it against the decoder without.

Legend: B sequences, S places, T tokens, G key/value heads, H query heads, K head dim, D width, A position axes.
"""

import dataclasses

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ftrain.kernels import random
from ftrain.kernels.attention import attention_reference
from ftrain.modules import decoder, kv_cache, spec
from ftrain.modules.attention import AttentionConfig
from ftrain.modules.decoder import DecoderConfig
from ftrain.modules.moe import MoEConfig

EXACT = {"rtol": 0.0, "atol": 1e-10}
LENGTHS = st.lists(st.integers(0, 6), min_size=1, max_size=4)


def normal(seed: int, *shape: int) -> torch.Tensor:
    return random.normal(random.key(seed), shape, dtype=torch.float64)


def cut(x_TGK: torch.Tensor, lengths: list[int]) -> list[torch.Tensor]:
    return list(x_TGK.split(lengths))


@settings(deadline=None, max_examples=60)
@given(LENGTHS, st.integers(1, 4), st.sampled_from([(1, 1), (1, 3), (2, 2)]), st.none() | st.integers(1, 7))
def test_each_newest_token_reads_its_own_sequence(lengths, steps, heads, window) -> None:
    B, (G, R), K = len(lengths), heads, 4
    totals = [length + steps for length in lengths]
    q, k, v = (cut(normal(i, sum(totals), h, K), totals) for i, h in enumerate((G * R, G, G)))
    start = [torch.cat([x[:n] for x, n in zip(xs, lengths, strict=True)]) for xs in (k, v)]
    cache = kv_cache.from_packed([(start[0], start[1])], torch.tensor(lengths), room=steps)
    for step in range(steps):
        newest = [torch.stack([x[n + step] for x, n in zip(xs, lengths, strict=True)]) for xs in (q, k, v)]
        layer = kv_cache.append(cache.layers[0], newest[1], newest[2], cache.length_B)
        cache = kv_cache.KvCache((layer,), cache.length_B + 1, cache.room - 1)
        out_BHK = kv_cache.attend(newest[0], layer, kv_cache.seen(cache, window=window))
        for b in range(B):
            whole = [x[b][: lengths[b] + step + 1] for x in (q, k, v)]
            torch.testing.assert_close(out_BHK[b], attention_reference(*whole, window=window)[-1], **EXACT)


def test_a_new_token_is_written_behind_its_sequence_and_nowhere_else() -> None:
    k_TGK, v_TGK = normal(0, 5, 1, 2), normal(1, 5, 1, 2)
    cache = kv_cache.from_packed([(k_TGK, v_TGK)], torch.tensor([2, 0, 3]), room=2)
    assert cache.layers[0].k_BGSK.shape == (3, 1, 5, 2)
    assert torch.equal(cache.layers[0].v_BGSK[2, 0, :3], v_TGK[2:, 0])
    before = cache.layers[0].k_BGSK.clone()
    layer = kv_cache.append(cache.layers[0], k_TGK[:3] + 9, v_TGK[:3], cache.length_B)
    changed_BS = (layer.k_BGSK != before)[:, 0].any(-1)
    assert changed_BS.nonzero().tolist() == [[0, 2], [1, 0], [2, 3]]


def test_what_lies_behind_the_end_is_not_read() -> None:
    cache = kv_cache.from_packed([(normal(0, 4, 1, 2), normal(1, 4, 1, 2))], torch.tensor([1, 3]), room=0)
    q_BHK, seen_BS = normal(2, 2, 1, 2), kv_cache.seen(cache, window=None)
    clean = kv_cache.attend(q_BHK, cache.layers[0], seen_BS)
    for memory in cache.layers[0]:
        memory[0, :, 1:] = 1e6
    assert torch.equal(kv_cache.attend(q_BHK, cache.layers[0], seen_BS), clean)


def test_half_precision_is_full_precision_but_for_rounding() -> None:
    k, v, q = normal(0, 400, 2, 16), normal(1, 400, 2, 16), normal(2, 2, 4, 16)
    outs = []
    for dtype in (torch.float64, torch.bfloat16):
        cache = kv_cache.from_packed([(k.to(dtype), v.to(dtype))], torch.tensor([399, 1]), room=0)
        outs.append(kv_cache.attend(q.to(dtype), cache.layers[0], kv_cache.seen(cache, window=None)))
    assert outs[1].dtype == torch.bfloat16
    torch.testing.assert_close(outs[1].double(), outs[0], rtol=2e-2, atol=2e-3)


@pytest.mark.parametrize(
    ("lengths", "room", "words"), [([2, 2], 1, "5 packed tokens, lengths that sum to 4"), ([2, 3], -1, "room=-1")]
)
def test_lengths_that_are_not_the_packs_are_refused(lengths, room, words) -> None:
    with pytest.raises(ValueError, match=words):
        kv_cache.from_packed([(normal(0, 5, 1, 2), normal(1, 5, 1, 2))], torch.tensor(lengths), room=room)


HEADS = AttentionConfig(16, heads=4, kv_heads=4, head_dim=8)
DENSE = DecoderConfig(vocab=30, d_model=16, layers=3, attention=HEADS, d_hidden=24)
EXPERTS = MoEConfig(16, 12, experts=6, top_k=2)
BIASED = MoEConfig(16, 12, experts=6, top_k=2, shared_experts=1, score="sigmoid", balance="bias", scale=1.5)


def heads(**options) -> DecoderConfig:
    return dataclasses.replace(DENSE, attention=dataclasses.replace(HEADS, **options))


CONFIGS = {
    "dense": DENSE,
    "grouped": heads(kv_heads=2),
    "one key head, norms, biases": heads(kv_heads=1, qk_norm=True, bias=True, out_bias=True),
    "window": heads(kv_heads=2, window=3),
    "no rotation": heads(rope_base=None),
    "several axes": heads(kv_heads=2, qk_norm=True, rope_sections=(2, 1, 1), rope_interleaved=True),
    "experts": dataclasses.replace(heads(kv_heads=2, qk_norm=True), moe=EXPERTS, d_hidden=0),
    "experts without a loss": dataclasses.replace(DENSE, moe=BIASED, dense_layers=1),
}


def model_of(cfg: DecoderConfig):
    """Parameters in float64, and the state of balancing, without zeros that would hide a forgotten one."""
    wild = spec.map_with_paths(lambda _, leaf: dataclasses.replace(leaf, dtype=torch.float64), decoder.specs(cfg))
    params = spec.map_with_paths(lambda _, leaf: leaf + 0.1 * normal(7, *leaf.shape), spec.init(wild, random.key(0)))
    rows = sum(cfg.has_experts(i) for i in range(cfg.layers))
    biased = cfg.moe is not None and cfg.moe.balance == "bias"
    return params, {"router_bias_LE": 0.5 * normal(8, rows, cfg.moe.experts)} if biased else None


def check_cut(cfg: DecoderConfig, lengths: list[int], steps: int) -> None:
    """Prefilling `lengths` tokens and extending by `steps` gives the hidden states of running all of them at once."""
    params, balance = model_of(cfg)
    totals = [length + steps for length in lengths]
    x = cut(normal(3, sum(totals), cfg.d_model), totals)
    axes = len(cfg.attention.rope_sections or (1,))
    # positions jump and differ by axis, as those of media do
    positions_AT = torch.cat([torch.arange(n) for n in totals])[None] * 2 + torch.arange(axes)[:, None]
    at = [p if axes > 1 else p[0] for p in positions_AT.split(totals, dim=1)]
    segments = torch.repeat_interleave(torch.tensor(totals))
    options = {"cfg": cfg, "balance": balance}
    whole_TD, _ = decoder.apply(params, torch.cat(x), positions=torch.cat(at, dim=-1), segments=segments, **options)
    whole = cut(whole_TD, totals)
    hidden_TD, cache = decoder.prefill(
        params,
        torch.cat([rows[:n] for rows, n in zip(x, lengths, strict=True)]),
        positions=torch.cat([p[..., :n] for p, n in zip(at, lengths, strict=True)], dim=-1),
        length_B=torch.tensor(lengths),
        room=steps,
        **options,
    )
    for got, want in zip(cut(hidden_TD, lengths), whole, strict=True):
        torch.testing.assert_close(got, want[: len(got)], **EXACT)
    for step in range(steps):
        newest = [n + step for n in lengths]
        x_BD = torch.stack([rows[i] for rows, i in zip(x, newest, strict=True)])
        positions = torch.stack([p[..., i] for p, i in zip(at, newest, strict=True)], dim=-1)
        hidden_BD, cache = decoder.extend(params, x_BD, positions=positions, cache=cache, **options)
        want_BD = torch.stack([rows[i] for rows, i in zip(whole, newest, strict=True)])
        torch.testing.assert_close(hidden_BD, want_BD, **EXACT)
    assert cache.length_B.tolist() == totals
    assert cache.room == 0


@pytest.mark.parametrize("cfg", CONFIGS.values(), ids=CONFIGS)
def test_tokens_one_by_one_give_the_hidden_states_of_all_at_once(cfg) -> None:
    check_cut(cfg, [5, 0, 1, 3], steps=5)


@settings(deadline=None, max_examples=15)
@given(st.sampled_from(sorted(CONFIGS)), LENGTHS.filter(any), st.integers(1, 4))
def test_it_does_not_matter_where_the_prompts_end(name, lengths, steps) -> None:
    check_cut(CONFIGS[name], lengths, steps)


@pytest.mark.parametrize("name", ["grouped", "experts"])
def test_many_sequences_run_on_the_fast_kernels(name, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(decoder, "PIECE", 0)
    check_cut(CONFIGS[name], [5, 0, 1, 3], steps=3)


def test_no_token_is_dropped_when_all_want_one_expert() -> None:
    cfg = dataclasses.replace(CONFIGS["experts without a loss"], moe=dataclasses.replace(BIASED, top_k=1))
    params, balance = model_of(cfg)
    balance["router_bias_LE"][:, 4] = 100.0
    x_TD = normal(3, 8, cfg.d_model)
    at_T, segments_T = torch.tensor([0, 1] * 4), torch.arange(8) // 2
    whole_TD, _ = decoder.apply(params, x_TD, positions=at_T, segments=segments_T, cfg=cfg, balance=balance)
    options = {"cfg": cfg, "balance": balance}
    one_B = torch.ones(4, dtype=torch.int64)
    _, cache = decoder.prefill(params, x_TD[::2], positions=one_B * 0, length_B=one_B, room=1, **options)
    hidden_BD, _ = decoder.extend(params, x_TD[1::2], positions=one_B, cache=cache, **options)
    torch.testing.assert_close(hidden_BD, whole_TD[1::2], **EXACT)


def test_misuse_of_a_cache_is_named() -> None:
    params, _ = model_of(DENSE)
    two_B = torch.tensor([1, 1])
    options = {"positions": two_B * 0, "cfg": DENSE}
    _, cache = decoder.prefill(params, normal(0, 2, 16), length_B=two_B, room=1, **options)
    with pytest.raises(ValueError, match="1 new tokens for a cache of 2 sequences"):
        decoder.extend(params, normal(0, 1, 16), positions=two_B[:1], cache=cache, cfg=DENSE)
    _, full = decoder.extend(params, normal(0, 2, 16), cache=cache, **options)
    with pytest.raises(ValueError, match="cache of 2 sequences is full"):
        decoder.extend(params, normal(0, 2, 16), cache=full, **options)
    with pytest.raises(ValueError, match="2 sequences without a token"):
        decoder.prefill(params, normal(0, 0, 16), positions=two_B[:0], length_B=two_B * 0, room=1, cfg=DENSE)
    both = heads(causal=False)
    with pytest.raises(ValueError, match="needs causal attention"):
        decoder.prefill(params, normal(0, 2, 16), positions=two_B, length_B=two_B, room=1, cfg=both)
