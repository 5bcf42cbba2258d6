"""One table says what an op does: every op that torch knows to be random, and those that hide a write, are in it."""

import operator

import pytest
import torch

from ftrain.graph.op_effects import HIDDEN_WRITES, Effect, effect_of, effect_of_op, hidden_writes, op_draws
from ftrain.graph.writes import written_arguments
from tests.helpers.graphs import graph_of

aten = torch.ops.aten


def overloads():
    """All overloads of ATen's ops."""
    for name in dir(aten):
        packet = getattr(aten, name)
        for overload in packet.overloads() if isinstance(packet, torch._ops.OpOverloadPacket) else ():
            yield getattr(packet, overload)


def arguments(op, **given):
    """A value for each argument: what is given, probabilities of a half, flags set, a string for a tensor."""
    named = {"p": 0.5, "dropout_p": 0.5, "dropout": 0.5, "train": True, "training": True, **given}
    return tuple(named.get(a.name, a.name) for a in op._schema.arguments)


def test_every_op_that_torch_calls_random_is_random():
    seeded = [op for op in overloads() if torch.Tag.nondeterministic_seeded in op.tags]
    assert len(seeded) > 90
    pure = [str(op) for op in seeded if effect_of_op(op, arguments(op), {}) is Effect.PURE]
    assert all("backward" in name for name in pure), pure  # these replay the seed of the forward


def test_every_op_with_a_generator_is_random_or_writes():
    drawing = [op for op in overloads() if any(a.name == "generator" for a in op._schema.arguments)]
    assert drawing
    assert not [str(op) for op in drawing if effect_of_op(op, arguments(op), {}) is Effect.PURE]


def test_every_op_that_writes_says_so_and_some_that_hide_it_too():
    for op in overloads():
        if op._schema.is_mutable:
            assert effect_of_op(op, arguments(op), {}) is Effect.WRITES
    statistics = {n: op for op in overloads() if (n := op._schema.name) in HIDDEN_WRITES and not op._schema.is_mutable}
    assert set(statistics) == set(HIDDEN_WRITES)
    for op in statistics.values():
        assert effect_of_op(op, arguments(op), {}) is Effect.WRITES
        assert hidden_writes(op, arguments(op), {}) == ["running_mean", "running_var"]
        assert effect_of_op(op, arguments(op, training=False), {}) is Effect.PURE
        assert effect_of_op(op, arguments(op, running_mean=None, running_var=None), {}) is Effect.PURE


def test_a_forward_that_moves_its_statistics_is_known():
    """Ops of one name with running statistics, a flag, and no mark of writing must be in the table."""
    for op in overloads():
        names = {a.name for a in op._schema.arguments}
        unmarked = not op._schema.is_mutable and not op._schema.name.endswith(("_functional", "_backward"))
        if {"running_mean", "running_var"} <= names and unmarked and names & {"train", "training"}:
            composite = torch._C._dispatch_has_kernel_for_dispatch_key(op.name(), "CompositeImplicitAutograd")
            assert op._schema.name in HIDDEN_WRITES or composite, op


@pytest.mark.parametrize(
    ("op", "given", "effect"),
    [
        (aten.native_dropout.default, {"train": False}, Effect.PURE),
        (aten.native_dropout.default, {"p": 0.0}, Effect.RANDOM),  # it draws all the same
        (aten._scaled_dot_product_flash_attention.default, {"dropout_p": 0.0}, Effect.PURE),
        (aten._scaled_dot_product_flash_attention.default, {"dropout_p": 0.1}, Effect.RANDOM),
        (aten._cudnn_rnn.default, {"dropout": 0.0}, Effect.PURE),
        (aten.mm.default, {}, Effect.PURE),
        (aten.bernoulli.p, {}, Effect.RANDOM),
        (aten._assert_async.msg, {}, Effect.ANYTHING),
        (aten.copy_.default, {}, Effect.WRITES),
    ],
)
def test_arguments_decide_where_they_do(op, given, effect):
    assert effect_of_op(op, arguments(op, **given), {}) is effect


@pytest.mark.parametrize(
    ("op", "given", "random"),
    [
        (aten.bernoulli_.float, {}, True),
        (aten._scaled_dot_product_flash_attention.default, {"dropout_p": 0.0}, False),
        (aten.native_dropout_backward.default, {}, False),  # from the mask of the forward
        (aten.add_.Tensor, {}, False),
    ],
)
def test_what_draws_is_asked_beside_what_writes(op, given, random):
    assert op_draws(op, arguments(op, **given), {}) is random


@torch.library.custom_op("effects_test::twice", mutates_args=())
def twice(x: torch.Tensor) -> torch.Tensor:
    """An op of a user, of which nothing is known."""
    return x * 2


twice.register_fake(torch.empty_like)


def test_nodes_of_a_graph():
    def function(x):
        noise, both = torch.rand_like(x), x.chunk(2)
        return [twice(x), noise, both[0].contiguous() + 1]

    found = {n.target: effect_of(n) for n in graph_of(function, torch.ones(4)).graph.nodes if n.op == "call_function"}
    assert found[torch.ops.effects_test.twice.default] is Effect.ANYTHING
    assert found[aten.rand_like.default] is Effect.RANDOM
    assert found[operator.getitem] is Effect.PURE
    assert found[aten.add.Tensor] is Effect.PURE


def test_hidden_writes_are_among_written_arguments():
    def function(x, mean, var):
        return [torch.nn.functional.batch_norm(x, mean, var, training=True)]

    graph = graph_of(function, torch.ones(4, 3), torch.zeros(3), torch.ones(3)).graph
    (norm,) = [n for n in graph.nodes if n.target is aten.native_batch_norm.default]
    assert [n.name for n in written_arguments(norm)] == ["mean_1", "var_1"]
