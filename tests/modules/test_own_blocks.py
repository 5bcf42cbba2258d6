"""Blocks of one's own in a decoder: what they compute, that generation goes on from them, and what is refused.

tests/ftrain/step/test_own_blocks_in_steps.py has them in compiled steps and on meshes.
"""

import dataclasses

import pytest
import torch

from ftrain.kernels import random
from ftrain.kernels.experts import experts_swiglu
from ftrain.modules import decoder, moe, omni, spec
from ftrain.modules.attention import AttentionConfig
from ftrain.modules.block import Block, Context
from ftrain.modules.generation import decoder_family, generate, generate_codes, generate_text
from ftrain.modules.hf_config import decoder_config, hf_config
from ftrain.modules.hf_names import decoder_names, named
from ftrain.modules.layers import attention_block, moe_block
from ftrain.modules.packing import Text, exact_budget, pack
from tests.helpers import whole_pack
from tests.helpers.own_blocks import (
    BASE,
    CONFIGS,
    EXPERTS,
    HEADS,
    KINDS,
    D,
    bilinear,
    differential,
    parallel,
    reference,
    retention,
)
from tests.helpers.tiny_omni import MODEL, documents, image

EXACT = {"rtol": 0.0, "atol": 1e-10}
LENGTHS = [7, 1, 5]
SEGMENTS = torch.repeat_interleave(torch.arange(3), torch.tensor(LENGTHS))
POSITIONS = torch.cat([torch.arange(n) for n in LENGTHS])
TOKENS = random.randint(random.key(5), (13,), low=0, high=61)


def params_of(cfg: decoder.DecoderConfig) -> dict:
    """Float64, and nothing zero or one, so that every leaf counts."""
    made = spec.init(decoder.specs(cfg), random.key(0))
    noise = lambda path, leaf: 0.1 * random.normal(random.key(len(path)), leaf.shape, dtype=torch.float64)  # noqa: E731
    return spec.map_with_paths(lambda path, leaf: leaf.double() + noise(path, leaf), made)


def hidden(cfg: decoder.DecoderConfig, params: dict) -> torch.Tensor:
    return decoder.apply(params, TOKENS, positions=POSITIONS, segments=SEGMENTS, cfg=cfg)[0]


def test_parameters_are_named_as_the_blocks_say() -> None:
    paths = [path for path, _ in spec.leaves_with_paths(decoder.specs(CONFIGS["mixed"])["layers"])]
    assert [p for p in paths if p.startswith(("0.second", "2.mlp."))] == [
        "0.second.w_k", "0.second.w_o", "0.second.w_q", "0.second.w_v", "2.mlp.w_in_DF", "2.mlp.w_out_FD",
    ]  # fmt: skip
    usual = [p for p, _ in spec.leaves_with_paths(decoder.specs(BASE)["layers"]) if p.startswith("1.")]
    assert [p for p in paths if p.startswith("1.")] == usual


def test_the_pattern_goes_round() -> None:
    cfg = dataclasses.replace(BASE, layers=9, pattern=(None, None, None, decoder.layer_with(BASE, mlp=bilinear())))
    own = ["w_in_DF" in layer["mlp"] for layer in decoder.specs(cfg)["layers"]]
    assert own == [False, False, False, True, False, False, False, True, False]
    assert decoder.specs(cfg)["layers"][3]["mlp"]["w_out_FD"].init.std == pytest.approx((24 * 18) ** -0.5)


@pytest.mark.parametrize("name", KINDS)
def test_loss_and_gradients_are_those_of_the_definition(name: str) -> None:
    cfg, params = CONFIGS[name], params_of(CONFIGS[name])
    labels = decoder.next_token_labels(TOKENS, SEGMENTS)

    def ours(p: dict) -> torch.Tensor:
        return decoder.loss(p, hidden(cfg, p), labels, cfg).value()

    def theirs(p: dict) -> torch.Tensor:
        scores = reference(p, TOKENS, LENGTHS, KINDS[name]) @ p["head"]["w_DV"]
        return torch.nn.functional.cross_entropy(scores, labels, ignore_index=-100)

    (got, loss), (want, expected) = (torch.func.grad_and_value(f)(params) for f in (ours, theirs))
    torch.testing.assert_close(loss, expected, **EXACT)
    for (path, a), (_, b) in zip(spec.leaves_with_paths(got), spec.leaves_with_paths(want), strict=True):
        torch.testing.assert_close(a, b, **EXACT, msg=lambda m, path=path: f"{path}: {m}")


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("few", [True, False], ids=["few", "many"])
def test_tokens_one_by_one_give_the_hidden_states_of_all_at_once(name: str, few: bool, monkeypatch) -> None:
    """Prompts of 4, 0, 1 and 6 tokens are extended by 7."""
    if not few:
        monkeypatch.setattr(decoder, "PIECE", 0)
    cfg, params, lengths, steps = CONFIGS[name], params_of(CONFIGS[name]), [4, 0, 1, 6], 7
    rows = [decoder.embed(params, TOKENS.roll(i)[: n + steps]) for i, n in enumerate(lengths)]
    wants = [_alone(cfg, params, x) for x in rows]
    out, cache = decoder.prefill(
        params,
        torch.cat([x[:n] for x, n in zip(rows, lengths, strict=True)]),
        positions=torch.cat([torch.arange(n) for n in lengths]),
        length_B=torch.tensor(lengths),
        room=steps,
        cfg=cfg,
    )
    for got, want in zip(out.split(lengths), wants, strict=True):
        torch.testing.assert_close(got, want[: len(got)], **EXACT)
    for step in range(steps):
        at = [n + step for n in lengths]
        x_BD = torch.stack([x[i] for x, i in zip(rows, at, strict=True)])
        out, cache = decoder.extend(params, x_BD, positions=torch.tensor(at), cache=cache, cfg=cfg)
        torch.testing.assert_close(out, torch.stack([w[i] for w, i in zip(wants, at, strict=True)]), **EXACT)


def _alone(cfg: decoder.DecoderConfig, params: dict, x_TD: torch.Tensor) -> torch.Tensor:
    zero_T = torch.zeros(len(x_TD), dtype=torch.int64)
    return decoder.apply(params, x_TD, positions=torch.arange(len(x_TD)), segments=zero_T, cfg=cfg)[0]


@pytest.mark.parametrize("name", CONFIGS)
def test_what_is_generated_is_most_likely_under_teacher_forcing(name: str) -> None:
    cfg, params = CONFIGS[name], params_of(CONFIGS[name])
    prompts = [[5, 6, 7, 8], [9], [10, 11]]
    for prompt, made in zip(prompts, generate(params, prompts, family=decoder_family(cfg), max_new=6), strict=True):
        whole = torch.tensor([*prompt, *made])
        scores = decoder.logits(params, _alone(cfg, params, decoder.embed(params, whole)), cfg)
        assert scores.argmax(-1)[len(prompt) - 1 : -1].tolist() == made


def test_an_omni_model_has_them_in_its_foundation() -> None:
    """Losses with every modality, and text and codes as running the whole pack again for each gives them."""
    usual = MODEL.foundation
    widths = dataclasses.replace(usual.attention, rope_sections=None, rope_interleaved=False, rope_base=None)
    layer = decoder.layer_with(usual, attention=attention_block(widths))
    model = dataclasses.replace(MODEL, foundation=dataclasses.replace(usual, pattern=(None, layer)))
    params = spec.init(omni.specs(model), random.key(0))
    params["foundation"]["head"]["w_DV"] *= 20
    params["decoders"]["draw"]["head_DC"] *= 20
    prompts = [[Text([1, 2, 3])], [image(0), Text([4])]]
    assert generate_text(params, prompts, model=model, max_new=4) == whole_pack.text(
        params, prompts, model=model, max_new=4
    )
    options = {"model": model, "decoder": "draw"}
    assert torch.equal(generate_codes(params, prompts, **options), whole_pack.codes(params, prompts, **options))
    given = documents()
    batch = pack(given, budget=exact_budget(given, model=model), model=model).batch
    terms, stats = omni.loss_terms(params, batch, model=model)
    assert {"text", "draw", "balance"} <= set(terms)
    assert stats.router.load_E.shape[0] == usual.layers


def test_layers_that_stay_have_their_names_there() -> None:
    names = {n.leaf: n.name for n in decoder_names(CONFIGS["mixed"])}
    assert names["layers.1.mlp.w_up_DF"] == "model.layers.1.mlp.up_proj.weight"
    assert names["layers.2.attention_norm.weight_D"] == "model.layers.2.input_layernorm.weight"
    assert names["layers.0.attention.w_q_DHK"] == "model.layers.0.self_attn.q_proj.weight"
    assert not any(leaf.startswith(("layers.0.second", "layers.2.mlp.", "layers.0.norm")) for leaf in names)
    kept = named(decoder.specs(CONFIGS["mixed"]), decoder_names(CONFIGS["mixed"]))
    assert sorted(path for path, _ in spec.leaves_with_paths(kept)) == sorted(names)


def test_a_leaf_of_another_shape_is_another_leaf() -> None:
    heads = dataclasses.replace(HEADS, kv_heads=1)
    cfg = dataclasses.replace(BASE, pattern=(decoder.layer_with(BASE, attention=attention_block(heads)),))
    leaves = {n.leaf for n in decoder_names(cfg)}
    assert "layers.0.attention.w_q_DHK" in leaves
    assert "layers.0.attention.w_k_DGK" not in leaves


def test_no_family_of_hugging_face_has_layers_of_ones_own() -> None:
    with pytest.raises(ValueError, match="without them"):
        hf_config(CONFIGS["mlp"])
    usual = hf_config(BASE)
    with pytest.raises(ValueError, match="another model"):
        hf_config(CONFIGS["mlp"], base=usual)
    assert decoder_config(usual) == BASE


def test_statistics_and_biases_are_of_every_router_wherever_it_is() -> None:
    routed = dataclasses.replace(EXPERTS.moe, balance="bias")
    base = dataclasses.replace(EXPERTS, moe=routed)
    cfg = dataclasses.replace(
        base, pattern=(decoder.layer_with(base, mlp=bilinear()), None, parallel(moe_block(routed)))
    )
    balance = spec.init(decoder.balance_specs(cfg), random.key(0))
    assert balance["router_bias_LE"].shape == (2, 8)  # layers 1 and 2; layer 3 is as layer 0
    balance["router_bias_LE"][1, 5] = 50.0
    params = params_of(cfg)
    run = lambda b: decoder.apply(params, TOKENS, positions=POSITIONS, segments=SEGMENTS, cfg=cfg, balance=b)  # noqa: E731
    _, stats = run(balance)
    assert stats.router.load_E[:, 5].tolist() == [pytest.approx(stats.router.load_E[0, 5]), 13.0]
    moved = decoder.update_balance(balance, stats, rate=0.1)
    assert moved["router_bias_LE"][1, 5] < 50
    assert cfg.balance == "bias"


def test_a_mixture_of_ones_own_is_counted() -> None:
    """It has a router of its own kind, which sends tokens by their number, and our experts."""
    usual = moe_block(EXPERTS.moe)

    def apply(params: dict, x_TD: torch.Tensor, at: Context) -> torch.Tensor:
        expert_TK = (at.positions % 8)[:, None]
        load_E = torch.nn.functional.one_hot(expert_TK[:, 0], 8).sum(0).double()
        at.record(moe.RouterStats(load_E, load_E, load_E.sum(), load_E.new_zeros(())))
        weights = (params["w_gate_EDF"], params["w_up_EDF"], params["w_down_EFD"])
        return experts_swiglu(x_TD, expert_TK, torch.ones_like(x_TD[:, :1]), *weights)

    own = Block(usual.specs, apply)
    cfg = dataclasses.replace(BASE, pattern=(None, decoder.layer_with(BASE, mlp=own)))
    _, stats = decoder.apply(params_of(cfg), TOKENS, positions=POSITIONS, segments=SEGMENTS, cfg=cfg)
    assert stats.router.load_E.tolist() == [[3, 2, 2, 2, 2, 1, 1, 0]] * 2


def test_a_block_that_returns_something_else_is_named() -> None:
    def too_wide(params: dict, x_TD: torch.Tensor, at: Context) -> torch.Tensor:
        return torch.cat([x_TD, x_TD], dim=-1)

    cfg = dataclasses.replace(BASE, pattern=(decoder.layer_with(BASE, mlp=Block(lambda gain: {}, too_wide)),))
    with pytest.raises(ValueError, match=r"block .*too_wide makes rows \[13, 64\] of rows \[13, 32\]"):
        hidden(cfg, params_of(cfg))
    both = Block(lambda gain: {}, lambda params, x_TD, at: (x_TD, None))
    cfg = dataclasses.replace(BASE, pattern=(decoder.layer_with(BASE, mlp=both),))
    with pytest.raises(ValueError, match=r"makes a tuple of rows"):
        hidden(cfg, params_of(cfg))
    narrow = Block(lambda gain: {}, lambda params, x_TD, at: x_TD.float())
    cfg = dataclasses.replace(BASE, pattern=(None, narrow))
    with pytest.raises(ValueError, match=r"layer 1 makes torch\.float32 rows of torch\.float64"):
        hidden(cfg, params_of(cfg))


def test_an_mlp_may_compute_in_another_dtype() -> None:
    """As everything does under autocast: what is added to the stream is cast by the sum."""
    half = Block(lambda gain: {}, lambda params, x_TD, at: x_TD.bfloat16() * 2)
    cfg = dataclasses.replace(BASE, pattern=(decoder.layer_with(BASE, mlp=half),))
    assert hidden(cfg, params_of(cfg)).dtype == torch.float64
    with torch.autocast("cpu", torch.bfloat16):
        assert hidden(BASE, spec.init(decoder.specs(BASE), random.key(0))).dtype == torch.float32


def test_routers_that_differ_are_refused() -> None:
    other = decoder.layer_with(EXPERTS, mlp=moe_block(moe.MoEConfig(D, 12, experts=4, top_k=2)))
    with pytest.raises(ValueError, match=r"\(4, 'aux'\) and \(8, 'aux'\) in one stack"):
        dataclasses.replace(EXPERTS, pattern=(None, other))


def test_a_router_that_is_not_listed_has_no_biases() -> None:
    routed = dataclasses.replace(EXPERTS.moe, balance="bias")
    base = dataclasses.replace(EXPERTS, moe=routed, layers=2)
    hidden_away = dataclasses.replace(decoder.layer_with(base), routers=())
    cfg = dataclasses.replace(base, pattern=(None, hidden_away))
    balance = spec.init(decoder.balance_specs(cfg), random.key(0))
    with pytest.raises(ValueError, match=r"more routers than the 1 rows .* Block\.routers"):
        decoder.apply(params_of(cfg), TOKENS, positions=POSITIONS, segments=SEGMENTS, cfg=cfg, balance=balance)
    silent = Block(moe_block(routed).specs, lambda params, x_TD, at: x_TD, routers=(routed,))  # records nothing
    cfg = dataclasses.replace(base, pattern=(None, decoder.layer_with(base, mlp=silent)))
    balance = spec.init(decoder.balance_specs(cfg), random.key(0))
    with pytest.raises(
        ValueError, match="1 routers have recorded what they did, and the state of balancing has 2 rows"
    ):
        decoder.apply(params_of(cfg), TOKENS, positions=POSITIONS, segments=SEGMENTS, cfg=cfg, balance=balance)


def test_a_cache_goes_on_with_its_configuration_alone() -> None:
    cfg, params = CONFIGS["attention"], params_of(CONFIGS["attention"])
    one_B = torch.ones(2, dtype=torch.int64)
    x_BD = decoder.embed(params, TOKENS[:2])
    usual = params_of(BASE)
    _, cache = decoder.prefill(usual, x_BD, positions=one_B * 0, length_B=one_B, room=2, cfg=BASE)
    with pytest.raises(ValueError, match="what 4 attentions and other blocks have kept, and there are more"):
        decoder.extend(params, x_BD, positions=one_B, cache=cache, cfg=cfg)
    _, cache = decoder.prefill(params, x_BD, positions=one_B * 0, length_B=one_B, room=2, cfg=cfg)
    with pytest.raises(ValueError, match="6 attentions and other blocks have kept, of which 4 were asked for"):
        decoder.extend(usual, x_BD, positions=one_B, cache=cache, cfg=BASE)


def test_only_causal_attention_has_a_cache() -> None:
    both = attention_block(AttentionConfig(D, heads=2, kv_heads=2, head_dim=8, causal=False))
    cfg = dataclasses.replace(BASE, pattern=(decoder.layer_with(BASE, attention=both),))
    one_B = torch.ones(2, dtype=torch.int64)
    params = params_of(cfg)
    with pytest.raises(ValueError, match="needs causal attention"):
        decoder.prefill(params, decoder.embed(params, TOKENS[:2]), positions=one_B * 0, length_B=one_B, room=2, cfg=cfg)


def test_a_configuration_can_be_compared_and_hashed() -> None:
    own = decoder.layer_with(BASE, attention=differential())
    a, b = (dataclasses.replace(BASE, pattern=(own,)) for _ in range(2))
    assert a == b
    assert hash(a) == hash(b)
    assert a != dataclasses.replace(BASE, pattern=(decoder.layer_with(BASE, attention=retention()),))
