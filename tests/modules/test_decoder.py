"""The decoder stack by itself; tests/modules/test_decoder_hf.py compares it with transformers."""

import dataclasses

import pytest
import torch
import torch.nn.functional as F
from torch.fx.experimental.proxy_tensor import make_fx

from ftrain.kernels import random
from ftrain.modules import decoder, moe, spec
from ftrain.modules.block import Context

DENSE, SPARSE = decoder.preset("llama-tiny"), decoder.preset("qwen3-moe-tiny")
SEGMENTS = torch.tensor([0] * 9 + [1] * 6 + [2] * 5)
POSITIONS = torch.tensor([*range(9), *range(6), *range(5)])
TOKENS = random.randint(random.key(5), (20,), low=0, high=256)


def params_of(cfg):
    return spec.init(decoder.specs(cfg), random.key(0))


def run(cfg, params, x=TOKENS, **options):
    return decoder.apply(params, x, **{"positions": POSITIONS, "segments": SEGMENTS, "cfg": cfg, **options})


@pytest.mark.parametrize("cfg", [DENSE, SPARSE], ids=["dense", "sparse"])
def test_packed_documents_do_not_see_each_other(cfg):
    params = params_of(cfg)
    packed, _ = run(cfg, params)
    for document in range(3):
        mine = document == SEGMENTS
        alone, _ = run(cfg, params, TOKENS[mine], positions=POSITIONS[mine], segments=None)
        torch.testing.assert_close(packed[mine], alone, rtol=1e-4, atol=1e-5)


def test_streams_between_layers_are_kept_as_transformers_counts_them():
    """Before what is added behind a layer; and the first layers alone give the same."""
    params, rows = params_of(DENSE), torch.ones(2, DENSE.d_model)
    added = decoder.Added((rows,), torch.tensor([3, 7]))
    hidden, stats = run(DENSE, params, added=added, keep=(2, 0, 1))
    first = Context(POSITIONS, segments_T=SEGMENTS)
    embedded = decoder.embed(params, TOKENS)
    behind = decoder.apply_layer(params["layers"][0], embedded, layer=0, cfg=DENSE, at=first)
    for kept, wanted in zip(stats.kept, (hidden, embedded, behind), strict=True):
        assert torch.equal(kept, wanted)
    with pytest.raises(ValueError, match=r"keep=\(3,\) names stream 3: 2 layers have 0 to that number"):
        run(DENSE, params, keep=(3,))


def test_the_future_does_not_matter():
    params = params_of(DENSE)
    changed = TOKENS.clone()
    changed[14] = (changed[14] + 1) % 256
    before, after = run(DENSE, params)[0], run(DENSE, params, changed)[0]
    assert torch.equal(before[:14], after[:14])
    assert not torch.allclose(before[14], after[14])


def test_tokens_and_their_embeddings_are_one_input():
    params = params_of(DENSE)
    assert torch.equal(run(DENSE, params)[0], run(DENSE, params, decoder.embed(params, TOKENS))[0])


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("weighted", [False, True])
def test_loss_is_the_cross_entropy_of_the_logits(tied, weighted):
    cfg = dataclasses.replace(DENSE, tie_embeddings=tied)
    params = params_of(cfg)
    hidden, _ = run(cfg, params)
    labels = decoder.next_token_labels(TOKENS, SEGMENTS)
    weights = random.uniform(random.key(9), (20,)) if weighted else None
    each = F.cross_entropy(decoder.logits(params, hidden, cfg), labels, reduction="none", ignore_index=-100)
    scale = (labels != -100) * (1.0 if weights is None else weights)
    mean = decoder.loss(params, hidden, labels, cfg, weights_T=weights)
    torch.testing.assert_close(mean.value(), (each * scale).sum() / scale.sum())
    torch.testing.assert_close(mean.count, scale.sum().float())


@pytest.mark.parametrize("weight", [1.0, 1e-3, 1e-9])
def test_the_mean_over_weights_does_not_depend_on_their_scale(weight):
    """Nor on the weights of positions without a label."""
    params = params_of(DENSE)
    hidden, _ = run(DENSE, params)
    labels = decoder.next_token_labels(TOKENS, SEGMENTS)
    weights = torch.where(labels == -100, torch.nan, weight)
    mean = decoder.loss(params, hidden, labels, DENSE, weights_T=weights)
    torch.testing.assert_close(mean.value(), decoder.loss(params, hidden, labels, DENSE).value())


def test_no_labels_mean_no_loss():
    params = params_of(DENSE)

    def loss(p):
        return decoder.loss(p, run(DENSE, p)[0], torch.full((20,), -100), DENSE).value()

    grads, value = torch.func.grad_and_value(loss)(params)
    assert value == 0
    assert all(torch.equal(grad, torch.zeros_like(grad)) for _, grad in spec.leaves_with_paths(grads))


def test_labels_are_the_next_tokens_of_the_document():
    labels = decoder.next_token_labels(torch.tensor([7, 8, 9, 4, 5]), torch.tensor([0, 0, 0, 3, 3]))
    assert labels.tolist() == [8, 9, -100, 5, -100]
    assert decoder.next_token_labels(torch.tensor([7, 8]), None).tolist() == [8, -100]


def test_the_first_layers_can_be_dense():
    cfg = dataclasses.replace(SPARSE, layers=3, dense_layers=1, d_hidden=48)
    layers = decoder.specs(cfg)["layers"]
    assert ["moe" in layer for layer in layers] == [False, True, True]
    _, stats = run(cfg, params_of(cfg))
    assert stats.router.load_E.shape == (2, 8)
    assert stats.router.count.tolist() == [20, 20]
    assert stats.router.load_E.sum(-1).tolist() == [40, 40]


def test_a_dense_stack_has_no_router():
    assert run(DENSE, params_of(DENSE))[1].router is None


def test_padding_is_left_out_of_the_routers_statistics():
    valid = SEGMENTS != 2
    _, stats = run(SPARSE, params_of(SPARSE), valid=valid)
    assert stats.router.count.tolist() == [15, 15]


def test_loss_free_balance_is_state_beside_the_parameters():
    experts = dataclasses.replace(SPARSE.moe, balance="bias")
    cfg = dataclasses.replace(SPARSE, layers=3, dense_layers=1, d_hidden=48, moe=experts)
    params, balance = params_of(cfg), spec.init(decoder.balance_specs(cfg), random.key(0))
    assert [(path, leaf.shape) for path, leaf in spec.leaves_with_paths(balance)] == [("router_bias_LE", (2, 8))]

    _, stats = run(cfg, params, balance=balance)
    moved = decoder.update_balance(balance, stats, rate=0.5)
    expected = torch.stack([moe.update_bias(torch.zeros(8), load_E, rate=0.5) for load_E in stats.router.load_E])
    assert torch.equal(moved["router_bias_LE"], expected)
    loads = [run(cfg, params, balance=state)[1].router.load_E for state in (balance, moved)]
    assert not torch.equal(*loads)


def test_other_balances_have_no_state():
    assert decoder.balance_specs(DENSE) == decoder.balance_specs(SPARSE) == {}


def test_each_layer_of_the_biases_goes_to_its_router():
    """A bias that forbids expert 3 in the second sparse layer empties it there and nowhere else."""
    cfg = dataclasses.replace(SPARSE, moe=dataclasses.replace(SPARSE.moe, balance="bias"))
    bias_LE = torch.zeros(2, 8)
    bias_LE[1, 3] = -10.0
    _, stats = run(cfg, params_of(cfg), balance={"router_bias_LE": bias_LE})
    assert stats.router.load_E[1, 3] == 0
    assert stats.router.load_E[0, 3] > 0


def test_30b_a3b_has_thirty_billion_parameters_of_which_three_are_active():
    cfg = decoder.preset("30b-a3b")
    total = spec.count(decoder.specs(cfg))
    idle = cfg.layers * (cfg.moe.experts - cfg.moe.top_k) * 3 * cfg.d_model * cfg.moe.d_expert
    assert total == 30_532_122_624  # as its published checkpoint
    assert 3.2e9 < total - idle < 3.4e9


def test_an_unknown_preset_is_answered_with_the_nearest():
    with pytest.raises(ValueError, match="nearest: '30b-a3b'"):
        decoder.preset("30b-a3")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"x": torch.zeros(20, 8)}, r"embeddings \[T, 64\], got embeddings \[20, 8\]"),
        ({"x": torch.zeros(2, 10, dtype=torch.int64)}, "fold a batch of sequences"),
        ({"positions": torch.arange(3)}, r"positions \[3\] do not fit 20 tokens"),
        ({"segments": torch.zeros(3, dtype=torch.int64)}, r"segments \[3\] do not fit 20 tokens"),
        ({"cfg": dataclasses.replace(DENSE, layers=3)}, "params hold 2 layers, the configuration says 3"),
    ],
)
def test_inputs_that_do_not_fit_are_named(options, message):
    with pytest.raises(ValueError, match=message):
        run(**{"cfg": DENSE, "params": params_of(DENSE), **options})


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"d_model": 32}, "attention.d_model=64 differs from d_model=32"),
        ({"layers": 0}, "layers=0 must be at least 1"),
        ({"d_hidden": 0}, "needs d_hidden"),
        ({"d_hidden": 0, "moe": SPARSE.moe, "dense_layers": 1}, "needs d_hidden"),
    ],
)
def test_a_configuration_that_makes_no_sense_is_refused(options, message):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(DENSE, **options)


def test_the_residual_stream_does_not_grow_with_depth():
    """The mean square of the last branch's sum stays near that of a shallow stack."""

    def spread(layers):
        cfg = dataclasses.replace(DENSE, layers=layers, init_std=1.0)
        params = params_of(cfg)
        x = decoder.embed(params, TOKENS)
        at, start = Context(POSITIONS, segments_T=SEGMENTS), x
        for i, layer in enumerate(params["layers"]):
            x = decoder.apply_layer(layer, x, layer=i, cfg=cfg, at=at)
        return (x - start).square().mean().item()

    assert spread(16) < 2 * spread(2)


@pytest.mark.parametrize("cfg", [DENSE, SPARSE], ids=["dense", "sparse"])
def test_bfloat16_is_float32_but_for_rounding(cfg):
    labels = decoder.next_token_labels(TOKENS, SEGMENTS)

    def loss(params):
        hidden, _ = run(cfg, params)
        return decoder.loss(params, hidden, labels, cfg).value(), hidden

    def grads_and_loss(params):
        return torch.func.grad_and_value(loss, has_aux=True)(params)

    params = params_of(cfg)
    wide, (wide_loss, _) = grads_and_loss(params)
    low, (low_loss, hidden) = grads_and_loss(spec.map_with_paths(lambda _, leaf: leaf.bfloat16(), params))
    assert hidden.dtype == torch.bfloat16
    assert low_loss.dtype == torch.float32
    assert low_loss.item() == pytest.approx(wide_loss.item(), rel=1e-3)
    for (path, got), (_, want) in zip(spec.leaves_with_paths(low), spec.leaves_with_paths(wide), strict=True):
        assert got.dtype == torch.bfloat16, path
        if "moe" not in path:  # a token near a tie changes its expert, and the experts' gradients with it
            assert torch.cosine_similarity(got.float().flatten(), want.flatten(), dim=0) > 0.99, path


@pytest.mark.parametrize("cfg", [DENSE, SPARSE], ids=["dense", "sparse"])
@pytest.mark.filterwarnings("ignore:torch.searchsorted")  # vmap makes views of rows
def test_gradients_of_single_documents_by_vmap(cfg):
    """Per-sample gradients: `vmap` of `grad` equals one gradient after another."""
    params, tokens = params_of(cfg), TOKENS[:14].view(2, 7)

    def loss(p, tokens_T):
        hidden, _ = decoder.apply(p, tokens_T, positions=torch.arange(7), segments=None, cfg=cfg)
        return decoder.loss(p, hidden, decoder.next_token_labels(tokens_T, None), cfg).value()

    together = torch.func.vmap(torch.func.grad(loss), (None, 0))(params, tokens)
    singly = [torch.func.grad(loss)(params, row) for row in tokens]
    for (_, both), *each in zip(*map(spec.leaves_with_paths, (together, *singly)), strict=True):
        torch.testing.assert_close(both, torch.stack([leaf for _, leaf in each]), rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("cfg", [DENSE, SPARSE], ids=["dense", "sparse"])
def test_loss_and_gradient_trace_on_shapes_alone(cfg):
    labels = decoder.next_token_labels(TOKENS, SEGMENTS)

    def step(params, tokens, positions, segments, labels):
        def loss(p):
            hidden, stats = decoder.apply(p, tokens, positions=positions, segments=segments, cfg=cfg)
            aux = 0.0 if stats.router is None else moe.aux_loss(stats.router).value()
            return decoder.loss(p, hidden, labels, cfg).value() + 1e-3 * aux

        return torch.func.grad_and_value(loss)(params)

    batch = (TOKENS, POSITIONS, SEGMENTS, labels)
    params = params_of(cfg)
    graph = make_fx(step, tracing_mode="fake")(params, *batch)
    torch.testing.assert_close(graph(params, *batch), step(params, *batch))
